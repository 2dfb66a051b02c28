"""The one entry point of the grouped matrix product: validation, choice of backend, differentiation."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.grouped_matmul import reference, tiled_xla

# A backend is a module with `forward` and `backward`, as in reference.py.
IMPLEMENTATIONS = {"reference": reference, "tiled_xla": tiled_xla}


def default_implementation() -> str:
    """What `implementation="auto"` stands for on this platform."""
    platform.announce("grouped matmul", "tiled_xla", f"the default on {platform.platform()}")
    return "tiled_xla"


def grouped_matmul(lhs, rhs, group_sizes, *, implementation="auto"):
    """Multiplies the rows of group g, which lie one group after the other, with `rhs[g]`.

    Args:
      lhs: [R, K], the rows sorted by group.
      rhs: [G, K, N], in the dtype of `lhs`.
      group_sizes: int32 [G] rows of each group, at most R in all. Groups may be empty.
      implementation: a key of `IMPLEMENTATIONS`, or "auto" for the default of the platform.

    Returns:
      [R, N] in the dtype of `lhs`, accumulated in float32. Rows behind the last group are 0.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or an unknown implementation.
    """
    if implementation == "auto":
        implementation = default_implementation()
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is not one of {', '.join(sorted(IMPLEMENTATIONS))}")
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1] or group_sizes.shape != rhs.shape[:1]:
        raise ValueError(
            f"grouped_matmul takes lhs [R, K], rhs [G, K, N], group_sizes [G]; got {lhs.shape}, {rhs.shape}, "
            f"{group_sizes.shape}"
        )
    if lhs.dtype != rhs.dtype or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"lhs and rhs must share a dtype, group_sizes be int32; got {lhs.dtype}, {rhs.dtype}, {group_sizes.dtype}"
        )
    return _multiply(implementation, lhs, rhs, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(implementation, lhs, rhs, group_sizes):
    return IMPLEMENTATIONS[implementation].forward(lhs, rhs, group_sizes)


def _multiply_forward(implementation, lhs, rhs, group_sizes):
    return _multiply(implementation, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _multiply_backward(implementation, saved, d_output):
    lhs, rhs, group_sizes = saved
    return *IMPLEMENTATIONS[implementation].backward(lhs, rhs, group_sizes, d_output), None


_multiply.defvjp(_multiply_forward, _multiply_backward)
