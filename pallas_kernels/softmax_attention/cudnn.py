"""Softmax attention by cuDNN's fused kernels, as jax calls them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import platform
from pallas_kernels.softmax_attention import blockwise_xla

# What packed attention is compiled for: documents of a row, and elements of the queries (its offsets are int32).
MAX_DOCUMENTS, MAX_ELEMENTS = 64, 2**31 - 1


def check(q: Any, k: Any, v: Any, *, segmented: bool) -> None:
    """Raises NotImplementedError where cuDNN cannot serve the shapes."""
    del k, v
    if platform.platform() != "gpu":
        raise NotImplementedError("softmax attention: cudnn runs on NVIDIA GPUs; use 'blockwise'")
    if q.dtype != jnp.bfloat16:
        raise NotImplementedError(f"softmax attention: cudnn serves bfloat16, got {q.dtype}; use 'blockwise'")
    if segmented and q.size > MAX_ELEMENTS:
        raise NotImplementedError(
            f"softmax attention: cudnn serves packed queries of at most {MAX_ELEMENTS} elements, got {q.shape}; use "
            "'blockwise'"
        )


def forward(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, *, block: int) -> jax.Array:
    """See `api.softmax_attention`. Packed rows that cuDNN has no form for run blockwise."""
    if segment_ids is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return _packed(q, k, v, segment_ids, block)


def _packed(q, k, v, segment_ids, block):
    """Packed rows as cuDNN's ragged sequences, which have no gaps and no more documents than it is compiled for."""
    # The packed layout has no public name in jax.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    token_mask = (segment_ids > 0)[:, :, None, None]
    # Where there is no document cuDNN writes nothing, neither outputs nor gradients.
    q, k, v = (jnp.where(token_mask, x, 0) for x in (q, k, v))
    starts, lengths, gaps = _document_table(segment_ids, MAX_DOCUMENTS)

    def ragged(q, k, v):
        output = dot_product_attention(
            q,
            k,
            v,
            q_seqlen=lengths,
            kv_seqlen=lengths,
            q_offsets=starts,
            kv_offsets=starts,
            scale=1 / np.sqrt(q.shape[-1]),
            mask_type=MaskType.PADDING_CAUSAL,
        )
        return jnp.where(token_mask, output, 0)  # pyright: ignore[reportArgumentType]

    served = (jnp.max(segment_ids) <= MAX_DOCUMENTS) & ~gaps
    blockwise = functools.partial(blockwise_xla.forward, segment_ids=segment_ids, block=block)
    return lax.cond(served, ragged, blockwise, q, k, v)


def _document_table(segment_ids, count):
    """The documents of each row, and whether any of them has padding inside.

    Returns:
      (first tokens int32 [B, count + 1], lengths [B, count], both -1 where there is no document; bool ()).
    """
    own = segment_ids[:, :, None] == 1 + jnp.arange(count)
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[:, None]
    lengths = jnp.sum(own, axis=1, dtype=jnp.int32)
    starts = jnp.min(jnp.where(own, index, segment_ids.shape[1]), axis=1)
    ends = jnp.max(jnp.where(own, index + 1, 0), axis=1)
    gaps = jnp.any((lengths > 0) & (ends - starts > lengths))
    starts, lengths = (jnp.where(lengths > 0, x, -1) for x in (starts, lengths))
    return jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1), lengths, gaps


def cached_forward(q: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array, *, block: int) -> jax.Array:
    """See `api.cached_attention`: one call over the earlier slots and one over the new ones, merged by log-sum-exp."""
    # jax's public function rounds the logarithms of the sums to bfloat16.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    del block
    batch, length, _, dim = q.shape
    attend: Any = functools.partial(
        dot_product_attention, q.swapaxes(1, 2), scale=1 / np.sqrt(dim), qkv_layout="BNTH", return_residual=True
    )
    new_key, new_value = (_slots(x, lengths, length) for x in (key, value))
    new, new_log_sum = attend(new_key, new_value, mask_type=MaskType.CAUSAL)
    earlier, earlier_log_sum = attend(
        key,
        value,
        q_seqlen=jnp.full(batch, length, jnp.int32),
        kv_seqlen=jnp.maximum(lengths, 1),  # of no key it would make a NaN
        mask_type=MaskType.PADDING,
    )
    share = jnp.where(lengths[:, None, None] > 0, jax.nn.sigmoid(earlier_log_sum - new_log_sum), 0)[..., None]
    return (new * (1 - share) + earlier * share).astype(q.dtype).swapaxes(1, 2)


def _slots(cache, lengths, count):
    """[B, K, count, D]: the slots lengths[b] .. lengths[b] + count - 1 of each row of a cache [B, K, S, D]."""
    return jax.vmap(lambda row, start: lax.dynamic_slice_in_dim(row, start, count, axis=1))(cache, lengths)
