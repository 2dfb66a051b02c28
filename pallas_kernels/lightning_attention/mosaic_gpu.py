"""Lightning attention on NVIDIA Hopper, as one Pallas Mosaic GPU kernel: tensor cores, TMA, float32 state in registers.

A program walks the chunks of one head and 64 of its value columns. Inside a chunk with entry state S, c_i the
number of its real tokens up to and including i, n their total and m half the chunk, the decay is folded into the
rows of v and of the output (arXiv 2401.04658, algorithm 1, with exp(-s (c_i - c_j)) split at m):

    v'_j  = exp(s (c_j - m)) v_j                     S' = exp(-s m) S
    o_i   = exp(-s (c_i - m)) (sum_{j<=i} (q_i . k_j) v'_j + q_i S')
    S'_out = exp(-s n) (S' + sum_j k_j^T v'_j)

so q and k go from memory to the tensor cores as they are. The split holds while exp(s m) is a float32; beyond that
the slopes are so steep that `chunked_xla` takes over, chosen on the device (`_splits`).

Every gradient is the same scan; `reverse` runs from the last token to the first:

    dq = scan(do, v, k)      dk = reverse(v, do, q)      dv = reverse(k, q, do)
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.lightning_attention import chunked_xla
from pallas_kernels.platform import cdiv, platform

CHUNK = 64  # tokens: the rows of one wgmma
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

    def kernel():
        return _scan(q, k, v, slopes, runs, initial_state, reverse=False)

    def steep():
        return chunked_xla.forward(q, k, v, slopes, runs, initial_state, chunk_size=chunk_size)[:2]

    return *lax.cond(_splits(slopes), kernel, steep), initial_state


def backward(q, k, v, slopes, runs, initial_state, d_output, d_state, *, chunk_size):
    """Gradients to q, k, v and the initial state."""
    do = d_output.astype(q.dtype)

    def kernel():
        # In the reverse scan a state is one step further from its tokens than the gradient of the final state is.
        step = jnp.exp(slopes)[:, None, None]
        entry = d_state * step
        dq, _ = _scan(do, v, k, slopes, runs, initial_state.swapaxes(-1, -2), reverse=False)
        dk, _ = _scan(v, do, q, slopes, runs, entry.swapaxes(-1, -2), reverse=True)
        dv, d_initial = _scan(k, q, do, slopes, runs, entry, reverse=True)
        return dq, dk, dv, d_initial / step

    def steep():
        inputs = q, k, v, slopes, runs
        _, _, residuals = chunked_xla.forward(*inputs, initial_state, chunk_size=chunk_size)
        return chunked_xla.backward(*inputs, residuals, do, d_state, chunk_size=chunk_size)

    return lax.cond(_splits(slopes), kernel, steep)


def _splits(slopes):
    """bool (): whether the decay of half a chunk and its reciprocal are numbers, for every head."""
    return jnp.max(slopes) * CHUNK / 2 < MAX_EXPONENT


def _scan(q, k, v, slopes, runs, state, *, reverse):
    # Jitted, so that the calls of a model's layers are traced and lowered once: a kernel takes a second of it.
    return _jitted_scan(q, k, v, slopes, runs, state, reverse=reverse, interpreted=platform() == "cpu")


@functools.partial(jax.jit, static_argnames=("reverse", "interpreted"))
def _jitted_scan(q, k, v, slopes, runs, state, *, reverse, interpreted):
    """o [B, T, H*D] and the exit state float32 [B, H, D, D], from the entry state at the end where the scan starts."""
    batch, length, _ = q.shape
    padding = cdiv(length, CHUNK) * CHUNK - length
    if padding:
        runs = jnp.ones((batch, length), jnp.int32) if runs is None else runs
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0))) for x in (q, k, v))
        runs = jnp.pad(runs, ((0, 0), (0, padding)))
    documents = () if runs is None else _documents(runs, reverse)
    frame = jnp.exp(-slopes * (CHUNK / 2))[:, None, None]
    output, state = _call(q, k, v, slopes, state * frame, documents, reverse=reverse, interpreted=interpreted)
    return output[:, :length], state / frame


def _documents(runs, reverse):
    """What the kernel knows about documents, float32: counts, runs and reach [B, T], chunks [B, N, 4].

    The reach of a token is the first token of its document in the chunk; with it a causal mask needs no run of the
    other side, for padding is left out by its values. A chunk has (document of its entry state, of its exit state,
    real tokens, 1 where the state is carried on). All of it in the direction of the scan.
    """
    batch = runs.shape[0]
    chunks = runs.reshape(batch, -1, CHUNK)
    real = chunks > 0
    total = jnp.sum(real, axis=2)
    count = jnp.cumsum(real, axis=2)
    same = chunks[..., :, None] == chunks[..., None, :]
    reach = jnp.argmax(same, axis=-1)
    # The state at the left end is run 1's and that at the right end the last document's, also behind padding.
    right = jnp.maximum(lax.cummax(jnp.max(chunks, axis=2), axis=1), 1)
    left = jnp.pad(right, ((0, 0), (1, 0)), constant_values=1)[:, :-1]
    entry, exit_ = left, right
    if reverse:
        count = total[:, :, None] + 1 - count
        reach = CHUNK - 1 - jnp.argmax(jnp.flip(same, axis=-1), axis=-1)
        entry, exit_ = right, left
    table = jnp.stack([entry, exit_, total, entry == exit_], axis=-1).astype(jnp.float32)
    return *(x.reshape(batch, -1).astype(jnp.float32) for x in (count, chunks, reach)), table


def _call(q, k, v, slopes, state, documents, *, reverse, interpreted):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, length, _ = q.shape
    heads, dim = slopes.shape[0], state.shape[-1]
    count = length // CHUNK
    dtype = q.dtype
    rows = plgpu.Layout.WGMMA.reduce(1)  # of a vector along the rows of an accumulator

    def tiled(shape):
        return plgpu.SMEM(shape, dtype, transforms=hopper.swizzled())

    def multiply_into(initial, a, b, spill):
        """initial + a @ b. `spill` is where the interpreter, which takes a from shared memory alone, puts it."""
        if not interpreted:
            return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(initial))
        if spill is not None:
            spill[...] = a
            a = spill

        def product(acc):
            plgpu.wgmma(acc, a, b)
            return acc[...]

        return initial + pl.run_scoped(product, plgpu.ACC(initial.shape, jnp.float32))

    def kernel(q_ref, k_ref, v_ref, slope_ref, entry_ref, *refs):
        document_refs, (o_ref, exit_ref, state_smem, value_smem, kept_smem, o_smem, spill) = refs[:-7], refs[-7:]
        b, h, part = (lax.axis_index(name) for name in ("batch", "head", "part"))
        slope = slope_ref[h]
        own = pl.ds(h * dim + part * COLUMNS, COLUMNS)
        part_of_state = (b, h, slice(None), pl.ds(part * COLUMNS, COLUMNS))

        def at(step):
            return count - 1 - step if reverse else step

        def spread(vector, width):
            """A vector along the rows of an accumulator, alike in all of its columns."""
            return plgpu.layout_cast(lax.broadcast_in_dim(vector, (CHUNK, width), (0,)), plgpu.Layout.WGMMA)

        def body(index, q_smem, k_smem, v_smem, *vectors_and_state):
            *vectors, state = vectors_and_state
            step = index[0]
            chunk = at(step)
            if vectors:
                count_smem, run_smem, reach_smem = vectors
                counts = plgpu.load(count_smem, layout=rows)
                run_rows = plgpu.load(run_smem, layout=rows)
                reach = plgpu.load(reach_smem, layout=rows)
                entry, exit_, tokens, carried = (document_refs[-1][b, chunk, i] for i in range(4))
            else:
                index_rows = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=rows).astype(jnp.float32)
                counts = CHUNK - index_rows if reverse else index_rows + 1.0
                tokens = jnp.float32(CHUNK)
            exponent = slope * (counts - CHUNK / 2)

            def from_inputs(scores, inter):
                plgpu.wgmma(scores, q_smem, k_smem.transpose((1, 0)))
                plgpu.wgmma(inter, q_smem, state_smem)
                # While the tensor cores are at it, the values are weighted.
                values = plgpu.load(v_smem, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                values = values * spread(jnp.exp(exponent), COLUMNS)
                if vectors:
                    values = jnp.where(spread(run_rows, COLUMNS) > 0.0, values, 0.0)
                    kept = jnp.where(spread(run_rows, COLUMNS) == exit_, values, 0.0)
                    kept_smem[...] = kept.astype(dtype)
                value_smem[...] = values.astype(dtype)
                plgpu.commit_smem()
                return scores[...], inter[...]

            scores, inter = pl.run_scoped(
                from_inputs, plgpu.ACC((CHUNK, CHUNK), jnp.float32), plgpu.ACC((CHUNK, COLUMNS), jnp.float32)
            )
            i = plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0, layout=plgpu.Layout.WGMMA)
            j = plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1, layout=plgpu.Layout.WGMMA)
            scores = jnp.where((i <= j) if reverse else (i >= j), scores, 0.0)
            if vectors:
                reach = spread(reach, CHUNK)
                j = j.astype(jnp.float32)
                scores = jnp.where((j <= reach) if reverse else (j >= reach), scores, 0.0)
                inter = jnp.where(spread(run_rows, COLUMNS) == entry, inter, 0.0)
            output = multiply_into(inter, scores.astype(dtype), value_smem, spill)
            output = output * spread(jnp.exp(-exponent), COLUMNS)
            if vectors:
                output = jnp.where(spread(run_rows, COLUMNS) > 0.0, output, 0.0)

            slot = o_smem.at[lax.rem(step, jnp.int32(2))]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the output before the last has left this slot
            slot[...] = output.astype(o_ref.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(slot, o_ref.at[b, pl.ds(chunk * CHUNK, CHUNK), own])

            if vectors:
                state = state * carried
            state = multiply_into(state, k_smem.transpose((1, 0)), kept_smem if vectors else value_smem, None)
            half = jnp.exp(-slope * tokens / 2)  # exp(-s n) itself may underflow
            state = state * half * half
            state_smem[...] = state.astype(dtype)
            plgpu.commit_smem()
            return state

        def around(pipeline):
            state = plgpu.load(entry_ref.at[part_of_state], layout=plgpu.Layout.WGMMA, optimized=False)
            state_smem[...] = state.astype(dtype)
            plgpu.commit_smem()
            state = pipeline(state)
            plgpu.wait_smem_to_gmem(0)
            exit_ref.at[part_of_state][...] = state

        def block(width):
            return plgpu.BlockSpec((CHUNK, width), lambda step: (at(step), 0), transforms=hopper.swizzled())

        vector = plgpu.BlockSpec((CHUNK,), lambda step: (at(step),))
        pipeline = plgpu.emit_pipeline_warp_specialized(
            body, grid=(count,), in_specs=[block(dim), block(dim), block(COLUMNS), *(vector for _ in documents[:-1])],
            max_concurrent_steps=3, num_compute_wgs=1, memory_registers=hopper.LOADER_REGISTERS, wg_axis="group",
            compute_context=around,
        )  # fmt: skip
        head = pl.ds(h * dim, dim)
        pipeline(
            q_ref.at[b, :, head], k_ref.at[b, :, head], v_ref.at[b, :, own], *(ref.at[b] for ref in document_refs[:-1])
        )

    call = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(v.shape, dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)],
        scratch_types=[
            tiled((dim, COLUMNS)), tiled((CHUNK, COLUMNS)), tiled((CHUNK, COLUMNS)),
            plgpu.SMEM((2, CHUNK, COLUMNS), dtype, transforms=hopper.swizzled()), tiled((CHUNK, CHUNK)),
        ],
        grid=(batch, heads, dim // COLUMNS), grid_names=("batch", "head", "part"),
        num_threads=2, thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **(dict(interpret=plgpu.InterpretGPUParams()) if interpreted else {}),
    )  # fmt: skip
    return call(q, k, v, slopes, state, *documents)
