"""Grouped matrix products on TPU by jax's own kernels, megablox: `gmm` for rows, `tgmm` for gradients to matrices.

Both walk over tiles of `m` rows that lie at multiples of `m`, so a tile in which groups meet is visited once for each
of them: at most one visit a group more than there are tiles. Rows behind the last group are not visited and hold
anything until they are zeroed here.

What a product costs follows from its tile (m, k, n). With `k` the whole contraction, `gmm` reads a matrix once, however
many tiles its group has, and the rows once for every `n` columns; with less, a matrix anew in every visit. `tgmm`
writes a gradient once, and reads the rows once for every `n` columns on one side and every `k` on the other.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import block_sizes
from pallas_kernels.grouped_matmul import swiglu
from pallas_kernels.platform import cdiv, interpret, platform

_LANES = 128
_SUBLANES = 16  # rows of a packed bfloat16 tile
_DTYPES = (jnp.bfloat16, jnp.float32)
_TILE_ROWS = (128, 256, 512)  # fewer than 128 rows take the matrix unit as long as 128
_VMEM_BYTES = 31 << 19  # of the 16 MiB that a kernel gets by default on the chip that gives least
_CANDIDATES = 24  # that tuning measures
_FLOPS_PER_BYTE = 240  # of TPU v5e; v5p has 166, v6e 560, tpu7x 310


def check(lhs: Any, rhs: Any) -> None:
    """Serves widths that are multiples of 128 in bfloat16 and float32, on TPU and interpreted on the CPU."""
    depth, columns = lhs.shape[-1], rhs.shape[-1]
    if platform() not in ("cpu", "tpu"):
        raise _refusal(f"platform {platform()}", "tpu, and cpu by interpretation")
    if lhs.dtype not in _DTYPES:
        raise _refusal(f"dtype {lhs.dtype}", "bfloat16 and float32")
    if depth % _LANES or columns % _LANES:
        raise _refusal(f"widths {depth} and {columns}", f"widths that are multiples of {_LANES}")


def _refusal(what, served):
    return NotImplementedError(f"megablox cannot serve {what}: it serves {served}; 'tiled_xla' serves every shape")


def forward(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`."""
    return _zero_surplus(_rows(lhs, rhs, group_sizes), group_sizes)


