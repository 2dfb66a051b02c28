"""Lightning attention on NVIDIA Hopper, as one Pallas Mosaic GPU kernel: tensor cores, TMA, float32 state in registers.

The kernel is in scan_kernel.py, what it is told about documents in segment_table_kernel.py, and how rows are cut in
time_split.py. A program walks the chunks of one head and 64 of its value columns. Inside a chunk with entry state
S, c_i the number of its real tokens up to and including i, n their total and m half the chunk, the decay is folded into
the rows of v and of the output (arXiv 2401.04658, algorithm 1, with exp(-s (c_i - c_j)) split at m):

    v'_j   = exp(s (c_j - m)) v_j                    S' = exp(-s m) S
    o_i    = exp(-s (c_i - m)) (sum_{j<=i} (q_i . k_j) v'_j + q_i S')
    S'_out = exp(-s n) (S' + sum_j k_j^T v'_j)

so q and k go from memory to the tensor cores as they are, and the state is carried as S'. That holds while exp(2 s m)
is a float32; beyond that the slopes are so steep that `chunked_xla` takes over, chosen on the device (`_splits`).

Every gradient is the same scan; `reverse` runs from the last token to the first:

    dq = scan(do, v, k)      dk = reverse(v, do, q)      dv = reverse(k, q, do)
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import block_sizes, mosaic_gpu_common
from pallas_kernels.lightning_attention import chunked_xla
from pallas_kernels.lightning_attention.mosaic_gpu import segment_table_kernel
from pallas_kernels.lightning_attention.mosaic_gpu import time_split as rows
from pallas_kernels.lightning_attention.mosaic_gpu.scan_kernel import COLUMNS, scan
from pallas_kernels.lightning_attention.mosaic_gpu.time_split import CHUNK
from pallas_kernels.platform import cdiv, interpret

MAX_EXPONENT = 80.0  # exp of it and its reciprocal are normal in float32 and bfloat16


def check(q, k, v, slopes, *, segmented, chunk_size):
    """Raises NotImplementedError where the kernel cannot serve; any `chunk_size` is taken, the kernel has its own."""
    del k, segmented, chunk_size
    mosaic_gpu_common.check("lightning_attention", q.dtype, fallback="chunked_xla")
    width = q.shape[-1] // slopes.shape[0]
    if width not in (64, 128) or v.shape != q.shape:
        raise NotImplementedError(
            f"mosaic_gpu serves head_dim 64 and 128, the same for values; got {width} and "
            f"{v.shape[-1] // slopes.shape[0]}; 'chunked_xla' serves every shape"
        )


def documents(ids, *, numbered):
    """What `forward` and the others take as documents."""
    return segment_table_kernel.Documents(jnp.asarray(ids, jnp.int32), numbered)


def forward(q, k, v, slopes, documents, initial_state, *, chunk_size):
    """See `api.lightning_attention`; returns (output, final state, residuals of the backward)."""
    count = _segments(q)
    tables = _tables(documents, q, count)

    def kernel():
        entries = _entry_states(k, v, slopes, tables, initial_state, count, reverse=False)
        (output,), (exits,) = _scans([(q, k, v)], slopes, tables, [entries], count, reverse=False)
        return output, _ends(exits, count)[-1], entries

    def steep():
        runs = documents and documents.runs()
        output, state, _ = chunked_xla.forward(q, k, v, slopes, runs, initial_state, chunk_size=chunk_size)
        return output, state, jnp.repeat(initial_state, count, axis=0)  # the backward reads the first of a row

    output, state, entries = lax.cond(_splits(slopes), kernel, steep)
    return output, state, (tables, entries)


def backward(q, k, v, slopes, documents, residuals, d_output, d_state, *, chunk_size):
    """Gradients to q, k, v and the initial state."""
    tables, entries = residuals  # of the documents, and the states where the segments of time begin
    do = d_output.astype(q.dtype)
    count = _segments(q)

    def kernel():
        # In the reverse scan a state is one step further from its tokens than the gradient of the final state is.
        step = jnp.exp(slopes)[:, None, None]
        (dq,), _ = _scans([(do, v, k)], slopes, tables, [entries.swapaxes(-1, -2)], count, reverse=False)
        # In one launch they share what they read, in the L2 cache.
        d_entries = _entry_states(q, do, slopes, tables, d_state * step, count, reverse=True)
        (dk, dv), (_, exits) = _scans(
            [(v, do, q), (k, q, do)], slopes, tables, [d_entries.swapaxes(-1, -2), d_entries], count, reverse=True
        )
        return dq, dk, dv, _ends(exits, count)[0] / step

    def steep():
        inputs = q, k, v, slopes, documents and documents.runs()
        _, _, saved = chunked_xla.forward(*inputs, _ends(entries, count)[0], chunk_size=chunk_size)
        return chunked_xla.backward(*inputs, saved, do, d_state, chunk_size=chunk_size)

    return lax.cond(_splits(slopes), kernel, steep)


def end_state(k, v, slopes, documents, *, reverse, chunk_size):
    """See `api.end_state`."""

    def kernel():
        count = _segments(k)
        tables = _tables(documents, k, count)
        state = _jitted_end_state(k, v, slopes, tables, count, reverse=reverse, interpreted=interpret())
        return state * jnp.exp(-slopes)[:, None, None] if reverse else state

    def steep():
        runs = documents and documents.runs()
        return chunked_xla.end_state(k, v, slopes, runs, reverse=reverse, chunk_size=chunk_size)

    return lax.cond(_splits(slopes), kernel, steep)


def _splits(slopes):
    """bool (): whether the decay of a chunk and its reciprocal are numbers, for every head."""
    return jnp.max(slopes) * CHUNK < MAX_EXPONENT


def _segments(q):
    """Into how many segments of time the rows are cut."""
    batch, length, width = q.shape
    return block_sizes.choose(
        "lightning_attention", "mosaic_gpu", "scan", dict(batch=batch, length=length, width=width),
        candidates=lambda: [dict(segments=2**i) for i in range(8) if 2**i <= cdiv(length, CHUNK)],
        heuristic=lambda: dict(segments=rows.segments(batch * width // COLUMNS, length)),
    )["segments"]  # fmt: skip


def _ends(states, count):
    """The states [B, H, D, D] of the leftmost and the rightmost of `count` segments of each row."""
    return states[::count], states[count - 1 :: count]


# All are jitted, so that the calls of a model's layers are traced and lowered once: a kernel takes a second of it.
def _tables(documents, q, count):
    """Tables of rows that `rows.cut` makes of those of q, or None if each is one document without padding."""
    if documents is None:
        if q.shape[1] % (CHUNK * count) == 0:
            return None
        documents = segment_table_kernel.Documents(jnp.ones(q.shape[:2], jnp.int32), numbered=True)
    return _jitted_tables(documents, count, interpreted=interpret())


def _scans(problems, slopes, tables, states, count, *, reverse):
    return _jitted_scans(problems, slopes, tables, states, count, reverse=reverse, interpreted=interpret())


def _entry_states(k, v, slopes, tables, initial, count, *, reverse):
    if count == 1:
        return initial
    return _jitted_entry_states(k, v, slopes, tables, initial, count, reverse=reverse, interpreted=interpret())


@functools.partial(jax.jit, static_argnames=("count", "interpreted"))
def _jitted_tables(documents, count, *, interpreted):
    batch = documents.ids.shape[0]
    ids = rows.cut(documents.ids, count)
    chunks = ids.shape[1] // CHUNK
    whole = segment_table_kernel.Documents(ids.reshape(batch, -1), documents.numbered)
    tables = segment_table_kernel.tables(whole, chunks, interpreted=interpreted)
    return jax.tree.map(lambda x: x.reshape(batch * count, chunks, *x.shape[2:]), tables)


@functools.partial(jax.jit, static_argnames=("count", "reverse", "interpreted"))
def _jitted_scans(problems, slopes, tables, states, count, *, reverse, interpreted):
    """The scan of each problem (q, k, v), all [B, T, H*D], in `count` segments from their entry states.

    Returns:
      (outputs [B, T, H*D], exit states float32 [B * count, H, D, D]), lists like `problems`.
    """
    batch, length, _ = problems[0][0].shape
    problems = [[rows.cut(x, count) for x in problem] for problem in problems]
    outputs, exits = scan(problems, slopes, jnp.stack(states), tables, reverse=reverse, interpreted=interpreted)
    return [rows.join(x, batch, length) for x in outputs], list(exits)


@functools.partial(jax.jit, static_argnames=("count", "reverse", "interpreted"))
def _jitted_entry_states(k, v, slopes, tables, initial, count, *, reverse, interpreted):
    """The entry states float32 [B * count, H, D, D] of the segments of time, from that of the whole rows."""
    own, segments = _own_states(k, v, slopes, tables, count, reverse=reverse, interpreted=interpreted)
    return rows.entry_states(initial, own, slopes, segments, reverse=reverse)


@functools.partial(jax.jit, static_argnames=("count", "reverse", "interpreted"))
def _jitted_end_state(k, v, slopes, tables, count, *, reverse, interpreted):
    """The exit state float32 [B, H, D, D] of whole rows from zero."""
    own, segments = _own_states(k, v, slopes, tables, count, reverse=reverse, interpreted=interpreted)
    if count == 1:
        return own
    entries = rows.entry_states(jnp.zeros_like(own[::count]), own, slopes, segments, reverse=reverse)
    exits = own + rows.carried(entries, slopes, segments)
    return _ends(exits, count)[0 if reverse else -1]


def _own_states(k, v, slopes, tables, count, *, reverse, interpreted):
    """(exit states from zero [B * count, H, D, D], `rows.Segments`) of the segments of time."""
    batch, length, width = k.shape
    heads = slopes.shape[0]
    k, v = (rows.cut(x, count) for x in (k, v))
    zeros = jnp.zeros((1, batch * count, heads, width // heads, width // heads), jnp.float32)
    _, (own,) = scan([(k, v)], slopes, zeros, tables, reverse=reverse, interpreted=interpreted)
    if tables is None:
        return own, rows.whole_segments(batch, count, k.shape[1])
    tokens, started = tables.tokens_and_starts()
    return own, rows.segments_of(tokens.reshape(batch, -1), started.reshape(batch, -1), count)
