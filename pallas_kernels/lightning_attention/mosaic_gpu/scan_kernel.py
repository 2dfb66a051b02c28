"""The Mosaic GPU kernel of lightning attention.

A program walks the chunks of one row and head, and 64 value columns, with three groups of threads. `load` keeps a ring
of chunks in shared memory filled by TMA. `score` makes the causal products of q and k and divides documents, up to two
chunks ahead of `recur`, which makes the output and carries the state. Both are transposed there, value columns down and
tokens or key columns across, so that the state and v' go from registers to the tensor cores: shared memory, which feeds
the other operand, would not keep up with both. What documents and padding ask for is done in MIXED chunks alone.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic_gpu_common
from pallas_kernels.lightning_attention.mosaic_gpu import segment_table_kernel as facts
from pallas_kernels.lightning_attention.mosaic_gpu.time_split import CHUNK

COLUMNS = 64  # value columns of a program


def scan(problems, slopes, entries, tables, *, reverse, interpreted):
    """The scans of P problems, for rows of whole chunks; see api.py for what is computed in a chunk.

    Args:
      problems: (q, k, v) each, bfloat16 [R, N * C, H*D]; or (k, v) each, for the exit states alone.
      slopes: float32 [H].
      entries: float32 [P, R, H, D, D], states at the end where the scan starts.
      tables: `segment_table_kernel.Tables` of the rows, or None: each is one document without padding.

    Returns:
      (outputs, a list like `problems` or empty; exit states like `entries`).
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    table = tables and (tables.reverse if reverse else tables.forward)
    *_, v = problems[0]
    batch, length, _ = v.shape
    dtype = v.dtype
    heads, dim = slopes.shape[0], entries.shape[-1]
    chunks, parts = length // CHUNK, dim // COLUMNS
    with_output = len(problems[0]) == 3
    prepared = with_output or table is not None  # whether `score` has something to do
    wgmma, transposed = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED
    along_rows, along_columns = wgmma.reduce(1), wgmma.reduce(0)  # of vectors
    one_by_one = plgpu.Layout.WG_STRIDED((2 * CHUNK,), vec_size=1)  # one number a thread
    stage_bytes = 2 * CHUNK * (2 * dim + COLUMNS) + (0 if table is None else 4 * table.shape[2] * table.shape[3])
    other_bytes = 2 * 2 * CHUNK * (CHUNK + COLUMNS) + 4 * 2 * 2 * CHUNK + 1024
    copies = len(problems[0]) + (table is not None)  # of a chunk
    stages = min(4, (mosaic_gpu_common.SHARED_MEMORY - other_bytes) // stage_bytes)

    def kernel(slope_ref, entry_ref, *refs):
        refs = list(refs)
        inputs = [[refs.pop(0) for _ in problem] for problem in problems]
        table_ref = None if table is None else refs.pop(0)
        outputs = [refs.pop(0) for _ in problems if with_output]
        exit_ref, q_smem, k_smem, v_smem, table_smem, weight_smem, score_smem, o_smem, *rest = refs
        full, free, ready, used, *for_interpreter = rest
        b, h, group = (lax.axis_index(name) for name in ("batch", "head", "group"))
        problem, part = lax.div(lax.axis_index("part"), parts), lax.rem(lax.axis_index("part"), parts)
        slope = slope_ref[h]
        head, own = pl.ds(h * dim, dim), pl.ds(h * dim + part * COLUMNS, COLUMNS)
        own_state = (problem, b, h, slice(None), pl.ds(part * COLUMNS, COLUMNS))

        def chunk_at(step):
            return chunks - 1 - step if reverse else step

        def tokens_at(step):
            return pl.ds(pl.multiple_of(chunk_at(step) * CHUNK, CHUNK), CHUNK)

        def each_problem(run):
            for p in range(len(problems)):
                pl.when(problem == p)(functools.partial(run, p))

        def scalar(stage, name):
            return table_smem[stage, facts.SCALARS, name]

        def is_mixed(stage):
            return scalar(stage, facts.KIND) == facts.MIXED

        def along(vector_ref, layout):
            return plgpu.load(vector_ref, layout=layout, optimized=False)

        def runs_of(stage, layout):
            return along(table_smem.at[stage, facts.RUNS, pl.ds(0, CHUNK)], layout)

        def spread(vector, shape, axis):
            """A vector along one axis of an accumulator, alike along the other."""
            return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, (axis,)), wgmma)

        def causal():
            """bool [CHUNK, CHUNK]: row i is not before column j."""
            i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=wgmma) for axis in (0, 1))
            return (i <= j) if reverse else (i >= j)

        def multiply(acc, a, b):
            """acc += a b with `a` in registers."""
            if interpreted:  # the interpreter reads operands from memory alone
                (staged,) = for_interpreter
                staged = staged.at[:, pl.ds(0, a.shape[1])]
                staged[...] = a
                a = staged
            plgpu.wgmma(acc, a, b)

        def accumulated(initial, add):
            """`initial` and what `add` adds to an accumulator."""
            if interpreted:  # the interpreter has no accumulator that starts from a value

                def from_zero(acc):
                    add(acc)
                    return initial + acc[...]

                return pl.run_scoped(from_zero, plgpu.ACC(initial.shape, jnp.float32))
            return pl.run_state(add)(plgpu.ACC.init(initial))

        def load():
            plgpu.set_max_registers(mosaic_gpu_common.LOADER_REGISTERS, action="decrease")

            def one_step(step, _):
                stage = lax.rem(step, stages)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(free.at[stage])

                @each_problem
                def _(p):
                    rings = ((q_smem, head), (k_smem, head), (v_smem, own))[-len(inputs[p]) :]
                    for ref, (ring, width) in zip(inputs[p], rings, strict=True):
                        plgpu.copy_gmem_to_smem(ref.at[b, tokens_at(step), width], ring.at[stage], full.at[stage])

                if table is not None:
                    plgpu.copy_gmem_to_smem(table_ref.at[b, chunk_at(step)], table_smem.at[stage], full.at[stage])

            lax.fori_loop(0, chunks, one_step, None)

        def score():
            plgpu.set_max_registers(mosaic_gpu_common.worker_registers(2), action="increase")

            def one_step(step, _):
                stage, pair = lax.rem(step, stages), lax.rem(step, 2)

                def weigh():
                    exponents = along(table_smem.at[stage, facts.EXPONENTS], one_by_one)
                    weights = jnp.where(exponents == facts.PADDING, 0.0, jnp.exp(slope * exponents.astype(jnp.float32)))
                    weight_smem[pair] = weights

                def product(acc):
                    plgpu.wgmma(acc, q_smem.at[stage], k_smem.at[stage].transpose((1, 0)))
                    return acc[...]

                def inside_documents(scores):
                    sources = along(table_smem.at[stage, facts.RUNS, pl.ds(CHUNK, CHUNK)], along_columns)
                    run_i = spread(runs_of(stage, along_rows), (CHUNK, CHUNK), 0)
                    return jnp.where(run_i == spread(sources, (CHUNK, CHUNK), 1), scores, 0.0)

                def keep(ring, kept):
                    """Clears the rows of a ring that are not to be `kept`."""
                    values = plgpu.load(ring.at[stage], layout=wgmma)
                    ring.at[stage][...] = jnp.where(spread(kept, values.shape, 0), values, jnp.zeros_like(values))

                def divide_documents():
                    """The entry state is for q of its document, the exit state of k of its own."""
                    runs = runs_of(stage, along_rows)
                    for ring, name in ((q_smem, facts.ENTRY), (k_smem, facts.EXIT))[not with_output :]:
                        keep(ring, runs == scalar(stage, name))
                    keep(v_smem, runs > 0)  # padding may be no number
                    weigh()

                plgpu.barrier_wait(full.at[stage])

                # Waited for before the product, which then runs while `recur` makes its next state.
                @pl.when(step >= 2)
                def _():
                    plgpu.barrier_wait(used.at[pair])

                if with_output:
                    scores = pl.run_scoped(product, plgpu.ACC((CHUNK, CHUNK), jnp.float32))
                    scores = jnp.where(causal(), scores, 0.0)
                    if table is not None:
                        scores = lax.cond(is_mixed(stage), inside_documents, lambda scores: scores, scores)
                    score_smem[pair] = scores.astype(dtype)
                if table is not None:
                    pl.when(is_mixed(stage))(divide_documents)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready.at[pair])

            if prepared:
                lax.fori_loop(0, chunks, one_step, None)

        def recur():
            plgpu.set_max_registers(mosaic_gpu_common.worker_registers(2), action="increase")

            def write(output, step):
                slot = o_smem.at[lax.rem(step, 2)]
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the output before the last has left this slot
                slot.transpose((1, 0))[...] = output.astype(dtype)
                plgpu.commit_smem()

                @each_problem
                def _(p):
                    plgpu.copy_smem_to_gmem(slot, outputs[p].at[b, tokens_at(step), own])

            def one_chunk(step, state, *, mixed):
                """The next entry state."""
                stage, pair = lax.rem(step, stages), lax.rem(step, 2)
                entry, weights, factor = state.astype(dtype), plain_weights, plain_factor
                if mixed:
                    parts = [weight_smem.at[pair, pl.ds(i * CHUNK, CHUNK)] for i in range(len(plain_weights))]
                    weights = [along(part, along_columns) for part in parts]
                    factor = jnp.exp(-slope * scalar(stage, facts.TOKENS).astype(jnp.float32))
                    goes_on = scalar(stage, facts.ENTRY) == scalar(stage, facts.EXIT)
                    state = state * jnp.where(goes_on, 1.0, 0.0)
                weights = [spread(weight, (COLUMNS, CHUNK), 1) for weight in weights]

                def weighted_values():
                    values = plgpu.load(v_smem.at[stage].transpose((1, 0)), layout=wgmma).astype(jnp.float32)
                    return (values * weights[0]).astype(dtype)

                def update(state_acc):
                    multiply(state_acc, weighted_values(), k_smem.at[stage])

                def output_and_update(state_acc, output):
                    multiply(output, entry, q_smem.at[stage].transpose((1, 0)))
                    values = weighted_values()  # while the tensor cores are at it
                    multiply(output, values, score_smem.at[pair].transpose((1, 0)))
                    multiply(state_acc, values, k_smem.at[stage])
                    # The output leaves while the tensor cores are at the state.
                    write(plgpu.wgmma_accumulator_load(output, wait_n=1) * weights[1], step)

                def with_accumulator(state_acc):
                    output = plgpu.ACC((COLUMNS, CHUNK), jnp.float32)
                    pl.run_scoped(functools.partial(output_and_update, state_acc), output)

                total = accumulated(state, with_accumulator if with_output else update)
                if table is not None:
                    factor = jnp.where(scalar(stage, facts.DROPPED) > 0, 0.0, factor)
                return total * factor

            def one_step(step, state):
                stage, pair = lax.rem(step, stages), lax.rem(step, 2)
                plgpu.barrier_wait(full.at[stage])
                if prepared:
                    plgpu.barrier_wait(ready.at[pair])
                plain, mixed = (functools.partial(one_chunk, step, mixed=mixed) for mixed in (False, True))
                if table is None:
                    state = plain(state)
                else:  # as a whole, so that chunks which are not MIXED pay for nothing else
                    state = lax.cond(is_mixed(stage), mixed, plain, state)
                if prepared:
                    plgpu.barrier_arrive(used.at[pair])
                plgpu.barrier_arrive(free.at[stage])
                return state

            # Of v and of the output, alike in all chunks that are not MIXED.
            index = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=along_columns)
            exponent = ((CHUNK - index if reverse else index + 1) - CHUNK // 2).astype(jnp.float32)
            plain_weights = [jnp.exp(sign * slope * exponent) for sign in ((1, -1) if with_output else (1,))]
            plain_factor = jnp.exp(-slope * CHUNK)
            state = plgpu.load(entry_ref.at[own_state].transpose((1, 0)), layout=transposed, optimized=False)
            state = plgpu.layout_cast(state, wgmma) * jnp.exp(-slope * (CHUNK / 2))
            if table is not None:
                fresh = table_ref[b, chunk_at(0), facts.SCALARS, facts.FRESH]
                state = state * jnp.where(fresh > 0, 0.0, 1.0)
            state = lax.fori_loop(0, chunks, one_step, state)
            plgpu.wait_smem_to_gmem(0)
            state = plgpu.layout_cast(state * jnp.exp(slope * (CHUNK / 2)), transposed)
            exit_ref.at[own_state].transpose((1, 0))[...] = state

        lax.switch(group, [load, score, recur])

    def smem(*shape):
        return plgpu.SMEM(shape, dtype, transforms=mosaic_gpu_common.swizzled())

    call = plgpu.kernel(
        kernel,
        out_type=[
            *(jax.ShapeDtypeStruct(v.shape, dtype) for *_, v in problems if with_output),
            jax.ShapeDtypeStruct(entries.shape, jnp.float32),
        ],
        scratch_types=[
            smem(stages, CHUNK, dim), smem(stages, CHUNK, dim), smem(stages, CHUNK, COLUMNS),
            plgpu.SMEM((stages, *table.shape[2:]) if table is not None else (1,), jnp.int32),
            plgpu.SMEM((2, 2 * CHUNK), jnp.float32),
            smem(2, CHUNK, CHUNK), smem(2, CHUNK, COLUMNS),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=2), plgpu.Barrier(num_barriers=2),
            *([smem(COLUMNS, max(dim, CHUNK))] if interpreted else []),
        ],
        grid=(batch, heads, len(problems) * parts), grid_names=("batch", "head", "part"),
        num_threads=3, thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **(dict(interpret=plgpu.InterpretGPUParams()) if interpreted else {}),
    )  # fmt: skip
    *outputs, exits = call(slopes, entries, *jax.tree.leaves(problems), *([] if table is None else [table]))
    return outputs, exits
