"""Softmax attention as pure functions, none of which holds a [T, T] matrix for long sequences.

`causal_attention` serves training and scoring, `cached_attention` prefill and decoding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mmx_jax.parallel import sequence
from pallas_kernels import blockwise_attention as blocks
from pallas_kernels import platform
from pallas_kernels.platform import cdiv

IMPLEMENTATIONS = ("blockwise", "cudnn", "splash")
# What packed cuDNN attention is compiled for: documents a row, and elements of the queries (its offsets are int32).
_CUDNN_DOCUMENTS, _CUDNN_ELEMENTS = 64, 2**31 - 1
_SPLASH_BLOCK = 512  # query and key tokens; a multiple of 128


def causal_attention(q, k, v, runs=None, *, axis=None, method="ring", implementation="auto", block=512):
    """Causal grouped-query attention inside documents; query head h reads key head h // (H / K).

    Args:
      q: [B, T, H, D]; k, v: [B, T, K, D].
      runs: int32 [B, T], the number of a token's document in its row, counted from 1, and 0 at padding
        (`document_runs`). None: one document.
      axis: inside `jax.shard_map`, the mesh axis over which the tokens of a row are divided, each device giving its
        own; `runs` is its part of those of the whole rows. None: rows are whole.
      method: what moves along `axis`, as `parallel.sequence.softmax_attention` has it; always in blocks.
      implementation: "blockwise" (any platform, memory linear in T), "cudnn" (NVIDIA GPU, bfloat16; packed rows
        on Hopper and later), "splash" (TPU, head_dim a multiple of 128; interpreted on CPU), or "auto".
      block: query and key tokens that "blockwise" holds scores for at once.

    Returns:
      [B, T, H, D] in the dtype of `v`; 0 at padding.
    """
    if implementation not in (*IMPLEMENTATIONS, "auto"):
        raise ValueError(f"softmax implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}, auto")
    if axis is not None:
        if implementation not in ("blockwise", "auto"):
            raise NotImplementedError(
                f"softmax implementation {implementation!r} serves whole rows; where mesh axis {axis!r} divides their "
                "tokens, 'blockwise' does"
            )
        platform.announce("softmax attention of divided rows", "blockwise", f"method {method!r} over {axis!r}")
        return sequence.softmax_attention(q, k, v, runs, axis=axis, method=method, block=block)
    if implementation == "auto":
        implementation = _default(q, runs is not None)
    if implementation == "cudnn":
        if runs is None:
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return _cudnn_packed(q, k, v, runs, block)
    if runs is None:
        runs = jnp.ones(q.shape[:2], jnp.int32)
    if implementation == "splash":
        return _splash(q, k, v, runs)
    return blocks.causal_attention(q, k, v, runs, block)


def _default(q, segmented):
    chosen, reason = "blockwise", f"the default on {platform.platform()}"
    if platform.platform() == "gpu":
        reason = (
            f"cudnn serves bfloat16, and packed batches of up to {_CUDNN_ELEMENTS} elements; got {q.dtype} {q.shape}"
        )
        if q.dtype == jnp.bfloat16 and not (segmented and q.size > _CUDNN_ELEMENTS):
            chosen, reason = "cudnn", "bfloat16 on GPU"
    elif platform.platform() == "tpu":
        reason = platform.why_not(lambda: _check_splash(q))
        chosen, reason = ("blockwise", reason) if reason else ("splash", "the default on tpu")
    platform.announce("packed softmax attention" if segmented else "softmax attention", chosen, reason)
    return chosen


def _check_splash(q):
    if q.shape[-1] % 128:
        raise NotImplementedError(
            f"softmax attention: splash serves head_dim that is a multiple of 128, got {q.shape[-1]}; use 'blockwise'"
        )


def _splash(q, k, v, runs):
    """jax's own attention kernel for TPU: one call a row and key head, over the query heads that read it."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _check_splash(q)
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    block = min(_SPLASH_BLOCK, cdiv(length, 128) * 128)
    padded = cdiv(length, block) * block
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))) for x in (q, k, v))
    ids = jnp.pad(runs, ((0, 0), (0, padded - length)))
    causal = masks.MultiHeadMask([masks.CausalMask((padded, padded))] * (heads // kv_heads))
    # Not its fused backward, which keeps a dq of every key block: memory that grows with the square of T.
    names = "q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq"
    kernel = splash.make_splash_mqa_single_device(
        causal,
        block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
        interpret=platform.platform() == "cpu",
    )
    q = (q / np.sqrt(dim)).astype(q.dtype).reshape(batch, padded, kv_heads, heads // kv_heads, dim)
    over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    output = jax.vmap(lambda q, k, v, ids: over_heads(q, k, v, splash.SegmentIds(ids, ids)))(
        q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2), ids
    )
    output = output.transpose(0, 3, 1, 2, 4).reshape(batch, padded, heads, dim)[:, :length]
    return jnp.where((runs > 0)[:, :, None, None], output, 0).astype(v.dtype)


def _cudnn_packed(q, k, v, runs, block):
    """Packed rows as cuDNN's ragged sequences, which have neither gaps nor more documents than it is compiled for.

    Other rows go blockwise.
    """
    # The packed layout has no public name in jax.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    real = (runs > 0)[:, :, None, None]
    # Where there is no document cuDNN writes nothing, neither outputs nor gradients.
    q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    starts, lengths, gaps = _document_table(runs, _CUDNN_DOCUMENTS)

    def packed(q, k, v):
        output = dot_product_attention(
            q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts, kv_offsets=starts,
            scale=1 / np.sqrt(q.shape[-1]), mask_type=MaskType.PADDING_CAUSAL,
        )  # fmt: skip
        return jnp.where(real, output, 0)

    served = (jnp.max(runs) <= _CUDNN_DOCUMENTS) & ~gaps
    return lax.cond(served, packed, lambda *qkv: blocks.causal_attention(*qkv, runs, block), q, k, v)


def _document_table(runs, count):
    """The documents of each row, and whether any of them has padding inside.

    Returns:
      (first tokens int32 [B, count + 1], lengths [B, count], both -1 where there is no document; bool ()).
    """
    number = 1 + jnp.arange(count)
    own = runs[:, :, None] == number
    at = jnp.arange(runs.shape[1], dtype=jnp.int32)[:, None]
    lengths = jnp.sum(own, axis=1, dtype=jnp.int32)
    starts = jnp.min(jnp.where(own, at, runs.shape[1]), axis=1)
    ends = jnp.max(jnp.where(own, at + 1, 0), axis=1)
    gaps = jnp.any((lengths > 0) & (ends - starts > lengths))
    starts, lengths = (jnp.where(lengths > 0, x, -1) for x in (starts, lengths))
    return jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1), lengths, gaps


def cached_attention(q, key, value, cursor, real, *, implementation="auto", block=512):
    """Attention of new tokens over a cache that already holds them.

    Args:
      q: [B, T, H, D], the tokens of slots cursor .. cursor + T - 1.
      key, value: [B, K, S, D].
      cursor: int32 (), slot of the first query.
      real: bool [B, S], slots that hold a token.
      implementation: "cudnn" (NVIDIA GPU, bfloat16), or "auto", which takes it for several tokens where it can.
        The others of `IMPLEMENTATIONS` mean blocks of `block` slots.

    Returns:
      [B, T, H, D] in the dtype of `q`; any number at padding.
    """
    length = q.shape[1]
    bfloat16 = q.dtype == key.dtype == jnp.bfloat16
    if implementation == "cudnn" or (implementation == "auto" and platform.platform() == "gpu" and bfloat16):
        if length > 1:
            return _cudnn_over_cache(q, key, value, cursor, real, block)
    return _blockwise_over_cache(q, key, value, cursor, real, block)


def _cudnn_over_cache(q, key, value, cursor, real, block):
    """Two calls, over the slots before `cursor` and over the new ones, merged by their sums of exponentials.

    They know how many tokens a row has, not where: rows whose padding is not all behind their tokens, in either part,
    go blockwise.
    """
    # jax's public function rounds the logarithms of the sums to bfloat16.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    batch, length, _, dim = q.shape
    own_slots = functools.partial(lax.dynamic_slice_in_dim, start_index=cursor, slice_size=length)
    past = real & (jnp.arange(real.shape[1]) < cursor)
    past_lengths = jnp.sum(past, axis=1, dtype=jnp.int32)
    in_order = jnp.array([jnp.all(x[:, 1:] <= x[:, :-1]) for x in (past, own_slots(real, axis=1))])

    def attend(q, key, value):
        call = functools.partial(
            dot_product_attention, q.swapaxes(1, 2), scale=1 / np.sqrt(dim), qkv_layout="BNTH", return_residual=True
        )
        own, own_log_sum = call(own_slots(key, axis=2), own_slots(value, axis=2), mask_type=MaskType.CAUSAL)
        before, before_log_sum = call(
            key, value, q_seqlen=jnp.full(batch, length, jnp.int32), kv_seqlen=jnp.maximum(past_lengths, 1),
            mask_type=MaskType.PADDING,
        )  # fmt: skip
        share = jnp.where(past_lengths[:, None, None] > 0, jax.nn.sigmoid(before_log_sum - own_log_sum), 0)[..., None]
        return (own * (1 - share) + before * share).astype(q.dtype).swapaxes(1, 2)

    return lax.cond(
        jnp.all(in_order), attend, lambda *qkv: _blockwise_over_cache(*qkv, cursor, real, block), q, key, value
    )


def _blockwise_over_cache(q, key, value, cursor, real, block):
    length = q.shape[1]
    # Blocks of queries too: each reads the cache only up to its own last slot, and its scores stay small. On
    # accelerators a trip round the loop over key blocks costs more than the scores that are masked. On the CPU larger
    # blocks than in training pay: their elementwise work is split between threads.
    block, queries = (2 * block, 2 * block) if platform.platform() == "cpu" else (block, 16 * block)
    if length <= queries:
        return _attend_cache(q, key, value, cursor, real, block)
    count = cdiv(length, queries)
    padded = jnp.pad(q, ((0, 0), (0, count * queries - length), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(q.shape[0], count, queries, *q.shape[2:]), 1, 0)
    starts = cursor + queries * jnp.arange(count)
    output = lax.map(lambda x: _attend_cache(x[0], key, value, x[1], real, block), (blocks, starts))
    return jnp.moveaxis(output, 0, 1).reshape(padded.shape)[:, :length]


def _attend_cache(q, key, value, cursor, real, block):
    """`cached_attention` of one block of queries."""
    batch, length, heads, dim = q.shape
    kv_heads, slots = key.shape[1:3]
    groups = heads // kv_heads
    grouped = q.reshape(batch, length, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    query_slot = jnp.tile(cursor + jnp.arange(length), groups)  # of every row of `grouped`

    def attend(first, carry, size):
        start = jnp.minimum(first, slots - size)  # the last block may overlap the one before; it counts from `first`
        rows = lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=2)  # noqa: E731
        slot = start + jnp.arange(size)
        seen = lax.dynamic_slice_in_dim(real, start, size, axis=1)[:, None] & (slot <= query_slot[:, None])
        return blocks.accumulate(carry, grouped, rows(key), rows(value), (seen & (slot >= first))[:, None])

    carry = blocks.empty_carry(grouped)
    if length == 1 or slots <= block:  # one token's scores over the whole cache are small
        carry = attend(0, carry, slots)
    else:
        count = jnp.minimum((cursor + length + block - 1) // block, cdiv(slots, block))
        carry = lax.fori_loop(0, count, lambda i, carry: attend(i * block, carry, block), carry)
    output, _ = blocks.finish(carry)
    output = output.reshape(batch, kv_heads, groups, length, dim)
    return output.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
