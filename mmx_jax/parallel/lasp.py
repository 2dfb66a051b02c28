"""Lightning attention over rows whose tokens are divided over a mesh axis (LASP and LASP+), inside `jax.shard_map`.

Device i of the n along `axis` holds the i-th part of the tokens of every row. Documents lie anywhere: they cross
borders, end at one, and a device may hold nothing but padding. One float32 state a head travels in the forward and one
in the backward pass, whatever the length.

LASP+ (arXiv 2501.08313, section 3.2.2; the formula with decay and documents is ours). Device j computes the state M_j
that its own tokens leave behind, of its last document. Let a_j be the decay over all tokens of device j, and 0 if a
document starts among them. The state that enters device t, and the gradient of the state that leaves it, are

    S_t = sum_{j<t} (prod_{j<i<t} a_i) M_j + (prod_{i<t} a_i) S_0
    G_t = sum_{j>t} (prod_{t<i<j} a_i) R_j + (prod_{i>t} a_i) G_n        R_j = sum_i exp(-s c_i) q_i^T do_i

where R_j runs over the tokens of the document that goes on from the left. Then one kernel runs over the tokens with
the state that enters. A pass for M_j alone reads k and v; adding exp(-s c) q S_t to the outputs of a kernel that began
with zero would read q and the outputs and write these again, rounded twice.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mmx_jax.parallel.methods import check_method
from pallas_kernels import lightning_attention as lightning


@dataclasses.dataclass(frozen=True)
class LaspSpec:
    """How rows of lightning attention are divided.

    Attributes:
      axis: name of the mesh axis. None: rows are whole.
      method: "gather": one all-gather of the states (LASP+). "ring": n - 1 hops from neighbour to neighbour, each of
        which waits for the one before (LASP).
      chunk_size, implementation: as in `pallas_kernels.lightning_attention`.
    """

    axis: str | None = "seq"
    method: str = "gather"
    chunk_size: int | None = None
    implementation: str = "auto"

    def __post_init__(self):
        check_method(self.method)


def lightning_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    *,
    spec: LaspSpec = LaspSpec(),
) -> tuple[jax.Array, jax.Array | None]:
    """`pallas_kernels.lightning_attention` of rows whose tokens are divided over `spec.axis`.

    Gradients are those of the whole rows, to q, k, v and the initial state.

    Args:
      q, k: [B, T, H*D], v: [B, T, H*E], the tokens of this device.
      slopes: float32 [H].
      segment_ids: int32 [B, T], this device's part of `number_segments` of the whole rows. None: one document a row.
      initial_state: float32 [B, H, D, E], the same on all devices of the axis; document 1 goes on from it. None: zero.

    Returns:
      (output [B, T, H*E], final state of the whole rows, float32 [B, H, D, E], the same on all devices of the axis).
      The final state is None if there is no initial state: then only the exchange itself is sent.
    """
    options: dict[str, Any] = dict(segmented=segment_ids is not None, chunk_size=spec.chunk_size)
    if spec.axis is None or lax.axis_size(spec.axis) == 1:
        output, state = lightning.lightning_attention(
            q,
            k,
            v,
            slopes,
            segment_ids=segment_ids,
            initial_state=initial_state,
            chunk_size=spec.chunk_size,
            implementation=spec.implementation,
        )
        return output, None if initial_state is None else state
    if spec.implementation == "auto":
        chosen = lightning.default_implementation(q, k, v, slopes, **options)
        spec = dataclasses.replace(spec, implementation=chosen)
    lightning.IMPLEMENTATIONS[spec.implementation].check(q, k, v, slopes, **options)
    return _attend(spec, q, k, v, lax.stop_gradient(slopes), segment_ids, initial_state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec, q, k, v, slopes, segment_ids, initial_state):
    return _attend_forward(spec, q, k, v, slopes, segment_ids, initial_state)[0]


def _attend_forward(spec, q, k, v, slopes, segment_ids, initial_state):
    backend, options = lightning.IMPLEMENTATIONS[spec.implementation], dict(chunk_size=spec.chunk_size)
    own = lightning.end_state(k, v, slopes, segment_ids, implementation=spec.implementation, **options)
    own = _ShardState(own, *_summary(q, segment_ids))
    exchange = _gather_forward if spec.method == "gather" else _chain_forward
    entry, before, distances, final = exchange(own, slopes, initial_state, spec.axis)
    # Numbered so that the document which goes on is 1, as the backends take it.
    local = None if segment_ids is None else jnp.where(segment_ids > 0, segment_ids - before[:, None] + 1, 0)
    # Named, so that a policy of `jax.checkpoint` that keeps the output does not send states anew.
    entry, local, distances, final = checkpoint_name((entry, local, distances, final), "lightning_attention")
    documents = lightning.documents_for(spec.implementation, local, numbered=True)
    output, _, residuals = backend.forward(q, k, v, slopes, documents, entry, **options)
    output = checkpoint_name(output.astype(v.dtype), "lightning_attention")
    return (output, final), (q, k, v, slopes, local, distances, residuals)


def _attend_backward(spec, saved, cotangents):
    q, k, v, slopes, local, distances, residuals = saved
    d_output, d_final = cotangents
    backend, options = lightning.IMPLEMENTATIONS[spec.implementation], dict(chunk_size=spec.chunk_size)
    d_output = d_output.astype(q.dtype)
    own = lightning.end_state(
        q, d_output, slopes, local, reverse=True, implementation=spec.implementation, chunk_size=spec.chunk_size
    )
    # All devices give the same final state, and each gets its part of the gradient.
    d_last = None if d_final is None else lax.psum(d_final, spec.axis)
    exchange = _gather_backward if spec.method == "gather" else _chain_backward
    d_exit = exchange(own, distances, slopes, d_last, spec.axis)
    documents = lightning.documents_for(spec.implementation, local, numbered=True)
    dq, dk, dv, d_entry = backend.backward(q, k, v, slopes, documents, residuals, d_output, d_exit, **options)
    # Of the initial state only the first device makes use.
    d_initial = None if d_final is None else jnp.where(lax.axis_index(spec.axis) == 0, d_entry, 0)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), jnp.zeros_like(slopes), None, d_initial


_attend.defvjp(_attend_forward, _attend_backward)


class _ShardState(NamedTuple):
    """The state that the tokens of a device leave behind, and what the next device must know about them."""

    state: jax.Array  # float32 [B, H, D, E], from a zero state on
    last: jax.Array  # float32 [B], number of the last document; 0 if there is none
    count: jax.Array  # float32 [B], tokens without padding


def _summary(q, segment_ids):
    if segment_ids is None:
        return jnp.ones(q.shape[0]), jnp.full(q.shape[0], float(q.shape[1]))
    return jnp.max(segment_ids, axis=1).astype(jnp.float32), jnp.sum(segment_ids > 0, axis=1, dtype=jnp.float32)


def _distance(shard, before):
    """float32 [B], from the state that enters to the one that leaves; infinite if document `before` does not last."""
    return jnp.where(shard.last <= before, shard.count, jnp.inf)


def _decayed(state, slopes, distance):
    """state [B, H, D, E] over a distance [B]."""
    return jnp.exp(-slopes * distance[:, None])[..., None, None] * state


def _gather_forward(own, slopes, initial, axis):
    """(state that enters, the document it belongs to int32 [B], distances of all devices [n, B], final state)."""
    # One array is one message, so the two numbers of a row travel as two more rows of each head's state.
    rows = jnp.stack([own.last, own.count], axis=1)[:, None, :, None]
    rows = jnp.broadcast_to(rows, (*own.state.shape[:2], 2, own.state.shape[3]))
    gathered = lax.all_gather(jnp.concatenate([own.state, rows], axis=2), axis)
    dim = own.state.shape[2]
    shards = _ShardState(gathered[..., :dim, :], gathered[:, :, 0, dim, 0], gathered[:, :, 0, dim + 1, 0])
    before = jnp.pad(lax.cummax(shards.last, axis=0), ((1, 0), (0, 0)))[:-1]
    before = jnp.maximum(before, 1.0)  # the document that the initial state belongs to
    distances = _distance(shards, before)
    index = lax.axis_index(axis)
    entry = _combine_states(shards.state, distances, slopes, initial, index)
    final = None if initial is None else _combine_states(shards.state, distances, slopes, initial, distances.shape[0])
    return entry, before[index].astype(jnp.int32), distances, final


def _gather_backward(own, distances, slopes, d_last, axis):
    """The gradient of the state that leaves this device."""
    return _combine_states(lax.all_gather(own, axis), distances, slopes, d_last, lax.axis_index(axis), reverse=True)


def _combine_states(states, distances, slopes, end, place, reverse=False):
    """The sum of what arrives at `place` from the left, or from the right if `reverse`.

    Args:
      states: float32 [n, B, H, D, E] that the devices add.
      distances: float32 [n, B] over each device.
      end: float32 [B, H, D, E] that comes in where the row begins, or None.
      place: index of a device, or n: what leaves the last one.
    """
    index = jnp.arange(states.shape[0])
    passed = (index > place) if reverse else (index < place)
    nearer = (index < index[:, None]) if reverse else (index > index[:, None])
    between = jnp.sum(jnp.where((passed & nearer)[..., None], distances, 0.0), axis=1)  # [n, B]
    between = jnp.where(passed[:, None], between, jnp.inf)
    total = jnp.sum(jnp.exp(-slopes * between[..., None])[..., None, None] * states, axis=0)
    if end is None:
        return total
    return total + _decayed(end, slopes, jnp.sum(jnp.where(passed[:, None], distances, 0.0), axis=0))


def _chain_forward(own, slopes, initial, axis):
    """As `_gather_forward`, by hops; the distances are this device's own, [B]."""
    zero = jnp.zeros_like(own.state) if initial is None else initial
    first = zero, jnp.ones_like(own.last)

    def leave(arrived):
        entry, before = arrived
        return own.state + _decayed(entry, slopes, _distance(own, before)), jnp.maximum(own.last, before)

    entry, before = _chain(leave, first, axis, step=1)
    final = None
    if initial is not None:
        last = lax.axis_index(axis) == lax.axis_size(axis) - 1
        final = lax.psum(jnp.where(last, leave((entry, before))[0], 0), axis)
    return entry, before.astype(jnp.int32), _distance(own, before), final


def _chain_backward(own, distance, slopes, d_last, axis):
    """As `_gather_backward`, by hops."""
    first = jnp.zeros_like(own) if d_last is None else d_last
    return _chain(lambda d_exit: own + _decayed(d_exit, slopes, distance), first, axis, step=-1)


def _chain(leave, first, axis, step):
    """The value that arrives at this device if `first` enters the row and each device sends leave(its arrival) on."""
    size = lax.axis_size(axis)
    hops = [(i, i + step) for i in range(size) if 0 <= i + step < size]
    at_end = lax.axis_index(axis) == (0 if step > 0 else size - 1)

    def hop(arrived, _):
        received = jax.tree.map(lambda x: lax.ppermute(x, axis, hops), leave(arrived))
        return jax.tree.map(lambda a, b: jnp.where(at_end, a, b), first, received), None

    # After hop i it is right on the first i + 1 devices.
    return lax.scan(hop, first, length=size - 1)[0]
