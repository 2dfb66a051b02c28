"""Attention over rows whose tokens are divided over the devices of a mesh axis, as functions inside `jax.shard_map`.

Device i of the n along `axis` holds the i-th part of the tokens of every row. Documents lie anywhere: they cross
borders, end at one, and a device may hold nothing but padding. What travels is

    lightning_attention   one float32 state a head, in the forward and in the backward pass, whatever the length
    softmax_attention     keys and values with their documents, and in the backward pass their gradients; half of the
                          queries and of the outputs, once, so that causal work is even

LASP+ (arXiv 2501.08313, section 3.2.2; the formula with decay and documents is ours). Device j makes the state M_j
that its own tokens leave behind, of its last document. Let a_j be the decay over all of its real tokens, and 0 if a
document starts among them. The state that enters device t, and the gradient of the state that leaves it, are

    S_t = sum_{j<t} (prod_{j<i<t} a_i) M_j + (prod_{i<t} a_i) S_0
    G_t = sum_{j>t} (prod_{t<i<j} a_i) R_j + (prod_{i>t} a_i) G_n        R_j = sum_i exp(-s c_i) q_i^T do_i

where R_j runs over the tokens of the document that goes on from the left. Then one kernel runs over the tokens with
the state that enters. A pass for M_j alone reads k and v; adding exp(-s c) q S_t to the outputs of a kernel that began
with zero would read q and the outputs and write these again, rounded twice.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import blockwise_attention as blocks
from pallas_kernels import lightning_attention as lightning
from pallas_kernels.platform import cdiv

METHODS = ("gather", "ring")


def lightning_attention(
    q, k, v, slopes, runs=None, initial_state=None, *, axis="seq", method="gather", chunk_size=None,
    implementation="auto",
):  # fmt: skip
    """`pallas_kernels.lightning_attention` of rows whose tokens are divided over `axis`.

    Gradients are those of the whole rows, to q, k, v and the initial state.

    Args:
      q, k: [B, T, H*D], v: [B, T, H*E], the tokens of this device.
      slopes: float32 [H].
      runs: int32 [B, T], this device's part of `document_runs` of the whole rows. None: one document a row.
      initial_state: float32 [B, H, D, E], the same on all devices of `axis`; document 1 goes on from it. None: zero.
      axis: name of the mesh axis. None: rows are whole.
      method: "gather": one all-gather of the states (LASP+). "ring": n - 1 hops from neighbour to neighbour, each of
        which waits for the one before (LASP).
      chunk_size, implementation: as there.

    Returns:
      (output [B, T, H*E], final state of the whole rows, float32 [B, H, D, E], the same on all devices of `axis`). The
      final state is None if there is no initial state: then nothing but the exchange itself is sent.
    """
    _check_method(method)
    options = dict(segmented=runs is not None, chunk_size=chunk_size)
    if axis is None or lax.axis_size(axis) == 1:
        output, state = lightning.lightning_attention(
            q, k, v, slopes, segment_ids=runs, initial_state=initial_state, chunk_size=chunk_size,
            implementation=implementation,
        )  # fmt: skip
        return output, None if initial_state is None else state
    if implementation == "auto":
        implementation = lightning.default_implementation(q, k, v, slopes, **options)
    lightning.IMPLEMENTATIONS[implementation].check(q, k, v, slopes, **options)
    plan = _LightningPlan(axis, method, implementation, chunk_size)
    return _lightning(plan, q, k, v, lax.stop_gradient(slopes), runs, initial_state)


class _LightningPlan(NamedTuple):
    axis: str
    method: str
    implementation: str
    chunk_size: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lightning(plan, q, k, v, slopes, runs, initial_state):
    return _lightning_forward(plan, q, k, v, slopes, runs, initial_state)[0]


def _lightning_forward(plan, q, k, v, slopes, runs, initial_state):
    backend, options = lightning.IMPLEMENTATIONS[plan.implementation], dict(chunk_size=plan.chunk_size)
    own = lightning.end_state(k, v, slopes, runs, implementation=plan.implementation, **options)
    own = _Share(own, *_summary(q, runs))
    exchange = _gather_forward if plan.method == "gather" else _chain_forward
    entry, before, distances, final = exchange(own, slopes, initial_state, plan.axis)
    # Numbered so that the document which goes on is 1, as the backends take it.
    local = None if runs is None else jnp.where(runs > 0, runs - before[:, None] + 1, 0)
    # Named, so that a policy of `jax.checkpoint` that keeps the output does not send states anew.
    entry, local, distances, final = checkpoint_name((entry, local, distances, final), "lightning_attention")
    documents = lightning.documents_for(plan.implementation, local, numbered=True)
    output, _, residuals = backend.forward(q, k, v, slopes, documents, entry, **options)
    output = checkpoint_name(output.astype(v.dtype), "lightning_attention")
    return (output, final), (q, k, v, slopes, local, distances, residuals)


def _lightning_backward(plan, saved, cotangents):
    q, k, v, slopes, local, distances, residuals = saved
    d_output, d_final = cotangents
    backend, options = lightning.IMPLEMENTATIONS[plan.implementation], dict(chunk_size=plan.chunk_size)
    d_output = d_output.astype(q.dtype)
    own = lightning.end_state(
        q, d_output, slopes, local, reverse=True, implementation=plan.implementation, **options
    )  # fmt: skip
    # All devices give the same final state, and each gets its part of the gradient.
    d_last = None if d_final is None else lax.psum(d_final, plan.axis)
    exchange = _gather_backward if plan.method == "gather" else _chain_backward
    d_exit = exchange(own, distances, slopes, d_last, plan.axis)
    documents = lightning.documents_for(plan.implementation, local, numbered=True)
    dq, dk, dv, d_entry = backend.backward(q, k, v, slopes, documents, residuals, d_output, d_exit, **options)
    # Of the initial state only the first device makes use.
    d_initial = None if d_final is None else jnp.where(lax.axis_index(plan.axis) == 0, d_entry, 0)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), jnp.zeros_like(slopes), None, d_initial


_lightning.defvjp(_lightning_forward, _lightning_backward)


class _Share(NamedTuple):
    """What a device tells of its tokens."""

    state: jax.Array  # float32 [B, H, D, E] behind them, from a zero state on
    last: jax.Array  # float32 [B], number of the last document; 0 if there is none
    count: jax.Array  # float32 [B], real tokens


def _summary(q, runs):
    if runs is None:
        return jnp.ones(q.shape[0]), jnp.full(q.shape[0], float(q.shape[1]))
    return jnp.max(runs, axis=1).astype(jnp.float32), jnp.sum(runs > 0, axis=1, dtype=jnp.float32)


def _distance(share, before):
    """float32 [B], from the state that enters to the one that leaves; infinite if document `before` does not last."""
    return jnp.where(share.last <= before, share.count, jnp.inf)


def _decayed(state, slopes, distance):
    """state [B, H, D, E] over a distance [B]."""
    return jnp.exp(-slopes * distance[:, None])[..., None, None] * state


def _gather_forward(own, slopes, initial, axis):
    """(state that enters, the document it belongs to int32 [B], distances of all devices [n, B], final state)."""
    # One array, one message: numbers of a row lie in two more rows of each head's state.
    rows = jnp.stack([own.last, own.count], axis=1)[:, None, :, None]
    rows = jnp.broadcast_to(rows, (*own.state.shape[:2], 2, own.state.shape[3]))
    everyone = lax.all_gather(jnp.concatenate([own.state, rows], axis=2), axis)
    dim = own.state.shape[2]
    shares = _Share(everyone[..., :dim, :], everyone[:, :, 0, dim, 0], everyone[:, :, 0, dim + 1, 0])
    before = jnp.pad(lax.cummax(shares.last, axis=0), ((1, 0), (0, 0)))[:-1]
    before = jnp.maximum(before, 1.0)  # the document that the initial state belongs to
    distances = _distance(shares, before)
    index = lax.axis_index(axis)
    entry = _combine(shares.state, distances, slopes, initial, index)
    final = None if initial is None else _combine(shares.state, distances, slopes, initial, distances.shape[0])
    return entry, before[index].astype(jnp.int32), distances, final


def _gather_backward(own, distances, slopes, d_last, axis):
    """The gradient of the state that leaves this device."""
    return _combine(lax.all_gather(own, axis), distances, slopes, d_last, lax.axis_index(axis), reverse=True)


def _combine(states, distances, slopes, end, place, reverse=False):
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
    """What arrives at this device if `first` comes in at the end and each device sends on leave(what arrived)."""
    size = lax.axis_size(axis)
    hops = [(i, i + step) for i in range(size) if 0 <= i + step < size]
    at_end = lax.axis_index(axis) == (0 if step > 0 else size - 1)

    def hop(arrived, _):
        received = jax.tree.map(lambda x: lax.ppermute(x, axis, hops), leave(arrived))
        return jax.tree.map(lambda a, b: jnp.where(at_end, a, b), first, received), None

    # After hop i it is right on the first i + 1 devices.
    return lax.scan(hop, first, length=size - 1)[0]


def softmax_attention(q, k, v, runs=None, *, axis="seq", method="ring", block=512):
    """Causal grouped-query attention inside documents of rows whose tokens are divided over `axis`.

    Rows fall into 2 n parts, of which device i holds 2 i and 2 i + 1. For the work it trades its second part for that
    of device n - 1 - i, and then every device has the same number of pairs of parts to work on, at every step. That
    moves half of q, k, v and of the outputs once; the layout outside stays contiguous, which lightning layers need.

    Args:
      q: [B, T, H, D]; k, v: [B, T, K, D], the tokens of this device.
      runs: int32 [B, T], this device's part of `document_runs` of the whole rows. None: one document a row.
      axis: name of the mesh axis.
      method: "ring": keys and values go round, a device holds those of one other. "gather": it holds those of all.
        Either leaves out pairs of parts that no document joins.
      block: query and key tokens that scores are held for at once.

    Returns:
      [B, T, H, D] in the dtype of `v`; 0 at padding.
    """
    _check_method(method)
    length = q.shape[1]
    block = min(block, cdiv(length, 2))
    padding = cdiv(length, 2 * block) * 2 * block - length
    runs = jnp.ones((q.shape[0], length), jnp.int32) if runs is None else runs
    q, k, v, runs = (jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) for x in (q, k, v, runs))
    return _softmax(_SoftmaxPlan(axis, method, block), q, k, v, runs)[:, :length]


class _SoftmaxPlan(NamedTuple):
    axis: str
    method: str
    block: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(plan, q, k, v, runs):
    return _softmax_forward(plan, q, k, v, runs)[0]


def _softmax_forward(plan, q, k, v, runs):
    q, k, v, runs = (_trade(_halves(x), plan.axis) for x in (q, k, v, runs))
    queries, keys = blocks.cut_queries(q, k.shape[2], plan.block), blocks.cut_keys(k, v, runs, plan.block)
    # Each part with itself, as rows of their own.
    carry = blocks.carry_of(*blocks.causal_blocks(queries, keys, jnp.float32), keys.runs)
    queries, keys, carry = _by_part((queries, keys, carry))

    def visit(carry, keys_there, nothing, source):
        def attend(carry, nothing, mine, theirs):
            return blocks.attend_earlier(carry, *mine, theirs), nothing

        return _meet(attend, carry, nothing, (queries, keys.runs), keys_there, source, plan.axis)

    carry, _ = _visit_all(plan, visit, carry, keys, None)
    output, log_sums = blocks.finish(carry)
    output = output.astype(v.dtype)
    return _whole_rows(output, plan), (queries, keys, output, log_sums)


def _softmax_backward(plan, saved, d_output):
    queries, keys, output, log_sums = saved
    d_output = _trade(_halves(d_output.astype(output.dtype)), plan.axis)
    d_output = _by_part(blocks.cut_queries(d_output, keys.key.shape[3], plan.block))
    results = blocks.results_of(d_output, output, log_sums)
    dq, *d_keys = _by_part(blocks.causal_gradients(*_as_rows((queries, keys, results))))

    def visit(dq, keys_there, d_keys, source):
        def add(dq, d_keys, mine, theirs):
            queries, runs, results = mine
            return blocks.earlier_gradients((dq, d_keys), queries, runs, theirs, results)

        return _meet(add, dq, d_keys, (queries, keys.runs, results), keys_there, source, plan.axis)

    dq, (dk, dv) = _visit_all(plan, visit, dq, keys, tuple(d_keys))
    dtypes = queries.dtype, keys.key.dtype, keys.value.dtype
    return *(_whole_rows(x.astype(dtype), plan) for x, dtype in zip((dq, dk, dv), dtypes, strict=True)), None


_softmax.defvjp(_softmax_forward, _softmax_backward)


def _halves(x):
    """[B, T, ...] -> [2 B, T / 2, ...], first all first halves."""
    return x.reshape(x.shape[0], 2, -1, *x.shape[2:]).swapaxes(0, 1).reshape(-1, x.shape[1] // 2, *x.shape[2:])


def _trade(x, axis):
    """Gives the second halves to device n - 1 - i for its own; twice is nothing."""
    size = lax.axis_size(axis)
    first, second = jnp.split(x, 2)
    return jnp.concatenate([first, lax.ppermute(second, axis, [(i, size - 1 - i) for i in range(size)])])


def _whole_rows(x, plan):
    """Blocks [2, m, B, K, ., D] -> [B, T, ., D], traded back."""
    x = _trade(blocks.merge(_as_rows(x), plan.block), plan.axis)
    return x.reshape(2, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape[0] // 2, -1, *x.shape[2:])


def _by_part(tree):
    """Leaves [m, 2 B, ...] -> [2, m, B, ...]."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], 2, -1, *x.shape[2:]).swapaxes(0, 1), tree)


