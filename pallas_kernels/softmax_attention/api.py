"""The entry points of softmax attention: validation and choice of backend.

`softmax_attention` serves training and scoring, `cached_attention` prefill and decoding. No backend but the reference
holds a [T, T] matrix.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.softmax_attention import blockwise_xla, cudnn, reference, splash_tpu

# A backend is a module with `check` and `forward`, as in reference.py; JAX differentiates `forward`.
IMPLEMENTATIONS = {"reference": reference, "blockwise": blockwise_xla, "cudnn": cudnn, "splash": splash_tpu}
_KERNELS = {"gpu": "cudnn", "tpu": "splash"}
# Backends with `cached_forward`. For the others `cached_attention` runs blockwise.
_CACHED = {"blockwise": blockwise_xla, "cudnn": cudnn}


def default_implementation(q: Any, k: Any, v: Any, *, segmented: bool) -> str:
    """The choice of `implementation="auto"`: the kernel of the platform if it serves the shapes, or blockwise."""
    kernel = _KERNELS.get(platform.platform())
    reason = kernel and platform.why_not(lambda: IMPLEMENTATIONS[kernel].check(q, k, v, segmented=segmented))
    chosen = kernel if kernel and reason is None else "blockwise"
    op = "packed softmax attention" if segmented else "softmax attention"
    platform.announce(op, chosen, reason or f"the default on {platform.platform()}")
    return chosen


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    implementation: str = "auto",
    block: int = 512,
) -> jax.Array:
    """Causal grouped-query attention inside documents; query head h reads key head h // (H / K).

    Args:
      q: [B, T, H, D]; k, v: [B, T, K, D].
      segment_ids: int32 [B, T] as `pallas_kernels.segments.number_segments` gives them, 0 at padding. None: one
        document a row.
      implementation: a key of `IMPLEMENTATIONS`, or "auto" for the default of the platform. "blockwise" serves any
        platform with memory linear in T, "cudnn" NVIDIA GPUs in bfloat16 (packed rows on Hopper and later), "splash"
        TPUs where head_dim is a multiple of 128 (interpreted on CPU).
      block: query and key tokens that "blockwise" holds scores for at once.

    Returns:
      [B, T, H, D] in the dtype of `v`; 0 at padding.

    Raises:
      ValueError: an unknown implementation.
      NotImplementedError: the chosen backend cannot serve these shapes; the message says which can.
    """
    _check_name(implementation)
    segmented = segment_ids is not None
    if implementation == "auto":
        implementation = default_implementation(q, k, v, segmented=segmented)
    backend = IMPLEMENTATIONS[implementation]
    backend.check(q, k, v, segmented=segmented)
    return backend.forward(q, k, v, segment_ids, block=block)


def cached_attention(
    q: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array,
    *,
    implementation: str = "auto",
    block: int = 512,
) -> jax.Array:
    """Causal attention of new tokens over a key-value cache that already holds them.

    Args:
      q: [B, T, H, D]; token t of row b lies in slot lengths[b] + t and sees the slots up to its own.
      key, value: [B, K, S, D].
      lengths: int32 [B], slots of each row that were filled before these tokens; rows may differ.
      implementation: as in `softmax_attention`. "auto" takes cudnn for several tokens where it serves them. "splash"
        and "reference" mean blocks of `block` slots, as "blockwise" does.

    Returns:
      [B, T, H, D] in the dtype of `q`.
    """
    _check_name(implementation)
    several = q.shape[1] > 1
    if implementation == "auto":
        on_gpu = platform.platform() == "gpu" and q.dtype == key.dtype == jnp.bfloat16
        implementation = "cudnn" if on_gpu and several else "blockwise"
    # A single query is one small product with the cache: a kernel would only add its launch.
    backend = _CACHED.get(implementation, blockwise_xla) if several else blockwise_xla
    return backend.cached_forward(q, key, value, lengths, block=block)


def _check_name(implementation):
    if implementation not in (*IMPLEMENTATIONS, "auto"):
        names = ", ".join((*IMPLEMENTATIONS, "auto"))
        raise ValueError(f"softmax implementation {implementation!r} is not one of {names}")
