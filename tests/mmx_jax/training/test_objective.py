"""The training objective as a whole: a step and its metrics against formulas that share no line with the trainer.

A forward pass of a few products stands in for the model, which has oracles of its own. What the trainer makes of hidden
states and router probabilities, the accumulation over micro-batches, AdamW and every metric are written again here.
"""

import dataclasses
import functools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx_jax import sharding
from mmx_jax.config import Config, ModelConfig, RuntimeConfig, TrainingConfig
from mmx_jax.layers.moe import RouterStats
from mmx_jax.training import optimizer, train_step

ROWS, LENGTH, VOCABULARY, WIDTH, EXPERTS, TOP_K, LAYERS = 4, 8, 24, 8, 3, 2, 2
# Coefficients so large that no term hides behind another, and an eps that keeps Adam smooth at zero.
TRAINING = TrainingConfig(
    total_tokens=1000,
    sequence_length=LENGTH,
    batch_tokens=ROWS * LENGTH,
    z_loss_coef=0.2,
    adam_eps=1e-3,
    adam_b1=0.8,
    adam_b2=0.9,
    weight_decay=0.3,
    gradient_clip=0.0,
)
MODEL = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    num_layers=LAYERS,
    layer_pattern=("softmax",),
    num_experts=EXPERTS,
    experts_per_token=TOP_K,
    router_aux_loss_coef=0.7,
)
WHOLE = Config(model=MODEL, runtime=RuntimeConfig(loss_chunk=16), training=TRAINING)
# Two micro-batches of two rows, the report's form of the balancing loss, and clipping.
PARTS = Config(
    runtime=RuntimeConfig(loss_chunk=16),
    model=dataclasses.replace(MODEL, router_aux_loss_coef=20.0),
    training=dataclasses.replace(
        TRAINING, microbatch_rows=2, aux_loss_form="report", aux_loss_pooling="per_layer", gradient_clip=0.05
    ),
)
BOTH = pytest.mark.parametrize("config", [WHOLE, PARTS], ids=["whole", "parts"])


class Output(NamedTuple):
    hidden: jax.Array
    router: RouterStats


def forward(params, tokens, segment_ids, positions):
    """Hidden states that depend on all three, and the router of every layer; its layers see different numbers."""
    x = params["embed"]["embedding"][tokens]
    x = jnp.tanh(x + 0.1 * jnp.sin(positions[..., None] + jnp.arange(WIDTH)) + 0.3 * segment_ids[..., None])
    layer = params["blocks"]["layer_0"]
    real = (segment_ids > 0).astype(jnp.float32)  # [B, T]
    logits = jnp.einsum("btm,lme->lbte", x, layer["mlp"]["router"], precision="highest")
    probability = jax.nn.softmax(logits * jnp.arange(1, LAYERS + 1)[:, None, None, None])
    ranks = jnp.argsort(jnp.argsort(-probability))
    chosen = (ranks < TOP_K) * real[..., None]
    stats = RouterStats(
        assignments=chosen.sum((1, 2)),
        probability=(probability * real[..., None]).sum((1, 2)),
        tokens=jnp.broadcast_to(real.sum(), LAYERS),
        dropped=jnp.arange(1.0, LAYERS + 1) * jnp.sum(tokens % 3 == 0),
        entropy=-(probability * jnp.log(probability) * real[..., None]).sum((1, 2, 3)),
    )
    gain = layer["attention_norm"]["scale"].prod(0) * params["final_norm"]["scale"]
    return Output(x * gain, stats)


class Decoder:
    """In the place of `mmx_jax.models.decoder.Decoder`."""

    def __init__(self, config, runtime):
        del config, runtime

    def apply(self, variables, tokens, segment_ids, positions, *, logits):
        assert not logits
        return forward(variables["params"], tokens, segment_ids, positions)


