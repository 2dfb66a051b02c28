"""Experts over the mesh: every device routes its own tokens, and only rows travel, to where their expert lives.

Each mesh axis has two uses. The experts lie over the axes of the rule "experts", the width of each over those of
"mlp", and both are cut over those of "embed" until they are used; the tokens are divided among all devices. One step
of a group of tokens is

    sort by expert -> all-to-all -> all-gather over the width -> products -> reduce-scatter -> all-to-all -> sum

The all-to-all stays among the devices that hold different experts. The other axes hold copies of them: nothing but
the sums of gradients, and in the capacity mode the counts of the router, goes over those.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from mmx_jax.sharding import axes_size, logical_to_spec, mesh_axes
from pallas_kernels.grouped_matmul import grouped_swiglu, order_by_group
from pallas_kernels.platform import cdiv, platform

BUFFER_ALIGNMENT = 8  # a buffer of received rows is a multiple of this: kernels take whole blocks of rows


def mixture_of_experts(
    x, real, router, w_gate, w_up, w_down, *, weight_axes, route, statistics, experts_per_token, capacity=None,
    shared_capacity=True, buffer=None, token_groups=1, implementation="auto",
):  # fmt: skip
    """A mixture of SwiGLU experts over the ambient mesh (`jax.set_mesh`).

    Tokens that are not real go to no expert, and give 0. An assignment is dropped, which means that it adds nothing,

    - with `capacity`, where its expert has served so many before it: all first choices of the batch come before any
      second choice, and among them earlier rows of the batch before later ones. This order does not depend on the
      mesh. With `shared_capacity` false each device counts its own tokens alone, in the same order;
    - with `buffer`, where more rows come to a device than it has room for: every sender and expert then loses the same
      fraction, last choices and last tokens first.

    Args:
      x: [B, T, M]. If the mesh does not divide B or T, rows that are not real fill the batch up.
      real: bool [B, T].
      router: [M, E]; w_gate, w_up: [E, M, F]; w_down: [E, F, M]. Weights are multiplied in the dtype of `x`, and their
        gradients summed over devices in their own.
      weight_axes: logical axes of (E, M, F).
      route: (rows [R, M], router) -> routing with `experts` int32 [R, k] and `weights` float32 [R, k].
      statistics: (routing, real [R], kept bool [R, k]) -> tree of sums over rows.
      capacity: None, or a function from a number of tokens to the most that one expert serves.
      buffer: rows a device has room for, as a multiple of the even share; None: for all that may come.
      token_groups: parts of the tokens that travel and are multiplied one by one, so that one can travel while another
        is multiplied. Their greatest common divisor with the tokens of a device counts.
      implementation: of `grouped_swiglu`.

    Returns:
      ([B, T, M] in the dtype of `x`, the statistics of all devices together).

    Raises:
      ConfigError: the mesh does not divide E, M or F.
    """
    mesh = jax.sharding.get_abstract_mesh()
    experts, embed, width = weight_axes
    for size, axis in zip(w_gate.shape, weight_axes, strict=True):
        axes_size(mesh, mesh_axes(axis), dividing=size, of=f"the experts {w_gate.shape}: axis {axis!r}")
    batch_axes, length_axes = token_axes(mesh.shape, x.shape[1])
    rows = x.shape[0]
    missing = -rows % axes_size(mesh, batch_axes)
    x, real = jnp.pad(x, ((0, missing), (0, 0), (0, 0))), jnp.pad(real, ((0, missing), (0, 0)))
    tokens = P(batch_axes, length_axes or None)
    up, down = logical_to_spec((experts, embed, width)), logical_to_spec((experts, width, embed))
    layer = _Layer(
        *(_Axes.of(mesh, names) for names in (*map(mesh_axes, weight_axes), batch_axes, length_axes)),
        w_gate.shape[0], experts_per_token, route, statistics, capacity, shared_capacity, buffer, token_groups,
        implementation,
    )  # fmt: skip
    output, sums = jax.shard_map(
        functools.partial(_on_device, layer),
        in_specs=(tokens, tokens, logical_to_spec((embed, None)), up, up, down),
        out_specs=(tokens, P()),
        check_vma=False,  # kernels do not say over which axes their results vary
    )(x, real, router, w_gate, w_up, w_down)
    return output[:rows], sums


def token_axes(sizes: Mapping[str, int], length: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes for (batch, length) that divide the tokens among all devices, in the order of the batch.

    The dense part holds the same tokens on the devices of "tensor": each takes a piece of a row, or where a row is too
    short, as in decoding, some rows of the batch.

    Args:
      sizes: of all axes of the mesh, in its order.
      length: of the rows.
    """
    batch, seq = mesh_axes("batch"), mesh_axes("length")
    rest = tuple(name for name in sizes if name not in batch + seq)
    if length % math.prod(sizes[name] for name in seq + rest) == 0:
        return batch, seq + rest
    if length % math.prod(sizes[name] for name in seq) == 0:
        return batch + rest, seq
    return batch + seq + rest, ()


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Mesh axes as one, the first the slowest: collectives over them, which are nothing where there is one device."""

    names: tuple[str, ...]
    size: int
    mesh_size: int  # of all axes together

    @classmethod
    def of(cls, mesh, names):
        return cls(names, axes_size(mesh, names), mesh.size)

    def __add__(self, other):
        return _Axes(self.names + other.names, self.size * other.size, self.mesh_size)

    def index(self):
        return lax.axis_index(self.names) if self.size > 1 else 0

    def stack(self, x):
        """[n, ...] of all devices."""
        return lax.all_gather(x, self.names) if self.size > 1 else x[None]

    def gather(self, x, axis=0):
        return lax.all_gather(x, self.names, axis=axis, tiled=True) if self.size > 1 else x

    def scatter_sum(self, x, axis=0):
        if self.size == 1:
            return x
        for groups in self._stages():
            x = lax.psum_scatter(x, self.names, scatter_dimension=axis, tiled=True, axis_index_groups=groups)
        return x

    def _stages(self):
        """Groups of devices for each step of a reduce-scatter; None is all of them."""
        factors = reduce_scatter_factors(self.size, self.mesh_size)
        if len(factors) == 1:
            return [None]
        rows, columns = factors
        grid = [list(range(i * columns, (i + 1) * columns)) for i in range(rows)]
        return [list(map(list, zip(*grid, strict=True))), grid]


def reduce_scatter_factors(size: int, mesh_size: int) -> list[int]:
    """How many devices sum and divide an array in each step of a reduce-scatter over `size` of `mesh_size`.

    On TPU one step over all devices of 8 or more becomes an all-reduce, whose whole result lies on every device until
    it is cut where it is used. Two, over the columns and the rows of a grid of devices, send as much, and stay.
    """
    columns = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    if size < mesh_size or size < 8 or columns == 1:
        return [size]
    return [size // columns, columns]


class _Layer(NamedTuple):
    """What is known before any array is."""

    owners: _Axes  # devices with different experts
    embed: _Axes  # devices with slices of the weights, which are gathered
    width: _Axes  # devices with slices of the same experts
    batch: _Axes
    length: _Axes
    num_experts: int
    experts_per_token: int
    route: object
    statistics: object
    capacity: object
    shared_capacity: bool
    buffer: float | None
    token_groups: int
    implementation: str


def _on_device(layer, x, real, router, w_gate, w_up, w_down):
    """x: [b, t, M], real: [b, t], the tokens of this device."""
    rows, real_rows = x.reshape(-1, x.shape[-1]), real.reshape(-1)
    router = _gather_weight(layer.embed, 0, router.dtype, router)
    weights = [_gather_weight(layer.embed, axis, x.dtype, w) for w, axis in ((w_gate, 1), (w_up, 1), (w_down, 2))]
    rows, *weights = _gradients_together(rows, *weights)
    routing = layer.route(rows, router)
    # First choices first; an expert that does not exist is the choice of a token that is not real.
    choices = jnp.where(real_rows, routing.experts.T, layer.num_experts)  # [k, R]
    groups = math.gcd(layer.token_groups, rows.shape[0])
    limits = [None] * groups if layer.capacity is None else _within_capacity(layer, choices, *real.shape, groups)
    size = rows.shape[0] // groups
    parts = [slice(i * size, (i + 1) * size) for i in range(groups)]
    sendings = [_sending(layer, choices[:, part], limit) for part, limit in zip(parts, limits, strict=True)]
    returned = _through_experts(layer, [rows[part] for part in parts], sendings, weights)
    outputs = [
        _combine(own_rows, sending, routing.weights[part]).astype(x.dtype)
        for own_rows, sending, part in zip(returned, sendings, parts, strict=True)
    ]
    kept = [_kept(layer, choices[:, part], sending) for part, sending in zip(parts, sendings, strict=True)]
    sums = layer.statistics(routing, real_rows, jnp.concatenate(kept))
    return jnp.concatenate(outputs).reshape(x.shape), lax.psum(sums, (layer.batch + layer.length).names)


class _Sending(NamedTuple):
    """How the k * R assignments of a group of tokens lie in the order of their experts, and where they go."""

    order: jax.Array  # int32 [k * R], as of `order_by_group`
    inverse: jax.Array
    slices: "_Slices"


def _sending(layer, choices, limit):
    """`_Sending` of a group of tokens.

    Args:
      choices: int32 [k, R].
      limit: int32 [E], the most that this device may send to each expert; or None.
    """
    owners, rows = layer.owners, choices.shape[1]
    local_experts = layer.num_experts // owners.size
    order, inverse, counts = order_by_group(choices.reshape(-1), layer.num_experts)
    sizes = counts if limit is None else jnp.minimum(counts, limit)
    # What every device has for every expert: [sender, receiver, expert of the receiver].
    every = owners.stack(jnp.stack([jnp.cumsum(counts) - counts, sizes]))
    begins, sizes = jnp.moveaxis(every, 1, 0).reshape(2, owners.size, owners.size, local_experts)
    buffer_rows = _buffer_rows(layer, rows)
    if buffer_rows < _worst_case(layer, rows):
        # Exact enough: the fractions add up to more than the buffer only beyond 2^22 rows.
        share = jnp.minimum(1.0, buffer_rows / jnp.maximum(jnp.sum(sizes, axis=(0, 2)), 1))
        sizes = jnp.floor(sizes * share[:, None]).astype(jnp.int32)
    # A receiver has its rows sorted by expert, and for each expert by sender.
    arrivals = jnp.transpose(_exclusive_cumsum(jnp.transpose(sizes, (2, 0, 1)), 2), (1, 2, 0))
    return _Sending(order, inverse, _Slices(begins, sizes, arrivals))


def _through_experts(layer, groups, sendings, weights):
    """Sends groups of tokens to their experts and back.

    Args:
      groups: arrays [R, M].
      weights: of the experts of this device.

    Returns:
      For each group [k * R, M], sorted by expert; 0 for what is not sent.
    """
    owners, k, size = layer.owners, layer.experts_per_token, groups[0].shape[0]
    leaving = [_spread(k, rows, s.order, s.inverse) for rows, s in zip(groups, sendings, strict=True)]
    if len(groups) > 1:
        # All are sorted before the first one leaves, or a group would be sorted behind the products of the one before
        # it, and travel beside nothing.
        leaving, sendings = lax.optimization_barrier((leaving, sendings))
    there = [sending.slices for sending in sendings]
    received = _exchange_in_turns(owners, _buffer_rows(layer, size), leaving, there)
    made = [
        _swiglu_over_width(layer, rows, weights, jnp.sum(slices.sizes[:, owners.index()], axis=0))
        for rows, slices in zip(received, there, strict=True)
    ]
    return _exchange_in_turns(owners, k * size, made, [slices.reversed() for slices in there])


def _combine(returned, sending, weights_of_choices):
    """Sums over the choices of tokens: float32 [R, M].

    Args:
      returned: [k * R, M], sorted by expert.
      weights_of_choices: float32 [R, k].
    """
    tokens, k = weights_of_choices.shape
    returned = _permute(returned, sending.inverse, sending.order).reshape(k, tokens, -1)
    return jnp.einsum("krm,rk->rm", returned.astype(jnp.float32), weights_of_choices)


def _kept(layer, choices, sending):
    """Which assignments are sent: bool [R, k], of choices [k, R]."""
    flat, me = choices.reshape(-1), layer.owners.index()
    # One more expert, that of tokens that are not real, which sends nothing.
    begins, sizes = (jnp.append(x[me].reshape(-1), 0) for x in (sending.slices.begins, sending.slices.sizes))
    kept = sending.inverse - begins[flat] < sizes[flat]
    return kept.reshape(choices.shape).T


def _swiglu_over_width(layer, rows, weights, group_sizes):
    """`grouped_swiglu` of rows whose experts lie in slices on the devices of `layer.width`.

    Args:
      rows: [R, M], sorted by expert.
      group_sizes: int32 [experts of this device].
    """
    swiglu = functools.partial(grouped_swiglu, implementation=layer.implementation)
    if layer.width.size == 1:
        return swiglu(rows, *weights, group_sizes)
    blocks = layer.width.stack(group_sizes)  # [n, experts]
    # Every block is sorted by expert, and so must be all of them together.
    starts = jnp.arange(layer.width.size)[:, None] * rows.shape[0] + jnp.cumsum(blocks, axis=1) - blocks
    sorted_starts = _exclusive_cumsum(blocks.T, 2).T
    rows = layer.width.gather(rows)
    order = _follow(rows.shape[0], sorted_starts, blocks, starts, missing=rows.shape[0])
    inverse = _follow(rows.shape[0], starts, blocks, sorted_starts, missing=rows.shape[0])
    rows = swiglu(_permute(rows, order, inverse), *weights, jnp.sum(blocks, axis=0))
    return layer.width.scatter_sum(_permute(rows, inverse, order))


def _worst_case(layer, rows):
    """The rows that come to a device if all tokens of all senders choose its experts, each of which it chooses once."""
    return layer.owners.size * rows * min(layer.experts_per_token, layer.num_experts // layer.owners.size)


def _buffer_rows(layer, rows):
    """Static size of the buffer of received rows, for a group of `rows` tokens on each device."""
    worst = _worst_case(layer, rows)
    if layer.buffer is None:
        return worst
    bound = math.ceil(layer.buffer * rows * layer.experts_per_token)
    return min(worst, cdiv(bound, BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT)


def _within_capacity(layer, choices, batch, length, groups):
    """How many assignments of each group of tokens of this device its experts still serve.

    The order of assignments is that of choice, row of the batch, and position. Tokens of this device are neighbours in
    it inside a row, so that counts decide: of each choice, row, and piece of a row that no group divides.

    Args:
      choices: int32 [k, b * t].

    Returns:
      int32 [groups, E].
    """
    k, tokens = choices.shape
    pieces = length // math.gcd(length, tokens // groups)
    own = choices.reshape(k, batch, pieces, -1, 1) == jnp.arange(layer.num_experts)
    own = jnp.sum(own, axis=3, dtype=jnp.int32)  # [k, b, pieces, E]
    if layer.shared_capacity:
        capacity = layer.capacity(tokens * layer.batch.size * layer.length.size)
        every = (layer.batch + layer.length).stack(own)
        every = every.reshape(layer.batch.size, layer.length.size, *own.shape)
        before = _exclusive_cumsum(jnp.transpose(every, (2, 0, 3, 1, 4, 5)), 5)  # [k, N, b, n, pieces, E]
        before = before[:, layer.batch.index(), :, layer.length.index()]
    else:
        capacity = layer.capacity(tokens)
        before = _exclusive_cumsum(own, 3)
    served = jnp.clip(capacity - before, 0, own)
    return jnp.sum(served.reshape(k, groups, -1, layer.num_experts), axis=(0, 2))


def _exclusive_cumsum(x, axes):
    """Along the first `axes` axes as if they were one."""
    flat = x.reshape(-1, *x.shape[axes:])
    return (jnp.cumsum(flat, axis=0) - flat).reshape(x.shape)


class _Slices(NamedTuple):
    """Slices of rows on their way, int32 [sender, receiver, slice], known to all devices that exchange them."""

    begins: jax.Array  # among the rows of the sender
    sizes: jax.Array
    arrivals: jax.Array  # among the rows of the receiver

    def reversed(self):
        """The way back."""
        return _Slices(*(jnp.swapaxes(x, 0, 1) for x in (self.arrivals, self.sizes, self.begins)))


def _exchange(devices, num_rows, rows, slices):
    """All-to-all of slices of rows [R, M]; returns [num_rows, M], 0 where nothing arrives."""
    return _exchange_rows(devices, num_rows, rows.shape[0], rows, slices)


def _exchange_in_turns(devices, num_rows, groups, slices):
    """`_exchange` of each of several arrays [R, M], which leaves when the one before it is there.

    The products of that one hide it, and their gradients hide its own on the way back.
    """
    received = []
    for rows, own_slices in zip(groups, slices, strict=True):
        if received:
            received[-1], rows = lax.optimization_barrier((received[-1], rows))
        received.append(_exchange(devices, num_rows, rows, own_slices))
    return received


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _exchange_rows(devices, num_rows, num_sent, rows, slices):
    del num_sent  # of the way back
    if devices.size == 1:
        source = _follow(num_rows, slices.arrivals, slices.sizes, slices.begins, missing=rows.shape[0])
        return _take(rows, source)
    if platform() == "cpu":
        return _exchange_padded(devices, num_rows, rows, slices)
    me = devices.index()
    return lax.ragged_all_to_all(
        rows, jnp.zeros((num_rows, rows.shape[1]), rows.dtype),
        slices.begins[me].reshape(-1), slices.sizes[me].reshape(-1), slices.arrivals[me].reshape(-1),
        slices.sizes[:, me].reshape(-1), axis_name=devices.names,
    )  # fmt: skip


_exchange_rows.defvjp(
    lambda devices, num_rows, num_sent, rows, slices: (_exchange(devices, num_rows, rows, slices), slices),
    lambda devices, num_rows, num_sent, slices, g: (_exchange(devices, num_sent, g, slices.reversed()), None),
)


def _exchange_padded(devices, num_rows, rows, slices):
    """The same by an all-to-all of pieces of equal length, for XLA has no ragged one on CPUs."""
    me, length = devices.index(), min(num_rows, rows.shape[0])
    offsets = jnp.cumsum(slices.sizes, axis=2) - slices.sizes  # in the piece from sender to receiver
    pack = functools.partial(_follow, length, missing=rows.shape[0])
    pieces = _take(rows, jax.vmap(pack)(offsets[me], slices.sizes[me], slices.begins[me]))
    pieces = lax.all_to_all(pieces, devices.names, 0, 0, tiled=True).reshape(devices.size * length, -1)
    offsets = offsets[:, me] + jnp.arange(devices.size)[:, None] * length
    source = _follow(num_rows, slices.arrivals[:, me], slices.sizes[:, me], offsets, missing=pieces.shape[0])
    return _take(pieces, source)


def _follow(count, starts, sizes, sources, *, missing):
    """Where positions 0 to `count` - 1 come from, if position starts[i] + j comes from sources[i] + j for j < sizes[i].

    Returns:
      int32 [count]; `missing` for positions that are in no slice.
    """
    position = jnp.arange(count, dtype=jnp.int32)
    starts, sizes, sources = (x.reshape(-1).astype(jnp.int32) for x in (starts, sizes, sources))
    inside = (position[:, None] >= starts) & (position[:, None] < starts + sizes)
    shift = jnp.sum(jnp.where(inside, sources - starts, 0), axis=1)
    return jnp.where(jnp.any(inside, axis=1), position + shift, missing)


def _take(x, index):
    """x[index], and 0 for an index behind the end."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _permute(x, order, inverse):
    """x[order], where `order` and `inverse` may lead behind the end; the gradient is a gather too, not a scatter."""
    return _take(x, order)


