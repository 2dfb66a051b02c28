"""Mixture of experts over the mesh: every device routes its own tokens, and only rows travel, to where their expert is.

Each mesh axis has two uses. The experts lie over the axes of the rule "experts", the width of each over those of
"mlp", and both are divided over those of "embed" until they are used; the tokens are divided among all devices. One
step of a group of tokens is

    sort by expert -> all-to-all -> all-gather over the width -> products -> reduce-scatter -> all-to-all -> sum

The all-to-all stays among the devices that hold different experts. The other axes hold copies of them: only the sums
of gradients, and in the capacity mode the counts of the router, go over those.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from mmx_jax.parallel import token_dispatch as dispatches
from mmx_jax.parallel.mesh_group import MeshGroup, gather_weight
from mmx_jax.parallel.token_dispatch import DispatchSpec, plan_dispatch
from mmx_jax.sharding import axes_size, logical_to_spec, mesh_axes
from pallas_kernels.grouped_matmul import grouped_swiglu


class MoEWeights(NamedTuple):
    """Weights of the router and the experts."""

    router: jax.Array  # float32 [M, E]
    gate: jax.Array  # [E, M, F]
    up: jax.Array  # [E, M, F]
    down: jax.Array  # [E, F, M]


@dataclasses.dataclass(frozen=True)
class MoESpec:
    """A mixture of experts: its function, and how its tokens travel.

    Attributes:
      weight_axes: logical axes of (E, M, F).
      experts_per_token: k.
      route: (rows [R, M], router) -> routing with `experts` int32 [R, k] and `weights` float32 [R, k].
      statistics: (routing, token_mask [R], kept bool [R, k]) -> tree of sums over rows.
      capacity: number of tokens -> the most of them that one expert serves; None: no limit.
      shared_capacity: whether the capacity is that of the whole batch; False: each device counts its own tokens.
      buffer: rows that a device has room for, times the even share; None: room for all that may come.
      token_groups: groups of tokens that travel and are multiplied one by one, so that one can travel while another is
        multiplied. The greatest common divisor with the tokens of a device counts.
      implementation: of `grouped_swiglu`.
    """

    weight_axes: tuple[str | None, str, str]
    experts_per_token: int
    route: Callable
    statistics: Callable
    capacity: Callable[[int], int] | None = None
    shared_capacity: bool = True
    buffer: float | None = None
    token_groups: int = 1
    implementation: str = "auto"


class MoEOutput(NamedTuple):
    """Result of a mixture of experts."""

    output: jax.Array  # [B, T, M] in the dtype of the input
    stats: Any  # the statistics of all devices together


def expert_parallel_moe(
    x: jax.Array, token_mask: jax.Array, weights: MoEWeights, spec: MoESpec, *, on_mesh: bool = True
) -> MoEOutput:
    """A mixture of SwiGLU experts over the ambient mesh (`jax.set_mesh`).

    Padding goes to no expert, and gives 0. An assignment is dropped, which means that it adds nothing,

    - with `spec.capacity`, where its expert has served so many before it: all first choices of the batch come before
      any second choice, and among them earlier rows of the batch before later ones. This order does not depend on the
      mesh. With `shared_capacity` False each device counts its own tokens alone, in the same order;
    - with `spec.buffer`, where more rows come to a device than it has room for: every sender and expert then loses the
      same fraction, last choices and last tokens first.

    Args:
      x: [B, T, M]. Where the mesh does not divide B or T, padding fills the batch up.
      token_mask: bool [B, T], False at padding.
      weights: multiplied in the dtype of `x`; their gradients are summed over devices in their own.
      on_mesh: False computes on each device alone what it is given, as on a mesh of one device.

    Raises:
      ConfigError: the mesh does not divide E, M or F.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not on_mesh:
        layer = _Layer.on_one_device(spec, weights.gate.shape[0])
        return MoEOutput(*_on_device(layer, x, token_mask, weights))
    experts, embed, width = spec.weight_axes
    for size, axis in zip(weights.gate.shape, spec.weight_axes, strict=True):
        axes_size(mesh, mesh_axes(axis), dividing=size, of=f"the experts {weights.gate.shape}: axis {axis!r}")
    batch_axes, length_axes = token_axes(mesh.shape, x.shape[1])
    rows = x.shape[0]
    missing = -rows % axes_size(mesh, batch_axes)
    x, token_mask = jnp.pad(x, ((0, missing), (0, 0), (0, 0))), jnp.pad(token_mask, ((0, missing), (0, 0)))
    tokens = P(batch_axes, length_axes or None)
    up, down = logical_to_spec((experts, embed, width)), logical_to_spec((experts, width, embed))
    layer = _Layer.over_mesh(spec, weights.gate.shape[0], mesh, batch_axes, length_axes)
    output, stats = jax.shard_map(
        functools.partial(_on_device, layer),
        in_specs=(tokens, tokens, MoEWeights(logical_to_spec((embed, None)), up, up, down)),  # pyright: ignore[reportArgumentType]
        out_specs=(tokens, P()),
        check_vma=False,  # kernels do not say over which axes their results vary
    )(x, token_mask, weights)
    return MoEOutput(output[:rows], stats)