def backward(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, d_output: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients to lhs and rhs."""
    d_output = d_output.astype(lhs.dtype)
    d_lhs = _rows(d_output, rhs, group_sizes, transposed=True)
    return _zero_surplus(d_lhs, group_sizes), _columns(lhs, d_output, group_sizes)


def swiglu_forward(
    x: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array, group_sizes: jax.Array, *, differentiated: bool
) -> tuple[jax.Array, Any]:
    """See `api.grouped_swiglu`; returns (output, residuals of the backward).

    Surplus rows of the residuals hold anything: they reach no row but themselves, and no gradient of a matrix.
    """
    del differentiated  # the residuals are arrays on the way
    gate, up = (_rows(x, w, group_sizes) for w in (w_gate, w_up))
    return forward(swiglu.activate(gate, up), w_down, group_sizes), (gate, up)


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
    d_output = d_output.astype(x.dtype)
    d_hidden = _rows(d_output, w_down, group_sizes, transposed=True)
    hidden, d_gate, d_up = swiglu.activate_backward(*residuals, d_hidden=d_hidden)
    by_gate, by_up = (
        _rows(d, w, group_sizes, transposed=True).astype(jnp.float32) for d, w in ((d_gate, w_gate), (d_up, w_up))
    )
    d_x = _zero_surplus((by_gate + by_up).astype(x.dtype), group_sizes)
    return d_x, *(_columns(a, b, group_sizes) for a, b in ((x, d_gate), (x, d_up), (hidden, d_output)))


def _zero_surplus(x, group_sizes):
    used = jnp.arange(x.shape[0]) < jnp.sum(group_sizes)
    return jnp.where(used[:, None], x, 0)


def _rows(lhs, rhs, group_sizes, *, transposed=False):
    """Rows of group g times rhs[g], or its transpose: [R, N] in the dtype of lhs, anything in surplus rows."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    columns = rhs.shape[1 if transposed else 2]
    tile = _choose("rows transposed" if transposed else "rows", _rows_tiles, lhs, columns, group_sizes)
    with _precision(lhs.dtype):
        output = gmm(
            _pad_rows(lhs, tile.rows),
            rhs,
            group_sizes,
            lhs.dtype,
            tuple(tile),
            transpose_rhs=transposed,
            interpret=interpret(),
        )
    return output[: lhs.shape[0]]


def _columns(lhs, rhs, group_sizes):
    """lhs[rows of g]^T @ rhs[rows of g] for each group g: [G, K, N]."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tile = _choose("columns", _columns_tiles, lhs, rhs.shape[1], group_sizes)
    lhs, rhs = (_pad_rows(x, tile.rows) for x in (lhs, rhs))
    with _precision(lhs.dtype):
        return tgmm(lhs.T, rhs, group_sizes, lhs.dtype, tuple(tile), interpret=interpret())


def _pad_rows(x, multiple):
    return jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0)))


def _precision(dtype):
    """megablox leaves the precision of its products to the context, which may ask bfloat16 for what the MXU lacks."""
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


class Tile(NamedTuple):
    """Block sizes that one step of a kernel multiplies."""

    rows: int
    depth: int  # `gmm`: of the contraction; `tgmm`: of the columns of lhs
    columns: int


def _choose(kernel, tiles_of, lhs, columns, group_sizes) -> Tile:
    """The tile that was measured, or the first of `tiles_of`."""
    num_rows, depth = lhs.shape
    groups = group_sizes.shape[0]
    shape = dict(rows=num_rows, depth=depth, columns=columns, groups=groups, dtype=lhs.dtype.name)

    def tiles(vmem_bytes):
        return [tile._asdict() for tile in tiles_of(num_rows, depth, columns, groups, lhs.dtype.itemsize, vmem_bytes)]

    return Tile(
        **block_sizes.choose(
            "grouped_matmul",
            "megablox",
            kernel,
            shape,
            candidates=lambda: tiles(2 * _VMEM_BYTES)[:_CANDIDATES],  # some chips give a kernel 32 MiB
            heuristic=lambda: tiles(_VMEM_BYTES)[0],
        )
    )


def _rows_tiles(num_rows, depth, columns, groups, itemsize, vmem_bytes) -> list[Tile]:
    """The tiles of `gmm` that fit, those with the least bytes and products first."""
    occupied = min(groups, num_rows)

    def fits(tile):
        areas = tile.rows * tile.depth, tile.depth * tile.columns, tile.rows * tile.columns
        return _vmem_bytes(tile, *areas, itemsize) <= vmem_bytes

    def cost(tile):
        visits = _visits(num_rows, tile.rows, occupied)
        whole = tile.depth == depth
        lhs = columns // tile.columns * (cdiv(num_rows, tile.rows) if whole else visits) * tile.rows * depth
        rhs = (occupied if whole else visits) * depth * columns
        return itemsize * (lhs + rhs) + _product_cost(visits, tile.rows, depth, columns)

    return sorted(filter(fits, _tiles(num_rows, depth, columns)), key=cost)


def _columns_tiles(num_rows, depth, columns, groups, itemsize, vmem_bytes) -> list[Tile]:
    """The tiles of `tgmm` that fit, those with the least bytes and products first."""

    def fits(tile):
        areas = tile.rows * tile.depth, tile.rows * tile.columns, tile.depth * tile.columns
        return _vmem_bytes(tile, *areas, itemsize) <= vmem_bytes

    def cost(tile):
        read = num_rows * depth * (columns // tile.columns) + num_rows * columns * (depth // tile.depth)
        return itemsize * read + _product_cost(_visits(num_rows, tile.rows, groups), tile.rows, depth, columns)

    return sorted(filter(fits, _tiles(num_rows, depth, columns)), key=cost)


def _vmem_bytes(tile, lhs, rhs, result, itemsize):
    """At least what the compiler allots, found by compiling: arrays in two buffers, float32 sums, and copies.

    Args:
      lhs, rhs, result: numbers in the blocks of these.
    """
    copies = 1 if itemsize == 2 else 5  # float32 is multiplied in bfloat16 parts
    blocks = 2 * itemsize * (lhs + rhs + result) + 4 * result
    return blocks + itemsize * (copies * lhs + tile.rows * tile.columns)


def _tiles(num_rows, depth, columns):
    """Those that divide the widths, large ones first."""
    rows = [m for m in _TILE_ROWS if m <= num_rows] or [min(_LANES, cdiv(num_rows, _SUBLANES) * _SUBLANES)]
    widths = ([w for w in range(size, 0, -_LANES) if size % w == 0] for size in (depth, columns))
    return itertools.starmap(Tile, itertools.product(rows, *widths))


def _visits(num_rows, tile_rows, groups):
    return cdiv(num_rows, tile_rows) + groups - 1


def _product_cost(visits, tile_rows, depth, columns):
    """In bytes that the chip could have moved meanwhile."""
    return 2 * visits * max(tile_rows, _LANES) * depth * columns / _FLOPS_PER_BYTE
