"""Segment ids of packed rows: which document each token of a row belongs to, and which tokens are padding."""

import jax
import jax.numpy as jnp
from jax import lax


def number_segments(segment_ids: jax.Array) -> jax.Array:
    """Numbers the documents of each row 1, 2, 3, ... from left to right; padding stays 0.

    A document is a maximal run of equal positive ids with padding left out: padding inside a document does not end it,
    and the same id further right is another document.

    Args:
      segment_ids: int [B, T]; 0 marks padding, positive ids mark documents.

    Returns:
      int32 [B, T], the form in which the ops here and the layers take segment ids.
    """
    token_mask = segment_ids > 0
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    last_token = lax.cummax(jnp.where(token_mask, index, -1), axis=1)
    previous = jnp.pad(last_token, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]  # last token before t
    previous_id = jnp.take_along_axis(segment_ids, jnp.maximum(previous, 0), axis=1)
    starts = token_mask & ((previous < 0) | (segment_ids != previous_id))
    return jnp.where(token_mask, jnp.cumsum(starts, axis=1), 0).astype(jnp.int32)
