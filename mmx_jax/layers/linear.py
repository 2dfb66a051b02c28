"""Bias-free projections, and the activation after them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmx_jax.config import ModelConfig
from pallas_kernels import platform
from pallas_kernels.einsum import product


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`product` of activations with a weight, which is multiplied in the dtype of `x`; returned in that dtype.

    `equation` is "x,w->y", every letter in two of the three terms. The gradient of `w` goes from the float32
    accumulator to the dtype of `w` in one step, and is computed in the order of its axes: JAX's own rule computes the
    transpose and copies both factors and the result.
    """
    if platform.platform() == "gpu" and x.size == x.shape[-1]:
        # Two equal rows: of a single one XLA would write products to memory and sum them, two kernels instead of one.
        twice = jnp.broadcast_to(x, (2, *x.shape[1:]))
        return product(equation, twice, w.astype(x.dtype), x.dtype)[:1]
    return product(equation, x, w.astype(x.dtype), x.dtype)


def _einsum_forward(equation, x, w):
    # Not by `einsum` itself: the policies of `jax.checkpoint` see the product only outside a custom_vjp.
    return product(equation, x, w.astype(x.dtype), x.dtype), (x, w)


def _einsum_backward(equation, saved, dy):
    x, w = saved
    terms, y = equation.split("->")
    a, b = terms.split(",")
    dx = product(f"{y},{b}->{a}", dy, w.astype(x.dtype), x.dtype)
    dw = product(f"{a},{y}->{b}", x, dy, jnp.float32)
    return dx, dw.astype(w.dtype)


einsum.defvjp(_einsum_forward, _einsum_backward)


@functools.partial(jax.checkpoint, prevent_cse=False)  # keeps `x` alone for the backward
def silu(x: jax.Array) -> jax.Array:
    """x sigmoid(x) in float32, returned in the dtype of `x`."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def weight(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    axes: tuple[str | None, ...],
    *,
    fan: tuple[int, int],
    gain: Any = 1.0,
    dtype: str | None = None,
) -> Any:
    """Declares a projection weight of a module with a `config`: Xavier normal, or normal(`initializer_range`).

    Args:
      axes: logical axes of `shape`.
      fan: (inputs of an output, outputs of an input), for Xavier's standard deviation sqrt(2 / (fan_in + fan_out)).
      gain: factor of the standard deviation under Xavier: a number, or an array that broadcasts against `shape`.
      dtype: None: the config's `param_dtype`.
    """
    config: ModelConfig = getattr(module, "config")  # noqa: B009 -- a field of every module here
    param_dtype = jnp.dtype(dtype or config.param_dtype)
    stddev = config.initializer_range if config.initializer == "normal" else gain * (2.0 / sum(fan)) ** 0.5

    def init(key, shape, dtype):
        return (stddev * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return module.param(name, nn.with_logical_partitioning(init, axes), shape, param_dtype)


def deepnorm_gain(config: ModelConfig) -> float:
    """Gain of the value, output and MLP weights under DeepNorm, (8 N)^(-1/4) (arXiv 2203.00555, Table 1)."""
    return (8 * config.num_layers) ** -0.25 if config.postnorm else 1.0