_permute.defvjp(
    lambda x, order, inverse: (_take(x, order), (order, inverse)),
    lambda saved, g: (_take(g, saved[1]), None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(k, x, order, inverse):
    """k copies of x [R, M], one after the other, permuted: [k * R, M]."""
    del k, inverse  # of the gradient
    return x[order % x.shape[0]]


_spread.defvjp(
    lambda k, x, order, inverse: (_spread(k, x, order, inverse), inverse),
    lambda k, inverse, g: (jnp.sum(g[inverse].reshape(k, -1, g.shape[1]), axis=0), None, None),
)


@jax.custom_vjp
def _gradients_together(*arrays):
    """The arrays, whose gradients are all there before one of them is used.

    The layer before goes on with the gradient of the rows. Nothing but the optimizer waits for those of the weights, so
    that the compiler would put their products off, layer by layer, and keep what they multiply.
    """
    return arrays


_gradients_together.defvjp(lambda *arrays: (arrays, None), lambda _, gradients: lax.optimization_barrier(gradients))


def _gather_weight(devices, axis, dtype, w):
    """The whole of a weight in `dtype`. It travels in that; its gradient is summed in the dtype of the weight."""
    return _gather_cast(devices, axis, dtype, w.dtype, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _gather_cast(devices, axis, dtype, own_dtype, w):
    del own_dtype  # of the gradient
    return devices.gather(w.astype(dtype), axis)


_gather_cast.defvjp(
    lambda devices, axis, dtype, own_dtype, w: (_gather_cast(devices, axis, dtype, own_dtype, w), None),
    lambda devices, axis, dtype, own_dtype, _, g: (devices.scatter_sum(g.astype(own_dtype), axis),),
)
