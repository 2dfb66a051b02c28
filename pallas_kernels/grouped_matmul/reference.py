"""The definition: XLA's own ragged product. Its weight gradient is dense over the groups on some platforms."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import swiglu


def check(lhs: Any, rhs: Any) -> None:
    """Serves every shape and dtype."""
    del lhs, rhs


def forward(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`."""
    precision = lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
    product = lax.ragged_dot(lhs, rhs, group_sizes, precision=precision, preferred_element_type=jnp.float32)
    return product.astype(lhs.dtype)


def backward(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, d_output: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients to lhs and rhs."""
    _, vjp = jax.vjp(lambda lhs, rhs: forward(lhs, rhs, group_sizes), lhs, rhs)
    return vjp(d_output)


def swiglu_forward(
    x: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array, group_sizes: jax.Array, *, differentiated: bool
) -> tuple[jax.Array, Any]:
    """See `api.grouped_swiglu`; returns (output, residuals of `swiglu_backward`), which may be () if none follows."""
    del differentiated
    hidden = swiglu.activate(forward(x, w_gate, group_sizes), forward(x, w_up, group_sizes))
    return forward(hidden, w_down, group_sizes), ()


def swiglu_backward(
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    group_sizes: jax.Array,
    residuals: Any,
    d_output: jax.Array,
) -> tuple[jax.Array, ...]:
    """Gradients to x, w_gate, w_up and w_down."""
    del residuals
    _, vjp = jax.vjp(
        lambda *inputs: swiglu_forward(*inputs, group_sizes=group_sizes, differentiated=True)[0],
        x,
        w_gate,
        w_up,
        w_down,
    )
    return vjp(d_output)
