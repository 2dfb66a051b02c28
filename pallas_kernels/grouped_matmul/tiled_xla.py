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


def check(lhs, rhs):
    """Serves every shape and dtype."""
    del lhs, rhs


def forward(lhs, rhs, group_sizes):
    """See `api.grouped_matmul`."""
    plan = _plan(lhs.shape[0], group_sizes)

    def multiply(output, tile):
        return tile.write(output, _dot("mk,kn->mn", tile.read(lhs), tile.matrix(rhs)))

    return _visit(plan, multiply, jnp.zeros((lhs.shape[0], rhs.shape[2]), lhs.dtype))


def backward(lhs, rhs, group_sizes, d_output):
    """Gradients to lhs and rhs."""
    plan = _plan(lhs.shape[0], group_sizes)

    def accumulate(gradients, tile):
        d_lhs, d_rhs = gradients
        d_rows = tile.read_own(d_output).astype(lhs.dtype)
        d_lhs = tile.write(d_lhs, _dot("mn,kn->mk", d_rows, tile.matrix(rhs)))
        return d_lhs, tile.add_matrix(d_rhs, _dot("mk,mn->kn", tile.read(lhs), d_rows))

    d_lhs, d_rhs = _visit(plan, accumulate, (jnp.zeros_like(lhs), jnp.zeros(rhs.shape, jnp.float32)))
    return d_lhs, d_rhs.astype(rhs.dtype)


def swiglu_forward(x, w_gate, w_up, w_down, group_sizes):
    """See `api.grouped_swiglu`; returns (output, residuals of the backward)."""
    plan = _plan(x.shape[0], group_sizes)

    def expert(buffers, tile):
        output, gates, ups = buffers
        rows = tile.read(x)
        gate = _dot("mk,kn->mn", rows, tile.matrix(w_gate)).astype(x.dtype)
        up = _dot("mk,kn->mn", rows, tile.matrix(w_up)).astype(x.dtype)
        product = _dot("mk,kn->mn", swiglu.activate(gate, up), tile.matrix(w_down))
        return tile.write(output, product), tile.write(gates, gate), tile.write(ups, up)

    hidden = jnp.zeros((x.shape[0], w_gate.shape[2]), x.dtype)
    output, gates, ups = _visit(plan, expert, (jnp.zeros_like(x), hidden, hidden))
    return output, (gates, ups)


def swiglu_backward(x, w_gate, w_up, w_down, group_sizes, residuals, d_output):
    """Gradients to x, w_gate, w_up and w_down."""
    gates, ups = residuals
    plan = _plan(x.shape[0], group_sizes)

    def accumulate(gradients, tile):
        d_x, d_w_gate, d_w_up, d_w_down = gradients
        rows, gate, up = (tile.read(y) for y in (x, gates, ups))
        d_rows = tile.read_own(d_output).astype(x.dtype)
        d_hidden = _dot("mn,kn->mk", d_rows, tile.matrix(w_down)).astype(x.dtype)
        hidden, d_gate, d_up = swiglu.activate_backward(gate, up, d_hidden)
        product = _dot("mn,kn->mk", d_gate, tile.matrix(w_gate)) + _dot("mn,kn->mk", d_up, tile.matrix(w_up))
        return (
            tile.write(d_x, product),
            tile.add_matrix(d_w_gate, _dot("mk,mn->kn", rows, d_gate)),
            tile.add_matrix(d_w_up, _dot("mk,mn->kn", rows, d_up)),
            tile.add_matrix(d_w_down, _dot("mk,mn->kn", hidden, d_rows)),
        )

    weights = w_gate, w_up, w_down
    zeros = jnp.zeros_like(x), *(jnp.zeros(w.shape, jnp.float32) for w in weights)
    d_x, *d_weights = _visit(plan, accumulate, zeros)
    return d_x, *(d.astype(w.dtype) for d, w in zip(d_weights, weights, strict=True))


