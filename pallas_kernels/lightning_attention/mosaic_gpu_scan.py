"""The Mosaic GPU kernel of lightning attention.

A program walks the chunks of one row and head, and 64 value columns, with three groups of threads. `load` keeps a ring
of chunks in shared memory filled by TMA. `score` makes v' and the causal products of q and k, up to two chunks ahead of
`recur`, which makes the output and carries the state. What documents and padding ask for is done in MIXED chunks alone.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.lightning_attention.mosaic_gpu_rows import CHUNK, CONTINUES, MIXED, STARTS, Documents

COLUMNS = 64  # value columns of a program


def scan(problems, slopes, entries, documents, *, reverse, interpreted):
    """The scans of P problems, for rows of whole chunks; see mosaic_gpu.py for what is computed in a chunk.

    Args:
      problems: (q, k, v) each, bfloat16 [R, N * C, H*D]; or (k, v) each, for the exit states alone.
      slopes: float32 [H].
      entries: float32 [P, R, H, D, D], states at the end where the scan starts.
      documents: `Documents` of the rows, or None: each is one document without padding.

    Returns:
      (outputs, a list like `problems` or empty; exit states like `entries`).
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    *_, v = problems[0]
    batch, length, _ = v.shape
    dtype = v.dtype
    heads, dim = slopes.shape[0], entries.shape[-1]
    chunks, parts = length // CHUNK, dim // COLUMNS
    with_output = len(problems[0]) == 3
    wgmma = plgpu.Layout.WGMMA
    along_rows, along_columns = wgmma.reduce(1), wgmma.reduce(0)  # of vectors
    stage_bytes = 2 * CHUNK * (2 * dim + COLUMNS)
    other_bytes = 2 * (dim * COLUMNS + 2 * CHUNK * (CHUNK + 2 * COLUMNS)) + 1024
    stages = min(4, (hopper.SHARED_MEMORY - other_bytes) // stage_bytes)

    def kernel(slope_ref, entry_ref, *refs):
        refs = list(refs)
        inputs = [[refs.pop(0) for _ in problem] for problem in problems]
        facts = documents and Documents(*(refs.pop(0) for _ in documents))
        outputs = [refs.pop(0) for _ in problems if with_output]
        exit_ref, q_smem, k_smem, v_smem, score_smem, value_smem, state_smem, o_smem, full, free, ready, used = refs
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

        def kind_at(step):
            """None where all chunks are alike. It is read a step ahead, for memory is far away."""
            if facts is None:
                return None
            return jnp.where(step < chunks, facts.kinds[b, chunk_at(jnp.minimum(step, chunks - 1))], CONTINUES)

        def if_mixed(kind, mixed, plain):
            return plain if kind is None else lax.cond(kind == MIXED, mixed, lambda: plain)

        def along(ref, step, layout):
            """What is known about the tokens of a chunk, from memory: a mixed chunk can wait for it."""
            return plgpu.load(ref.at[b, tokens_at(step)], layout=layout, optimized=False)

        def spread(vector, width, axis=0):
            """A vector along the rows of an accumulator, alike in all of its columns; the other way with axis 1."""
            return plgpu.layout_cast(lax.broadcast_in_dim(vector, (CHUNK, width), (axis,)), wgmma)

        def causal():
            """bool [CHUNK, CHUNK]: row i is not before column j."""
            i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=wgmma) for axis in (0, 1))
            return (i <= j) if reverse else (i >= j)

        def weights(step, kind, sign):
            """exp(sign s (c_i - m)) along the rows, 0 at padding."""
            index = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=along_rows)
            count = CHUNK - index if reverse else index + 1

            def weigh(count):
                return jnp.exp(sign * slope * (count - CHUNK / 2))

            def mixed():
                real = spread(along(facts.sources, step, along_columns), CHUNK, axis=1) > 0
                count = jnp.sum(jnp.where(causal() & real, 1.0, 0.0), axis=1)
                return jnp.where(along(facts.runs, step, along_rows) > 0, weigh(count), 0.0)

            return if_mixed(kind, mixed, weigh(count.astype(jnp.float32)))

        def load():
            plgpu.set_max_registers(hopper.LOADER_REGISTERS, action="decrease")

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

            lax.fori_loop(0, chunks, one_step, None)

        def score():
            plgpu.set_max_registers(hopper.worker_registers(2), action="increase")

            def one_step(step, kind):
                following = kind_at(step + 1)
                stage, pair = lax.rem(step, stages), lax.rem(step, 2)
                weight = spread(weights(step, kind, 1), COLUMNS)

                def weigh_values():
                    values = plgpu.load(v_smem.at[stage], layout=wgmma).astype(jnp.float32)
                    value_smem[pair] = jnp.where(weight > 0.0, values * weight, 0.0).astype(dtype)

                def score_values(acc):
                    plgpu.wgmma(acc, q_smem.at[stage], k_smem.at[stage].transpose((1, 0)))
                    weigh_values()  # while the tensor cores are at it
                    return acc[...]

                plgpu.barrier_wait(full.at[stage])

                @pl.when(step >= 2)
                def _():
                    plgpu.barrier_wait(used.at[pair])

                if with_output:
                    scores = pl.run_scoped(score_values, plgpu.ACC((CHUNK, CHUNK), jnp.float32))
                    scores = jnp.where(causal(), scores, 0.0)

                    def inside_documents():
                        run_i = spread(along(facts.runs, step, along_rows), CHUNK)
                        run_j = spread(along(facts.sources, step, along_columns), CHUNK, axis=1)
                        return jnp.where(run_i == run_j, scores, 0.0)

                    score_smem[pair] = if_mixed(kind, inside_documents, scores).astype(dtype)
                else:
                    weigh_values()
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready.at[pair])
                plgpu.barrier_arrive(free.at[stage])
                return following

            lax.fori_loop(0, chunks, one_step, kind_at(0))

        def recur():
            plgpu.set_max_registers(hopper.worker_registers(2), action="increase")

            def borders(step):
                """The documents of the entry and of the exit state."""
                left, right = (table[b, chunk_at(step)] for table in (facts.lefts, facts.rights))
                return (right, left) if reverse else (left, right)

            def keep_documents_of_states(step, stage):
                """The entry state is for the rows of q of its document, the exit state of the rows of k of its own."""
                runs = along(facts.runs, step, along_rows)
                for ring, document in zip((q_smem, k_smem), borders(step), strict=True):
                    values = plgpu.load(ring.at[stage], layout=wgmma)
                    ring.at[stage][...] = jnp.where(spread(runs, dim) == document, values, jnp.zeros_like(values))
                plgpu.commit_smem()

            def decays(step, kind, following):
                """The factors in the exit state of the entry state and of the product of the chunk."""

                def over(tokens):
                    return jnp.exp(-slope * tokens), jnp.exp(-slope * (tokens - CHUNK / 2))

                def mixed():
                    entry, exit_ = borders(step)
                    carried, added = over(facts.tokens[b, chunk_at(step)].astype(jnp.float32))
                    return jnp.where(entry == exit_, carried, 0.0), added

                factors = if_mixed(kind, mixed, over(jnp.float32(CHUNK)))
                if kind is None:
                    return factors
                dropped = (kind if reverse else following) == STARTS
                return tuple(jnp.where(dropped, 0.0, factor) for factor in factors)

            def share(state):
                state_smem[...] = (state * jnp.exp(-slope * (CHUNK / 2))).astype(dtype)
                plgpu.commit_smem()

            def write(output, step):
                slot = o_smem.at[lax.rem(step, 2)]
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the output before the last has left this slot
                slot[...] = output.astype(dtype)
                plgpu.commit_smem()

                @each_problem
                def _(p):
                    plgpu.copy_smem_to_gmem(slot, outputs[p].at[b, tokens_at(step), own])

            def one_step(step, carry):
                kind, state = carry
                following = kind_at(step + 1)
                stage, pair = lax.rem(step, stages), lax.rem(step, 2)
                carried, added = decays(step, kind, following)
                weight = spread(weights(step, kind, -1), COLUMNS) if with_output else None
                plgpu.barrier_wait(full.at[stage])
                plgpu.barrier_wait(ready.at[pair])
                if kind is not None:
                    pl.when(kind == MIXED)(functools.partial(keep_documents_of_states, step, stage))

                def add_update(update):
                    plgpu.wgmma(update, k_smem.at[stage].transpose((1, 0)), value_smem.at[pair])

                def output_and_update(output, update):
                    plgpu.wgmma(output, q_smem.at[stage], state_smem)
                    plgpu.wgmma(output, score_smem.at[pair], value_smem.at[pair])
                    add_update(update)
                    # The output leaves while the tensor cores are at the state.
                    write(plgpu.wgmma_accumulator_load(output, wait_n=1) * weight, step)
                    return update[...]

                def update_alone(update):
                    add_update(update)
                    return update[...]

                of_state = plgpu.ACC((dim, COLUMNS), jnp.float32)
                if with_output:
                    update = pl.run_scoped(output_and_update, plgpu.ACC((CHUNK, COLUMNS), jnp.float32), of_state)
                else:
                    update = pl.run_scoped(update_alone, of_state)
                plgpu.barrier_arrive(used.at[pair])
                plgpu.barrier_arrive(free.at[stage])
                state = state * carried + update * added
                if with_output:
                    share(state)
                return following, state

            kind = kind_at(0)
            state = plgpu.load(entry_ref.at[own_state], layout=wgmma, optimized=False)
            if kind is not None and not reverse:
                state = state * jnp.where(kind == STARTS, 0.0, 1.0)
            share(state)
            _, state = lax.fori_loop(0, chunks, one_step, (kind, state))
            plgpu.wait_smem_to_gmem(0)
            exit_ref.at[own_state][...] = state

        lax.switch(group, [load, score, recur])

    def smem(*shape):
        return plgpu.SMEM(shape, dtype, transforms=hopper.swizzled())

    call = plgpu.kernel(
        kernel,
        out_type=[
            *(jax.ShapeDtypeStruct(v.shape, dtype) for *_, v in problems if with_output),
            jax.ShapeDtypeStruct(entries.shape, jnp.float32),
        ],
        scratch_types=[
            smem(stages, CHUNK, dim), smem(stages, CHUNK, dim), smem(stages, CHUNK, COLUMNS),
            smem(2, CHUNK, CHUNK), smem(2, CHUNK, COLUMNS), smem(dim, COLUMNS), smem(2, CHUNK, COLUMNS),
            plgpu.Barrier(num_arrivals=len(problems[0]), num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_barriers=2), plgpu.Barrier(num_barriers=2),
        ],
        grid=(batch, heads, len(problems) * parts), grid_names=("batch", "head", "part"),
        num_threads=3, thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **(dict(interpret=plgpu.InterpretGPUParams()) if interpreted else {}),
    )  # fmt: skip
    *outputs, exits = call(slopes, entries, *jax.tree.leaves(problems), *(documents or ()))
    return outputs, exits
