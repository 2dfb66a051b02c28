"""Softmax attention over rows whose tokens are divided over a mesh axis, inside `jax.shard_map`: a ring, or a gather.

Device i of the n along `axis` holds the i-th part of the tokens of every row. Documents lie anywhere: they cross
borders, end at one, and a device may hold nothing but padding. Keys and values travel with their segment ids, and in
the backward pass their gradients; half of the queries and of the outputs travels once, so that causal work is even
(the zigzag order of ring attention, arXiv 2310.01889 and 2311.09431).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from mmx_jax.parallel.methods import check_method
from pallas_kernels import platform
from pallas_kernels import softmax_attention as softmax
from pallas_kernels.platform import cdiv
from pallas_kernels.softmax_attention import blockwise_xla as blocks


@dataclasses.dataclass(frozen=True)
class RingSpec:
    """How rows of softmax attention are divided.

    Attributes:
      axis: name of the mesh axis. None: rows are whole.
      method: "ring": keys and values go round, a device holds those of one other. "gather": it holds those of all.
        Either leaves out pairs of parts that no document joins.
      implementation, block: as in `pallas_kernels.softmax_attention`; divided rows run blockwise.
    """

    axis: str | None = "seq"
    method: str = "ring"
    implementation: str = "auto"
    block: int = 512

    def __post_init__(self):
        check_method(self.method)


def softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None, *, spec: RingSpec = RingSpec()
) -> jax.Array:
    """`pallas_kernels.softmax_attention` of rows whose tokens are divided over `spec.axis`.

    Rows fall into 2 n parts, of which device i holds 2 i and 2 i + 1. For the work it swaps its second part with that
    of device n - 1 - i, and then every device has the same number of pairs of parts to work on, at every step. That
    moves half of q, k, v and of the outputs once; the layout outside stays contiguous, which lightning layers need.

    Args:
      q: [B, T, H, D]; k, v: [B, T, K, D], the tokens of this device.
      segment_ids: int32 [B, T], this device's part of `number_segments` of the whole rows. None: one document a row.

    Returns:
      [B, T, H, D] in the dtype of `v`; 0 at padding.
    """
    if spec.axis is None:
        return softmax.softmax_attention(q, k, v, segment_ids, implementation=spec.implementation, block=spec.block)
    if spec.implementation not in ("blockwise", "auto"):
        raise NotImplementedError(
            f"softmax implementation {spec.implementation!r} serves whole rows; where mesh axis {spec.axis!r} divides "
            "their tokens, 'blockwise' does"
        )
    platform.announce("softmax attention of divided rows", "blockwise", f"method {spec.method!r} over {spec.axis!r}")
    length = q.shape[1]
    block = min(spec.block, cdiv(length, 2))
    padding = cdiv(length, 2 * block) * 2 * block - length
    segment_ids = jnp.ones((q.shape[0], length), jnp.int32) if segment_ids is None else segment_ids
    q, k, v, segment_ids = (
        jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)) for x in (q, k, v, segment_ids)
    )
    return _attend(dataclasses.replace(spec, block=block), q, k, v, segment_ids)[:, :length]  # pyright: ignore[reportIndexIssue]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec, q, k, v, segment_ids):
    return _attend_forward(spec, q, k, v, segment_ids)[0]


def _attend_forward(spec, q, k, v, segment_ids):
    q, k, v, segment_ids = (_zigzag_swap(_stack_halves(x), spec.axis) for x in (q, k, v, segment_ids))
    queries, keys = blocks.split_queries(q, k.shape[2], spec.block), blocks.split_keys(k, v, segment_ids, spec.block)
    # Each part with itself, as rows of their own.
    carry = blocks.carry_of(*blocks.causal_blocks(queries, keys, jnp.float32), keys.segment_ids)
    queries, keys, carry = _split_parts((queries, keys, carry))

    visit = functools.partial(_attend_pairs, _attend_pair, (queries, keys.segment_ids), spec.axis)
    carry, _ = _over_all_devices(spec, visit, carry, keys, None)
    output, log_sums = blocks.finish(carry)
    output = output.astype(v.dtype)
    return _whole_rows(output, spec), (queries, keys, output, log_sums)


def _attend_backward(spec, saved, d_output):
    queries, keys, output, log_sums = saved
    d_output = _zigzag_swap(_stack_halves(d_output.astype(output.dtype)), spec.axis)
    d_output = _split_parts(blocks.split_queries(d_output, keys.key.shape[3], spec.block))
    residuals = blocks.residuals_of(d_output, output, log_sums)
    dq, *d_keys = _split_parts(blocks.causal_gradients(*_join_parts((queries, keys, residuals))))

    visit = functools.partial(_attend_pairs, _add_pair_gradients, (queries, keys.segment_ids, residuals), spec.axis)
    dq, (dk, dv) = _over_all_devices(spec, visit, dq, keys, tuple(d_keys))
    dtypes = queries.dtype, keys.key.dtype, keys.value.dtype
    return *(_whole_rows(x.astype(dtype), spec) for x, dtype in zip((dq, dk, dv), dtypes, strict=True)), None


_attend.defvjp(_attend_forward, _attend_backward)


def _attend_pair(carry, nothing, mine, keys):
    """Online softmax of queries over one part of keys; `mine`: (queries, segment ids)."""
    queries, segment_ids = mine
    return blocks.attend_earlier(carry, queries, segment_ids, keys), nothing


def _add_pair_gradients(dq, d_keys, mine, keys):
    """Gradients of one pair of parts; `mine`: (queries, segment ids, residuals)."""
    queries, segment_ids, residuals = mine
    return blocks.earlier_gradients((dq, d_keys), queries, segment_ids, keys, residuals)


def _stack_halves(x):
    """[B, T, ...] -> [2 B, T / 2, ...], first all first halves."""
    return x.reshape(x.shape[0], 2, -1, *x.shape[2:]).swapaxes(0, 1).reshape(-1, x.shape[1] // 2, *x.shape[2:])


def _zigzag_swap(x, axis):
    """Exchanges the second halves of devices i and n - 1 - i, so that causal work is even; its own inverse."""
    size = lax.axis_size(axis)
    first, second = jnp.split(x, 2)
    return jnp.concatenate([first, lax.ppermute(second, axis, [(i, size - 1 - i) for i in range(size)])])


def _whole_rows(x, spec):
    """Blocks [2, m, B, K, ., D] -> [B, T, ., D], swapped back."""
    x = _zigzag_swap(blocks.merge_blocks(_join_parts(x), spec.block), spec.axis)
    return x.reshape(2, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape[0] // 2, -1, *x.shape[2:])


def _split_parts(tree):
    """Leaves [m, 2 B, ...] -> [2, m, B, ...]."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], 2, -1, *x.shape[2:]).swapaxes(0, 1), tree)


