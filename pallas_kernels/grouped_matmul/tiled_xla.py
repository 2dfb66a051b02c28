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

    def multiply(t, output):
        group, start, mine = tiles.at(t)
        rows = lax.dynamic_slice_in_dim(lhs, start, tiles.rows)
        weight = lax.dynamic_index_in_dim(rhs, group, keepdims=False)
        product = _dot("mk,kn->mn", rows, weight).astype(output.dtype)
        before = lax.dynamic_slice_in_dim(output, start, tiles.rows)
        return lax.dynamic_update_slice_in_dim(output, jnp.where(mine, product, before), start, 0)

    return lax.fori_loop(0, tiles.count, multiply, jnp.zeros((lhs.shape[0], rhs.shape[2]), lhs.dtype))


def backward(lhs, rhs, group_sizes, d_output):
    """Gradients to lhs and rhs."""
    d_output = d_output.astype(lhs.dtype)
    tiles = _plan(lhs.shape[0], group_sizes)

    def accumulate(t, gradients):
        d_lhs, d_rhs = gradients
        group, start, mine = tiles.at(t)
        rows = lax.dynamic_slice_in_dim(lhs, start, tiles.rows)
        d_rows = jnp.where(mine, lax.dynamic_slice_in_dim(d_output, start, tiles.rows), 0)
        weight = lax.dynamic_index_in_dim(rhs, group, keepdims=False)
        product = _dot("mn,kn->mk", d_rows, weight).astype(d_lhs.dtype)
        before = lax.dynamic_slice_in_dim(d_lhs, start, tiles.rows)
        d_lhs = lax.dynamic_update_slice_in_dim(d_lhs, jnp.where(mine, product, before), start, 0)
        d_weight = lax.dynamic_index_in_dim(d_rhs, group) + _dot("mk,mn->kn", rows, d_rows)
        return d_lhs, lax.dynamic_update_slice_in_dim(d_rhs, d_weight, group, 0)

    zeros = jnp.zeros_like(lhs), jnp.zeros(rhs.shape, jnp.float32)
    d_lhs, d_rhs = lax.fori_loop(0, tiles.count, accumulate, zeros)
    return d_lhs, d_rhs.astype(rhs.dtype)


class _Tiles(NamedTuple):
    rows: int  # of a tile
    count: int | jnp.ndarray  # tiles to visit
    group_ends: jnp.ndarray  # int32 [G], row behind the group
    tile_ends: jnp.ndarray  # int32 [G], tile behind the group
    last_start: int  # of a tile that lies inside the rows

    def at(self, t):
        """(group, first row, bool [m, 1] rows of the tile that are the group's) of tile t."""
        group = jnp.searchsorted(self.tile_ends, t, side="right").astype(jnp.int32)
        surplus = group >= self.group_ends.shape[0]
        group = jnp.minimum(group, self.group_ends.shape[0] - 1)
        first_tile = jnp.where(group > 0, self.tile_ends[group - 1], 0)
        first_row = jnp.where(group > 0, self.group_ends[group - 1], 0) + (t - first_tile) * self.rows
        # Dynamic slices clamp their start; clamping it here keeps the mask and the rows together.
        start = jnp.minimum(first_row, self.last_start)
        index = start + jnp.arange(self.rows)
        mine = (index >= first_row) & (index < self.group_ends[group]) & ~surplus
        return group, start, mine[:, None]


def _plan(num_rows, group_sizes):
    groups = group_sizes.shape[0]
    rows = min(num_rows, _tile_rows(num_rows, groups))
    tile_ends = jnp.cumsum((group_sizes + rows - 1) // rows, dtype=jnp.int32)
    if platform() == "cpu":
        count = tile_ends[-1]
    else:
        # A trip count known when compiling spares the accelerator a round trip to the host for each tile.
        # At most min(G, R) groups have rows, and each leaves at most one tile partly filled.
        occupied = min(groups, num_rows)
        count = occupied + (num_rows - occupied) // rows
    return _Tiles(rows, count, jnp.cumsum(group_sizes, dtype=jnp.int32), tile_ends, num_rows - rows)


def _tile_rows(num_rows, groups):
    """A power of two that leaves a group of mean size about eight tiles: few rows are computed in vain."""
    return min(512, max(8, 1 << cdiv(num_rows, 8 * groups).bit_length() - 1))


def _dot(equation, a, b):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
