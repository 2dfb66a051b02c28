"""The definition of lightning attention, and its recurrent step.

Every other backend is tested against this one; it is quadratic in T and takes its gradient from JAX.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.segments import number_segments

SQUARES = 64  # numbers of an output whose squares `gated_step` adds up


def documents(segment_ids: jax.Array | None, *, numbered: bool) -> Any:
    """Segment ids as the backends take them: int32 [B, T], 1, 2, 3, ... along a row and 0 at padding.

    Args:
      segment_ids: int [B, T] of the caller; or if they are `numbered`, int32 as `number_segments` gives them already.
    """
    return segment_ids if numbered or segment_ids is None else number_segments(segment_ids)


def check(q: Any, k: Any, v: Any, slopes: Any, *, segmented: bool, chunk_size: int) -> None:
    """The definition serves every shape."""
    del q, k, v, slopes, segmented, chunk_size


def _definition(q, k, v, initial_state, slopes, segments):
    batch, length, _ = q.shape
    heads = slopes.shape[0]
    q, k, v = (x.astype(jnp.float32).reshape(batch, length, heads, -1) for x in (q, k, v))
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    token_mask = segments > 0
    count = jnp.cumsum(token_mask, axis=1)  # real tokens up to and including t
    index = jnp.arange(length)

    def weight(distance, mask):
        # Clamp before exp: the masked half would overflow and poison the gradient with 0 * inf.
        decay = jnp.exp(-slopes[:, None, None] * jnp.maximum(distance, 0)[:, None])
        return jnp.where(mask[:, None], decay, 0.0)

    attends = (index[:, None] >= index) & (segments[:, :, None] == segments[:, None, :]) & token_mask[:, None, :]
    scores = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest")
    scores *= weight(count[:, :, None] - count[:, None, :], attends)
    output = jnp.einsum("bhts,bshe->bthe", scores, v, precision="highest")

    # The initial state belongs to the first document, the final state to the last one.
    entering = weight(count[:, :, None], (segments == 1)[:, :, None])[..., 0]  # [B, H, T]
    output += jnp.einsum("bht,bthd,bhde->bthe", entering, q, initial_state, precision="highest")
    last_segment = jnp.maximum(jnp.max(segments, axis=1, keepdims=True), 1)
    total = count[:, -1:]
    leaving = weight((total - count)[:, :, None], ((segments == last_segment) & token_mask)[:, :, None])[..., 0]
    state = jnp.einsum("bht,bthd,bthe->bhde", leaving, k, v, precision="highest")
    state += weight(total[:, :, None], (last_segment == 1)[:, :, None]) * initial_state
    return output.reshape(batch, length, -1), state


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
    """See `api.lightning_attention`; returns (output in float32, final state, residuals of the backward)."""
    del chunk_size
    output, state = _definition(q, k, v, initial_state, slopes, segments)
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
    del chunk_size
    _, vjp = jax.vjp(lambda q, k, v, s: _definition(q, k, v, s, slopes, segments), q, k, v, residuals)
    return vjp((d_output.astype(jnp.float32), d_state))


def end_state(
    k: jax.Array, v: jax.Array, slopes: jax.Array, segments: Any, *, reverse: bool, chunk_size: int
) -> jax.Array:
    """See `api.end_state`."""
    del chunk_size
    batch, length, width = k.shape
    heads = slopes.shape[0]
    zero = jnp.zeros((batch, heads, width // heads, v.shape[-1] // heads), jnp.float32)
    if not reverse:
        return _definition(k, k, v, zero, slopes, segments)[1]
    # The gradient to the initial state is the state of the queries and of the gradient to the outputs.
    _, vjp = jax.vjp(lambda state: _definition(k, k, v, state, slopes, segments)[0], zero)
    return vjp(v.astype(jnp.float32))[0]


def recurrent_step(
    q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array, state: Any, token_mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """One token of decoding: S <- exp(-s) S + k^T v; o = q S (arXiv 2401.04658, equation 2).

    Args:
      q, k, v: [B, H*D].
      slopes: float32 [H].
      state: float32 [B, H, D, D].
      token_mask: bool [B]; rows that hold no token keep their state.

    Returns:
      (output float32 [B, H*D], state float32 [B, H, D, D]).
    """
    batch, heads = q.shape[0], slopes.shape[0]
    q, k, v = (x.astype(jnp.float32).reshape(batch, heads, -1) for x in (q, k, v))
    updated = jnp.exp(-slopes)[:, None, None] * state + k[..., :, None] * v[..., None, :]
    if token_mask is not None:
        updated = jnp.where(token_mask[:, None, None, None], updated, state)
    # A multiply and a sum, not a dot: it fuses with the update, and float32 stays float32 on every platform.
    output = jnp.sum(q[..., :, None] * updated, axis=-2)
    return lax.reshape(output, (batch, heads * v.shape[-1])), updated


def gated_step(
    projected: jax.Array, slopes: jax.Array, state: Any, scale: jax.Array, token_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.gated_step`."""
    batch, heads, dim, _ = state.shape
    *qkv, gate = jnp.split(projected[:batch].astype(jnp.float32), 4, axis=1)
    q, k, v = (jax.nn.silu(x).astype(projected.dtype) for x in qkv)
    output, state = recurrent_step(q, k, v, slopes, state, token_mask)
    squares = jnp.sum(jnp.square(output).reshape(batch, -1, SQUARES), axis=-1)
    return (jax.nn.sigmoid(gate) * (output * scale)).astype(projected.dtype), squares, state
