"""The definition of lightning attention, and its recurrent step.

Every other backend is tested against this one; it is quadratic in T and takes its gradient from JAX.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.segments import number_segments

SQUARES = 64  # numbers of an output whose squares `gated_step` adds up


def documents(segment_ids, *, numbered):
    """Segment ids as the backends take them: int32 [B, T], 1, 2, 3, ... along a row and 0 at padding.

    Args:
      segment_ids: int [B, T] of the caller; or if they are `numbered`, int32 as `number_segments` gives them already.
    """
    return segment_ids if numbered else number_segments(segment_ids)


def check(q, k, v, slopes, *, segmented, chunk_size):
    """The definition serves every shape."""
    del q, k, v, slopes, segmented, chunk_size


def _definition(q, k, v, initial_state, slopes, runs):
    batch, length, _ = q.shape
    heads = slopes.shape[0]
    q, k, v = (x.astype(jnp.float32).reshape(batch, length, heads, -1) for x in (q, k, v))
    if runs is None:
        runs = jnp.ones((batch, length), jnp.int32)
    real = runs > 0
    count = jnp.cumsum(real, axis=1)  # real tokens up to and including t
    index = jnp.arange(length)

    def weight(distance, mask):
        # Clamp before exp: the masked half would overflow and poison the gradient with 0 * inf.
        decay = jnp.exp(-slopes[:, None, None] * jnp.maximum(distance, 0)[:, None])
        return jnp.where(mask[:, None], decay, 0.0)

    attends = (index[:, None] >= index) & (runs[:, :, None] == runs[:, None, :]) & real[:, None, :]
    scores = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest")
    scores *= weight(count[:, :, None] - count[:, None, :], attends)
    output = jnp.einsum("bhts,bshe->bthe", scores, v, precision="highest")

    # The initial state belongs to the first document, the final state to the last one.
    entering = weight(count[:, :, None], (runs == 1)[:, :, None])[..., 0]  # [B, H, T]
    output += jnp.einsum("bht,bthd,bhde->bthe", entering, q, initial_state, precision="highest")
    last_run = jnp.maximum(jnp.max(runs, axis=1, keepdims=True), 1)
    total = count[:, -1:]
    leaving = weight((total - count)[:, :, None], ((runs == last_run) & real)[:, :, None])[..., 0]
    state = jnp.einsum("bht,bthd,bthe->bhde", leaving, k, v, precision="highest")
    state += weight(total[:, :, None], (last_run == 1)[:, :, None]) * initial_state
    return output.reshape(batch, length, -1), state


def forward(q, k, v, slopes, runs, initial_state, *, chunk_size):
    """See `api.lightning_attention`; returns (output in float32, final state, residuals of the backward)."""
    del chunk_size
    output, state = _definition(q, k, v, initial_state, slopes, runs)
    return output, state, initial_state


def backward(q, k, v, slopes, runs, residuals, d_output, d_state, *, chunk_size):
    """Gradients to q, k, v and the initial state."""
    del chunk_size
    _, vjp = jax.vjp(lambda q, k, v, s: _definition(q, k, v, s, slopes, runs), q, k, v, residuals)
    return vjp((d_output.astype(jnp.float32), d_state))


def end_state(k, v, slopes, runs, *, reverse, chunk_size):
    """See `api.end_state`."""
    del chunk_size
    batch, length, width = k.shape
    heads = slopes.shape[0]
    zero = jnp.zeros((batch, heads, width // heads, v.shape[-1] // heads), jnp.float32)
    if not reverse:
        return _definition(k, k, v, zero, slopes, runs)[1]
    # The gradient to the initial state is the state of the queries and of the gradient to the outputs.
    _, vjp = jax.vjp(lambda state: _definition(k, k, v, state, slopes, runs)[0], zero)
    return vjp(v.astype(jnp.float32))[0]


def recurrent_step(q, k, v, slopes, state, real=None):
    """One token of decoding: S <- exp(-s) S + k^T v; o = q S (spec C.3, step 4).

    Args:
      q, k, v: [B, H*D].
      slopes: float32 [H].
      state: float32 [B, H, D, D].
      real: bool [B]; rows that hold no token keep their state.

    Returns:
      (output float32 [B, H*D], state float32 [B, H, D, D]).
    """
    batch, heads = q.shape[0], slopes.shape[0]
    q, k, v = (x.astype(jnp.float32).reshape(batch, heads, -1) for x in (q, k, v))
    updated = jnp.exp(-slopes)[:, None, None] * state + k[..., :, None] * v[..., None, :]
    if real is not None:
        updated = jnp.where(real[:, None, None, None], updated, state)
    # A multiply and a sum, not a dot: it fuses with the update, and float32 stays float32 on every platform.
    output = jnp.sum(q[..., :, None] * updated, axis=-2)
    return lax.reshape(output, (batch, heads * v.shape[-1])), updated


def gated_step(projected, slopes, state, scale, real):
    """See `api.gated_step`."""
    batch, heads, dim, _ = state.shape
    *qkv, gate = jnp.split(projected[:batch].astype(jnp.float32), 4, axis=1)
    q, k, v = (jax.nn.silu(x).astype(projected.dtype) for x in qkv)
    output, state = recurrent_step(q, k, v, slopes, state, real)
    squares = jnp.sum(jnp.square(output).reshape(batch, -1, SQUARES), axis=-1)
    return (jax.nn.sigmoid(gate) * (output * scale)).astype(projected.dtype), squares, state
