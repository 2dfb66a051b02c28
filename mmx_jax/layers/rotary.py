"""Partial rotary position embedding."""

import jax
import jax.numpy as jnp
import numpy as np


def apply_rotary(x: jax.Array, positions: jax.Array, *, rotary_dim: int, theta: float) -> jax.Array:
    """Rotates the first `rotary_dim` of D dims, pairing i with i + rotary_dim / 2; the rest passes (docs/model.md).

    The frequency ladder is theta^(-2 i / rotary_dim): its denominator is rotary_dim, not D.

    Args:
      x: [B, T, H, D].
      positions: int [B, T].

    Returns:
      [B, T, H, D] in the dtype of `x`; the rotation is float32.
    """
    half = rotary_dim // 2
    # In NumPy: an error in the last place of a device's power function is radians at a million tokens.
    frequency = (theta ** (-2.0 * np.arange(half) / max(rotary_dim, 1))).astype(np.float32)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency  # [B, T, 1, half]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second, rest = jnp.split(x, [half, rotary_dim], axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([r.astype(x.dtype) for r in rotated] + [rest], axis=-1)
