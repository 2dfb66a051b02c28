"""Grouped matrix product as a loop over row tiles, in plain XLA.

A tile is up to `m` rows of one group: it reads one matrix and makes one dense product. Only the matrices of
groups that have rows are read, which is what decoding lives on, and nothing of the size [G, ...] exists
besides the weight gradient itself.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.platform import cdiv, platform


def forward(lhs, rhs, group_sizes):
    """See `api.grouped_matmul`."""
    tiles = _plan(lhs.shape[0], group_sizes)

    def multiply(output, tile):
        rows = lax.dynamic_slice_in_dim(lhs, tile.start, tiles.rows)
        weight = lax.dynamic_index_in_dim(rhs, tile.group, keepdims=False)
        product = _dot("mk,kn->mn", rows, weight).astype(output.dtype)
        before = lax.dynamic_slice_in_dim(output, tile.start, tiles.rows)
        return lax.dynamic_update_slice_in_dim(output, jnp.where(tiles.mine(tile), product, before), tile.start, 0)

    return _visit(tiles, multiply, jnp.zeros((lhs.shape[0], rhs.shape[2]), lhs.dtype))


def backward(lhs, rhs, group_sizes, d_output):
    """Gradients to lhs and rhs."""
    d_output = d_output.astype(lhs.dtype)
    tiles = _plan(lhs.shape[0], group_sizes)

    def accumulate(gradients, tile):
        d_lhs, d_rhs = gradients
        mine = tiles.mine(tile)
        rows = lax.dynamic_slice_in_dim(lhs, tile.start, tiles.rows)
        d_rows = jnp.where(mine, lax.dynamic_slice_in_dim(d_output, tile.start, tiles.rows), 0)
        weight = lax.dynamic_index_in_dim(rhs, tile.group, keepdims=False)
        product = _dot("mn,kn->mk", d_rows, weight).astype(d_lhs.dtype)
        before = lax.dynamic_slice_in_dim(d_lhs, tile.start, tiles.rows)
        d_lhs = lax.dynamic_update_slice_in_dim(d_lhs, jnp.where(mine, product, before), tile.start, 0)
        d_weight = lax.dynamic_index_in_dim(d_rhs, tile.group) + _dot("mk,mn->kn", rows, d_rows)
        return d_lhs, lax.dynamic_update_slice_in_dim(d_rhs, d_weight, tile.group, 0)

    zeros = jnp.zeros_like(lhs), jnp.zeros(rhs.shape, jnp.float32)
    d_lhs, d_rhs = _visit(tiles, accumulate, zeros)
    return d_lhs, d_rhs.astype(rhs.dtype)


class _Tile(NamedTuple):
    """One tile, or all of them stacked; int32."""

    group: jnp.ndarray
    start: jnp.ndarray  # first row that is read
    first: jnp.ndarray  # rows [first, end) are the group's and this tile's
    end: jnp.ndarray


class _Tiles(NamedTuple):
    rows: int  # of a tile
    used: jnp.ndarray  # int32 (), tiles that have rows; the table is as long as the worst split needs
    table: _Tile

    def mine(self, tile):
        """bool [m, 1]: rows of the slice that are the tile's own."""
        index = tile.start + jnp.arange(self.rows)
        return ((index >= tile.first) & (index < tile.end))[:, None]


def _visit(tiles, body, carry):
    """Folds `body` over the tiles."""
    if platform() == "cpu":
        at = lambda t: _Tile(*(x[t] for x in tiles.table))  # noqa: E731
        return lax.fori_loop(0, tiles.used, lambda t, carry: body(carry, at(t)), carry)
    # A trip count known when compiling spares the accelerator a round trip to the host for each tile.
    return lax.scan(lambda carry, tile: (body(carry, tile), None), carry, tiles.table)[0]


def _plan(num_rows, group_sizes):
    groups = group_sizes.shape[0]
    rows = min(num_rows, _tile_rows(num_rows, groups))
    group_ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    tile_ends = jnp.cumsum((group_sizes + rows - 1) // rows, dtype=jnp.int32)
    # At most min(G, R) groups have rows, and each leaves at most one tile partly filled.
    occupied = min(groups, num_rows)
    tile = jnp.arange(occupied + (num_rows - occupied) // rows, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(tile_ends, tile, side="right").astype(jnp.int32), groups - 1)
    tile_begins, group_begins = (jnp.pad(ends, (1, 0))[:-1] for ends in (tile_ends, group_ends))
    first = group_begins[group] + (tile - tile_begins[group]) * rows  # of a surplus tile: behind its group
    # Dynamic slices clamp their start; clamping it here keeps the mask and the rows together.
    table = _Tile(group, jnp.minimum(first, num_rows - rows), first, group_ends[group])
    return _Tiles(rows, tile_ends[-1], table)


def _tile_rows(num_rows, groups):
    """A power of two that cuts a group of mean size into a few tiles.

    Larger tiles spend less on moving matrices, smaller ones less on rows computed in vain: half a tile a group on
    CPU, where the trip count is exact, and a whole one on accelerators.
    """
    tiles_per_group = 4 if platform() == "cpu" else 8
    return min(512, max(8, 1 << cdiv(num_rows, tiles_per_group * groups).bit_length() - 1))


def _dot(equation, a, b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
