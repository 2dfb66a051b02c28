"""Softmax attention by jax's own kernel for TPU, splash attention."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import platform
from pallas_kernels.platform import cdiv

BLOCK = 512  # query and key tokens; a multiple of 128


def check(q: Any, k: Any, v: Any, *, segmented: bool) -> None:
    """Raises NotImplementedError where the kernel cannot serve the shapes."""
    del k, v, segmented
    if q.shape[-1] % 128:
        raise NotImplementedError(
            f"softmax attention: splash serves head_dim that is a multiple of 128, got {q.shape[-1]}; use 'blockwise'"
        )


def forward(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, *, block: int) -> jax.Array:
    """See `api.softmax_attention`: one call a row and key head, over the query heads that read it."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    del block
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    size = min(BLOCK, cdiv(length, 128) * 128)
    padded = cdiv(length, size) * size
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))) for x in (q, k, v))
    ids = jnp.pad(segment_ids, ((0, 0), (0, padded - length)))
    q = (q / np.sqrt(dim)).astype(q.dtype).reshape(batch, padded, kv_heads, heads // kv_heads, dim)
    over_heads = jax.vmap(_kernel(padded, heads // kv_heads, size), in_axes=(0, 0, 0, None))
    output: Any = jax.vmap(lambda q, k, v, ids: over_heads(q, k, v, splash.SegmentIds(ids, ids)))(
        q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2), ids
    )
    output = output.transpose(0, 3, 1, 2, 4).reshape(batch, padded, heads, dim)[:, :length]
    return jnp.where((segment_ids > 0)[:, :, None, None], output, 0).astype(v.dtype)


def _kernel(length, heads, block):
    """Causal attention of [heads, length, D] queries over [length, D] keys and values."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    causal = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    # Not its fused backward, which keeps a dq of every key block: memory that grows with the square of T.
    names = "q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq"
    return splash.make_splash_mqa_single_device(
        causal,
        block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
        interpret=platform.interpret(),
    )