def random_params():
    rng = np.random.default_rng(3)
    shapes = {
        "embed": {"embedding": (VOCABULARY, WIDTH)},
        "blocks": {"layer_0": {"mlp": {"router": (LAYERS, WIDTH, EXPERTS)}, "attention_norm": {"scale": (2, WIDTH)}}},
        "final_norm": {"scale": (WIDTH,)},
        "lm_head": {"kernel": (VOCABULARY, WIDTH)},
    }
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=lambda shape: type(shape) is tuple
    )


@functools.cache
def mesh():
    return sharding.make_mesh(WHOLE.mesh, jax.devices()[:1])


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    def param_shardings(model, mesh):
        del model
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return jax.tree.map(lambda _: whole, random_params())

    monkeypatch.setattr(train_step, "decoder", types.SimpleNamespace(Decoder=Decoder))
    monkeypatch.setattr(train_step, "model_params", types.SimpleNamespace(param_shardings=param_shardings))


@functools.cache
def batch(seed=0):
    """Padding, documents, positions that are not those of the slots, and rows with different numbers of targets."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, size=(ROWS, LENGTH)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[:, 5:] = 2
    segments[1, 6:] = 0
    targets = np.where(rng.random(tokens.shape) < 0.8, rng.integers(0, VOCABULARY, size=tokens.shape), -1)
    targets[2, 1:] = -1
    targets[segments == 0] = -1
    positions = np.broadcast_to(3 * np.arange(LENGTH), tokens.shape)
    return {
        "tokens": tokens,
        "targets": targets.astype(np.int32),
        "segment_ids": segments,
        "positions": positions.astype(np.int32),
    }


def micro_batches(config, whole):
    """The rows 0, A, 2A, ... are the first of A micro-batches, and so on."""
    count = ROWS // (config.training.microbatch_rows or ROWS)
    return [{name: x[index::count] for name, x in whole.items()} for index in range(count)]


class Parts(NamedTuple):
    """Of one micro-batch: nll, z [B, T], zero where there is no target; the balancing loss, by layer and of all."""

    nll: jax.Array
    z: jax.Array
    correct: jax.Array
    per_layer: jax.Array
    balance: jax.Array
    router: tuple


def parts_of(config, params, part):
    out = forward(params, part["tokens"], part["segment_ids"], part["positions"])
    logits = jnp.einsum("btm,vm->btv", out.hidden, params["lm_head"]["kernel"], precision="highest")
    log_z = jax.scipy.special.logsumexp(logits, axis=-1)
    target = part["targets"]
    chosen = jnp.take_along_axis(logits, jnp.maximum(target, 0)[..., None], axis=-1)[..., 0]
    here = target >= 0
    share = jax.lax.stop_gradient(out.router.assignments) / out.router.tokens[:, None]  # [L, E]
    mean = out.router.probability / out.router.tokens[:, None]
    if config.training.aux_loss_form == "switch":
        scale = EXPERTS
    else:
        scale = 1 / EXPERTS
    per_layer = scale * jnp.sum(share * mean, axis=1)
    # All layers see the same tokens, so that a mean over tokens of all layers is a mean over layers.
    pooled = scale * jnp.sum(share.mean(0) * mean.mean(0))
    balance = pooled if config.training.aux_loss_pooling == "pooled" else per_layer.mean()
    return Parts(
        jnp.where(here, log_z - chosen, 0.0),
        jnp.where(here, log_z**2, 0.0),
        here & (logits.argmax(-1) == target),
        per_layer,
        balance,
        out.router,
    )


def objective(config, params, whole):
    """(mean objective, the parts of every micro-batch)."""
    total, found = 0.0, []
    for part in micro_batches(config, whole):
        one = parts_of(config, params, part)
        targets = (part["targets"] >= 0).sum()
        total += one.nll.sum() + config.training.z_loss_coef * one.z.sum()
        total += config.model.router_aux_loss_coef * one.balance * targets
        found.append(one)
    return total / (whole["targets"] >= 0).sum(), found


@functools.cache
def oracle(config):
    return jax.jit(jax.grad(functools.partial(objective, config), has_aux=True))


class Run(NamedTuple):
    states: list  # on the host, before the first step and after each
    rows: list  # metrics


RATES = (0.1, 0.02)


@functools.cache
def step_of(config):
    return train_step.make_train_step(config, mesh())


@functools.cache
def run(config):
    """Two steps of the trainer from random parameters."""
    params = random_params()
    state = {"step": np.int32(0), "params": params, "opt_state": optimizer.init_optimizer(config.training, params)}
    states, rows = [jax.device_get(state)], []
    with jax.set_mesh(mesh()):
        for number, rate in enumerate(RATES):
            state, row = step_of(config)(state, batch(number), np.float32(rate))
            states.append(jax.device_get(state))
            rows.append(jax.device_get(row))
    return Run(states, rows)


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def global_norm(tree):
    return np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree)))


def assert_close(got, want, relative=2e-4):
    """Every leaf to a part of its largest element."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, w), g in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True):
        bound = relative * max(np.abs(w).max(), 1e-6)
        np.testing.assert_allclose(g, w, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


@BOTH
def test_the_gradient_is_that_of_the_written_objective(config):
    """The first moment after a step from zero is a known multiple of the gradient that AdamW was given."""
    states, rows = run(config)
    gradient = float64(oracle(config)(states[0]["params"], batch(0))[0])
    norm = global_norm(gradient)
    clip = config.training.gradient_clip
    factor = min(1.0, clip / norm) if clip else 1.0
    assert (factor < 1) == bool(clip)  # the case is one of clipping, or of none
    mu = jax.tree.map(lambda m: m / (1 - config.training.adam_b1), float64(states[1]["opt_state"].mu))
    assert_close(mu, jax.tree.map(lambda g: factor * g, gradient))
    np.testing.assert_allclose(rows[0]["gradient_norm"], norm, rtol=1e-4)


@BOTH
def test_two_steps_are_those_of_adamw_in_numpy(config):
    states, _ = run(config)
    training = config.training
    params = float64(states[0]["params"])
    mu = nu = jax.tree.map(np.zeros_like, params)
    for number, rate in enumerate(RATES, start=1):
        gradient = float64(oracle(config)(jax.tree.map(np.float32, params), batch(number - 1))[0])
        clip = training.gradient_clip
        factor = min(1.0, clip / global_norm(gradient)) if clip else 1.0
        gradient = jax.tree.map(lambda g, factor=factor: factor * g, gradient)
        mu = jax.tree.map(lambda m, g: training.adam_b1 * m + (1 - training.adam_b1) * g, mu, gradient)
        nu = jax.tree.map(lambda v, g: training.adam_b2 * v + (1 - training.adam_b2) * g * g, nu, gradient)

        def updated(path, p, m, v, number=number, rate=rate):
            m, v = m / (1 - training.adam_b1**number), v / (1 - training.adam_b2**number)
            decay = 0.0 if path[-1].key in ("scale", "norm") else training.weight_decay * p
            return p - rate * (m / (np.sqrt(v) + training.adam_eps) + decay)

        params = jax.tree_util.tree_map_with_path(updated, params, mu, nu)
        assert states[number]["step"] == number
        assert_close(states[number]["params"], params, relative=2e-3)
    assert_close(states[-1]["opt_state"].mu, mu, relative=2e-3)
    assert_close(states[-1]["opt_state"].nu, nu, relative=4e-3)


@BOTH
def test_metrics_are_means_of_what_was_seen(config):
    states, rows = run(config)
    gradient, found = oracle(config)(states[0]["params"], batch(0))
    found, row = float64(found), rows[0]
    counts = np.array([(part["targets"] >= 0).sum() for part in micro_batches(config, batch(0))])
    real = (batch(0)["segment_ids"] > 0).sum()
    assert len(set(counts)) == len(counts)  # micro-batches weigh differently

    def weighted(values):
        return sum(count * value for count, value in zip(counts, values, strict=True)) / counts.sum()

    want = {
        "loss": sum(part.nll.sum() for part in found) / counts.sum(),
        "z_loss": sum(part.z.sum() for part in found) / counts.sum(),
        "accuracy": sum(part.correct.sum() for part in found) / counts.sum(),
        "aux_loss": weighted(part.balance for part in found),
        "tokens": counts.sum(),
        "parameter_norm": global_norm(float64(states[0]["params"])),
        "finite": 1.0,
    }
    got = {name: row[name] for name in want}
    assert got == pytest.approx(want, rel=1e-4)
    assignments = sum(part.router.assignments for part in found)
    assert assignments.sum() == real * TOP_K * LAYERS
    load = assignments / (real * TOP_K / EXPERTS)
    dropped = sum(part.router.dropped for part in found)
    assert dropped.sum() > 0
    router = {
        "max_load": load.max(1),
        "min_load": load.min(1),
        "entropy": sum(part.router.entropy for part in found) / real,
        "drop_rate": dropped / (real * TOP_K),
        "aux_loss": weighted(part.per_layer for part in found),
    }
    assert row["router"].keys() == router.keys()
    for name, values in router.items():
        np.testing.assert_allclose(row["router"][name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    norms = jax.tree_util.tree_map_with_path(
        lambda path, g: np.sqrt((g**2).sum(tuple(range(1, g.ndim)) if path[0].key == "blocks" else None)),
        float64(gradient),
    )
    assert_close(row["gradient_norms"], norms)


def test_an_evaluation_sums_the_cross_entropy_alone():
    params = run(WHOLE).states[0]["params"]
    _, (part,) = oracle(WHOLE)(params, batch(0))
    with jax.set_mesh(mesh()):
        got = jax.device_get(train_step.make_eval_step(WHOLE)(params, batch(0)))
    want = {"nll": part.nll.sum(), "correct": part.correct.sum(), "count": (batch(0)["targets"] >= 0).sum()}
    assert got == pytest.approx(jax.tree.map(float, want), rel=1e-5)


def test_a_batch_without_a_target_moves_parameters_by_their_decay_alone():
    """Divided by its count of tokens it would be 0 / 0."""
    before = run(WHOLE).states[0]
    nothing = batch(0) | {"targets": np.full((ROWS, LENGTH), -1, np.int32)}
    with jax.set_mesh(mesh()):
        after, row = step_of(WHOLE)(jax.device_put(before), nothing, np.float32(0.1))
    assert (row["finite"], row["loss"], row["tokens"], row["gradient_norm"]) == (1, 0, 0, 0)
    decayed = jax.tree_util.tree_map_with_path(
        lambda path, p: p * (1 if path[-1].key in ("scale", "norm") else 1 - 0.1 * TRAINING.weight_decay),
        float64(before["params"]),
    )
    assert_close(jax.device_get(after["params"]), decayed, relative=1e-6)


def test_a_finite_loss_whose_gradient_is_too_large_changes_nothing():
    """The squares of the gradient of the z-loss overflow; loss and parameters are finite, before and after."""
    large = {"kernel": np.float32(1e14) * random_params()["lm_head"]["kernel"]}
    before = run(WHOLE).states[0]
    before = before | {"params": before["params"] | {"lm_head": large}}
    with jax.set_mesh(mesh()):
        after, row = jax.device_get(step_of(WHOLE)(jax.device_put(before), batch(0), np.float32(0.1)))
    assert np.isfinite([row["loss"], row["aux_loss"], row["parameter_norm"]]).all()
    assert row["gradient_norm"] == np.inf and row["finite"] == 0
    jax.tree.map(np.testing.assert_array_equal, after, before | {"step": before["step"] + 1})