class _Tile(NamedTuple):
    """A slice of rows and the group it belongs to; int32 scalars besides the first two fields."""

    rows: int  # of the slice
    whole: bool  # all of them are the group's: nothing has to be masked
    group: jnp.ndarray
    start: jnp.ndarray  # of the slice
    first: jnp.ndarray  # rows [first, end) are the group's and this tile's
    end: jnp.ndarray

    def read(self, array):
        """[m, N] rows of [R, N]; some may be of other groups."""
        return lax.dynamic_slice_in_dim(array, self.start, self.rows)

    def read_own(self, array):
        """`read` with 0 for the rows that are not the tile's own."""
        return self._keep_own(self.read(array), 0)

    def write(self, array, rows):
        """Puts the tile's own rows where they lie in [R, N]."""
        rows = self._keep_own(rows.astype(array.dtype), self.read(array))
        return lax.dynamic_update_slice_in_dim(array, rows, self.start, 0)

    def matrix(self, weights):
        """The group's own of [G, K, N]."""
        return lax.dynamic_index_in_dim(weights, self.group, keepdims=False)

    def add_matrix(self, gradients, d_weight):
        """Adds to the group's own of [G, K, N]."""
        d_weight += lax.dynamic_index_in_dim(gradients, self.group)
        return lax.dynamic_update_slice_in_dim(gradients, d_weight, self.group, 0)

    def _keep_own(self, rows, others):
        if self.whole:
            return rows
        index = self.start + jnp.arange(self.rows)
        return jnp.where(((index >= self.first) & (index < self.end))[:, None], rows, others)


class _Tiles(NamedTuple):
    """Tiles of one size, as a table that is as long as the worst split needs."""

    rows: int
    whole: bool
    used: jnp.ndarray  # int32 (), tiles that have rows
    columns: tuple  # the other fields of `_Tile`, int32 [tiles]


def _visit(plan, body, carry):
    """Folds `body` over the tiles."""
    for tiles in plan:

        def visit(carry, columns, tiles=tiles):
            return body(carry, _Tile(tiles.rows, tiles.whole, *columns))

        if platform() == "cpu":
            at = lambda t, columns=tiles.columns: tuple(column[t] for column in columns)  # noqa: E731
            carry = lax.fori_loop(0, tiles.used, lambda t, carry, visit=visit, at=at: visit(carry, at(t)), carry)
        else:
            # A trip count known when compiling spares the accelerator a round trip to the host for each tile.
            carry, _ = lax.scan(lambda carry, columns, visit=visit: (visit(carry, columns), None), carry, tiles.columns)
    return carry


def _plan(num_rows, group_sizes):
    """Tiles that cover every group, as one `_Tiles` for each size."""
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    begins = ends - group_sizes
    rows = min(num_rows, _tile_rows(num_rows, group_sizes.shape[0]))
    if platform() != "cpu" or rows < 128:
        return (_tiles(num_rows, begins, ends, rows, whole=False),)
    # What is left of a group goes into smaller tiles, which have fewer rows that are computed in vain.
    middles = begins + group_sizes // rows * rows
    return (
        _tiles(num_rows, begins, middles, rows, whole=True),
        _tiles(num_rows, middles, ends, rows // 2, whole=False),
    )


def _tiles(num_rows, begins, ends, rows, *, whole):
    """Tiles for the rows [begins, ends) of each group."""
    groups = begins.shape[0]
    tile_ends = jnp.cumsum((ends - begins + rows - 1) // rows, dtype=jnp.int32)
    # At most min(G, R) groups have rows, and each leaves at most one tile partly filled.
    occupied = min(groups, num_rows)
    tile = jnp.arange(occupied + (num_rows - occupied) // rows, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(tile[:, None] >= tile_ends, axis=1, dtype=jnp.int32), groups - 1)
    first = begins[group] + (tile - jnp.pad(tile_ends, (1, 0))[group]) * rows  # of a surplus tile: behind its group
    # Dynamic slices clamp their start; clamping it here keeps the mask and the rows together.
    return _Tiles(rows, whole, tile_ends[-1], (group, jnp.minimum(first, num_rows - rows), first, ends[group]))


def _tile_rows(num_rows, groups):
    """A power of two that cuts a group of mean size into a few tiles.

    Larger tiles spend less on moving matrices, smaller ones less on rows computed in vain: a quarter of a tile a group
    on CPU, where the trip count is exact and the last tiles are halves, and a whole one on accelerators.
    """
    tiles_per_group = 2 if platform() == "cpu" else 8
    return min(512, max(8, 1 << cdiv(num_rows, tiles_per_group * groups).bit_length() - 1))


def _dot(equation, a, b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
