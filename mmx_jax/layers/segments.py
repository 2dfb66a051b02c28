"""Segment ids of packed rows, and the positions that follow from them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.segments import number_segments

__all__ = ["at_positions", "number_segments", "segment_positions"]


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Number of tokens of the same document before each token; padding does not count.

    Args:
      segment_ids: int32 [B, T], as `number_segments` gives them.

    Returns:
      int32 [B, T]; at padding, any number >= 0.
    """
    count = jnp.cumsum(segment_ids > 0, axis=1) - 1
    seen = jnp.pad(lax.cummax(segment_ids, axis=1), ((0, 0), (1, 0)))[:, :-1]
    start = lax.cummax(jnp.where(segment_ids > seen, count, 0), axis=1)
    return jnp.maximum(count - start, 0).astype(jnp.int32)


def at_positions(x: Any, index: jax.Array | None) -> Any:
    """[B, 1, ...]: of each row of x [B, T, ...] the position index, int32 [B]; x itself if either is None."""
    if x is None or index is None:
        return x
    return jnp.take_along_axis(x, index.reshape(-1, *[1] * (x.ndim - 1)), axis=1)