def token_axes(sizes: Mapping[str, int], length: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes for (batch, length) that divide the tokens among all devices, in the order of the batch.

    The dense part holds the same tokens on the devices of "tensor": each takes a piece of a row, or where a row is too
    short, as in decoding, some rows of the batch.

    Args:
      sizes: of all axes of the mesh, in its order.
      length: tokens of a row.
    """
    batch, seq = mesh_axes("batch"), mesh_axes("length")
    rest = tuple(name for name in sizes if name not in batch + seq)
    if length % math.prod(sizes[name] for name in seq + rest) == 0:
        return batch, seq + rest
    if length % math.prod(sizes[name] for name in seq) == 0:
        return batch + rest, seq
    return batch + seq + rest, ()


class _Layer(NamedTuple):
    """A mixture of experts on its mesh: everything static."""

    spec: MoESpec
    num_experts: int
    ep_group: MeshGroup  # devices with different experts
    embed_group: MeshGroup  # devices with slices of the weights, which are gathered
    width_group: MeshGroup  # devices with slices of the same experts
    batch_group: MeshGroup
    length_group: MeshGroup

    @classmethod
    def over_mesh(cls, spec, num_experts, mesh, batch_axes, length_axes):
        experts, embed, width = spec.weight_axes
        axes = mesh_axes(experts), mesh_axes(embed), mesh_axes(width), batch_axes, length_axes
        return cls(spec, num_experts, *(MeshGroup.of(mesh, names) for names in axes))

    @classmethod
    def on_one_device(cls, spec, num_experts):
        return cls(spec, num_experts, *(MeshGroup((), 1, 1),) * 5)

    @property
    def dispatch(self) -> DispatchSpec:
        return DispatchSpec(self.ep_group, self.num_experts, self.spec.experts_per_token, self.spec.buffer)


def _on_device(layer, x, token_mask, weights):
    """(output [b, t, M], statistics) of the tokens x [b, t, M] of this device."""
    rows, row_mask = x.reshape(-1, x.shape[-1]), token_mask.reshape(-1)
    router = gather_weight(layer.embed_group, 0, weights.router.dtype, weights.router)
    experts = [
        gather_weight(layer.embed_group, axis, x.dtype, w)
        for w, axis in ((weights.gate, 1), (weights.up, 1), (weights.down, 2))
    ]
    rows, *experts = _gradients_together(rows, *experts)
    with jax.named_scope("router"):
        routing = layer.spec.route(rows, router)
    # First choices first; an expert that does not exist is the choice of padding.
    choices = jnp.where(row_mask, routing.experts.T, layer.num_experts)  # [k, R]
    count = math.gcd(layer.spec.token_groups, rows.shape[0])
    limited = layer.spec.capacity is not None
    limits = _capacity_limits(layer, choices, token_mask.shape, count) if limited else [None] * count
    size = rows.shape[0] // count
    parts = [slice(i * size, (i + 1) * size) for i in range(count)]
    with jax.named_scope("dispatch"):
        plans = [
            plan_dispatch(layer.dispatch, choices[:, part], limit) for part, limit in zip(parts, limits, strict=True)
        ]
    returned = _through_experts(layer, [rows[part] for part in parts], plans, experts)
    with jax.named_scope("combine"):
        outputs = [
            _combine(own_rows, plan, routing.weights[part]).astype(x.dtype)
            for own_rows, plan, part in zip(returned, plans, parts, strict=True)
        ]
    kept = [
        dispatches.sent_assignments(layer.ep_group, choices[:, part], plan)
        for part, plan in zip(parts, plans, strict=True)
    ]
    stats = layer.spec.statistics(routing, row_mask, jnp.concatenate(kept))
    return jnp.concatenate(outputs).reshape(x.shape), (layer.batch_group + layer.length_group).psum(stats)


def _through_experts(layer, groups, plans, weights):
    """Sends groups of tokens to their experts and back.

    Args:
      groups: arrays [R, M].
      weights: gate, up and down of the experts of this device.

    Returns:
      For each group [k * R, M], sorted by expert; 0 for what is not sent.
    """
    group, k, tokens = layer.ep_group, layer.spec.experts_per_token, groups[0].shape[0]
    with jax.named_scope("dispatch"):
        leaving = [
            dispatches.repeat_and_permute(k, rows, plan.order, plan.inverse)
            for rows, plan in zip(groups, plans, strict=True)
        ]
        if len(groups) > 1:
            # All are sorted before the first one leaves. Otherwise XLA would sort a group after the products of the
            # one before it, and it would travel while nothing is computed.
            leaving, plans = lax.optimization_barrier((leaving, plans))
        there = [plan.slices for plan in plans]
        room = dispatches.received_rows(layer.dispatch, tokens)
        received = dispatches.all_to_all_in_turns(group, room, leaving, there)
    with jax.named_scope("experts"):
        made = [
            _swiglu_over_width(layer, rows, weights, jnp.sum(slices.sizes[:, group.index()], axis=0))
            for rows, slices in zip(received, there, strict=True)
        ]
    with jax.named_scope("combine"):
        return dispatches.all_to_all_in_turns(group, k * tokens, made, [slices.reversed() for slices in there])


def _combine(returned, plan, weights_of_choices):
    """Sum over the choices of each token: float32 [R, M].

    Args:
      returned: [k * R, M], sorted by expert.
      weights_of_choices: float32 [R, k].
    """
    tokens, k = weights_of_choices.shape
    returned = dispatches.permute_rows_or_zero(returned, plan.inverse, plan.order).reshape(k, tokens, -1)
    return jnp.einsum("krm,rk->rm", returned.astype(jnp.float32), weights_of_choices)


def _swiglu_over_width(layer, rows, weights, group_sizes):
    """`grouped_swiglu` of rows whose experts lie in slices on the devices of `layer.width_group`.

    Args:
      rows: [R, M], sorted by expert.
      group_sizes: int32 [experts of this device].
    """
    swiglu = functools.partial(grouped_swiglu, implementation=layer.spec.implementation)
    group = layer.width_group
    if group.size == 1:
        return swiglu(rows, *weights, group_sizes=group_sizes)
    blocks = group.stack(group_sizes)  # [n, experts]
    # The rows of every device are sorted by expert, and so must be all of them together.
    starts = jnp.arange(group.size)[:, None] * rows.shape[0] + jnp.cumsum(blocks, axis=1) - blocks
    sorted_starts = dispatches.exclusive_cumsum(blocks.T, 2).T
    rows = group.gather(rows)
    order = dispatches.source_rows(rows.shape[0], sorted_starts, blocks, starts, missing=rows.shape[0])
    inverse = dispatches.source_rows(rows.shape[0], starts, blocks, sorted_starts, missing=rows.shape[0])
    rows = swiglu(dispatches.permute_rows_or_zero(rows, order, inverse), *weights, group_sizes=jnp.sum(blocks, axis=0))
    return group.reduce_scatter(dispatches.permute_rows_or_zero(rows, inverse, order))


def _capacity_limits(layer, choices, shape, groups):
    """Assignments of each group of tokens of this device that each expert still serves: int32 [groups, E].

    The order of assignments is that of choice, row of the batch, and position. Tokens of this device are neighbours in
    it inside a row, so that counts decide: of each choice, row, and piece of a row that no group divides.

    Args:
      choices: int32 [k, b * t].
      shape: (b, t).
    """
    k, tokens = choices.shape
    batch, length = shape
    pieces = length // math.gcd(length, tokens // groups)
    own = choices.reshape(k, batch, pieces, -1, 1) == jnp.arange(layer.num_experts)
    own = jnp.sum(own, axis=3, dtype=jnp.int32)  # [k, b, pieces, E]
    if layer.spec.shared_capacity:
        batch_group, length_group = layer.batch_group, layer.length_group
        capacity = layer.spec.capacity(tokens * batch_group.size * length_group.size)
        table = (batch_group + length_group).stack(own)
        table = table.reshape(batch_group.size, length_group.size, *own.shape)
        before = dispatches.exclusive_cumsum(jnp.transpose(table, (2, 0, 3, 1, 4, 5)), 5)  # [k, N, b, n, pieces, E]
        before = before[:, batch_group.index(), :, length_group.index()]
    else:
        capacity = layer.spec.capacity(tokens)
        before = dispatches.exclusive_cumsum(own, 3)
    served = jnp.clip(capacity - before, 0, own)
    return jnp.sum(served.reshape(k, groups, -1, layer.num_experts), axis=(0, 2))


@jax.custom_vjp
def _gradients_together(*arrays):
    """The same arrays, whose gradients are all computed before one of them is used.

    The layer before goes on with the gradient of the rows, and only the optimizer waits for those of the weights. Left
    alone, XLA would postpone the weight-gradient products layer by layer and keep what they multiply.
    """
    return arrays


_gradients_together.defvjp(lambda *arrays: (arrays, None), lambda _, gradients: lax.optimization_barrier(gradients))
