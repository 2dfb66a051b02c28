"""Rows of tokens to the devices of their experts and back: which rows, in which order, by which exchange.

An *assignment* is one choice of one token: R tokens of k choices have k * R of them, first choices first. Sorted by
expert they fall into slices, one for each device and expert, which `all_to_all_rows` exchanges.

TPU exchanges slices of any length by `lax.ragged_all_to_all`. XLA has none on CPUs: there slices are padded to a
common length and exchanged by a dense all-to-all, which moves more and gives the same rows.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mmx_jax.parallel.mesh_group import MeshGroup
from pallas_kernels.grouped_matmul import order_by_group
from pallas_kernels.platform import cdiv, platform

BUFFER_ALIGNMENT = 8  # a buffer of received rows is a multiple of this: kernels take whole blocks of rows


class RowSlices(NamedTuple):
    """Slices of rows that devices exchange, int32 [sender, receiver, slice], known to all of these devices."""

    begins: jax.Array  # first row of a slice among the rows of the sender
    sizes: jax.Array  # rows
    arrivals: jax.Array  # first row among the rows of the receiver

    def reversed(self) -> "RowSlices":
        """The way back."""
        return RowSlices(*(jnp.swapaxes(x, 0, 1) for x in (self.arrivals, self.sizes, self.begins)))


class Dispatch(NamedTuple):
    """The k * R assignments of a group of tokens in the order of their experts, and where they go."""

    order: jax.Array  # int32 [k * R], as `order_by_group` gives it
    inverse: jax.Array  # int32 [k * R]
    slices: RowSlices


class DispatchSpec(NamedTuple):
    """Static parameters of a dispatch."""

    ep_group: MeshGroup  # devices with different experts
    num_experts: int
    experts_per_token: int
    buffer: float | None  # rows that a device has room for, times the even share; None: for all that may come


def received_rows(spec: DispatchSpec, tokens: int) -> int:
    """Static size of the buffer of received rows, for a group of `tokens` tokens on each device."""
    worst = worst_case_rows(spec, tokens)
    if spec.buffer is None:
        return worst
    bound = math.ceil(spec.buffer * tokens * spec.experts_per_token)
    return min(worst, cdiv(bound, BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT)


def worst_case_rows(spec: DispatchSpec, tokens: int) -> int:
    """Rows that come to a device if all tokens of all devices choose its experts, each of them once."""
    return spec.ep_group.size * tokens * min(spec.experts_per_token, spec.num_experts // spec.ep_group.size)


def plan_dispatch(spec: DispatchSpec, choices: jax.Array, limit: jax.Array | None) -> Dispatch:
    """Orders the assignments of a group of tokens by expert and decides which are sent.

    Args:
      choices: int32 [k, R]; `num_experts` stands for a token that goes nowhere.
      limit: int32 [E], the most assignments that this device may send to each expert; None: all.
    """
    group, tokens = spec.ep_group, choices.shape[1]
    local_experts = spec.num_experts // group.size
    order, inverse, counts = order_by_group(choices.reshape(-1), spec.num_experts)
    sizes = counts if limit is None else jnp.minimum(counts, limit)
    # Of every device and every expert: [sender, receiver, expert of the receiver].
    table = group.stack(jnp.stack([jnp.cumsum(counts) - counts, sizes]))
    begins, sizes = jnp.moveaxis(table, 1, 0).reshape(2, group.size, group.size, local_experts)
    room = received_rows(spec, tokens)
    if room < worst_case_rows(spec, tokens):
        # Every sender and expert loses the same fraction. float32 is exact enough: the fractions add up to more than
        # the buffer only beyond 2^22 rows.
        share = jnp.minimum(1.0, room / jnp.maximum(jnp.sum(sizes, axis=(0, 2)), 1))
        sizes = jnp.floor(sizes * share[:, None]).astype(jnp.int32)
    # A receiver has its rows sorted by expert, and those of an expert by sender.
    arrivals = jnp.transpose(exclusive_cumsum(jnp.transpose(sizes, (2, 0, 1)), 2), (1, 2, 0))
    return Dispatch(order, inverse, RowSlices(begins, sizes, arrivals))


def sent_assignments(group: MeshGroup, choices: jax.Array, dispatch: Dispatch) -> jax.Array:
    """bool [R, k]: which assignments of choices [k, R] are sent to their experts."""
    flat, me = choices.reshape(-1), group.index()
    # One expert more, that of tokens that go nowhere: it receives nothing.
    begins, sizes = (jnp.append(x[me].reshape(-1), 0) for x in (dispatch.slices.begins, dispatch.slices.sizes))
    sent = dispatch.inverse - begins[flat] < sizes[flat]
    return sent.reshape(choices.shape).T


def all_to_all_rows(group: MeshGroup, num_rows: int, rows: jax.Array, slices: RowSlices) -> jax.Array:
    """All-to-all of slices of rows [R, M] over `group`; returns [num_rows, M], 0 where nothing arrives.

    The gradient is the exchange of the way back.
    """
    return _exchange(group, num_rows, rows.shape[0], rows, slices)


def all_to_all_in_turns(group: MeshGroup, num_rows: int, groups: Sequence[Any], slices: Any) -> list[jax.Array]:
    """`all_to_all_rows` of several arrays [R, M], each of which leaves when the one before it has arrived.

    The products of the one before hide it, and in the backward pass their gradients hide its own.
    """
    received = []
    for rows, own_slices in zip(groups, slices, strict=True):
        if received:
            received[-1], rows = lax.optimization_barrier((received[-1], rows))
        received.append(all_to_all_rows(group, num_rows, rows, own_slices))
    return received


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _exchange(group, num_rows, num_sent, rows, slices):
    del num_sent  # of the way back
    if group.size == 1:
        source = source_rows(num_rows, slices.arrivals, slices.sizes, slices.begins, missing=rows.shape[0])
        return take_rows(rows, source)
    if platform() == "cpu":
        return _exchange_padded(group, num_rows, rows, slices)
    me = group.index()
    return lax.ragged_all_to_all(
        rows,
        jnp.zeros((num_rows, rows.shape[1]), rows.dtype),
        slices.begins[me].reshape(-1),
        slices.sizes[me].reshape(-1),
        slices.arrivals[me].reshape(-1),
        slices.sizes[:, me].reshape(-1),
        axis_name=group.names,
    )


_exchange.defvjp(
    lambda group, num_rows, num_sent, rows, slices: (_exchange(group, num_rows, num_sent, rows, slices), slices),
    lambda group, num_rows, num_sent, slices, g: (_exchange(group, num_sent, num_rows, g, slices.reversed()), None),
)


def _exchange_padded(group, num_rows, rows, slices):
    """`_exchange` by a dense all-to-all of one block a device, filled up to the longest that may come."""
    me, length = group.index(), min(num_rows, rows.shape[0])
    offsets = jnp.cumsum(slices.sizes, axis=2) - slices.sizes  # in the block from sender to receiver
    pack = functools.partial(source_rows, length, missing=rows.shape[0])
    blocks = take_rows(rows, jax.vmap(pack)(offsets[me], slices.sizes[me], slices.begins[me]))
    blocks = lax.all_to_all(blocks, group.names, 0, 0, tiled=True).reshape(group.size * length, -1)
    offsets = offsets[:, me] + jnp.arange(group.size)[:, None] * length
    source = source_rows(num_rows, slices.arrivals[:, me], slices.sizes[:, me], offsets, missing=blocks.shape[0])
    return take_rows(blocks, source)


def source_rows(count: int, starts: jax.Array, sizes: jax.Array, sources: jax.Array, *, missing: int) -> jax.Array:
    """Source of each of `count` rows, where row starts[i] + j comes from sources[i] + j for j < sizes[i].

    Returns:
      int32 [count]; `missing` for rows that are in no slice.
    """
    row = jnp.arange(count, dtype=jnp.int32)
    starts, sizes, sources = (x.reshape(-1).astype(jnp.int32) for x in (starts, sizes, sources))
    inside = (row[:, None] >= starts) & (row[:, None] < starts + sizes)
    shift = jnp.sum(jnp.where(inside, sources - starts, 0), axis=1)
    return jnp.where(jnp.any(inside, axis=1), row + shift, missing)


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], and 0 for an index beyond the end."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def permute_rows(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[order] for a permutation; the gradient is a gather too, by `inverse`, not a scatter."""
    return x[order]


permute_rows.defvjp(
    lambda x, order, inverse: (x[order], inverse),
    lambda inverse, g: (g[inverse], None, None),
)


@jax.custom_vjp
def permute_rows_or_zero(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """As `permute_rows`, where `order` and `inverse` may lead beyond the end, which gives 0."""
    return take_rows(x, order)


permute_rows_or_zero.defvjp(
    lambda x, order, inverse: (take_rows(x, order), inverse),
    lambda inverse, g: (take_rows(g, inverse), None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def repeat_and_permute(k: int, x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """[k * R, M]: k copies of x [R, M], one after the other, in the order `order`."""
    del k, inverse  # of the gradient
    return x[order % x.shape[0]]


repeat_and_permute.defvjp(
    lambda k, x, order, inverse: (repeat_and_permute(k, x, order, inverse), inverse),
    lambda k, inverse, g: (jnp.sum(g[inverse].reshape(k, -1, g.shape[1]), axis=0), None, None),
)


def exclusive_cumsum(x: jax.Array, axes: int) -> jax.Array:
    """Sum of all entries before each, along the first `axes` axes as if they were one."""
    flat = x.reshape(-1, *x.shape[axes:])
    return (jnp.cumsum(flat, axis=0) - flat).reshape(x.shape)
