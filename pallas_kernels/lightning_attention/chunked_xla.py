"""Lightning attention as a scan over chunks, in plain XLA: any length, any platform.

Inside a chunk with entry state S, c_i the number of its real tokens up to and including i, and n their
total (arXiv 2401.04658, algorithms 1 and 2; docs/model.md, "Lightning attention"):

    o_i   = sum_{j<=i} exp(-s (c_i - c_j)) (q_i . k_j) v_j + exp(-s c_i) q_i S
    S_out = exp(-s n) S + sum_j exp(-s (n - c_j)) k_j^T v_j

Terms between different documents are masked. Every exponent is formed as a difference before exp:
exp(-s c_i) exp(+s c_j) would overflow. The backward keeps q, k, v and the entry state of each chunk,
and is one scan from the last chunk to the first.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import block_sizes
from pallas_kernels.lightning_attention import reference
from pallas_kernels.platform import cdiv

documents = reference.documents

_CHUNK = 256  # where nothing was measured
_CHUNKS = (32, 64, 128, 256, 512)  # that tuning measures


def check(q: Any, k: Any, v: Any, slopes: Any, *, segmented: bool, chunk_size: int) -> None:
    """Serves every shape."""
    del q, k, v, slopes, segmented, chunk_size


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
    chunks, distances = _chunk_inputs((q, k, v), slopes, segments, _chunk_length(q, slopes, chunk_size))
    precision = _precision(q.dtype)
    decays = _decays_of_chunks(slopes, distances, chunks[0].shape[3])

    def step(state, chunk):
        (q, k, v), between = chunk
        decay = decays(between)
        scores = _dot("bhid,bhjd->bhij", q, k, precision) * decay.intra
        output = _dot("bhij,bhje->bhie", scores.astype(v.dtype), v, precision)
        output += _dot("bhid,bhde->bhie", q * decay.entering, state, precision)
        update = _dot("bhjd,bhje->bhde", (k * decay.leaving).astype(k.dtype), v, precision)
        return decay.carried * state + update, (output.astype(v.dtype), state)

    state, (output, entry_states) = lax.scan(step, initial_state, (chunks, distances))
    return _merge_chunks(output, q.shape[1]), state, entry_states


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
    chunks, distances = _chunk_inputs((q, k, v, d_output), slopes, segments, _chunk_length(q, slopes, chunk_size))
    precision = _precision(q.dtype)
    decays = _decays_of_chunks(slopes, distances, chunks[0].shape[3])

    def step(d_state, chunk):
        (q, k, v, do), between, state = chunk
        decay = decays(between)
        d_scores = (_dot("bhie,bhje->bhij", do, v, precision) * decay.intra).astype(q.dtype)
        scores = (_dot("bhid,bhjd->bhij", q, k, precision) * decay.intra).astype(q.dtype)
        dq = _dot("bhij,bhjd->bhid", d_scores, k, precision)
        dq += decay.entering * _dot("bhie,bhde->bhid", do, state, precision)
        dk = _dot("bhij,bhid->bhjd", d_scores, q, precision)
        dk += decay.leaving * _dot("bhje,bhde->bhjd", v, d_state, precision)
        dv = _dot("bhij,bhie->bhje", scores, do, precision)
        dv += decay.leaving * _dot("bhjd,bhde->bhje", k, d_state, precision)
        update = _dot("bhid,bhie->bhde", (q * decay.entering).astype(q.dtype), do, precision)
        return decay.carried * d_state + update, tuple(x.astype(q.dtype) for x in (dq, dk, dv))

    d_initial, gradients = lax.scan(step, d_state, (chunks, distances, residuals), reverse=True)
    return *(_merge_chunks(x, q.shape[1]) for x in gradients), d_initial


def end_state(
    k: jax.Array, v: jax.Array, slopes: jax.Array, segments: Any, *, reverse: bool, chunk_size: int
) -> jax.Array:
    """See `api.end_state`."""
    chunks, distances = _chunk_inputs((k, v), slopes, segments, _chunk_length(k, slopes, chunk_size))
    precision = _precision(k.dtype)
    decays = _decays_of_chunks(slopes, distances, chunks[0].shape[3])

    def step(state, chunk):
        (k, v), between = chunk
        decay = decays(between)
        weight = decay.entering if reverse else decay.leaving
        update = _dot("bhjd,bhje->bhde", (k * weight).astype(k.dtype), v, precision)
        return decay.carried * state + update, None

    _, batch, heads, _, dim = chunks[0].shape
    zero = jnp.zeros((batch, heads, dim, chunks[1].shape[-1]), jnp.float32)
    return lax.scan(step, zero, (chunks, distances), reverse=reverse)[0]


class _Distances(NamedTuple):
    """Tokens that lie between, float32; infinite between documents and at padding, so that exp(-s x) is 0 there.

    Stacked over chunks outside the scan: what does not depend on the head is made once, not in every head.
    """

    intra: jnp.ndarray  # [B, C, C] from v_j to o_i
    entering: jnp.ndarray  # [B, C] from the entry state to o_i
    leaving: jnp.ndarray  # [B, C] from k_j^T v_j to the exit state
    carried: jnp.ndarray  # [B] from the entry state to the exit state


class _Decays(NamedTuple):
    """float32 weights exp(-s distance); the leading axis is B, or 1 where rows are alike."""

    intra: jnp.ndarray  # [B, H, C, C]
    entering: jnp.ndarray  # [B, H, C, 1]
    leaving: jnp.ndarray  # [B, H, C, 1]
    carried: jnp.ndarray  # [B, H, 1, 1]


def _decays_of_chunks(slopes, distances, length):
    """A function from the distances of a chunk to its weights, which are made once where all chunks are alike."""
    if distances is None:
        index = jnp.arange(length)
        same = _decays(slopes, _distances(index[None] + 1, jnp.ones((1, length), int), jnp.ones(1), jnp.ones(1)))
        return lambda _: same
    return lambda distances: _decays(slopes, distances)


def _decays(slopes, distances):
    """The weights of one chunk."""

    def weight(distance):
        return jnp.exp(-slopes[:, None, None] * distance)

    intra, entering, leaving, carried = distances
    return _Decays(
        intra=weight(intra[:, None]),
        entering=weight(entering[:, None, :, None]),
        leaving=weight(leaving[:, None, :, None]),
        carried=weight(carried[:, None, None, None]),
    )


def _distances(count, segment, entry_segment, exit_segment):
    """The distances inside chunks.

    Args:
      count: int32 [..., C] real tokens of the chunk up to and including i.
      segment: int32 [..., C] document, 0 at padding.
      entry_segment, exit_segment: int32 [...] documents that the entry and the exit state belong to.
    """
    causal = jnp.tril(jnp.ones((count.shape[-1],) * 2, bool))
    attends = causal & (segment[..., :, None] == segment[..., None, :]) & (segment > 0)[..., None, :]
    total = count[..., -1]

    def distance(tokens, keep):
        return jnp.where(keep, tokens.astype(jnp.float32), jnp.inf)

    return _Distances(
        intra=distance(count[..., :, None] - count[..., None, :], attends),
        entering=distance(count, segment == entry_segment[..., None]),
        leaving=distance(total[..., None] - count, segment == exit_segment[..., None]),
        carried=distance(total, entry_segment == exit_segment),
    )


def _chunk_length(q, slopes, chunk_size):
    batch, length, width = q.shape
    if chunk_size is not None:
        return min(chunk_size, length)
    (heads,) = slopes.shape
    shape = dict(batch=batch, length=length, heads=heads, dim=width // heads, dtype=q.dtype.name)
    chosen = block_sizes.choose(
        "lightning_attention",
        "chunked_xla",
        "chunks",
        shape,
        candidates=lambda: [dict(chunk=size) for size in sorted({min(size, length) for size in _CHUNKS})],
        heuristic=lambda: dict(chunk=min(_CHUNK, length)),
    )
    return chosen["chunk"]


def _chunk_inputs(tensors, slopes, segments, size):
    """Cuts [B, T, H*D] into [N, B, H, C, D], and `segments` into stacked `_Distances` (None if rows are whole)."""
    batch, length, _ = tensors[0].shape
    heads = slopes.shape[0]
    count = cdiv(length, size)
    padding = count * size - length
    if padding and segments is None:
        segments = jnp.ones((batch, length), jnp.int32)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        return x.reshape(batch, count, size, heads, -1).transpose(1, 0, 3, 2, 4)

    return tuple(map(cut, tensors)), None if segments is None else _distances_of_segments(segments, padding, size)


def _distances_of_segments(segments, padding, size):
    batch = segments.shape[0]
    segments = jnp.pad(segments, ((0, 0), (0, padding))).reshape(batch, -1, size)
    # Segments grow from left to right and the initial state continues segment 1, also where a row starts with padding.
    exit_segment = jnp.maximum(lax.cummax(jnp.max(segments, axis=2), axis=1), 1)
    entry_segment = jnp.pad(exit_segment, ((0, 0), (1, 0)), constant_values=1)[:, :-1]
    distances = _distances(jnp.cumsum(segments > 0, axis=2), segments, entry_segment, exit_segment)
    return _Distances(*(jnp.moveaxis(x, 1, 0) for x in distances))


def _merge_chunks(x, length):
    """[N, B, H, C, D] -> [B, T, H*D], without the padded tail."""
    count, batch, heads, size, dim = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, count * size, heads * dim)[:, :length]


def _precision(dtype):
    """float32 inputs ask for float32 products, which TPU and GPU do not give by default."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _dot(equation, a, b, precision):
    """An einsum with float32 accumulation; decayed factors are float32, and `precision` is that of the inputs."""
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
