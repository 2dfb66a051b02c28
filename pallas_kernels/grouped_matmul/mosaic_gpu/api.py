"""Grouped matrix products on NVIDIA Hopper, as two persistent Pallas Mosaic GPU kernels.

Both walk tiles of their output. One group of threads of a program keeps a ring of shared memory filled by TMA, also
across tiles; the workers multiply on the tensor cores, each 64 rows of a tile, and accumulate in registers. A program
that is done takes the next tile from a counter: tiles of few rows are faster, and programs that read the same matrix
have to stay together for it to be in the L2 cache.

- `_multiply_rows`: rows of a group times its matrix, for the forward and for the gradient to the rows. Gate and up
  of an expert are two products of one kernel, activated where they leave the registers.
- `_multiply_columns`: the gradient to the matrices, rows^T @ rows over the rows of each group.

TMA reads and writes swizzled blocks at rows that are multiples of 8, so the first block of a group may begin with
rows of the group before it, and its last one end with rows of the next: they are left out where a block is written,
and zeroed in the left factor where it is summed over.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import block_sizes, mosaic_gpu_common
from pallas_kernels.grouped_matmul import row_tiles, swiglu
from pallas_kernels.platform import interpret

ALIGNMENT = 8  # rows of a swizzled block
ROWS = 64  # of one worker: the rows of a wgmma
DEPTH = 64  # of the contraction in one step of the ring; 128 bytes, which is a row of the swizzle
PIECE = 64  # columns that leave a worker at once
PANEL = 8  # column tiles that are visited before the next row tile, for the L2 cache
CLAIMS = 8  # tiles that the loading threads can be ahead of the others
INTERPRETED_PROGRAMS = 2
# Of few tokens: choices that a kernel reads one by one, and groups that it marks in the bits of an integer.
MOST_CHOICES, MOST_CHOSEN_GROUPS = 128, 32


def check(lhs, rhs):
    """Raises NotImplementedError where the kernels cannot serve."""
    mosaic_gpu_common.check("grouped_matmul", lhs.dtype, fallback="tiled_xla")
    if lhs.shape[-1] % DEPTH or rhs.shape[-1] % DEPTH:
        raise NotImplementedError(
            f"mosaic_gpu serves widths that are multiples of {DEPTH}, got {lhs.shape[-1]} and {rhs.shape[-1]}; "
            f"'tiled_xla' serves every width"
        )


def forward(lhs, rhs, group_sizes):
    """See `api.grouped_matmul`."""
    return _rows([(lhs, [rhs])], group_sizes)[0]


def backward(lhs, rhs, group_sizes, d_output):
    """Gradients to lhs and rhs."""
    d_output = d_output.astype(lhs.dtype)
    (d_lhs,) = _rows([(d_output, [rhs])], group_sizes, transposed=True)
    return d_lhs, _columns(lhs, d_output, group_sizes)


def swiglu_forward(x, w_gate, w_up, w_down, group_sizes, *, differentiated):
    """See `api.grouped_swiglu`; returns (output, residuals of the backward)."""
    finish = _activate_and_keep if differentiated else _activate
    hidden, *residuals = _rows([(x, [w_gate, w_up])], group_sizes, finish=finish)
    return forward(hidden, w_down, group_sizes), residuals


def swiglu_backward(x, w_gate, w_up, w_down, group_sizes, residuals, d_output):
    """Gradients to x, w_gate, w_up and w_down."""
    d_output = d_output.astype(x.dtype)
    # The activation is left to XLA: in the epilogue of this product, with gate and up brought by the ring, it took as
    # long, and registers to spill.
    (d_hidden,) = _rows([(d_output, [w_down])], group_sizes, transposed=True)
    hidden, d_gate, d_up = swiglu.activate_backward(*residuals, d_hidden)
    (d_x,) = _rows([(d_gate, [w_gate]), (d_up, [w_up])], group_sizes, transposed=True)
    return d_x, *(_columns(a, b, group_sizes) for a, b in ((x, d_gate), (x, d_up), (hidden, d_output)))


def serves_few_tokens(x, chosen, w_gate):
    """Whether one tile of rows holds all tokens, and a kernel can find the chosen groups by itself."""
    tokens = x.shape[0]
    return tokens <= ROWS and tokens * chosen <= MOST_CHOICES and w_gate.shape[0] <= MOST_CHOSEN_GROUPS


def few_tokens_swiglu(x, ranking, chosen, w_gate, w_up, w_down):
    """See `api.few_tokens_swiglu`.

    A group that any token has chosen takes all of them, for a tile of rows has room for them; so there is no order, no
    table and no copy of rows, each a kernel of its own. Matrices that nobody has chosen are not read.
    """
    multiply = functools.partial(_multiply_tokens, ranking=ranking, chosen=chosen, interpreted=interpret())
    hidden = multiply(x, [w_gate, w_up], finish=_activate)
    output = multiply(hidden, [w_down], finish=_as_it_is).reshape(-1, ROWS, x.shape[1])
    if x.shape[0] == 1:
        return output[:, 0][None]
    return output[ranking[:, :chosen], jnp.arange(x.shape[0])[:, None]]


# What becomes of the sums of a piece of rows, float32, before they are rounded and written.
def _as_it_is(total):
    return (total,)


def _activate(gate, up):
    return (swiglu.activate(gate, up),)


def _activate_and_keep(gate, up):
    return swiglu.activate(gate, up), gate, up


# Jitted, so that the calls of a model's layers are traced and lowered once: a kernel takes a second of it.
def _rows(terms, group_sizes, *, transposed=False, finish=_as_it_is):
    return _multiply_rows(terms, group_sizes, transposed=transposed, finish=finish, interpreted=interpret())


def _columns(lhs, rhs, group_sizes):
    return _multiply_columns(lhs, rhs, group_sizes, interpreted=interpret())


class _Tiling(NamedTuple):
    workers: int
    columns: int
    stages: int


def _tiling(kernel, shape, workers, tiles_of, *, matrices=1):
    """The measured tile, or the widest that leaves no multiprocessor without one: 128 x 256 needs the fewest bytes.

    Args:
      kernel, shape: for `block_sizes.choose`; the shape has the columns of the result.
      tiles_of: from (rows, columns) of a tile to the number of tiles.
      matrices: how many products a tile is of, side by side in the registers of a worker.
    """
    widths = [width for width in (256, 128, 64) if width * matrices <= 256 and shape["columns"] % width == 0]

    def fills_the_card(width):
        return tiles_of(workers * ROWS, width) >= mosaic_gpu_common.MULTIPROCESSORS

    width = block_sizes.choose(
        "grouped_matmul", "mosaic_gpu", kernel, shape,
        candidates=lambda: [dict(columns=width) for width in widths],
        heuristic=lambda: dict(columns=next(filter(fills_the_card, widths), widths[-1])),
    )["columns"]  # fmt: skip
    stage = (workers * ROWS + matrices * width) * DEPTH * 2
    spared = workers * 2 * ROWS * PIECE * 2 + 2048  # outputs on their way, barriers
    return _Tiling(workers, width, min(8, (mosaic_gpu_common.SHARED_MEMORY - spared) // stage))


class _RowTile(NamedTuple):
    """Rows of one group, int32 ()."""

    group: jax.Array
    source: jax.Array  # its first row in the left factors, a multiple of 8
    target: jax.Array  # its first row in the results, too
    first: jax.Array  # [first, last) of its rows are the group's
    last: jax.Array


@functools.partial(jax.jit, static_argnames=("transposed", "finish", "interpreted"))
def _multiply_rows(terms, group_sizes, *, transposed, finish, interpreted):
    """finish(sum_i lhs_i @ rhs_i[0][g], sum_i lhs_i @ rhs_i[1][g], ...) for the rows of group g.

    Args:
      terms: pairs (lhs_i [R, K], rhs_i: matrices [G, K, N], or [G, N, K] if `transposed`).
      finish: from float32 sums to a tuple of results. 0 gives 0.

    Returns:
      [R, N] for each result.
    """
    real_rows = terms[0][0].shape[0]
    terms = [(_whole_blocks(lhs), rhs) for lhs, rhs in terms]
    num_rows = terms[0][0].shape[0]
    groups = group_sizes.shape[0]
    occupied = min(groups, num_rows)
    # Few rows, as in decoding, read the matrices once whatever the tile, and all tiles take as long.
    workers = 1 if num_rows <= ROWS * groups else 2
    tiling = _row_tiling(
        terms, num_rows, workers, lambda rows: occupied + (num_rows - occupied) // rows, transposed=transposed
    )
    table = _row_tiles(group_sizes, num_rows, workers * ROWS)

    from jax.experimental import pallas as pl

    def find(table_ref):
        def tile_of(row):
            group, start, first, last = (table_ref[row, i] for i in range(4))
            start = pl.multiple_of(start, ALIGNMENT)
            return _RowTile(group, start, start, first, last)

        return table_ref[0, 4], tile_of

    outputs = _multiply_tiles(
        terms, table, find, tiling, out_rows=num_rows, most_tiles=table.shape[0], transposed=transposed, finish=finish,
        interpreted=interpreted,
    )  # fmt: skip
    return [x[:real_rows] for x in outputs]


def _row_tiling(terms, num_rows, workers, row_tiles_of, *, transposed=False):
    """`_tiling` of the product of rows with one matrix of each group, or several."""
    (lhs, matrices), *_ = terms
    groups, columns = matrices[0].shape[0], matrices[0].shape[1 if transposed else 2]
    name = ("rows, activated" if len(matrices) > 1 else "rows") + (", transposed" if transposed else "")
    return _tiling(
        name, dict(rows=num_rows, depth=lhs.shape[1], columns=columns, groups=groups), workers,
        lambda rows, width: row_tiles_of(rows) * columns // width, matrices=len(matrices),
    )  # fmt: skip


def _multiply_tiles(terms, found_in, find, tiling, *, out_rows, most_tiles, transposed=False, finish, interpreted):
    """The products of `_multiply_rows` for tiles of rows that the kernel finds.

    Args:
      found_in: an array that tells the tiles.
      find: from its ref to (how many tiles of rows there are, a function from the number of one to its `_RowTile`).
      out_rows: of the results; those that no tile covers hold anything.
      most_tiles: of rows.
    """
    (lhs, matrices), *_ = terms
    dtype, depth = lhs.dtype, lhs.shape[1]
    groups, columns = matrices[0].shape[0], matrices[0].shape[1 if transposed else 2]
    tile_rows, width = tiling.workers * ROWS, tiling.columns
    steps, column_tiles = depth // DEPTH, columns // width
    arrays, structure = jax.tree.flatten(terms)

    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    piece = jax.ShapeDtypeStruct((ROWS, PIECE), jnp.float32)
    results = len(jax.eval_shape(finish, *[piece] * len(matrices)))

    def kernel(found_in_ref, *refs):
        term_refs = structure.unflatten(refs[: len(arrays)])
        out_refs, scratch = refs[len(arrays) :][:results], refs[len(arrays) + results :]
        lhs_smem, rhs_smem, *_ = scratch
        worker = lax.axis_index("thread")
        row_tiles, tile_of = find(found_in_ref)

        def locate(index):
            row, column = plgpu.planar_snake(index, (row_tiles, column_tiles), 1, min(PANEL, column_tiles))
            group, source, target, first, last = tile_of(row)
            here = jnp.where(group < groups, len(terms) * steps, 0)  # rows behind the last group are 0
            own = _inside(first, last, worker)
            return here, own, (group, source, target, pl.multiple_of(column * width, PIECE))

        def load(where, step, slot, barrier):
            group, start, _, column = where
            for i, (lhs_ref, rhs_refs) in enumerate(term_refs):

                @pl.when(step // steps == i)
                def _(i=i, lhs_ref=lhs_ref, rhs_refs=rhs_refs):
                    inner = pl.ds((step - i * steps) * DEPTH, DEPTH)
                    outer = pl.ds(column, width)
                    plgpu.copy_gmem_to_smem(lhs_ref.at[pl.ds(start, tile_rows), inner], lhs_smem.at[slot], barrier)
                    for ref, smem in zip(rhs_refs, rhs_smem, strict=True):
                        own = ref.at[(group, outer, inner) if transposed else (group, inner, outer)]
                        plgpu.copy_gmem_to_smem(own, smem.at[slot], barrier)

        def multiply(sums, where, step, slot):
            own_rows = pl.ds(pl.multiple_of(worker * ROWS, ROWS), ROWS)
            for total, smem in zip(sums, rhs_smem, strict=True):
                matrix = smem.at[slot]
                plgpu.wgmma(total, lhs_smem.at[slot, own_rows], matrix.transpose((1, 0)) if transposed else matrix)

        def destination(result, where, p, first, rows):
            _, _, start, column = where
            own = pl.ds(start + worker * ROWS + first, rows), pl.ds(column + p * PIECE, PIECE)
            return out_refs[result].at[own]

        _walk(
            tiling, row_tiles * column_tiles, scratch, locate, load, multiply, destination, finish,
            shared=tiling.workers > 1 and _shared(most_tiles * column_tiles, interpreted),
        )  # fmt: skip

    return _call(
        kernel, (found_in, *arrays), [jax.ShapeDtypeStruct((out_rows, columns), dtype)] * results, tiling,
        lhs_block=(tile_rows, DEPTH), rhs_block=(width, DEPTH) if transposed else (DEPTH, width),
        matrices=len(matrices), interpreted=interpreted,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("chosen", "finish", "interpreted"))
def _multiply_tokens(lhs, matrices, *, ranking, chosen, finish, interpreted):
    """finish(lhs @ matrices[0][g], ...) for every group g that is among the first `chosen` of a row of `ranking`.

    Args:
      lhs: [R, K], the tokens, or what this gave for them.
      matrices: each [G, K, N].

    Returns:
      [S * ROWS, N]. The tokens' rows for group g begin at g * ROWS; for the i-th choice of a single token at i * ROWS.
      The other rows hold anything.
    """
    tokens = ranking.shape[0]
    groups = matrices[0].shape[0]
    slots = chosen if tokens == 1 else groups
    occupied = min(groups, tokens * chosen)
    same_for_all = lhs.shape[0] == tokens
    terms = [(_whole_blocks(lhs) if same_for_all else lhs, matrices)]
    tiling = _row_tiling(terms, tokens * chosen, 1, lambda rows: occupied)

    from jax.experimental import pallas as pl

    def find(ranking_ref):
        count, group_of = _chosen_groups(ranking_ref, chosen, groups)

        def tile_of(number):
            group = group_of(number)
            slot = number if tokens == 1 else group
            # Not a plain 0: a constant slice may not reach behind an array, where TMA reads 0.
            source = slot * (0 if same_for_all else ROWS)
            return _RowTile(group, pl.multiple_of(source, ALIGNMENT), slot * ROWS, 0, tokens)

        return count, tile_of

    (output,) = _multiply_tiles(
        terms, ranking, find, tiling, out_rows=slots * ROWS, most_tiles=occupied, finish=finish, interpreted=interpreted
    )
    return output


def _chosen_groups(ranking_ref, chosen, groups):
    """(how many groups are among the first `chosen` of the rows, a function from a number below it to such a group).

    Those of a single row are in its order.
    """
    if ranking_ref.shape[0] == 1:
        return jnp.int32(chosen), lambda number: ranking_ref[0, number]
    marks = jnp.int32(0)
    # Unrolled, so that no read waits for the one before.
    for row, choice in itertools.product(range(ranking_ref.shape[0]), range(chosen)):
        marks |= 1 << ranking_ref[row, choice]

    def group_of(number):
        rest = lax.fori_loop(0, number, lambda _, rest: rest & (rest - 1), marks)  # without the lowest mark
        return 31 - lax.clz(rest & -rest)

    return sum((marks >> group) & 1 for group in range(groups)), group_of


@functools.partial(jax.jit, static_argnames="interpreted")
def _multiply_columns(lhs, rhs, group_sizes, *, interpreted):
    """lhs[rows of g]^T @ rhs[rows of g] for each group g. lhs: [R, K], rhs: [R, N]; returns [G, K, N]."""
    lhs, rhs = _whole_blocks(lhs), _whole_blocks(rhs)
    depth, columns = lhs.shape[1], rhs.shape[1]
    groups = group_sizes.shape[0]
    workers = 1 if depth % (2 * ROWS) else 2
    tiling = _tiling(
        "columns", dict(rows=lhs.shape[0], depth=depth, columns=columns, groups=groups), workers,
        lambda rows, width: groups * depth // rows * columns // width,
    )  # fmt: skip
    tile_rows, width = tiling.workers * ROWS, tiling.columns
    row_tiles, column_tiles = depth // tile_rows, columns // width
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    bounds = jnp.stack([ends - group_sizes, ends], axis=1)

    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def kernel(bounds_ref, lhs_ref, rhs_ref, out_ref, *scratch):
        lhs_smem, (rhs_smem,), *_ = scratch
        worker = lax.axis_index("thread")

        def locate(index):
            group, inside = index // (row_tiles * column_tiles), index % (row_tiles * column_tiles)
            row, column = plgpu.planar_snake(inside, (row_tiles, column_tiles), 1, min(PANEL, column_tiles))
            begin, end = bounds_ref[group, 0], bounds_ref[group, 1]
            start = pl.multiple_of(lax.div(begin, ALIGNMENT) * ALIGNMENT, ALIGNMENT)
            steps = lax.div(end - start + DEPTH - 1, DEPTH)
            corner = pl.multiple_of(row * tile_rows, ROWS), pl.multiple_of(column * width, PIECE)
            used = bounds_ref[groups - 1, 1] - start  # rows of any group, from `start` on
            return steps, (0, ROWS), (group, start, begin - start, end - start, used, *corner)

        def load(where, step, slot, barrier):
            _, start, _, _, _, row, column = where
            inner = pl.ds(start + step * DEPTH, DEPTH)
            plgpu.copy_gmem_to_smem(lhs_ref.at[inner, pl.ds(row, tile_rows)], lhs_smem.at[slot], barrier)
            plgpu.copy_gmem_to_smem(rhs_ref.at[inner, pl.ds(column, width)], rhs_smem.at[slot], barrier)

        def multiply(sums, where, step, slot):
            _, _, first, last, used, *_ = where
            own = lhs_smem.at[slot, :, pl.ds(pl.multiple_of(worker * ROWS, ROWS), ROWS)]
            first, last = _inside(first, last, step)

            def clear_other_rows(part):
                values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
                part[...] = jnp.where((row >= first) & (row < last), values, jnp.zeros_like(values))

            @pl.when((first > 0) | (last < DEPTH))
            def _():
                clear_other_rows(own)
                plgpu.commit_smem()

            @pl.when(used - step * DEPTH < DEPTH)
            def _():
                # Rows of no group may hold what is not a number, which 0 does not clear. The workers write the same.
                for c in range(0, width, PIECE):
                    clear_other_rows(rhs_smem.at[slot, :, pl.ds(c, PIECE)])
                plgpu.commit_smem()

            plgpu.wgmma(sums[0], own.transpose((1, 0)), rhs_smem.at[slot])

        def destination(_, where, p, first, rows):
            group, _, _, _, _, row, column = where
            own = pl.ds(row + worker * ROWS + first, rows), pl.ds(column + p * PIECE, PIECE)
            return out_ref.at[(group, *own)]

        tiles = groups * row_tiles * column_tiles
        _walk(
            tiling, tiles, scratch, locate, load, multiply, destination, _as_it_is,
            shared=_shared(tiles, interpreted),
        )  # fmt: skip

    (output,) = _call(
        kernel, (bounds, lhs, rhs), [jax.ShapeDtypeStruct((groups, depth, columns), lhs.dtype)], tiling,
        lhs_block=(DEPTH, tile_rows), rhs_block=(DEPTH, width), interpreted=interpreted,
    )  # fmt: skip
    return output


def _shared(tiles, interpreted):
    """Whether programs share the tiles by a counter. To make it 0 is a kernel of its own, too much for few tiles."""
    return tiles > 2 * mosaic_gpu_common.MULTIPROCESSORS and not interpreted  # the interpreter has no such instruction


def _whole_blocks(rows):
    """[R, N] with rows of no group behind it: TMA divides an array in whole swizzled blocks, or into a part of one."""
    missing = -rows.shape[0] % ALIGNMENT if rows.shape[0] > ALIGNMENT else 0
    return jnp.pad(rows, ((0, missing), (0, 0))) if missing else rows


def _row_tiles(group_sizes, num_rows, tile_rows):
    """Tiles of rows that cover every group and begin at multiples of 8.

    Returns:
      int32 [tiles, 5]: group, first row, the part [first, last) of the tile that is the group's, and how many tiles
      are used, the same in every row: an array of its own would take a kernel of its own. The rows behind the last
      group are a group of their own, number G.
    """
    sizes = jnp.append(group_sizes, num_rows - jnp.sum(group_sizes, dtype=jnp.int32))
    tiles = row_tiles.cover(sizes, num_rows, tile_rows, alignment=ALIGNMENT)
    first = jnp.maximum(tiles.begin - tiles.start, 0)
    last = jnp.minimum(tiles.end - tiles.start, tile_rows)
    used = jnp.broadcast_to(tiles.used, first.shape)
    return jnp.stack([tiles.group, tiles.start, first, last, used], axis=1)


def _inside(first, last, block):
    """The part of block number `block` of ROWS rows that lies in [first, last), as offsets in the block."""
    return tuple(jnp.clip(bound - block * ROWS, 0, ROWS) for bound in (first, last))


def _walk(tiling, tiles, scratch, locate, load, multiply, destination, finish, *, shared):
    """What a thread of a program does: fill the ring, or multiply and write.

    Args:
      tiles: int32 (), tiles of all programs together.
      scratch: as `_call` makes it.
      locate: from the index of a tile to (steps, (first, last) of this worker's rows that are written, where).
      load(where, step, slot, barrier): starts the copies of a step.
      multiply(sums, where, step, slot): starts the products of a step.
      destination(result, where, p, first, rows): the part of a result for `rows` rows of piece p of this worker.
      finish: from a piece of the sums to a tuple of results.
      shared: whether programs take tiles from a counter, or in turns.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    _, rings, (whole, partial), full, free, claims, claimed, seen = scratch
    thread = lax.axis_index("thread")
    counter = pl.get_global(plgpu.SemaphoreType.REGULAR((1,))) if shared else None
    pieces = tiling.columns // PIECE

    def slot_of(step):
        return lax.rem(step, tiling.stages)

    def release(step):
        plgpu.barrier_arrive(free.at[slot_of(step)])

    def claim(number):
        """Puts the tile that is this program's `number`th where the workers find it, too."""
        slot = lax.rem(number, CLAIMS)

        @pl.when(number >= CLAIMS)
        def _():
            plgpu.barrier_wait(seen.at[slot])

        if shared:
            mosaic_gpu_common.fetch_and_add_one(counter, claims.at[pl.ds(slot, 1)])
        else:
            claims[slot] = lax.axis_index("program") + number * lax.axis_size("program")
        plgpu.barrier_arrive(claimed.at[slot])

    def claimed_tile(number):
        slot = lax.rem(number, CLAIMS)
        plgpu.barrier_wait(claimed.at[slot])
        return claims[slot]

    def for_each(take, one_tile):
        """one_tile(tile, begun) for take(0), take(1), ...; it adds to `begun` the slots of the ring that it went on."""

        def body(carry):
            number, tile, begun = carry
            begun = one_tile(tile, begun)
            return number + 1, take(number + 1), begun

        zero = jnp.int32(0)
        lax.while_loop(lambda carry: carry[1] < tiles, body, (zero, take(zero), zero))

    def fill():
        plgpu.set_max_registers(mosaic_gpu_common.LOADER_REGISTERS, action="decrease")

        def take(number):
            claim(number)
            return claimed_tile(number)

        def one_tile(tile, begun):
            steps, _, where = locate(tile)

            def one_step(step, _):
                slot = slot_of(begun + step)

                @pl.when(begun + step >= tiling.stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                load(where, step, slot, full.at[slot])

            lax.fori_loop(0, steps, one_step, None)
            return begun + steps

        for_each(take, one_tile)

    def work():
        plgpu.set_max_registers(mosaic_gpu_common.worker_registers(tiling.workers), action="increase")

        def take(number):
            tile = claimed_tile(number)
            plgpu.barrier_arrive(seen.at[lax.rem(number, CLAIMS)])
            return tile

        def one_tile(tile, begun):
            steps, rows, where = locate(tile)

            def products(*sums):
                def one_step(step, _):
                    plgpu.barrier_wait(full.at[slot_of(begun + step)])
                    multiply(sums, where, step, slot_of(begun + step))
                    plgpu.wgmma_wait(len(sums))  # those of this step go on

                    @pl.when(step > 0)
                    def _():
                        release(begun + step - 1)

                lax.fori_loop(0, steps, one_step, None)
                plgpu.wgmma_wait(0)

                @pl.when(steps > 0)
                def _():
                    release(begun + steps - 1)

                return [total[...] for total in sums]

            def compute():
                accumulator = plgpu.ACC((ROWS, tiling.columns), jnp.float32)
                write(pl.run_scoped(products, *[accumulator] * len(rings)), rows, where)

            def idle():
                def one_step(step, _):
                    plgpu.barrier_wait(full.at[slot_of(begun + step)])
                    release(begun + step)

                lax.fori_loop(0, steps, one_step, None)

            lax.cond(rows[0] < rows[1], compute, idle)
            return begun + steps

        for_each(take, one_tile)
        plgpu.wait_smem_to_gmem(0)

    def write(sums, rows, where):
        def results():
            """(result, piece, its values), which leave by the two slots in turns."""
            for p in range(pieces):
                columns = slice(p * PIECE, (p + 1) * PIECE)
                for result, values in enumerate(finish(*(total[:, columns] for total in sums))):
                    yield result, p, values.astype(whole.dtype)

        begin, end = rows
        count = end - begin

        def let_all_leave():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.when(count < ROWS)(let_all_leave)  # the two kinds of slots lie in the same memory
        for i, (result, p, values) in enumerate(results()):
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # what was in this slot has left

            @pl.when(count == ROWS)
            def _(i=i, result=result, p=p, values=values):
                slot = whole.at[thread, i % 2]
                slot[...] = values
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(slot, destination(result, where, p, 0, ROWS))

            @pl.when(count < ROWS)
            def _(i=i, result=result, p=p, values=values):
                slot = partial.at[thread, i % 2]
                slot[...] = values
                plgpu.commit_smem()
                # A copy has a fixed number of rows: one copy for each binary digit.
                for digit in range(ROWS.bit_length() - 2, -1, -1):
                    first = begin + (count >> (digit + 1) << (digit + 1))

                    @pl.when(count & (1 << digit) != 0)
                    def _(first=first, length=1 << digit):
                        source, target = slot.at[pl.ds(first, length)], destination(result, where, p, first, length)
                        plgpu.copy_smem_to_gmem(source, target, commit_group=False)

                plgpu.commit_smem_to_gmem_group()

        pl.when(count < ROWS)(let_all_leave)

    lax.cond(thread == tiling.workers, fill, work)


def _call(kernel, operands, outputs, tiling, *, lhs_block, rhs_block, matrices=1, interpreted):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    dtype = outputs[0].dtype

    def ring(block):
        return plgpu.SMEM((tiling.stages, *block), dtype, transforms=mosaic_gpu_common.swizzled())

    leaving = (tiling.workers, 2, ROWS, PIECE)
    # A piece of fewer rows than 8 cannot be cut out of a swizzled block.
    leaving = plgpu.SMEM(leaving, dtype, transforms=mosaic_gpu_common.swizzled()), plgpu.SMEM(leaving, dtype)
    call = plgpu.kernel(
        kernel,
        out_type=outputs,
        scratch_types=[
            ring(lhs_block), [ring(rhs_block)] * matrices, plgpu.RefUnion(*leaving),
            plgpu.Barrier(num_arrivals=1 + matrices, num_barriers=tiling.stages),
            plgpu.Barrier(num_arrivals=tiling.workers, num_barriers=tiling.stages),
            plgpu.SMEM((CLAIMS,), jnp.int32), plgpu.Barrier(num_arrivals=1, num_barriers=CLAIMS),
            plgpu.Barrier(num_arrivals=tiling.workers, num_barriers=CLAIMS),
        ],
        grid=(INTERPRETED_PROGRAMS if interpreted else mosaic_gpu_common.MULTIPROCESSORS,), grid_names=("program",),
        num_threads=tiling.workers + 1, thread_name="thread",
        **(dict(interpret=plgpu.InterpretGPUParams()) if interpreted else {}),
    )  # fmt: skip
    return call(*operands)
