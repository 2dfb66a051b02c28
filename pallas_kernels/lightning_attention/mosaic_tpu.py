"""Lightning attention as a Mosaic TPU kernel that walks over the chunks with the state in VMEM.

The grid is (B, H / heads per block, T / C) with the chunks innermost, so the float32 state of a block of
heads stays in scratch from the first chunk to the last. Tensors keep their layout [B, T, H*D]: a block is a
plain tile of a matrix, and each is read or written once per kernel. Inside a chunk the equations are those of
chunked_xla.py. These kernels share one frame, and so do two that carry the state alone (`end_state`):

    forward   reads q, k, v and carries S;       o_i  = sum_{j<=i} w_ij (q_i . k_j) v_j + exp(-s c_i) q_i S
    backward  reads q, k, v, do and carries R,   dk_j = sum_{i>=j} w_ij (v_j . do_i) q_i + exp(-s (n - c_j)) v_j R^T
              the gradient of the exit state;    dv_j = sum_{i>=j} w_ij (k_j . q_i) do_i + exp(-s (n - c_j)) k_j R

dq is the forward kernel again, on (do, v, k) with the transposed initial state: no chunk state is stored. In
units of one tensor the forward moves 4 and the backward 4 + 6. A length that is no multiple of C costs a padded
copy of each.

The weights lie in scratch as tables. Whole chunks of one document, which are nearly all, have the same
tables; a chunk with padding or a boundary in it makes its own.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import block_sizes
from pallas_kernels.lightning_attention import reference
from pallas_kernels.platform import cdiv, interpret, platform

documents = reference.documents

_HEAD_DIMS = (64, 128)
_DTYPES = (jnp.bfloat16, jnp.float32)
_LANES = 128
_MAX_CHUNK = 256  # tables grow with the square; beyond this the products inside a chunk outweigh the memory traffic
_CHUNKS = (64, 128, 256)  # that tuning measures
_VMEM_BYTES = 14 << 20  # of the 16 MiB that a kernel gets by default; the rest is for values that leave registers

# Stands for an infinite distance: exp(-s * _FAR) is 0 for every slope, and 0 * _FAR is still 0.
_FAR = 1e30


def check(q: Any, k: Any, v: Any, slopes: Any, *, segmented: bool, chunk_size: int) -> None:
    """Serves head dims 64 and 128 in bfloat16 and float32, on TPU and interpreted on the CPU."""
    del k, segmented
    heads = slopes.shape[0]
    dim, value_dim = q.shape[-1] // heads, v.shape[-1] // heads
    if platform() not in ("cpu", "tpu"):
        raise _refusal(f"platform {platform()}", "tpu, and cpu by interpretation")
    if q.dtype not in _DTYPES:
        raise _refusal(f"dtype {q.dtype}", "bfloat16 and float32")
    if dim != value_dim or dim not in _HEAD_DIMS:
        raise _refusal(f"head dims {dim} and {value_dim}", "equal head dims of 64 or 128")
    if not _heads_per_block(heads, dim, _chunk_length(q.shape[1], chunk_size), q.dtype.itemsize, _BACKWARD):
        raise _refusal(f"{heads} heads of {dim}", "an even number of heads of 64, or few enough to fit VMEM at once")


def _refusal(what, served):
    return NotImplementedError(f'mosaic_tpu cannot serve {what}: it serves {served}. "chunked_xla" serves every shape')


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array,
    segments: Any,
    initial_state: jax.Array,
    *,
    chunk_size: int,
) -> tuple[jax.Array, jax.Array, Any]:
    """See `api.lightning_attention`; returns (output, final state, residuals of the backward)."""
    (output,), state = _scan(_FORWARD, (q, k, v), slopes, segments, initial_state, chunk_size)
    return output, state, initial_state


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array,
    segments: Any,
    residuals: Any,
    d_output: jax.Array,
    d_state: jax.Array,
    *,
    chunk_size: int,
) -> tuple[jax.Array, ...]:
    """Gradients to q, k, v and the initial state."""
    transposed = jnp.swapaxes(residuals, 2, 3)
    (dq,), _ = _scan(_FORWARD, (d_output, v, k), slopes, segments, transposed, chunk_size)
    (dk, dv), d_initial = _scan(_BACKWARD, (q, k, v, d_output), slopes, segments, d_state, chunk_size)
    return dq, dk, dv, d_initial


def end_state(
    k: jax.Array, v: jax.Array, slopes: jax.Array, segments: Any, *, reverse: bool, chunk_size: int
) -> jax.Array:
    """See `api.end_state`."""
    batch, _, width = k.shape
    heads = slopes.shape[0]
    zero = jnp.zeros((batch, heads, width // heads, width // heads), jnp.float32)
    return _scan(_FIRST_STATE if reverse else _LAST_STATE, (k, v), slopes, segments, zero, chunk_size)[1]


class _Decays(NamedTuple):
    """float32 weights exp(-s distance) of one head in one chunk."""

    intra: jax.Array  # [C, C] from v_j to o_i; [i, j] in the forward, [j, i] in the backward
    entering: jax.Array  # [C, D] from the entry state to o_i
    leaving: jax.Array  # [C, D] from k_j^T v_j to the exit state
    carried: jax.Array  # [1, D] from the entry state to the exit state


def _forward_step(decay, state, q, k, v):
    """One head, one chunk: q, k, v [C, D], state float32 [D, D] -> (outputs float32, state)."""
    scores = (_dot(q, k, 1, 1) * decay.intra).astype(v.dtype)
    output = _dot(scores, v, 1, 0) + decay.entering * _dot(q, state.astype(q.dtype), 1, 0)
    update = _dot(_weighted(k, decay.leaving), v, 0, 0)
    return (output,), decay.carried * state + update


def _backward_step(decay, d_state, q, k, v, do):
    """One head, one chunk, from the gradient of the exit state to that of the entry state."""
    # Scores with the earlier token in rows: no product has to be transposed before it enters the next one.
    d_scores = (_dot(v, do, 1, 1) * decay.intra).astype(q.dtype)
    scores = (_dot(k, q, 1, 1) * decay.intra).astype(q.dtype)
    rounded = d_state.astype(q.dtype)
    dk = _dot(d_scores, q, 1, 0) + decay.leaving * _dot(v, rounded, 1, 1)
    dv = _dot(scores, do, 1, 0) + decay.leaving * _dot(k, rounded, 1, 0)
    update = _dot(_weighted(q, decay.entering), do, 0, 0)
    return (dk, dv), decay.carried * d_state + update


def _last_state_step(decay, state, k, v):
    """`_forward_step` without the outputs."""
    return (), decay.carried * state + _dot(_weighted(k, decay.leaving), v, 0, 0)


def _first_state_step(decay, d_state, q, do):
    """`_backward_step` without the gradients."""
    return (), decay.carried * d_state + _dot(_weighted(q, decay.entering), do, 0, 0)


class _Walk(NamedTuple):
    """Differences between the kernels."""

    name: str
    step: Callable
    inputs: int  # tensors [B, T, H*D] that a step reads
    outputs: int  # and writes
    reverse: bool  # from the last chunk to the first
    products: tuple[int, int]  # of C*C*D and of C*D*D multiplications in one chunk and head


_FORWARD = _Walk("lightning_forward", _forward_step, inputs=3, outputs=1, reverse=False, products=(2, 2))
_BACKWARD = _Walk("lightning_backward", _backward_step, inputs=4, outputs=2, reverse=True, products=(4, 3))
_LAST_STATE = _Walk("lightning_last_state", _last_state_step, inputs=2, outputs=0, reverse=False, products=(0, 1))
_FIRST_STATE = _Walk("lightning_first_state", _first_state_step, inputs=2, outputs=0, reverse=True, products=(0, 1))


def _weighted(x, weight):
    return (x.astype(jnp.float32) * weight).astype(x.dtype)


def _dot(a, b, a_axis, b_axis):
    """Product of two matrices over the named axes, accumulated in float32."""
    # float32 inputs ask for float32 products, which the MXU does not give by default.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _scan(walk, tensors, slopes, segments, initial_state, chunk_size):
    """Segments the steps of `walk` over the chunks of all rows and heads.

    Args:
      walk: `_FORWARD`, `_BACKWARD`, or one of the two that make no outputs.
      tensors: what a step reads, [B, T, H*D] each.
      slopes: float32 [H].
      segments: int32 [B, T] or None, as `number_segments` gives them.
      initial_state: float32 [B, H, D, D] before the first step.
      chunk_size: as in `api.lightning_attention`.

    Returns:
      (what the steps write, [B, T, H*D] each in the dtype of `tensors`; float32 [B, H, D, D] after the last step).
    """
    batch, length, width = tensors[0].shape
    dtype = tensors[0].dtype
    heads = slopes.shape[0]
    dim = width // heads
    size, block_heads = _blocks(walk, tensors[0], heads, chunk_size)
    chunks = cdiv(length, size)
    padding = chunks * size - length
    if padding and segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    if padding:
        segments, *tensors = (
            jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) for x in (segments, *tensors)
        )
    # Without segments one description stands for all chunks.
    shared = segments is None
    description = _describe(
        jnp.ones((1, 1, size), int) if shared else segments.reshape(batch, chunks, size), walk.reverse
    )

    def time(c):
        return chunks - 1 - c if walk.reverse else c

    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    token_spec = pl.BlockSpec((1, 1, 8, size), lambda b, h, c: (0, 0, 0, 0) if shared else (b, time(c), 0, 0))
    tensor_spec = pl.BlockSpec((1, size, block_heads * dim), lambda b, h, c: (b, time(c), h))
    state_spec = pl.BlockSpec((1, block_heads, dim, dim), lambda b, h, c: (b, h, 0, 0))
    scratch = [(block_heads, dim, dim), (block_heads, size, size), (block_heads, size, dim), (block_heads, size, dim)]
    written = jax.ShapeDtypeStruct((batch, chunks * size, width), dtype)
    *outputs, state = pl.pallas_call(
        functools.partial(_kernel, walk=walk, chunks=chunks, shared=shared),
        grid=(batch, heads // block_heads, chunks),
        in_specs=[scalars] * 3 + [token_spec] + [tensor_spec] * walk.inputs + [state_spec],
        out_specs=[tensor_spec] * walk.outputs + [state_spec],
        out_shape=[written] * walk.outputs + [jax.ShapeDtypeStruct(initial_state.shape, jnp.float32)],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(walk, written, initial_state, size),
        interpret=interpret(),
        name=walk.name,
    )(slopes, description.stale, description.carried, description.tokens, *tensors, initial_state)
    return tuple(x[:, :length] if padding else x for x in outputs), state


def _kernel(slopes_ref, stale_ref, carried_ref, tokens_ref, *refs, walk, chunks, shared):
    """One chunk of one block of heads.

    `refs` are the inputs [1, C, heads*D], the initial state [1, heads, D, D], the outputs and the final state like
    them, and in scratch the state [heads, D, D] and the tables of `_Decays` for each head.
    """
    input_refs, refs = refs[: walk.inputs], refs[walk.inputs :]
    initial_ref, *output_refs, final_ref, state_ref, intra_ref, entering_ref, leaving_ref = refs
    row, block, index = (pl.program_id(axis) for axis in range(3))
    place = 0 if shared else row * chunks + (chunks - 1 - index if walk.reverse else index)
    block_heads, dim, _ = state_ref.shape

    def slope(head):
        return slopes_ref[block * block_heads + head]

    @pl.when(index == 0)
    def _():
        state_ref[...] = initial_ref[0]

    @pl.when((index == 0) | (stale_ref[place] > 0))
    def _():
        intra, entering, leaving = _distances(tokens_ref[0, 0], transposed=walk.reverse)
        for head in range(block_heads):
            intra_ref[head] = jnp.exp(-slope(head) * intra)
            entering_ref[head] = jnp.broadcast_to(jnp.exp(-slope(head) * entering), entering_ref.shape[1:])
            leaving_ref[head] = jnp.broadcast_to(jnp.exp(-slope(head) * leaving), leaving_ref.shape[1:])

    for head in range(block_heads):
        lanes = slice(head * dim, (head + 1) * dim)
        carried = jnp.exp(jnp.full((1, dim), -slope(head) * carried_ref[place]))
        decay = _Decays(intra_ref[head], entering_ref[head], leaving_ref[head], carried)
        outputs, state_ref[head] = walk.step(decay, state_ref[head], *(ref[0, :, lanes] for ref in input_refs))
        for ref, output in zip(output_refs, outputs, strict=True):
            ref[0, :, lanes] = output.astype(ref.dtype)

    @pl.when(index == chunks - 1)
    def _():
        final_ref[0] = state_ref[...]


class _Description(NamedTuple):
    """Segment facts of each chunk, as the kernel reads them; B*N is 1 where all chunks are alike."""

    stale: jax.Array  # int32 [B*N] 1 where the tables of the chunk before do not serve this one
    carried: jax.Array  # float32 [B*N] distance from the entry state to the exit state
    tokens: jax.Array  # float32 [B, N, 8, C]: count, segment, entering and leaving distance, in a tile of 8 rows


def _describe(segments, reverse):
    """Reads the chunks off their segments, int32 [B, N, C]."""
    # Segments grow from left to right and the initial state continues segment 1, also where a row starts with padding.
    exit_segment = jnp.maximum(lax.cummax(jnp.max(segments, axis=2), axis=1), 1)  # [B, N]
    entry_segment = jnp.pad(exit_segment, ((0, 0), (1, 0)), constant_values=1)[:, :-1]
    count = jnp.cumsum(segments > 0, axis=2)
    total = count[..., -1:]

    def distance(tokens, keep):
        return jnp.where(keep, tokens.astype(jnp.float32), _FAR)

    rows = [
        count.astype(jnp.float32),
        segments.astype(jnp.float32),
        distance(count, segments == entry_segment[..., None]),
        distance(total - count, segments == exit_segment[..., None]),
    ]
    whole = jnp.all(segments == entry_segment[..., None], axis=2)
    before = jnp.roll(whole, -1 if reverse else 1, axis=1)  # what wraps around belongs to the first step
    return _Description(
        stale=(~(whole & before)).astype(jnp.int32).reshape(-1),
        carried=distance(total[..., 0], entry_segment == exit_segment).reshape(-1),
        tokens=jnp.pad(jnp.stack(rows, axis=2), ((0, 0), (0, 0), (0, 4), (0, 0))),
    )


def _distances(tokens, transposed):
    """Distances inside a chunk from its tokens, float32 [8, C].

    Returns:
      (intra [C, C], entering [C, 1], leaving [C, 1]); intra is [i, j], or [j, i] where `transposed`.
    """
    size = tokens.shape[1]
    down = lax.broadcasted_iota(jnp.int32, (size, size), 0)
    across = lax.broadcasted_iota(jnp.int32, (size, size), 1)
    count, segment, entering, leaving = (tokens[i : i + 1] for i in range(4))

    def column(row):  # [1, C] -> [C, 1] by its diagonal, which asks nothing of C as a transpose does
        return jnp.sum(jnp.where(down == across, row, 0.0), axis=1, keepdims=True)

    between = count - column(count) if transposed else column(count) - count
    causal = across >= down if transposed else down >= across
    attends = causal & (column(segment) == segment) & (segment > 0)
    return jnp.where(attends, between, _FAR), column(entering), column(leaving)


def _blocks(walk, tensor, heads, chunk_size):
    """(chunk length, heads of a block) for tensors like `tensor` [B, T, H*D]; `chunk_size` None leaves both open."""
    batch, length, width = tensor.shape
    dim, itemsize = width // heads, tensor.dtype.itemsize
    size = _chunk_length(length, chunk_size)
    largest = _heads_per_block(heads, dim, size, itemsize, walk)
    if chunk_size is not None:
        return size, largest
    sizes = sorted({_chunk_length(length, size) for size in _CHUNKS})
    chosen = block_sizes.choose(
        "lightning_attention",
        "mosaic_tpu",
        "backward" if walk.reverse else "forward",
        dict(batch=batch, length=length, heads=heads, dim=dim, dtype=tensor.dtype.name),
        candidates=lambda: [dict(chunk=c, heads=n) for c in sizes for n in _head_blocks(heads, dim, c, itemsize, walk)],
        heuristic=lambda: dict(chunk=size, heads=largest),
    )
    return chosen["chunk"], chosen["heads"]


def _chunk_length(length, chunk_size):
    """`chunk_size` in whole tiles of 16 rows, within what the row and the tables ask for."""
    return 16 * cdiv(min(length, chunk_size or _MAX_CHUNK, _MAX_CHUNK), 16)


def _heads_per_block(heads, dim, size, itemsize, walk):
    """The most heads that a block can hold, 0 if there are none: steps of one head would wait for the MXU."""
    return max(_head_blocks(heads, dim, size, itemsize, walk), default=0)


def _head_blocks(heads, dim, size, itemsize, walk):
    """Numbers of heads that a block can hold: whole tiles of 128 lanes, or all heads at once."""
    moved = 2 * (walk.inputs + walk.outputs) * size * dim * itemsize  # two buffers for each array that moves
    states = 5 * dim * _LANES * 4  # scratch, and two buffers for the initial and for the final state
    tables = size * (_LANES * cdiv(size, _LANES) + 2 * _LANES) * 4
    most = _VMEM_BYTES // (moved + states + tables)
    legal = (n for n in range(1, heads + 1) if heads % n == 0 and (n == heads or n * dim % _LANES == 0))
    return [n for n in legal if n <= most]


def _cost(walk, tensor, state, size):
    """Cost estimate of a kernel, for the schedule of XLA."""
    within, across = walk.products
    return pl.CostEstimate(
        flops=2 * tensor.size * (within * size + across * state.shape[-1]),
        bytes_accessed=(walk.inputs + walk.outputs) * tensor.size * tensor.dtype.itemsize + 2 * state.nbytes,
        transcendentals=0,
    )
