"""The mixture of experts against a float64 loop over tokens: dropless and with capacity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx_jax.config import ModelConfig
from mmx_jax.layers.moe import (
    MixtureOfExperts,
    dropless,
    expert_capacity,
    route,
    router_stats,
)
from mmx_jax.parallel.expert_parallel import MoESpec, MoEWeights, expert_parallel_moe
from pallas_kernels.grouped_matmul.order import FEW_ASSIGNMENTS, order_by_group
from tests.support import oracles

EMBED, INNER = 12, 20


def moe_config(num_experts=5, k=2, **changes):
    return ModelConfig(
        vocab_size=8,
        hidden_size=EMBED,
        num_layers=1,
        layer_pattern=("softmax",),
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        rotary_dim=2,
        mlp_dim=INNER,
        num_experts=num_experts,
        experts_per_token=k,
        dtype="float32",
        **changes,
    )


def random_layer(rows, num_experts=5, seed=0):
    """x [R, M], router, gate, up, down."""
    rng = np.random.default_rng(seed)
    shapes = (rows, EMBED), (EMBED, num_experts), *[(num_experts, EMBED, INNER)] * 2, (num_experts, INNER, EMBED)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)
def run_dropless(config, x, router, *weights):
    return dropless(x, route(x, router, config.experts_per_token), MoEWeights(router, *weights))


@functools.partial(jax.jit, static_argnums=0)
def run_with_capacity(config, token_mask, x, *weights):
    """(output [R, M], kept bool [R, k])."""
    spec = MoESpec(
        weight_axes=("experts", "embed", "mlp"),
        experts_per_token=config.experts_per_token,
        route=functools.partial(route, experts_per_token=config.experts_per_token),
        statistics=lambda routing, token_mask, kept: kept,
        capacity=functools.partial(expert_capacity, config),
    )
    moe = expert_parallel_moe(x[None], token_mask[None], MoEWeights(*weights), spec, on_mesh=False)
    return moe.output[0], moe.stats


def dense_experts(config, x, router, w_gate, w_up, w_down):
    """All experts on all tokens, combined by a masked softmax: another formulation, for its gradients."""
    logits = jnp.einsum("rm,me->re", x, router, precision="highest")
    threshold = jnp.sort(logits, axis=-1)[:, -config.experts_per_token][:, None]
    weights = jax.nn.softmax(jnp.where(logits >= threshold, logits, -jnp.inf), axis=-1)
    gate = jnp.einsum("rm,emf->erf", x, w_gate, precision="highest")
    up = jnp.einsum("rm,emf->erf", x, w_up, precision="highest")
    outputs = jnp.einsum("erf,efm->erm", gate * jax.nn.sigmoid(gate) * up, w_down, precision="highest")
    return jnp.einsum("re,erm->rm", weights, outputs, precision="highest")


def assert_close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 1e-30))


@pytest.mark.parametrize(("rows", "num_experts", "k"), [(1, 5, 2), (33, 5, 2), (40, 3, 3), (16, 8, 1), (9, 1, 1)])
def test_dropless_matches_a_loop_over_tokens(rows, num_experts, k):
    layer = random_layer(rows, num_experts)
    want, experts, _, probability = oracles.mixture_of_experts(*layer, k)
    assert_close(run_dropless(moe_config(num_experts, k), *layer), want)
    routing = jax.jit(route, static_argnums=2)(*layer[:2], k)
    np.testing.assert_array_equal(routing.experts, experts)
    assert_close(routing.probability, probability, 1e-6)
    np.testing.assert_allclose(np.sum(routing.weights, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, FEW_ASSIGNMENTS, FEW_ASSIGNMENTS + 1])
def test_assignments_are_sorted_by_expert_in_place_among_equals(count):
    assignment = np.random.default_rng(count).choice([0, 3, 4, 6], count).astype(np.int32)  # of 8: some are empty
    order, inverse, sizes = jax.jit(order_by_group, static_argnums=1)(assignment, 8)
    want = np.argsort(assignment, kind="stable")
    np.testing.assert_array_equal(order, want)
    np.testing.assert_array_equal(np.asarray(inverse)[want], np.arange(count))
    np.testing.assert_array_equal(sizes, np.bincount(assignment, minlength=8))
    assert {x.dtype for x in (order, inverse, sizes)} == {np.dtype(np.int32)}


def test_equal_probabilities_choose_the_lowest_index():
    x = np.ones((3, EMBED), np.float32)
    assert np.asarray(route(x, jnp.zeros((EMBED, 5)), 3).experts).tolist() == [[0, 1, 2]] * 3
    router = np.zeros((EMBED, 5), np.float32)
    router[:, [1, 3, 4]] = 1.0
    assert np.asarray(route(x, router, 2).experts).tolist() == [[1, 3]] * 3


def test_router_is_float32_for_bfloat16_activations():
    """Two experts whose logits differ by less than bfloat16 can tell."""
    router = np.zeros((EMBED, 4), np.float32)
    router[0] = [1.0, 1.001, 0.5, 0.0]
    x = jnp.zeros((1, EMBED), jnp.bfloat16).at[0, 0].set(1.0)
    routing = route(x, router, 2)
    assert np.asarray(routing.experts).tolist() == [[1, 0]]
    assert routing.weights.dtype == jnp.float32 and routing.weights[0, 0] > 0.5


@pytest.mark.parametrize("capacity_factor", [None, 2.5])  # 2.5 = E / k: room for every token
def test_gradients_equal_those_of_dense_experts(capacity_factor):
    config = moe_config(capacity_factor=capacity_factor)
    layer = random_layer(33)
    cotangent = np.random.default_rng(3).normal(size=(33, EMBED)).astype(np.float32)

    def run(*layer):
        if capacity_factor is None:
            return run_dropless(config, *layer)
        return run_with_capacity(config, np.ones(33, bool), *layer)[0]

    got = jax.grad(lambda *layer: jnp.vdot(run(*layer), cotangent), argnums=range(5))(*layer)
    want = jax.grad(lambda *layer: jnp.vdot(dense_experts(config, *layer), cotangent), argnums=range(5))(*layer)
    for got_leaf, want_leaf in zip(got, want, strict=True):
        assert_close(got_leaf, want_leaf)


def test_expert_without_tokens_has_zero_gradient():
    config, layer = moe_config(), random_layer(7)
    layer[1][:, 2] = 0  # expert 2 has logit 0, and the others that win have more
    layer[1][0, 2] = -1e3
    layer[0][:, 0] = 1.0
    gradient = jax.grad(lambda w: jnp.sum(run_dropless(config, *layer[:2], w, *layer[3:]) ** 2))(layer[2])
    assert not np.any(gradient[2])
    assert np.any(gradient[0])


def test_capacity_serves_first_choices_before_second_ones():
    """Four tokens, E = 3, k = 2, capacity ceil(0.75 * 4 * 2 / 3) = 2. By hand:

    first choices   0 0 0 1: token 2 finds expert 0 full
    second choices  1 1 1 0: expert 1 has served token 3 and takes token 0; tokens 1 and 2 are dropped, and
                             token 3 finds expert 0 full
    """
    config = moe_config(3, capacity_factor=0.75)
    assert expert_capacity(config, 4) == 2
    _, _, *weights = random_layer(4, 3)
    x = np.zeros((4, EMBED), np.float32)
    x[:, :3] = [[2, 1, 0], [2, 1, 0], [2, 1, 0], [1, 2, 0]]
    router = np.eye(EMBED, 3, dtype=np.float32)
    output, kept = run_with_capacity(config, np.ones(4, bool), x, router, *weights)
    assert np.asarray(kept).tolist() == [[True, True], [True, False], [False, False], [True, False]]
    assert not np.any(output[2])  # nothing is added to its residual
    want, _, want_kept, _ = oracles.mixture_of_experts(x, router, *weights, 2, capacity=2)
    np.testing.assert_array_equal(kept, want_kept)
    assert_close(output, want)
    # The weight of a choice that is kept is not renormalised: half of the pair is lost, not made up for.
    alone = run_dropless(config, x, router, *weights)
    second_only = oracles.mixture_of_experts(x[1:2], router, *weights, 2)[0] - output[1:2]
    assert_close(np.asarray(alone)[1:2] - np.asarray(output)[1:2], second_only)


@pytest.mark.parametrize("capacity_factor", [0.3, 1.0, 1.25, 100.0])
@pytest.mark.parametrize("padding", ["none", "left", "interior"])
def test_capacity_matches_a_loop_over_tokens(capacity_factor, padding):
    config, layer = moe_config(capacity_factor=capacity_factor), random_layer(30, seed=4)
    real = np.ones(30, bool)
    real[{"none": slice(0, 0), "left": slice(0, 11), "interior": slice(7, 29, 3)}[padding]] = False
    capacity = expert_capacity(config, 30)
    want, _, want_kept, _ = oracles.mixture_of_experts(*layer, 2, capacity=capacity, real=real)
    output, kept = run_with_capacity(config, real, *layer)
    np.testing.assert_array_equal(kept, want_kept)
    assert_close(output, want)
    assert not np.any(np.asarray(output)[~real])
    if capacity_factor == 100:
        assert capacity == 30
        assert_close(np.asarray(output)[real], np.asarray(run_dropless(config, *layer))[real], 1e-6)


def test_capacity_gradient_of_a_dropped_token_is_zero():
    config, layer = moe_config(capacity_factor=0.3), random_layer(30, seed=4)
    kept = run_with_capacity(config, np.ones(30, bool), *layer)[1]
    gone = ~np.any(kept, axis=1)
    assert gone.any() and not gone.all()

    def loss(x):
        return jnp.sum(run_with_capacity(config, np.ones(30, bool), x, *layer[1:])[0] ** 2)

    gradient = np.asarray(jax.grad(loss)(layer[0]))
    assert not np.any(gradient[gone])
    assert np.all(np.any(gradient[~gone], axis=1))


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_layer_and_statistics(capacity_factor):
    """The module: [B, T, M] in and out, and sums over real tokens alone."""
    config = moe_config(capacity_factor=capacity_factor)
    x, router, w_gate, w_up, w_down = random_layer(24, seed=5)
    params = {"router": router, "gate": w_gate, "up": w_up, "down": w_down}
    segment_ids = np.array([[0] * 5 + [1] * 4 + [2] * 3, [1] * 10 + [0] * 2])
    layer = jax.jit(MixtureOfExperts(config).apply)
    output, stats, _ = layer({"params": params}, x.reshape(2, 12, EMBED), segment_ids)
    real = segment_ids.reshape(-1) > 0
    capacity = None if capacity_factor is None else expert_capacity(config, 24)
    want, experts, kept, p = oracles.mixture_of_experts(
        x, router, w_gate, w_up, w_down, 2, capacity=capacity, real=real
    )
    assert output.shape == (2, 12, EMBED)
    assert_close(np.asarray(output).reshape(24, EMBED)[real], want[real])
    np.testing.assert_array_equal(stats.assignments, [np.sum(experts[real] == e) for e in range(5)])
    np.testing.assert_allclose(stats.probability, p[real].sum(axis=0), rtol=1e-5)
    assert stats.tokens == real.sum()
    assert stats.dropped == (0 if capacity is None else np.sum(~kept[real]))
    assert (stats.dropped > 0) == (capacity is not None)
    np.testing.assert_allclose(stats.entropy, -np.sum(p[real] * np.log(p[real])), rtol=1e-5)


def test_statistics_differentiate_through_the_probabilities_alone():
    x, router, *_ = random_layer(6)

    def total(router, field):
        stats = router_stats(route(x, router, 2), jnp.ones(6, bool), jnp.ones((6, 2), bool))
        return jnp.sum(getattr(stats, field) * jnp.arange(5.0))

    assert np.any(jax.grad(total)(router, "probability"))
    for field in ("assignments", "entropy"):
        assert not np.any(jax.grad(total)(router, field))


def test_expert_capacity_rounds_up_and_stays_within_the_tokens():
    assert expert_capacity(moe_config(capacity_factor=1.0), 10) == 4  # 10 * 2 / 5
    assert expert_capacity(moe_config(capacity_factor=1.01), 10) == 5
    assert expert_capacity(moe_config(capacity_factor=1e-6), 10) == 1
    assert expert_capacity(moe_config(capacity_factor=50.0), 10) == 10