def _join_parts(tree):
    """The inverse of `_split_parts`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:]), tree)


def _attend_pairs(work, my_inputs, axis, mine, keys: blocks.Keys, theirs, source):
    """Lets both parts of this device work with both parts of the keys of device `source`, where there is anything.

    Args:
      work: (mine, theirs, my inputs, keys), of one part each -> (mine, theirs).
      my_inputs: tuple whose second entry are the segment ids of the queries; leaves [2, ...], as all that follows.
      mine, theirs: accumulators for queries and for keys.
      source: the device whose keys these are.
    """
    size = lax.axis_size(axis)

    def place(device):
        """Numbers of the two parts of a device among the 2 n parts of a row."""
        return jnp.stack([2 * device, 2 * size - 1 - 2 * device])

    earlier = place(source) < place(lax.axis_index(axis))[:, None]  # [2 of mine, 2 of theirs]
    segment_ids = my_inputs[1]
    first = jnp.min(jnp.where(segment_ids > 0, segment_ids, jnp.iinfo(jnp.int32).max), axis=(1, 3))  # [2, B]
    last = jnp.max(keys.segment_ids, axis=(1, 3))
    # Segment ids grow along a row, so the last document of the keys must be the first one of the queries.
    needed = earlier & jnp.any((first[:, None] == last) & (last > 0), axis=-1)

    def pair(state, which):
        a, b = which
        mine, theirs = _entry(state[0], a), _entry(state[1], b)
        mine, theirs = lax.cond(needed[a, b], work, _skip, mine, theirs, _entry(my_inputs, a), _entry(keys, b))
        return (_with_entry(state[0], mine, a), _with_entry(state[1], theirs, b)), None

    pairs = jnp.array([(0, 0), (0, 1), (1, 0), (1, 1)])
    return lax.scan(pair, (mine, theirs), pairs)[0]


def _entry(tree, i):
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _with_entry(tree, new, i):
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0), tree, new)


def _skip(mine, theirs, *_):
    return mine, theirs


def _over_all_devices(spec, visit, mine, keys, theirs):
    """visit(mine, keys, theirs, device) -> (mine, theirs) with the keys of every device.

    `theirs` is what this device accumulates for its own keys so far; what the others add comes home to it. None:
    nothing.
    """
    size, index = lax.axis_size(spec.axis), lax.axis_index(spec.axis)
    if spec.method == "gather":

        def step(mine, inputs):
            return visit(mine, inputs[0], jax.tree.map(jnp.zeros_like, theirs), inputs[1])

        mine, gathered = blocks.barrier((mine, lax.all_gather(keys, spec.axis)))
        mine, added = lax.scan(step, mine, (gathered, jnp.arange(size)))
        return mine, jax.tree.map(lambda x, more: x + lax.psum_scatter(more, spec.axis), theirs, added)

    def shift(tree):
        return jax.tree.map(lambda x: lax.ppermute(x, spec.axis, [(i, (i + 1) % size) for i in range(size)]), tree)

    def hop(state, step):
        mine, keys, theirs = state
        following = shift(keys)  # travels while these are worked on
        mine, theirs = visit(mine, keys, theirs, (index - step) % size)
        return (mine, following, shift(theirs)), None

    mine, keys = blocks.barrier((mine, keys))
    (mine, keys, theirs), _ = lax.scan(hop, (mine, keys, theirs), jnp.arange(size - 1))
    mine, theirs = visit(mine, keys, theirs, (index + 1) % size)
    return mine, shift(theirs)
