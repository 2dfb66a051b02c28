"""The mixture of SwiGLU experts: router, dropless and capacity dispatch, statistics for the balancing loss."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from mmx_jax.config import ModelConfig
from mmx_jax.layers.linear import deepnorm_gain, product, weight
from mmx_jax.layers.norm import rms_norm
from mmx_jax.parallel import expert
from pallas_kernels.grouped_matmul import (
    few_tokens_swiglu,
    grouped_swiglu,
    norm_and_route,
    order_by_group,
    serves_few_tokens,
    serves_norm_and_route,
    swiglu,
)


class RouterStats(NamedTuple):
    """Float32 sums over the real tokens of a batch; a model stacks them with the layer axis L first."""

    assignments: jax.Array  # [E] top-k assignments, dropped ones included
    probability: jax.Array  # [E] router probabilities
    tokens: jax.Array  # [] real tokens
    dropped: jax.Array  # [] assignments that no expert had room for
    entropy: jax.Array  # [] router entropy, nats


class Routing(NamedTuple):
    """Choices of the router for R tokens."""

    experts: jax.Array  # int32 [R, k], lowest index first among equals
    weights: jax.Array  # float32 [R, k], summing to 1
    probability: jax.Array  # float32 [R, E]
    ranking: jax.Array  # int32 [R, k or more], begins with `experts`


def _probability(x, router):
    logits = jnp.einsum("rm,me->re", x.astype(jnp.float32), router, precision=lax.Precision.HIGHEST)
    return jax.nn.softmax(logits, axis=-1)


def _renormalised(chosen):
    """Probabilities [R, k] of the chosen experts, to sum to 1."""
    if chosen.shape[0] == 1:
        return chosen / jnp.sum(chosen, axis=-1, keepdims=True)
    # By columns: XLA takes a division by the sum of a row for a softmax, which on a GPU is a kernel of its own. For a
    # single token that kernel goes on to the norm behind the experts.
    return chosen / sum(jnp.split(chosen, chosen.shape[1], axis=-1))


def route(x, router, experts_per_token) -> Routing:
    """Softmax over all experts in float32, top-k, renormalised: the softmax of the chosen logits (spec C.5).

    Args:
      x: [R, M] in any dtype; router: float32 [M, E].
    """
    probability = _probability(x, router)
    chosen, experts = lax.top_k(probability, experts_per_token)
    # The whole order of the experts, for kernels: the first k of it would be a copy, a kernel of its own.
    ranking = lax.top_k(probability, probability.shape[-1])[1]
    return Routing(experts, _renormalised(chosen), probability, ranking)


def takes_norm(config: ModelConfig, x) -> bool:
    """Whether `MixtureOfExperts` makes the norm in front of it, of x [B, T, M], in one kernel with its router."""
    rows = jax.ShapeDtypeStruct((x.shape[0] * x.shape[1], x.shape[2]), x.dtype)
    return serves_norm_and_route(rows, config.num_experts, implementation=config.moe_implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 4))
def _norm_and_route(x, scale, eps, router, experts_per_token):
    """(normed [R, M], the chosen experts [R, k], their probabilities [R, k]), by one kernel."""
    return norm_and_route(x, scale, eps, router, experts_per_token)


def _norm_and_route_forward(x, scale, eps, router, experts_per_token):
    def compute(x, scale, router):
        normed = rms_norm(x, scale, eps)
        chosen, experts = lax.top_k(_probability(normed, router), experts_per_token)
        return normed, experts, chosen

    return jax.vjp(compute, x, scale, router)


def _norm_and_route_backward(eps, experts_per_token, vjp, cotangents):
    return vjp(cotangents)


_norm_and_route.defvjp(_norm_and_route_forward, _norm_and_route_backward)


def router_stats(routing: Routing, real, kept) -> RouterStats:
    """Sums over real tokens. real: bool [R]; kept: bool [R, k], assignments inside the capacity."""
    mask = real.astype(jnp.float32)
    one_hot = jax.nn.one_hot(routing.experts, routing.probability.shape[-1])  # [R, k, E]
    p = routing.probability
    entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, jnp.finfo(jnp.float32).tiny)), axis=-1)
    return RouterStats(
        assignments=lax.stop_gradient(jnp.einsum("rke,r->e", one_hot, mask)),
        probability=mask @ p,
        tokens=jnp.sum(mask),
        dropped=jnp.sum(mask[:, None] * ~kept),
        entropy=lax.stop_gradient(mask @ entropy),
    )


def expert_capacity(config: ModelConfig, tokens: int) -> int:
    """Rows of one expert in the capacity path, ceil(factor * tokens * k / E), at most `tokens`."""
    fair = tokens * config.experts_per_token / config.num_experts
    return min(tokens, max(1, math.ceil(config.capacity_factor * fair)))


@jax.custom_vjp
def _permute(x, order, inverse):
    """x[order] for a permutation; the gradient is a gather too, by `inverse`, not a scatter."""
    return x[order]


_permute.defvjp(
    lambda x, order, inverse: (x[order], (inverse,)),
    lambda saved, g: (g[saved[0]], None, None),
)


def dropless(config: ModelConfig, x, routing: Routing, w_gate, w_up, w_down):
    """Every token through its k experts. x: [R, M]; returns [R, M]."""
    weights = tuple(w.astype(x.dtype) for w in (w_gate, w_up, w_down))
    k = config.experts_per_token
    if serves_few_tokens(x, k, weights[0], implementation=config.moe_implementation):
        rows = _few_tokens(config, x, routing.ranking, *weights)
    else:
        rows = _sorted_by_expert(config, x, routing.experts, *weights)
    return jnp.einsum("rkm,rk->rm", rows.astype(jnp.float32), routing.weights).astype(x.dtype)


def _sorted_by_expert(config, x, experts, *weights):
    """[R, k, M]: tokens x [R, M] through experts [R, k], rows sorted by expert."""
    k = config.experts_per_token
    order, inverse, group_sizes = order_by_group(experts.reshape(-1), config.num_experts)
    rows = jnp.repeat(x, k, axis=0)
    if x.shape[0] > 1:  # the rows of one token are the same in every order
        rows = _permute(rows, order, inverse)
    rows = grouped_swiglu(rows, *weights, group_sizes, implementation=config.moe_implementation)
    return _permute(rows, inverse, order).reshape(x.shape[0], k, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _few_tokens(config, x, ranking, *weights):
    """As `_sorted_by_expert`, by kernels that need no order of rows. ranking: as of `Routing`."""
    return few_tokens_swiglu(x, ranking, config.experts_per_token, *weights)


def _few_tokens_forward(config, x, ranking, *weights):
    experts = ranking[:, : config.experts_per_token]
    return jax.vjp(lambda x, *weights: _sorted_by_expert(config, x, experts, *weights), x, *weights)


def _few_tokens_backward(config, vjp, d_rows):
    d_x, *d_weights = vjp(d_rows)
    return d_x, None, *d_weights


_few_tokens.defvjp(_few_tokens_forward, _few_tokens_backward)


def with_capacity(config: ModelConfig, x, routing: Routing, real, w_gate, w_up, w_down):
    """As `dropless`, but an expert serves only its first `expert_capacity` real tokens, first choices first.

    A dropped assignment adds nothing, so its token keeps its residual.

    Returns:
      ([R, M], kept: bool [R, k]).
    """
    num_tokens, k = routing.experts.shape
    capacity = expert_capacity(config, num_tokens)
    # Rank inside the expert, counting all first choices before any second choice.
    one_hot = jax.nn.one_hot(routing.experts.T, config.num_experts, dtype=jnp.int32)  # [k, R, E]
    one_hot *= real[None, :, None]
    rank = jnp.cumsum(one_hot.reshape(k * num_tokens, -1), axis=0).reshape(one_hot.shape) - 1
    rank = jnp.sum(rank * one_hot, axis=-1).T  # [R, k]
    kept = (rank < capacity) & real[:, None]
    spare = config.num_experts * capacity  # dropped rows are sent behind the buffer
    slot = jnp.where(kept, routing.experts * capacity + rank, spare)
    source = jnp.full(spare + 1, num_tokens, jnp.int32)
    source = source.at[slot.reshape(-1)].set(jnp.repeat(jnp.arange(num_tokens, dtype=jnp.int32), k))[:-1]
    rows = jnp.concatenate([x, jnp.zeros_like(x[:1])])[source].reshape(config.num_experts, capacity, -1)

    def multiply(equation, a, w):
        return product(equation, a, w.astype(a.dtype), a.dtype)

    hidden = swiglu.activate(multiply("ecm,emf->ecf", rows, w_gate), multiply("ecm,emf->ecf", rows, w_up))
    rows = multiply("ecf,efm->ecm", hidden, w_down).reshape(spare, -1)
    rows = jnp.concatenate([rows, jnp.zeros_like(rows[:1])])[slot]  # [R, k, M]
    return jnp.einsum("rkm,rk->rm", rows.astype(jnp.float32), routing.weights).astype(x.dtype), kept


class MixtureOfExperts(nn.Module):
    """Spec C.5. Returns ([B, T, M], RouterStats of this layer).

    `norm`: the RMSNorm in front, to be made in one kernel with the router (`takes_norm`); its result
    [B, T, M] is returned too, then.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x, segment_ids, norm=None):
        c = self.config
        embed, inner, experts = c.hidden_size, c.mlp_dim, c.num_experts
        fan = dict(fan_in=embed, fan_out=experts)
        router = weight(self, c, "router", (embed, experts), ("embed", "router_experts"), dtype="float32", **fan)
        gain = deepnorm_gain(c)
        experts_axis, mlp = ("experts", "mlp") if experts > 1 else (None, "dense_mlp")
        up_axes, down_axes = (experts_axis, "embed", mlp), (experts_axis, mlp, "embed")
        fan = dict(fan_in=embed, fan_out=inner, gain=gain)
        w_gate = weight(self, c, "gate", (experts, embed, inner), up_axes, **fan)
        w_up = weight(self, c, "up", (experts, embed, inner), up_axes, **fan)
        fan = dict(fan_in=inner, fan_out=embed, gain=gain)
        w_down = weight(self, c, "down", (experts, inner, embed), down_axes, **fan)

        mesh = jax.sharding.get_abstract_mesh()
        if mesh.size > 1 and not self.is_initializing():  # whose dummy tokens no mesh divides
            real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids > 0
            return expert.mixture_of_experts(
                x, real, router, w_gate, w_up, w_down, weight_axes=up_axes,
                route=functools.partial(route, experts_per_token=c.experts_per_token), statistics=router_stats,
                experts_per_token=c.experts_per_token,
                capacity=None if c.capacity_factor is None else functools.partial(expert_capacity, c),
                shared_capacity=c.capacity_scope == "global", buffer=c.expert_buffer, token_groups=c.token_groups,
                implementation=c.moe_implementation,
            )  # fmt: skip
        rows = x.reshape(-1, embed)
        real = jnp.ones(rows.shape[0], bool) if segment_ids is None else segment_ids.reshape(-1) > 0
        if norm is None:
            routing = route(rows, router, c.experts_per_token)
        else:
            apply = functools.partial(_norm_and_route, router=router, experts_per_token=c.experts_per_token)
            rows, experts, chosen = norm(rows, apply)
            routing = Routing(experts, _renormalised(chosen), _probability(rows, router), experts)
        if c.capacity_factor is None:
            output = dropless(c, rows, routing, w_gate, w_up, w_down)
            kept = jnp.ones(routing.experts.shape, bool)
        else:
            output, kept = with_capacity(c, rows, routing, real, w_gate, w_up, w_down)
        output, stats = output.reshape(x.shape), router_stats(routing, real, kept)
        return (output, stats) if norm is None else (output, stats, rows.reshape(x.shape))
