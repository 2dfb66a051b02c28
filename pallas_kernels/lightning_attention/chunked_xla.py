"""Lightning attention as a scan over chunks, in plain XLA: any length, any platform.

Inside a chunk with entry state S, c_i the number of its real tokens up to and including i, and n their
total (arXiv 2401.04658, algorithms 1 and 2; spec C.3 and C.7):

    o_i   = sum_{j<=i} exp(-s (c_i - c_j)) (q_i . k_j) v_j + exp(-s c_i) q_i S
    S_out = exp(-s n) S + sum_j exp(-s (n - c_j)) k_j^T v_j

Terms between different documents are masked. Every exponent is formed as a difference before exp:
exp(-s c_i) exp(+s c_j) would overflow. The backward keeps q, k, v and the entry state of each chunk,
and is one scan from the last chunk to the first.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.platform import cdiv


def check(q, k, v, slopes, *, segmented, chunk_size):
    """Serves every shape."""
    del q, k, v, slopes, segmented, chunk_size


def forward(q, k, v, slopes, runs, initial_state, *, chunk_size):
    """See `api.lightning_attention`; returns (output, final state, residuals of the backward)."""
    chunks, masks = _chunk_inputs((q, k, v), slopes, runs, chunk_size)
    precision = _precision(q.dtype)
    decays = _decays_of_chunks(slopes, masks, chunks[0].shape[3])

    def step(state, chunk):
        (q, k, v), m = chunk
        decay = decays(m)
        scores = _dot("bhid,bhjd->bhij", q, k, precision) * decay.intra
        output = _dot("bhij,bhje->bhie", scores.astype(v.dtype), v, precision)
        output += _dot("bhid,bhde->bhie", q * decay.entering, state, precision)
        update = _dot("bhjd,bhje->bhde", (k * decay.leaving).astype(k.dtype), v, precision)
        return decay.carried * state + update, (output.astype(v.dtype), state)

    state, (output, entry_states) = lax.scan(step, initial_state, (chunks, masks))
    return _merge_chunks(output, q.shape[1]), state, entry_states


def backward(q, k, v, slopes, runs, residuals, d_output, d_state, *, chunk_size):
    """Gradients to q, k, v and the initial state."""
    chunks, masks = _chunk_inputs((q, k, v, d_output), slopes, runs, chunk_size)
    precision = _precision(q.dtype)
    decays = _decays_of_chunks(slopes, masks, chunks[0].shape[3])

    def step(d_state, chunk):
        (q, k, v, do), m, state = chunk
        decay = decays(m)
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

    d_initial, gradients = lax.scan(step, d_state, (chunks, masks, residuals), reverse=True)
    return *(_merge_chunks(x, q.shape[1]) for x in gradients), d_initial


class _ChunkMask(NamedTuple):
    """Where the documents of a chunk lie; stacked over chunks outside the scan."""

    count: jnp.ndarray  # int32 [B, C] real tokens of the chunk up to and including i
    run: jnp.ndarray  # int32 [B, C] document, 0 at padding
    entry_run: jnp.ndarray  # int32 [B] document that the entry state belongs to
    exit_run: jnp.ndarray  # int32 [B] document that the exit state belongs to


class _Decays(NamedTuple):
    """float32 weights with the masks folded in; the leading axis is B, or 1 where rows are alike."""

    intra: jnp.ndarray  # [B, H, C, C] of v_j in o_i
    entering: jnp.ndarray  # [B, H, C, 1] of the entry state in o_i
    leaving: jnp.ndarray  # [B, H, C, 1] of k_j^T v_j in the exit state
    carried: jnp.ndarray  # [B, H, 1, 1] of the entry state in the exit state


def _decays_of_chunks(slopes, masks, length):
    """A function from the mask of a chunk to its weights, which are made once where no chunk has a mask."""
    if masks is None:
        same = _decays(slopes, None, length)
        return lambda mask: same
    return lambda mask: _decays(slopes, mask, length)


def _decays(slopes, mask, length):
    """The weights of one chunk."""
    causal = jnp.tril(jnp.ones((length, length), bool))
    if mask is None:
        count = jnp.arange(1, length + 1)[None]
        attends, enters, leaves, carries = causal[None], True, True, True
    else:
        count, run, entry_run, exit_run = mask
        attends = causal & (run[:, :, None] == run[:, None, :]) & (run > 0)[:, None, :]
        enters = (run == entry_run[:, None])[:, None, :, None]
        leaves = (run == exit_run[:, None])[:, None, :, None]
        carries = (entry_run == exit_run)[:, None, None, None]
    total = count[:, -1]
    slopes = slopes[:, None, None]

    def weight(distance, keep):  # distances are clamped before exp: masked ones are negative and would overflow
        return jnp.where(keep, jnp.exp(-slopes * jnp.maximum(distance, 0)[:, None]), 0.0)

    return _Decays(
        intra=weight(count[:, :, None] - count[:, None, :], attends[:, None]),
        entering=weight(count[:, :, None], enters),
        leaving=weight((total[:, None] - count)[:, :, None], leaves),
        carried=weight(total[:, None, None], carries),
    )


def _chunk_inputs(tensors, slopes, runs, chunk_size):
    """Cuts [B, T, H*D] into [N, B, H, C, D], and `runs` into a stacked `_ChunkMask` (None if rows are whole)."""
    batch, length, _ = tensors[0].shape
    heads = slopes.shape[0]
    size = min(chunk_size, length)
    count = cdiv(length, size)
    padding = count * size - length
    if padding and runs is None:
        runs = jnp.ones((batch, length), jnp.int32)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        return x.reshape(batch, count, size, heads, -1).transpose(1, 0, 3, 2, 4)

    return tuple(map(cut, tensors)), None if runs is None else _chunk_masks(runs, padding, size)


def _chunk_masks(runs, padding, size):
    batch = runs.shape[0]
    runs = jnp.pad(runs, ((0, 0), (0, padding))).reshape(batch, -1, size)
    # Runs grow from left to right and the initial state continues run 1, also where a row starts with padding.
    exit_run = jnp.maximum(lax.cummax(jnp.max(runs, axis=2), axis=1), 1)
    mask = _ChunkMask(
        count=jnp.cumsum(runs > 0, axis=2),
        run=runs,
        entry_run=jnp.pad(exit_run, ((0, 0), (1, 0)), constant_values=1)[:, :-1],
        exit_run=exit_run,
    )
    return _ChunkMask(*(jnp.moveaxis(x, 1, 0) for x in mask))


def _merge_chunks(x, length):
    """[N, B, H, C, D] -> [B, T, H*D], without the padded tail."""
    count, batch, heads, size, dim = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, count * size, heads * dim)[:, :length]


def _precision(dtype):
    """float32 inputs ask for float32 products, which TPU and GPU do not give by default."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _dot(equation, a, b, precision):
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
