"""The mixture of SwiGLU experts: router, dropless experts on one device, statistics for the balancing loss."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from mmx_jax.config import ModelConfig, RuntimeConfig
from mmx_jax.layers.linear import deepnorm_gain, weight
from mmx_jax.layers.norm import rms_norm
from mmx_jax.parallel.expert_parallel import MoESpec, MoEWeights, expert_parallel_moe
from mmx_jax.parallel.token_dispatch import permute_rows
from pallas_kernels.grouped_matmul import (
    few_tokens_swiglu,
    grouped_swiglu,
    norm_and_route,
    order_by_group,
    serves_few_tokens,
    serves_norm_and_route,
)


class RouterStats(NamedTuple):
    """Float32 sums over the tokens of a batch, padding left out; a model stacks them with the layer axis L first."""

    assignments: jax.Array  # [E] top-k assignments, dropped ones included
    probability: jax.Array  # [E] router probabilities
    tokens: jax.Array  # [] tokens
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
    # Add columns one by one: XLA would turn a division by a row sum into a separate softmax kernel. For a single token
    # that kernel includes the norm after the experts.
    return chosen / sum(jnp.split(chosen, chosen.shape[1], axis=-1))


def route(x: jax.Array, router: jax.Array, experts_per_token: int) -> Routing:
    """Softmax over all experts in float32, top-k, renormalised: the softmax of the chosen logits.

    Args:
      x: [R, M] in any dtype; router: float32 [M, E].
    """
    probability = _probability(x, router)
    chosen, experts = lax.top_k(probability, experts_per_token)
    # The order of all experts, for kernels: slicing the first k of it would be a copy, a kernel of its own.
    ranking = lax.top_k(probability, probability.shape[-1])[1]
    return Routing(experts, _renormalised(chosen), probability, ranking)


def takes_norm(config: ModelConfig, runtime: RuntimeConfig, x: jax.Array) -> bool:
    """Whether `MixtureOfExperts` computes the norm in front of it, of x [B, T, M], in one kernel with its router."""
    if config.capacity_factor is not None:
        return False
    rows = jax.ShapeDtypeStruct((x.shape[0] * x.shape[1], x.shape[2]), x.dtype)
    return serves_norm_and_route(rows, config.num_experts, implementation=runtime.moe_implementation)


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


def router_stats(routing: Routing, token_mask: jax.Array, kept: jax.Array) -> RouterStats:
    """Sums over tokens without padding.

    Args:
      token_mask: bool [R].
      kept: bool [R, k], assignments that an expert had room for.
    """
    mask = token_mask.astype(jnp.float32)
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
    """Most rows of one expert, ceil(factor * tokens * k / E) and at most `tokens`; dropless `tokens`."""
    if config.capacity_factor is None:
        return tokens
    fair = tokens * config.experts_per_token / config.num_experts
    return min(tokens, max(1, math.ceil(config.capacity_factor * fair)))


def dropless(x: jax.Array, routing: Routing, weights: MoEWeights, *, implementation: str = "auto") -> jax.Array:
    """Every token through its k experts on one device: x [R, M] -> [R, M]."""
    experts = tuple(w.astype(x.dtype) for w in (weights.gate, weights.up, weights.down))
    k = routing.experts.shape[1]
    if serves_few_tokens(x, k, experts[0], implementation=implementation):
        with jax.named_scope("experts"):
            rows = _few_tokens(k, implementation, x, routing.ranking, *experts)
    else:
        rows = _sorted_by_expert(implementation, x, routing.experts, *experts)
    with jax.named_scope("combine"):
        return jnp.einsum("rkm,rk->rm", rows.astype(jnp.float32), routing.weights).astype(x.dtype)  # pyright: ignore[reportAttributeAccessIssue]


def _sorted_by_expert(implementation, x, experts, *weights):
    """[R, k, M]: tokens x [R, M] through experts [R, k], rows sorted by expert."""
    k = experts.shape[1]
    with jax.named_scope("dispatch"):
        order, inverse, group_sizes = order_by_group(experts.reshape(-1), weights[0].shape[0])
        rows = jnp.repeat(x, k, axis=0)
        if x.shape[0] > 1:  # the rows of one token are the same in every order
            rows = permute_rows(rows, order, inverse)
    with jax.named_scope("experts"):
        rows = grouped_swiglu(rows, *weights, group_sizes=group_sizes, implementation=implementation)
    with jax.named_scope("combine"):
        return permute_rows(rows, inverse, order).reshape(x.shape[0], k, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _few_tokens(k, implementation, x, ranking, *weights):
    """As `_sorted_by_expert`, by kernels that need no order of rows. ranking: as of `Routing`."""
    return few_tokens_swiglu(x, ranking, k, *weights)


def _few_tokens_forward(k, implementation, x, ranking, *weights):
    experts = ranking[:, :k]
    return jax.vjp(lambda x, *weights: _sorted_by_expert(implementation, x, experts, *weights), x, *weights)


def _few_tokens_backward(k, implementation, vjp, d_rows):
    d_x, *d_weights = vjp(d_rows)
    return d_x, None, *d_weights


_few_tokens.defvjp(_few_tokens_forward, _few_tokens_backward)


class MoEOutput(NamedTuple):
    """Result of `MixtureOfExperts`."""

    output: jax.Array  # [B, T, M]
    stats: RouterStats  # of this layer
    normed: jax.Array | None = None  # [B, T, M], the input after the norm, where the layer computed it


class MixtureOfExperts(nn.Module):
    """Router and SwiGLU experts (docs/model.md, "Mixture of experts"; section 2.1 of arXiv 2501.08313).

    `norm`: the RMSNorm in front, to be computed in one kernel with the router (`takes_norm`); the result is then in
    `MoEOutput.normed`.
    """

    config: ModelConfig
    runtime: RuntimeConfig = RuntimeConfig()

    @nn.compact
    def __call__(self, x, segment_ids, norm=None) -> MoEOutput:
        c = self.config
        token_mask = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids > 0
        weights, weight_axes = self._weights()
        mesh = jax.sharding.get_abstract_mesh()
        # `init` runs on dummy tokens that no mesh divides.
        sharded = mesh.size > 1 and not self.is_initializing()
        if sharded or c.capacity_factor is not None:
            spec = MoESpec(
                weight_axes=weight_axes,
                experts_per_token=c.experts_per_token,
                route=functools.partial(route, experts_per_token=c.experts_per_token),
                statistics=router_stats,
                capacity=None if c.capacity_factor is None else functools.partial(expert_capacity, c),
                shared_capacity=c.capacity_scope == "global",
                buffer=c.expert_buffer if sharded else None,
                token_groups=self.runtime.token_groups if sharded else 1,
                implementation=self.runtime.moe_implementation,
            )
            return MoEOutput(*expert_parallel_moe(x, token_mask, weights, spec, on_mesh=sharded))
        return self._dropless_on_one_device(x, token_mask, weights, norm)

    def _weights(self):
        """(MoEWeights, logical axes of (E, M, F))."""
        c = self.config
        embed, inner, experts = c.hidden_size, c.mlp_dim, c.num_experts
        router = weight(
            self, "router", (embed, experts), ("embed", "router_experts"), fan=(embed, experts), dtype="float32"
        )
        experts_axis, mlp = ("experts", "mlp") if experts > 1 else (None, "dense_mlp")
        up_axes, down_axes = (experts_axis, "embed", mlp), (experts_axis, mlp, "embed")
        gain = deepnorm_gain(c)
        w_gate, w_up = (
            weight(self, name, (experts, embed, inner), up_axes, fan=(embed, inner), gain=gain)
            for name in ("gate", "up")
        )
        w_down = weight(self, "down", (experts, inner, embed), down_axes, fan=(inner, embed), gain=gain)
        return MoEWeights(router, w_gate, w_up, w_down), up_axes

    def _dropless_on_one_device(self, x, token_mask, weights, norm):
        c = self.config
        rows, row_mask = x.reshape(-1, x.shape[-1]), token_mask.reshape(-1)
        with jax.named_scope("router"):
            if norm is None:
                routing = route(rows, weights.router, c.experts_per_token)
            else:
                apply = functools.partial(_norm_and_route, router=weights.router, experts_per_token=c.experts_per_token)
                rows, experts, chosen = norm(rows, apply)
                routing = Routing(experts, _renormalised(chosen), _probability(rows, weights.router), experts)
        output = dropless(rows, routing, weights, implementation=self.runtime.moe_implementation)
        stats = router_stats(routing, row_mask, jnp.ones(routing.experts.shape, bool))
        return MoEOutput(output.reshape(x.shape), stats, None if norm is None else rows.reshape(x.shape))