def _as_rows(tree):
    """The inverse of `_by_part`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:]), tree)


def _meet(work, mine, theirs, my_inputs, keys: blocks.Keys, source, axis):
    """Lets both parts of this device work with both parts of the keys of device `source`, where there is anything.

    Args:
      work: (mine, theirs, my inputs, keys), of one part each -> (mine, theirs).
      mine, theirs: what is accumulated for queries and for keys; leaves [2, ...], as all that follows.
      my_inputs: tuple whose second entry are the documents of the queries.
    """
    size = lax.axis_size(axis)
    place = lambda device: jnp.stack([2 * device, 2 * size - 1 - 2 * device])  # noqa: E731
    earlier = place(source) < place(lax.axis_index(axis))[:, None]  # [2 of mine, 2 of theirs]
    runs = my_inputs[1]
    first = jnp.min(jnp.where(runs > 0, runs, jnp.iinfo(jnp.int32).max), axis=(1, 3))  # [2, B]
    last = jnp.max(keys.runs, axis=(1, 3))
    # Documents follow each other, so that the last one here must be the first one there.
    needed = earlier & jnp.any((first[:, None] == last) & (last > 0), axis=-1)

    def pair(state, which):
        a, b = which
        take = functools.partial(lax.dynamic_index_in_dim, keepdims=False)
        part = lambda tree, i: jax.tree.map(lambda x: take(x, i), tree)  # noqa: E731
        put = lambda tree, new, i: jax.tree.map(  # noqa: E731
            lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0), tree, new
        )
        mine, theirs = part(state[0], a), part(state[1], b)
        skip = lambda mine, theirs, *_: (mine, theirs)  # noqa: E731
        mine, theirs = lax.cond(needed[a, b], work, skip, mine, theirs, part(my_inputs, a), part(keys, b))
        return (put(state[0], mine, a), put(state[1], theirs, b)), None

    pairs = jnp.array([(0, 0), (0, 1), (1, 0), (1, 1)])
    return lax.scan(pair, (mine, theirs), pairs)[0]


def _visit_all(plan, visit, mine, keys, theirs):
    """visit(mine, keys, theirs, device) -> (mine, theirs) with the keys of every device.

    `theirs` is what this device accumulates for its own keys so far; what the others add comes home to it. None:
    nothing.
    """
    size, index = lax.axis_size(plan.axis), lax.axis_index(plan.axis)
    if plan.method == "gather":

        def step(mine, inputs):
            return visit(mine, inputs[0], jax.tree.map(jnp.zeros_like, theirs), inputs[1])

        mine, gathered = blocks.together((mine, lax.all_gather(keys, plan.axis)))
        mine, added = lax.scan(step, mine, (gathered, jnp.arange(size)))
        return mine, jax.tree.map(lambda x, more: x + lax.psum_scatter(more, plan.axis), theirs, added)

    def shift(tree):
        return jax.tree.map(lambda x: lax.ppermute(x, plan.axis, [(i, (i + 1) % size) for i in range(size)]), tree)

    def hop(state, step):
        mine, keys, theirs = state
        following = shift(keys)  # under way while these are worked on
        mine, theirs = visit(mine, keys, theirs, (index - step) % size)
        return (mine, following, shift(theirs)), None

    mine, keys = blocks.together((mine, keys))
    (mine, keys, theirs), _ = lax.scan(hop, (mine, keys, theirs), jnp.arange(size - 1))
    mine, theirs = visit(mine, keys, theirs, (index + 1) % size)
    return mine, shift(theirs)


def _check_method(method):
    if method not in METHODS:
        raise ValueError(f"method {method!r} of sequence parallelism is not one of {', '.join(METHODS)}")
