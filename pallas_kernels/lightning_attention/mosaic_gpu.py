"""Lightning attention on NVIDIA Hopper, as one Pallas Mosaic GPU kernel: tensor cores, TMA, float32 state in registers.

A program walks the chunks of one head and 64 of its value columns. Inside a chunk with entry state S, c_i the
number of its real tokens up to and including i, n their total and m half the chunk, the decay is folded into the
rows of v and of the output (arXiv 2401.04658, algorithm 1, with exp(-s (c_i - c_j)) split at m):

    v'_j  = exp(s (c_j - m)) v_j                     S' = exp(-s m) S
    o_i   = exp(-s (c_i - m)) (sum_{j<=i} (q_i . k_j) v'_j + q_i S')
    S_out = exp(-s n) S + exp(-s (n - m)) sum_j k_j^T v'_j

so q and k go from memory to the tensor cores as they are. The split holds while exp(s m) is a float32; beyond that
the slopes are so steep that `chunked_xla` takes over, chosen on the device (`_splits`).

A program has three groups of threads. The loader keeps a ring of chunks filled by TMA; `score` makes v' and the masked
products of q and k, chunks ahead of `recur`, which makes the output and carries the state.

Every gradient is the same scan; `reverse` runs from the last token to the first:

    dq = scan(do, v, k)      dk = reverse(v, do, q)      dv = reverse(k, q, do)
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.lightning_attention import chunked_xla
from pallas_kernels.lightning_attention import mosaic_gpu_rows as rows
from pallas_kernels.lightning_attention.mosaic_gpu_rows import CHUNK, CONTINUES, MIXED, STARTS
from pallas_kernels.platform import platform

COLUMNS = 64  # value columns of a program
MAX_EXPONENT = 80.0  # exp of it and its reciprocal are normal in float32 and bfloat16


def check(q, k, v, slopes, *, segmented, chunk_size):
    """Raises NotImplementedError where the kernel cannot serve; any `chunk_size` is taken, the kernel has its own."""
    del k, segmented, chunk_size
    hopper.check("lightning_attention", q.dtype, fallback="chunked_xla")
    width = q.shape[-1] // slopes.shape[0]
    if width not in (64, 128) or v.shape != q.shape:
        raise NotImplementedError(
            f"mosaic_gpu serves head_dim 64 and 128, the same for values; got {width} and "
            f"{v.shape[-1] // slopes.shape[0]}; 'chunked_xla' serves every shape"
        )


def forward(q, k, v, slopes, runs, initial_state, *, chunk_size):
    """See `api.lightning_attention`; returns (output, final state, residuals of the backward)."""
    count = _segments(q, slopes)

    def kernel():
        entries = _entry_states(k, v, slopes, runs, initial_state, count, reverse=False)
        (output,), (exits,) = _scans([(q, k, v)], slopes, runs, [entries], count, reverse=False)
        return output, _ends(exits, count)[-1], entries

    def steep():
        output, state, _ = chunked_xla.forward(q, k, v, slopes, runs, initial_state, chunk_size=chunk_size)
        return output, state, jnp.repeat(initial_state, count, axis=0)  # the backward reads the first of a row

    return lax.cond(_splits(slopes), kernel, steep)


def backward(q, k, v, slopes, runs, entries, d_output, d_state, *, chunk_size):
    """Gradients to q, k, v and the initial state. `entries` are the states where the segments of time begin."""
    do = d_output.astype(q.dtype)
    count = _segments(q, slopes)

    def kernel():
        # In the reverse scan a state is one step further from its tokens than the gradient of the final state is.
        step = jnp.exp(slopes)[:, None, None]
        (dq,), _ = _scans([(do, v, k)], slopes, runs, [entries.swapaxes(-1, -2)], count, reverse=False)
        # In one launch they share what they read, in the L2 cache.
        d_entries = _entry_states(q, do, slopes, runs, d_state * step, count, reverse=True)
        (dk, dv), (_, exits) = _scans(
            [(v, do, q), (k, q, do)], slopes, runs, [d_entries.swapaxes(-1, -2), d_entries], count, reverse=True
        )
        return dq, dk, dv, _ends(exits, count)[0] / step

    def steep():
        inputs = q, k, v, slopes, runs
        _, _, residuals = chunked_xla.forward(*inputs, _ends(entries, count)[0], chunk_size=chunk_size)
        return chunked_xla.backward(*inputs, residuals, do, d_state, chunk_size=chunk_size)

    return lax.cond(_splits(slopes), kernel, steep)


def end_state(k, v, slopes, runs, *, reverse, chunk_size):
    """See `api.end_state`."""
    batch, _, width = k.shape
    heads = slopes.shape[0]
    zero = jnp.zeros((batch, heads, width // heads, width // heads), jnp.float32)

    def kernel():
        # k in the place of q comes out of the L2 cache. The outputs are written in vain.
        _, (state,) = _scans([(k, k, v)], slopes, runs, [zero], reverse=reverse)
        return state * jnp.exp(-slopes)[:, None, None] if reverse else state

    def steep():
        return chunked_xla.end_state(k, v, slopes, runs, reverse=reverse, chunk_size=chunk_size)

    return lax.cond(_splits(slopes), kernel, steep)


def _splits(slopes):
    """bool (): whether the decay of half a chunk and its reciprocal are numbers, for every head."""
    return jnp.max(slopes) * CHUNK / 2 < MAX_EXPONENT


def _segments(q, slopes):
    """Into how many segments of time the rows are cut."""
    batch, length, width = q.shape
    return rows.segments(batch * width // COLUMNS, length)


def _ends(states, count):
    """The states [B, H, D, D] of the leftmost and the rightmost of `count` segments of each row."""
    return states[::count], states[count - 1 :: count]


# Both are jitted, so that the calls of a model's layers are traced and lowered once: a kernel takes a second of it.
def _scans(problems, slopes, runs, states, count, *, reverse):
    return _jitted_scans(problems, slopes, runs, states, count, reverse=reverse, interpreted=platform() == "cpu")


def _entry_states(k, v, slopes, runs, initial, count, *, reverse):
    if count == 1:
        return initial
    return _jitted_entry_states(k, v, slopes, runs, initial, count, reverse=reverse, interpreted=platform() == "cpu")


@functools.partial(jax.jit, static_argnames=("count", "reverse", "interpreted"))
def _jitted_scans(problems, slopes, runs, states, count, *, reverse, interpreted):
    """The scan of each problem (q, k, v), all [B, T, H*D], in `count` segments from their entry states.

    Returns:
      (outputs [B, T, H*D], exit states float32 [B * count, H, D, D]), lists like `problems`.
    """
    batch, length, _ = problems[0][0].shape
    documents = rows.documents(runs, batch, length, count)
    problems = [[rows.cut(x, count) for x in problem] for problem in problems]
    outputs, exits = _call(problems, slopes, jnp.stack(states), documents, reverse=reverse, interpreted=interpreted)
    return [rows.join(x, batch, length) for x in outputs], list(exits)


@functools.partial(jax.jit, static_argnames=("count", "reverse", "interpreted"))
def _jitted_entry_states(k, v, slopes, runs, initial, count, *, reverse, interpreted):
    """The entry states float32 [B * count, H, D, D] of the segments of time, from that of the whole rows."""
    batch, length, _ = k.shape
    documents = rows.documents(runs, batch, length, count)
    k, v = (rows.cut(x, count) for x in (k, v))
    zeros = jnp.zeros((1, batch * count, *initial.shape[1:]), jnp.float32)
    _, (own,) = _call([(k, v)], slopes, zeros, documents, reverse=reverse, interpreted=interpreted)
    return rows.entry_states(initial, own, slopes, documents, k.shape[1] // CHUNK, reverse=reverse)


def _call(problems, slopes, entries, documents, *, reverse, interpreted):
    """The kernel, for rows of whole chunks. A problem (k, v) has no output. States are float32 [P, B, H, D, D]."""
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
        facts = documents and rows.Documents(*(refs.pop(0) for _ in documents))
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
