"""Grouped matrix product as a loop over row tiles, in plain XLA.

A tile is up to `m` rows of one group: it reads one matrix and makes one dense product. Only the matrices of
groups that have rows are read, which is what decoding lives on, and nothing of the size [G, ...] exists
besides the weight gradient itself.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import swiglu
from pallas_kernels.platform import cdiv, platform


def forward(lhs, rhs, group_sizes):
    """See `api.grouped_matmul`."""
    tiles = _plan(lhs.shape[0], group_sizes)

    def multiply(output, tile):
        return tiles.write(output, tile, _dot("mk,kn->mn", tiles.read(lhs, tile), _matrix(rhs, tile)))

    return _visit(tiles, multiply, jnp.zeros((lhs.shape[0], rhs.shape[2]), lhs.dtype))


def backward(lhs, rhs, group_sizes, d_output):
    """Gradients to lhs and rhs."""
    tiles = _plan(lhs.shape[0], group_sizes)

    def accumulate(gradients, tile):
        d_lhs, d_rhs = gradients
        d_rows = tiles.read_own(d_output, tile).astype(lhs.dtype)
        d_lhs = tiles.write(d_lhs, tile, _dot("mn,kn->mk", d_rows, _matrix(rhs, tile)))
        return d_lhs, _add_matrix(d_rhs, tile, _dot("mk,mn->kn", tiles.read(lhs, tile), d_rows))

    d_lhs, d_rhs = _visit(tiles, accumulate, (jnp.zeros_like(lhs), jnp.zeros(rhs.shape, jnp.float32)))
    return d_lhs, d_rhs.astype(rhs.dtype)


def swiglu_forward(x, w_gate, w_up, w_down, group_sizes):
    """See `api.grouped_swiglu`; returns (output, residuals of the backward)."""
    tiles = _plan(x.shape[0], group_sizes)

    def expert(buffers, tile):
        output, gates, ups = buffers
        rows = tiles.read(x, tile)
        gate = _dot("mk,kn->mn", rows, _matrix(w_gate, tile)).astype(x.dtype)
        up = _dot("mk,kn->mn", rows, _matrix(w_up, tile)).astype(x.dtype)
        product = _dot("mk,kn->mn", swiglu.activate(gate, up), _matrix(w_down, tile))
        return tiles.write(output, tile, product), tiles.write(gates, tile, gate), tiles.write(ups, tile, up)

    hidden = jnp.zeros((x.shape[0], w_gate.shape[2]), x.dtype)
    output, gates, ups = _visit(tiles, expert, (jnp.zeros_like(x), hidden, hidden))
    return output, (gates, ups)


def swiglu_backward(x, w_gate, w_up, w_down, group_sizes, residuals, d_output):
    """Gradients to x, w_gate, w_up and w_down."""
    gates, ups = residuals
    tiles = _plan(x.shape[0], group_sizes)

    def accumulate(gradients, tile):
        d_x, d_w_gate, d_w_up, d_w_down = gradients
        rows, gate, up = (tiles.read(y, tile) for y in (x, gates, ups))
        d_rows = tiles.read_own(d_output, tile).astype(x.dtype)
        d_hidden = _dot("mn,kn->mk", d_rows, _matrix(w_down, tile)).astype(x.dtype)
        hidden, d_gate, d_up = swiglu.activate_backward(gate, up, d_hidden)
        product = _dot("mn,kn->mk", d_gate, _matrix(w_gate, tile)) + _dot("mn,kn->mk", d_up, _matrix(w_up, tile))
        return (
            tiles.write(d_x, tile, product),
            _add_matrix(d_w_gate, tile, _dot("mk,mn->kn", rows, d_gate)),
            _add_matrix(d_w_up, tile, _dot("mk,mn->kn", rows, d_up)),
            _add_matrix(d_w_down, tile, _dot("mk,mn->kn", hidden, d_rows)),
        )

    weights = w_gate, w_up, w_down
    zeros = jnp.zeros_like(x), *(jnp.zeros(w.shape, jnp.float32) for w in weights)
    d_x, *d_weights = _visit(tiles, accumulate, zeros)
    return d_x, *(d.astype(w.dtype) for d, w in zip(d_weights, weights, strict=True))


def _matrix(weights, tile):
    return lax.dynamic_index_in_dim(weights, tile.group, keepdims=False)


def _add_matrix(gradients, tile, d_weight):
    d_weight += lax.dynamic_index_in_dim(gradients, tile.group)
    return lax.dynamic_update_slice_in_dim(gradients, d_weight, tile.group, 0)


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

    def read(self, array, tile):
        """[m, N] rows of [R, N]; some may be of other groups."""
        return lax.dynamic_slice_in_dim(array, tile.start, self.rows)

    def read_own(self, array, tile):
        """`read` with 0 for the rows that are not the tile's own."""
        return jnp.where(self._own(tile), self.read(array, tile), 0)

    def write(self, array, tile, rows):
        """Puts the tile's own rows where they lie in [R, N]."""
        rows = jnp.where(self._own(tile), rows.astype(array.dtype), self.read(array, tile))
        return lax.dynamic_update_slice_in_dim(array, rows, tile.start, 0)

    def _own(self, tile):
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
    tiles_per_group = 2 if platform() == "cpu" else 8
    return min(512, max(8, 1 << cdiv(num_rows, tiles_per_group * groups).bit_length() - 1))


def _dot(equation, a, b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
