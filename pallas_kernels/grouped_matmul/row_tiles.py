"""The tiles of rows that cover every group, as a table that is as long as the worst split of the rows needs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.platform import cdiv


class RowTiles(NamedTuple):
    """int32 [tiles], but for the last field. A surplus tile lies behind its group."""

    group: jnp.ndarray
    start: jnp.ndarray  # first row
    begin: jnp.ndarray  # [begin, end) are the rows of the group
    end: jnp.ndarray
    used: jnp.ndarray  # int32 (), tiles that have rows


def cover(group_sizes: jax.Array, num_rows: int, tile_rows: int, *, alignment: int = 1) -> RowTiles:
    """Tiles of `tile_rows` rows, each inside one group but for the rows before it that alignment adds.

    Args:
      group_sizes: int32 [G], at most `num_rows` in all.
      alignment: tiles start at its multiples.
    """
    groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    begins = ends - group_sizes
    aligned = begins // alignment * alignment
    tile_ends = jnp.cumsum(jnp.where(group_sizes > 0, cdiv(ends - aligned, tile_rows), 0), dtype=jnp.int32)
    # At most min(G, R) groups have rows; each takes one tile, and more for what it and its alignment fill.
    occupied = min(groups, num_rows)
    tile = jnp.arange(occupied + (num_rows + (alignment - 2) * occupied) // tile_rows, dtype=jnp.int32)
    # Which of few intervals each tile is in: a comparison with all is one kernel, a binary search dozens.
    group = jnp.minimum(jnp.sum(tile[:, None] >= tile_ends, axis=1, dtype=jnp.int32), groups - 1)
    start = aligned[group] + (tile - jnp.pad(tile_ends, (1, 0))[group]) * tile_rows
    return RowTiles(group, start, begins[group], ends[group], tile_ends[-1])
