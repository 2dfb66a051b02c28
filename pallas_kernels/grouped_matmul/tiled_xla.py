"""Grouped matrix product as a loop over row tiles, in plain XLA.

A tile is up to `m` rows of one group: it reads one matrix and makes one dense product. Only the matrices of
groups that have rows are read, which is what decoding lives on, and nothing of the size [G, ...] exists
besides the weight gradient itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import row_tiles, swiglu
from pallas_kernels.platform import cdiv, platform


def check(lhs: Any, rhs: Any) -> None:
    """Serves every shape and dtype."""
    del lhs, rhs


def forward(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`."""

    def multiply(arrays, sums, tile, weights):
        (output,), (matrix,) = arrays, weights
        return (tile.write(output, _dot("mk,kn->mn", tile.read(lhs), matrix)),), sums

    output = jnp.zeros((lhs.shape[0], rhs.shape[2]), lhs.dtype)
    ((output,), _) = _fold(multiply, group_sizes, lhs.shape[0], (output,), (rhs,))
    return output


def backward(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, d_output: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients to lhs and rhs."""

    def accumulate(arrays, sums, tile, weights):
        (d_lhs,), (d_rhs,), (matrix,) = arrays, sums, weights
        d_rows = tile.read_own(d_output).astype(lhs.dtype)
        d_lhs = tile.write(d_lhs, _dot("mn,kn->mk", d_rows, matrix))
        return (d_lhs,), (d_rhs + _dot("mk,mn->kn", tile.read(lhs), d_rows),)

    (d_lhs,), (d_rhs,) = _fold(accumulate, group_sizes, lhs.shape[0], (jnp.zeros_like(lhs),), (rhs,), summed=True)
    return d_lhs, d_rhs.astype(rhs.dtype)


def swiglu_forward(
    x: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array, group_sizes: jax.Array, *, differentiated: bool
) -> tuple[jax.Array, Any]:
    """See `api.grouped_swiglu`; returns (output, residuals of the backward)."""
    del differentiated  # what nobody reads is not computed

    def expert(arrays, sums, tile, weights):
        output, gates, ups = arrays
        w_gate, w_up, w_down = weights
        rows = tile.read(x)
        gate = _dot("mk,kn->mn", rows, w_gate).astype(x.dtype)
        up = _dot("mk,kn->mn", rows, w_up).astype(x.dtype)
        product = _dot("mk,kn->mn", swiglu.activate(gate, up), w_down)
        return (tile.write(output, product), tile.write(gates, gate), tile.write(ups, up)), sums

    hidden = jnp.zeros((x.shape[0], w_gate.shape[2]), x.dtype)
    arrays = jnp.zeros_like(x), hidden, hidden
    (output, gates, ups), _ = _fold(expert, group_sizes, x.shape[0], arrays, (w_gate, w_up, w_down))
    return output, (gates, ups)


def swiglu_backward(
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    group_sizes: jax.Array,
    residuals: Any,
    d_output: jax.Array,
) -> tuple[jax.Array, ...]:
    """Gradients to x, w_gate, w_up and w_down."""
    gates, ups = residuals

    def accumulate(arrays, sums, tile, weights):
        (d_x,), (d_w_gate, d_w_up, d_w_down) = arrays, sums
        w_gate, w_up, w_down = weights
        rows, gate, up = (tile.read(y) for y in (x, gates, ups))
        d_rows = tile.read_own(d_output).astype(x.dtype)
        d_hidden = _dot("mn,kn->mk", d_rows, w_down).astype(x.dtype)
        hidden, d_gate, d_up = swiglu.activate_backward(gate, up, d_hidden)
        d_x = tile.write(d_x, _dot("mn,kn->mk", d_gate, w_gate) + _dot("mn,kn->mk", d_up, w_up))
        return (d_x,), (
            d_w_gate + _dot("mk,mn->kn", rows, d_gate),
            d_w_up + _dot("mk,mn->kn", rows, d_up),
            d_w_down + _dot("mk,mn->kn", hidden, d_rows),
        )

    weights = w_gate, w_up, w_down
    (d_x,), d_weights = _fold(accumulate, group_sizes, x.shape[0], (jnp.zeros_like(x),), weights, summed=True)
    return d_x, *(d.astype(w.dtype) for d, w in zip(d_weights, weights, strict=True))


class _Tile(NamedTuple):
    """A slice of rows, some of which are the tile's own; int32 scalars besides the first two fields."""

    rows: int  # of the slice
    whole: bool  # all of them are the tile's own: nothing has to be masked
    start: jnp.ndarray  # of the slice
    first: jnp.ndarray  # rows [first, end) are the tile's own
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

    def _keep_own(self, rows, others):
        if self.whole:
            return rows
        index = self.start + jnp.arange(self.rows)
        return jnp.where(((index >= self.first) & (index < self.end))[:, None], rows, others)


def _tile_at(first, end, rows, num_rows, *, whole=False):
    # Dynamic slices clamp their start; clamping it here keeps the mask and the rows together.
    return _Tile(rows, whole, jnp.minimum(first, num_rows - rows), first, end)


def _fold(body, group_sizes, num_rows, arrays, weights, *, summed=False):
    """Folds `body` over tiles that cover every group.

    Args:
      body: (arrays, sums, tile, weights) -> (arrays, sums). Its weights and sums are those of the tile's group.
      arrays: carried whole.
      weights: [G, K, N] each.
      summed: whether there are sums: float32, one of the shape of each weight, 0 at first.

    Returns:
      (arrays, sums [G, K, N]).
    """
    sums = tuple(jnp.zeros(w.shape, jnp.float32) for w in weights) if summed else ()
    rows = min(num_rows, _tile_rows(num_rows, group_sizes.shape[0]))
    fold = _fold_groups if platform() == "cpu" and rows >= 128 else _fold_table
    return fold(body, group_sizes, rows, num_rows, arrays, weights, sums)


# Tiles of a group in `_fold_groups`: the size as a divisor of the largest, and whether the group fills all of them.
# What is left goes into smaller ones, which have fewer rows that are computed in vain.
_FALLING = ((1, True), (2, True), (8, False))


def _fold_groups(body, group_sizes, rows, num_rows, arrays, weights, sums):
    """One group after the other, so that its matrices and sums stay in the cache, in tiles of falling sizes."""
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    begins = ends - group_sizes
    occupied = jnp.argsort(group_sizes == 0, stable=True)

    def visit_group(index, carry):
        arrays, sums = carry
        group = occupied[index]
        own_weights = _own(weights, group)
        carry = arrays, tuple(jnp.zeros_like(s) for s in _own(sums, group))
        first, end = begins[group], ends[group]
        for divisor, whole in _FALLING:
            size = rows // divisor
            count = (end - first) // size if whole else cdiv(end - first, size)

            def visit(t, carry, first=first, size=size, whole=whole):
                return body(*carry, _tile_at(first + t * size, end, size, num_rows, whole=whole), own_weights)

            carry = lax.fori_loop(0, count, visit, carry)
            first = first + count * size
        arrays, own_sums = carry
        return arrays, _put(sums, own_sums, group)

    return lax.fori_loop(0, jnp.sum(group_sizes > 0), visit_group, (arrays, sums))


def _fold_table(body, group_sizes, rows, num_rows, arrays, weights, sums):
    """Tile after tile, from a table."""
    tiles = row_tiles.cover(group_sizes, num_rows, rows)
    table = tiles.group, tiles.start, tiles.end

    def visit(carry, columns):
        arrays, sums = carry
        group, first, end = columns
        tile = _tile_at(first, end, rows, num_rows)
        arrays, own_sums = body(arrays, _own(sums, group), tile, _own(weights, group))
        return (arrays, _put(sums, own_sums, group)), None

    carry = arrays, sums
    if platform() == "cpu":

        def step(t, carry):
            return visit(carry, tuple(column[t] for column in table))[0]

        return lax.fori_loop(0, tiles.used, step, carry)
    # A trip count known when compiling spares the accelerator a round trip to the host for each tile.
    return lax.scan(visit, carry, table)[0]


def _own(stacked, group):
    """The group's own of each [G, K, N]."""
    return tuple(lax.dynamic_index_in_dim(x, group, keepdims=False) for x in stacked)


def _put(stacked, own, group):
    return tuple(lax.dynamic_update_index_in_dim(x, y, group, 0) for x, y in zip(stacked, own, strict=True))


def _tile_rows(num_rows, groups):
    """A power of two that cuts a group of mean size into a few tiles.

    Larger tiles spend less on moving matrices, smaller ones less on rows computed in vain: at most an eighth of a tile
    a group on CPU, where the trip count is exact and the last tiles are smaller, and a whole one on accelerators.
    """
    tiles_per_group = 2 if platform() == "cpu" else 8
    return min(512, max(8, 1 << cdiv(num_rows, tiles_per_group * groups).bit_length() - 1))


def _dot(equation, a, b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
