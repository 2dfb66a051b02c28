"""Root-mean-square normalisation."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

# Keeps the inputs alone for the backward pass, which recomputes the rest. No barriers (`prevent_cse`): they would cost
# passes over memory, and XLA may merge the two computations where it finds both in one loop.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


@functools.partial(_recomputed, static_argnums=2)
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32; returned in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    normed = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


@functools.partial(_recomputed, static_argnums=3)
def gated_rms_norm(x: jax.Array, gate: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """sigmoid(gate) * rms_norm(x) in float32, in the dtype of `gate` (docs/model.md, "Lightning attention")."""
    normed = rms_norm(x.astype(jnp.float32), scale, eps)
    return (jax.nn.sigmoid(gate.astype(jnp.float32)) * normed).astype(gate.dtype)


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale [M].

    `apply`: what is done with (x, scale, eps), where the norm is a part of something larger.
    """

    eps: float
    param_dtype: str

    @nn.compact
    def __call__(self, x, apply=rms_norm):
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.dtype(self.param_dtype))
        return apply(x, scale, self.eps)
