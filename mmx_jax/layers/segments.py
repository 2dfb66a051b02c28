"""Documents and padding inside a row, and the positions that follow from them."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.lightning_attention import document_runs

__all__ = ["at_positions", "document_positions", "document_runs"]


def document_positions(runs):
    """Real tokens of the same document before each token; padding does not count.

    Args:
      runs: int32 [B, T], as `document_runs` gives them.

    Returns:
      int32 [B, T]; at padding, any number >= 0.
    """
    count = jnp.cumsum(runs > 0, axis=1) - 1
    seen = jnp.pad(lax.cummax(runs, axis=1), ((0, 0), (1, 0)))[:, :-1]
    start = lax.cummax(jnp.where(runs > seen, count, 0), axis=1)
    return jnp.maximum(count - start, 0).astype(jnp.int32)


def at_positions(x, index):
    """[B, 1, ...]: of each row of x [B, T, ...] the position that index, int32 [B], names. None: x itself."""
    if x is None or index is None:
        return x
    return jnp.take_along_axis(x, index.reshape(-1, *[1] * (x.ndim - 1)), axis=1)
