"""Bias-free projections."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from mmx_jax.config import ModelConfig


def einsum(equation, x, w, out_dtype=None):
    """A product with float32 accumulation; float32 inputs get full float32 products on every platform."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    out_dtype = out_dtype or x.dtype
    return jnp.einsum(equation, x, w.astype(x.dtype), precision=precision, preferred_element_type=out_dtype)


def weight(module: nn.Module, config: ModelConfig, name, shape, axes, *, fan_in, fan_out, gain=1.0, dtype=None):
    """Declares a projection weight: Xavier normal times `gain`, or normal(`initializer_range`).

    `gain` is a number, or an array that broadcasts against `shape`.
    """
    dtype = jnp.dtype(dtype or config.param_dtype)
    if config.initializer == "normal":
        stddev = config.initializer_range
    else:
        stddev = gain * (2.0 / (fan_in + fan_out)) ** 0.5

    def init(key, shape, dtype):
        return (stddev * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return module.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)


def deepnorm_gain(config: ModelConfig) -> float:
    """Gain of the value, output and MLP weights under DeepNorm, (8 N)^(-1/4) (arXiv 2203.00555, Table 1)."""
    return (8 * config.num_layers) ** -0.25 if config.postnorm else 1.0
