"""Documents and padding inside a row.

A backend never sees the caller's `segment_ids`. It gets what its own `documents` makes of them, for most *runs*:
int32 [B, T], 0 at padding, and 1, 2, 3, ... for the documents of a row in their order. A document is a maximal run of
equal positive ids with padding left out, so padding in the middle of a document does not end it.
"""

import jax.numpy as jnp
from jax import lax


def documents(ids, *, numbered):
    """The runs of rows.

    Args:
      ids: int32 [B, T], as the caller has them; or if they are `numbered`, runs already.
    """
    return ids if numbered else document_runs(ids)


def document_runs(segment_ids):
    """Numbers the documents of each row 1, 2, 3, ... from left to right; padding stays 0.

    Args:
      segment_ids: int [B, T]; 0 marks padding, positive ids mark documents.

    Returns:
      int32 [B, T].
    """
    real = segment_ids > 0
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    last_real = lax.cummax(jnp.where(real, index, -1), axis=1)
    previous = jnp.pad(last_real, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]  # last real index before t
    previous_id = jnp.take_along_axis(segment_ids, jnp.maximum(previous, 0), axis=1)
    starts = real & ((previous < 0) | (segment_ids != previous_id))
    return jnp.where(real, jnp.cumsum(starts, axis=1), 0).astype(jnp.int32)
