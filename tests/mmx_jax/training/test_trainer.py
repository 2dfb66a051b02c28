"""Losses, schedule, optimizer, step, FLOPs, metrics, and whole runs: resumed, killed, stopped, gone non-finite."""

import dataclasses
import functools
import io
import json
import resource
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from safetensors.numpy import load_file

from mmx_jax import metrics, sharding
from mmx_jax.analysis import aot_training
from mmx_jax.checkpoints.manager import Checkpointer
from mmx_jax.config import (
    BatchRampStep,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    LearningRatePhase,
    ModelConfig,
    MonitoringConfig,
    ReadingConfig,
    RuntimeConfig,
    SourceConfig,
    StageConfig,
    TrainingConfig,
)
from mmx_jax.config import io as config_io
from mmx_jax.data import device_batch
from mmx_jax.layers.moe import RouterStats
from mmx_jax.models import decoder, flops
from mmx_jax.models import params as model_params
from mmx_jax.training import errors, loss, optimizer, same_run, schedule, train_step
from mmx_jax.training import run as training_run
from tests.support import fake_devices
from tests.support.paths import FIXTURES, REPOSITORY
from tests.support.patience import HANG_SECONDS, wait_until

TINY = FIXTURES / "text/tiny"

MODEL = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    num_layers=2,
    layer_pattern=("lightning", "softmax"),
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    rotary_dim=8,
    max_position_embeddings=4096,
    mlp_dim=32,
    num_experts=4,
    experts_per_token=2,
    router_aux_loss_coef=0.01,
    dtype="float32",
)
RUNTIME = RuntimeConfig(lightning_chunk=16, softmax_block=32, loss_chunk=64)
TRAINING = TrainingConfig(
    total_tokens=8 * 256,
    sequence_length=32,
    batch_tokens=256,
    learning_rate=1e-2,
)


# -- losses -----------------------------------------------------------------------------------------------------------


def cross_entropy_oracle(hidden, head, targets, z_loss_coef):
    """float64: (nll, z, correct, count) and the gradients of nll + z_loss_coef z."""
    x, w, t = hidden.reshape(-1, hidden.shape[-1]).astype(np.float64), head.astype(np.float64), targets.reshape(-1)
    logits = x @ w.T
    log_z = np.log(np.exp(logits).sum(-1))
    real = t >= 0
    chosen = logits[np.arange(len(t)), np.maximum(t, 0)]
    dlogits = np.exp(logits - log_z[:, None]) * (1 + 2 * z_loss_coef * log_z)[:, None]
    dlogits[np.arange(len(t)), np.maximum(t, 0)] -= 1
    dlogits *= real[:, None]
    sums = (log_z - chosen)[real].sum(), (log_z[real] ** 2).sum(), (logits.argmax(-1) == t).sum(), real.sum()
    return sums, (dlogits @ w).reshape(hidden.shape), dlogits.T @ x


@pytest.mark.parametrize(("chunk", "groups"), [(1, 1), (3, 1), (5, 2), (9, 4), (64, 2), (64, 1)])
def test_cross_entropy_matches_float64_for_every_chunk(chunk, groups):
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(4, 7, 8)).astype(np.float32), rng.normal(size=(19, 8)).astype(np.float32)
    targets = rng.integers(-1, 19, size=(4, 7)).astype(np.int32)

    def objective(hidden, head):
        out = loss.chunked_cross_entropy(hidden, head, targets, chunk=chunk, z_loss_coef=0.01, groups=groups)
        return -2.0 * out.objective, out

    (_, out), (dhidden, dhead) = jax.value_and_grad(objective, (0, 1), has_aux=True)(hidden, head)
    sums, want_dhidden, want_dhead = cross_entropy_oracle(hidden, head, targets, 0.01)
    np.testing.assert_allclose([out.nll, out.z, out.correct, out.count], sums, rtol=1e-6)
    np.testing.assert_allclose(out.objective, sums[0] + 0.01 * sums[1], rtol=1e-6)
    np.testing.assert_allclose(dhidden, -2 * want_dhidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dhead, -2 * want_dhead, rtol=1e-5, atol=1e-5)
    alone = loss.chunked_cross_entropy(hidden, head, targets, chunk=chunk)  # the path without gradients
    np.testing.assert_allclose([alone.objective, alone.correct], [sums[0], sums[2]], rtol=1e-6)


def test_cross_entropy_keeps_dtypes_and_survives_a_batch_without_targets():
    hidden, head = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((5, 4), jnp.float32)

    def objective(hidden, head):
        return loss.chunked_cross_entropy(hidden, head, jnp.full((2, 3), -1), chunk=2).objective

    value, (dhidden, dhead) = jax.value_and_grad(objective, (0, 1))(hidden, head)
    assert (value, dhidden.dtype, dhead.dtype) == (0.0, jnp.bfloat16, jnp.float32)
    assert not np.any(dhidden) and not np.any(dhead)


def inner_jaxprs(equation):
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
        if hasattr(value, "eqns"):
            yield getattr(value, "jaxpr", value)


def all_shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in inner_jaxprs(equation):
            yield from all_shapes(inner)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_group_has_logits_of_one_chunk_at_a_time_forward_and_backward(groups):
    rows, length, width, vocabulary, chunk = 2, 64, 4, 1009, 8

    def objective(hidden, head):
        targets = jnp.zeros((rows, length), jnp.int32)
        return loss.chunked_cross_entropy(hidden, head, targets, chunk=chunk, groups=groups).objective

    args = jnp.zeros((rows, length, width)), jnp.zeros((vocabulary, width))
    for function in (objective, jax.grad(objective, (0, 1))):
        shapes = list(all_shapes(jax.make_jaxpr(function)(*args).jaxpr))
        assert (groups, chunk, vocabulary) in shapes
        assert max(np.prod(shape) for shape in shapes if vocabulary in shape) <= groups * chunk * vocabulary


def fixture_router():
    oracle = np.load(TINY / "oracle.npz")
    logits = np.stack([oracle[f"plain_router_{layer}"] for layer in range(8)]).reshape(8, -1, 4).astype(np.float64)
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-probability, axis=-1)[..., :2]
    assignments = np.stack([np.bincount(layer.ravel(), minlength=4) for layer in chosen])
    tokens = np.full(8, probability.shape[1])
    zeros = np.zeros(8)
    leaves = assignments, probability.sum(1), tokens, zeros, zeros
    names = "assignments", "probability", "tokens", "dropped", "entropy"
    return oracle, RouterStats(**{n: jnp.asarray(x, jnp.float32) for n, x in zip(names, leaves, strict=True)})


def test_load_balancing_and_train_loss_match_the_oracle():
    oracle, stats = fixture_router()
    aux, per_layer = loss.load_balancing_loss(stats)
    np.testing.assert_allclose(aux, oracle["train_aux_loss"], rtol=1e-6)
    f, p = np.asarray(stats.assignments) / 80, np.asarray(stats.probability) / 80
    np.testing.assert_allclose(per_layer, 4 * (f * p).sum(-1), rtol=1e-6)

    head = load_file(TINY / "hf/model.safetensors")["lm_head.weight"]
    targets = np.pad(oracle["plain_ids"][:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    out = loss.chunked_cross_entropy(jnp.asarray(oracle["plain_hidden_8"]), head, targets, chunk=16)
    coefficient = json.loads((TINY / "hf/config.json").read_text())["router_aux_loss_coef"]
    np.testing.assert_allclose(out.nll / out.count + coefficient * aux, oracle["train_loss"], rtol=1e-6)


def test_load_balancing_forms_and_poolings():
    _, stats = fixture_router()
    switch, per_layer = loss.load_balancing_loss(stats, pooling="per_layer")
    np.testing.assert_allclose(switch, per_layer.mean())
    report, _ = loss.load_balancing_loss(stats, form="report", pooling="per_layer")
    np.testing.assert_allclose(report, switch / 4**2, rtol=1e-6)
    gradient = jax.grad(lambda s: loss.load_balancing_loss(s)[0])(stats)
    assert not np.any(gradient.assignments) and np.any(gradient.probability)


# -- schedule ---------------------------------------------------------------------------------------------------------

BILLION, TRILLION = 10**9, 10**12


def test_schedule_of_the_report():
    # Section 4.1: 500 steps of warm-up, 2e-4 for 7.2T tokens, 1.3e-4 for 3.2T, exponentially to 3e-5 over 1T.
    warmup = 500 * 16 * 2**20
    training = TrainingConfig(
        total_tokens=warmup + 11_400 * BILLION,
        batch_tokens=16 * 2**20,
        batch_ramp=(
            BatchRampStep(from_tokens=69 * BILLION, batch_tokens=32 * 2**20),
            BatchRampStep(from_tokens=790 * BILLION, batch_tokens=64 * 2**20),
            BatchRampStep(from_tokens=4700 * BILLION, batch_tokens=128 * 2**20),
        ),
        learning_rate=2e-4,
        learning_rate_phases=(
            LearningRatePhase(shape="linear", tokens=warmup, start=0.0, end=1.0),
            LearningRatePhase(tokens=7200 * BILLION),
            LearningRatePhase(tokens=3200 * BILLION, start=0.65, end=0.65),
            LearningRatePhase(shape="exponential", start=0.65, end=0.15),
        ),
    )
    rate = [
        schedule.learning_rate(training, warmup * part // 4 if part <= 4 else warmup + (part - 4) * 100 * BILLION)
        for part in (0, 1, 2, 4, 75, 76, 107, 108, 113, 118, 999)
    ]
    middle = 1.3e-4 * (0.15 / 0.65) ** 0.5
    want = [0, 5e-5, 1e-4, 2e-4, 2e-4, 1.3e-4, 1.3e-4, 1.3e-4, middle, 3e-5, 3e-5]
    np.testing.assert_allclose(rate, want, rtol=1e-12)
    assert schedule.learning_rate(training, warmup + 7200 * BILLION - 1) == 2e-4  # one token decides
    sizes = [
        schedule.batch_tokens(training, tokens) // 2**20 for tokens in (0, 69 * BILLION - 1, 69 * BILLION, TRILLION)
    ]
    assert sizes == [16, 16, 32, 64]
    assert schedule.batch_tokens(training, 5 * TRILLION) == 128 * 2**20


def test_cosine_and_the_open_last_phase():
    training = TrainingConfig(
        total_tokens=100 * 8192,
        batch_tokens=8192,
        learning_rate=1.0,
        learning_rate_phases=(LearningRatePhase(shape="cosine", start=1.0, end=0.1),),
    )
    rates = [schedule.learning_rate(training, part * 8192) for part in (0, 25, 50, 100, 500)]
    np.testing.assert_allclose(rates, [1.0, 0.1 + 0.9 * (0.5 + np.sqrt(0.125)), 0.55, 0.1, 0.1], rtol=1e-12)


def test_stages_and_plans():
    training = TrainingConfig(
        batch_tokens=128,
        microbatch_rows=1,
        stages=(
            StageConfig(tokens=200, sequence_length=32),
            StageConfig(tokens=300, sequence_length=128, rope_theta=5e6),
        ),
        batch_ramp=(BatchRampStep(from_tokens=256, batch_tokens=384),),
    )
    tokens, plans = 0, []
    while (plan := schedule.plan_step(training, tokens)) is not None:
        plans.append((plan.stage_index, plan.rows, plan.microbatches, plan.tokens))
        tokens += plan.tokens
    assert plans == [(0, 4, 4, 128), (0, 4, 4, 128), (1, 3, 3, 384)]
    assert [schedule.stage_index(training, seen) for seen in (0, 199, 200, 499, 500, 10**6)] == [0, 0, 1, 1, 1, 1]
    whole = dataclasses.replace(training, microbatch_rows=0)  # no accumulation
    assert [schedule.plan_step(whole, seen).microbatches for seen in (0, 256)] == [1, 1]
    assert training.row_unit(training.stages[0]) == 4
    assert training.row_unit(training.stages[1]) == 1
    ramp = (BatchRampStep(from_tokens=512, batch_tokens=384),)
    training = TrainingConfig(sequence_length=64, batch_tokens=256, batch_ramp=ramp, total_tokens=2**20)
    assert training.row_unit(training.resolved_stages[0]) == 2  # of 4 and 6 rows


# -- optimizer and step -----------------------------------------------------------------------------------------------


def test_adamw_matches_numpy():
    training = TrainingConfig(adam_eps=1e-3, weight_decay=0.2, gradient_clip=0.5)
    rng = np.random.default_rng(0)
    shapes = {"mlp": {"router": (2, 3, 4)}, "attention_norm": {"scale": (2, 3)}, "attention": {"norm": (2, 1, 3)}}
    params = {
        "blocks": {"layer_0": jax.tree.map(lambda s: rng.normal(size=s), shapes, is_leaf=lambda s: type(s) is tuple)}
    }
    want = jax.tree.map(np.float64, params)
    got = jax.tree.map(jnp.float32, params)
    opt_state = optimizer.init_optimizer(training, got)
    mu = nu = jax.tree.map(np.zeros_like, want)
    decays = {"blocks": {"layer_0": {"mlp": {"router": 1}, "attention_norm": {"scale": 0}, "attention": {"norm": 0}}}}
    for number, rate in enumerate([0.1, 0.02, 0.3], start=1):
        size = 1e-2 if number == 2 else 1.0  # the second is too small to be clipped
        gradients = jax.tree.map(lambda p, size=size: size * rng.normal(size=p.shape), params)
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients)))
        got, opt_state = optimizer.apply_gradients(
            training, got, opt_state, jax.tree.map(jnp.float32, gradients), jnp.float32(norm), jnp.float32(rate)
        )
        assert (norm < 0.5) == (number == 2)
        clipped = jax.tree.map(lambda g, norm=norm: g * min(1, 0.5 / norm), gradients)
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mu, clipped)
        nu = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, nu, clipped)
        changes = jax.tree.map(
            lambda p, m, v, d, n=number, r=rate: (
                -r * (m / (1 - 0.9**n) / (np.sqrt(v / (1 - 0.95**n)) + 1e-3) + 0.2 * d * p)
            ),
            want,
            mu,
            nu,
            decays,
        )
        want = jax.tree.map(np.add, want, changes)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5), got, want)


def test_weight_decay_spares_the_norms_of_the_real_tree_and_nothing_else():
    mask = optimizer.decay_mask(model_params.abstract_params(MODEL))
    spared = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, decays in jax.tree_util.tree_leaves_with_path(mask)
        if not decays
    }
    norms = {f"blocks/layer_{i}/{kind}_norm/scale" for i in range(2) for kind in ("attention", "mlp")}
    assert spared == norms | {"final_norm/scale", "blocks/layer_0/attention/norm"}


def random_batch(rows=8, length=32):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, MODEL.vocab_size, size=(rows, length)).astype(np.int32)
    targets = np.where(rng.random(tokens.shape) < 0.8, np.roll(tokens, -1, 1), -1)
    targets[0] = -1  # so that micro-batches weigh differently
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return {"tokens": tokens, "targets": targets, "segment_ids": np.ones_like(tokens), "positions": positions}


def one_device_mesh(config):
    return sharding.make_mesh(config.mesh, jax.devices()[:1])


@functools.cache
def compiled_step(config):
    return train_step.make_train_step(config, one_device_mesh(config))


def test_accumulation_equals_one_big_batch():
    # The load-balancing loss is that of a micro-batch, so it is left out here.
    model = dataclasses.replace(MODEL, router_aux_loss_coef=0.0, num_layers=1, layer_pattern=("lightning",))
    config = Config(model=model, runtime=RUNTIME, training=dataclasses.replace(TRAINING, z_loss_coef=1e-3))
    params = jax.jit(model_params.init_params, static_argnums=0)(model, jax.random.key(0))
    accumulate = jax.jit(train_step.accumulate_gradients, static_argnums=(0, 3))
    whole, sums = accumulate(config, params, random_batch(rows=4), 1)
    parts, part_sums = accumulate(config, params, random_batch(rows=4), 2)
    for name in ("nll", "z", "count", "correct", "router"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), sums[name], part_sums[name])
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * scale), whole, parts)


def test_a_non_finite_step_changes_nothing_and_names_the_layers():
    config = Config(model=MODEL, runtime=RUNTIME, training=TRAINING)
    mesh = one_device_mesh(config)
    batch = jax.device_put(random_batch(), device_batch.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        state = train_step.init_state(config, mesh)
        state["params"]["blocks"]["layer_1"]["mlp"]["down"] *= jnp.nan
        before = jax.device_get(state)
        state, row = compiled_step(config)(state, batch, np.float32(0.1))
    assert row["finite"] == 0 and state["step"] == 1
    jax.tree.map(np.testing.assert_array_equal, before["params"], jax.device_get(state["params"]))
    jax.tree.map(np.testing.assert_array_equal, before["opt_state"], jax.device_get(state["opt_state"]))
    names = train_step.nonfinite_names(jax.device_get(row["gradient_norms"]), 2)
    assert "blocks/layer_1/mlp/down (layers 1)" in names


def test_a_parameter_that_is_not_finite_stops_the_step_though_the_batch_does_not_meet_it():
    config = Config(model=MODEL, runtime=RUNTIME, training=TRAINING)
    mesh = one_device_mesh(config)
    batch = jax.device_put(random_batch(), device_batch.batch_sharding(mesh))
    unseen = np.setdiff1d(np.arange(MODEL.vocab_size), batch["tokens"])[0]
    with jax.set_mesh(mesh):
        state = train_step.init_state(config, mesh)
        state["params"]["embed"]["embedding"] = state["params"]["embed"]["embedding"].at[unseen].set(jnp.nan)
        before = jax.device_get(state["params"])
        state, row = compiled_step(config)(state, batch, np.float32(0.1))
    assert np.isfinite(row["loss"]) and np.isfinite(row["gradient_norm"]) and row["finite"] == 0
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state["params"]))


# -- FLOPs ------------------------------------------------------------------------------------------------------------


def test_report_formulas_give_the_printed_values():
    # Table 7 of arXiv 2406.16690, quoted in section 1.5 of the notes: 7B shapes, 480 sequences of 8192.
    shape = dict(layers=32, width=4096, heads=32)
    peta = [flops.report_training_flops(k, **shape, batch=480, length=8192) / 1e15 for k in ("softmax", "lightning")]
    np.testing.assert_allclose(peta, [202.7, 154.4], atol=0.05)
    ratios = []
    for length in (8192, 65536, 2**20):
        kinds = [
            flops.report_training_flops(k, **shape, batch=1, length=length) for k in ("softmax", "hybrid", "lightning")
        ]
        ratios.append([kinds[0] / kinds[2], kinds[1] / kinds[2]])
    np.testing.assert_allclose(np.array(ratios)[:, 0], [1.31, 3.6, 43], rtol=0.01)
    np.testing.assert_allclose(ratios[2][1], 6.25, rtol=0.01)
    counts = [flops.report_parameters(k, **shape) / 1e6 for k in ("softmax", "lightning")]
    np.testing.assert_allclose(counts, [6476.5, 6509.6], rtol=0.006)  # printed with the real widths of the MLP


def counted_flops(jaxpr):
    """Twice the multiply-adds of the matrix products in a jaxpr, by their shapes.

    Not those over the k chosen experts, nor those with a vector: sums, however they are written.
    """
    total = 0
    for equation in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in equation.invars]
        out = np.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if equation.primitive.name == "dot_general" and min(map(len, shapes)) > 1:
            (contract, _), _ = equation.params["dimension_numbers"]
            depth = np.prod([shapes[0][axis] for axis in contract])
            total += 2 * out * depth if depth > 2 else 0
        if equation.primitive.name.startswith("ragged_dot"):
            total += 2 * out * shapes[0][1]
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += repeats * sum(counted_flops(inner) for inner in inner_jaxprs(equation))
    return total


@pytest.mark.parametrize("pattern", [("lightning",), ("softmax",)])
def test_analytic_flops_equal_a_count_from_the_shapes(pattern):
    model = dataclasses.replace(MODEL, layer_pattern=pattern, mlp_dim=48, num_experts=3)
    runtime = RuntimeConfig(lightning_chunk=16, softmax_block=64, moe_implementation="reference")
    tokens = jnp.zeros((1, 64), jnp.int32)
    params = model_params.abstract_params(model)
    jaxpr = jax.make_jaxpr(lambda p: decoder.Decoder(model, runtime).apply({"params": p}, tokens).logits)(params)
    want = 64 * sum(flops.forward_flops(model, 64, chunk=16, causal="full").values())
    assert counted_flops(jaxpr.jaxpr) == want


def test_flops_of_the_released_model():
    # 6 N with the 45.9e9 active parameters, plus the head; the mixers add what the length asks for.
    parts = flops.forward_flops(ModelConfig(), 8192, causal="full")
    products = sum(parts[name] for name in ("attention_projections", "router", "experts"))
    gains = 80 * 2 * 6144 + 70 * 8192 + 6144  # norms multiply elementwise
    assert products == 2 * (45_944_920_064 - gains)
    assert parts["softmax_scores"] == 10 * 4 * 8192 * 8192
    assert flops.forward_flops(ModelConfig(), 8192)["softmax_scores"] == 10 * 4 * 8192 * 8193 / 2
    assert flops.mfu(989e12, "NVIDIA H200", 2) == 0.5 and flops.mfu(1.0, "cpu", 1) is None


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_are_truncated_on_resume_and_valid_json(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    for number in range(1, 5):
        writer.write({"step": number, "tokens_seen": number, "loss": 1.0 / number if number != 2 else float("nan")})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a kill in mid-write
    writer = metrics.MetricsWriter(tmp_path, resume_step=3)
    writer.write({"step": 4, "tokens_seen": 4, "eval_loss": 0.5, "router_max_load": [1.0, float("inf")]})
    writer.close()
    rows = metrics.read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[1]["loss"] is None and rows[3]["router_max_load"] == [1.0, None]
    metrics.plot_loss(rows, tmp_path / "loss.png", unigram_entropy=0.7, title="test")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_ends_where_its_tokens_or_its_steps_end():
    training = TrainingConfig(
        total_tokens=10_000,
        sequence_length=10,
        batch_tokens=100,
        batch_ramp=(BatchRampStep(from_tokens=300, batch_tokens=200),),
    )
    assert schedule.end_of_run(training, 0, 0, 6) == (6, 900)
    assert schedule.end_of_run(training, 0, 0) == (3 + 49, 10_100)  # the last step is taken whole
    assert schedule.end_of_run(training, 7, 1100, 6) == (7, 1100)


WANDB = """
    import json, os
    calls = []

    class Run:
        def define_metric(self, *args, **kwargs): calls.append(["define_metric", args, kwargs])
        def log(self, row):
            if os.environ.get("WANDB_BREAKS") == "log": raise OSError("no network")
            calls.append(["log", row])
        def finish(self): calls.append(["finish"])

    def init(**kwargs):
        if os.environ.get("WANDB_BREAKS") == "init": raise RuntimeError("no key")
        calls.append(["init", kwargs])
        return Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A module of that name that notes its calls."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/wandb.py").write_text(textwrap.dedent(WANDB))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    del sys.modules["wandb"]


def test_wandb_gets_the_rows_and_a_resumed_run_continues_there(wandb, tmp_path):
    for step in (1, 2):
        writer = metrics.MetricsWriter(tmp_path, resume_step=step - 1)
        writer.add(metrics.WandbRun(tmp_path, "hybrids", name="test", config={"a": 1}))
        writer.write({"step": step, "loss": 2.0, "mfu": None, "z": float("nan"), "router_max_load": [1.0]})
        writer.close()
    first, second = (kwargs for name, kwargs in (c for c in wandb.calls if c[0] == "init"))
    assert first == second and first["resume"] == "allow" and first["project"] == "hybrids"
    assert first["id"] == (tmp_path / "wandb_run_id").read_text().strip() and first["config"] == {"a": 1}
    assert [c[1] for c in wandb.calls if c[0] == "log"] == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 2.0}]
    assert ["define_metric", ("*",), {"step_metric": "step"}] in wandb.calls and wandb.calls[-1] == ["finish"]


@pytest.mark.parametrize("breaks", ["init", "log"])
def test_a_failure_of_wandb_is_told_once_and_the_run_goes_on(wandb, breaks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_BREAKS", breaks)
    writer = metrics.MetricsWriter(tmp_path)
    writer.add(metrics.WandbRun(tmp_path, "hybrids", name="test", config={}))
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": 2.0})
    writer.close()
    assert capsys.readouterr().err.count("the run goes on without it") == 1
    assert [row["step"] for row in metrics.read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_wandb_that_is_not_installed_is_an_error_at_once(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"--wandb needs the package wandb: pip install mmx_jax\[wandb\]"):
        metrics.check_wandb()


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of 8 steps on a few lines of text."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["state", "decay", "query", "key", "value", "norm", "\n"]
    for number in range(20):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(words, size=200)))
    return Config(
        name="test",
        model=MODEL,
        data=DataConfig(sources=(SourceConfig(path=str(folder)),), eval_fraction=0.2, packing_bins=4),
        runtime=RUNTIME,
        training=TRAINING,
        checkpoint=CheckpointConfig(save_every_steps=2, keep=8),
        monitoring=MonitoringConfig(eval_batches=2),
    )


def quiet():
    return rich.console.Console(file=io.StringIO())


def train(config, workdir, **options):
    return training_run.train(config, workdir, console=quiet(), **options)


def state_files(workdir, config, step):
    """Every number of a checkpoint, as bytes, and its JSON items."""
    mesh = one_device_mesh(config)
    checkpointer = Checkpointer(workdir / "checkpoints", keep=99)
    state, position, data = checkpointer.restore(step, train_step.abstract_state(config, mesh))
    checkpointer.close()
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    return {jax.tree_util.keystr(path): leaf.tobytes() for path, leaf in leaves}, position, data


def rows_of(workdir):
    rows = metrics.read_rows(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "mfu")} for row in rows]


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    result = train(config, workdir, steps=6)
    assert (result.step, result.tokens_seen, result.interrupted) == (6, 6 * 256, False)
    return workdir


def test_a_run_leaves_what_it_promises(straight, config):
    for name in (
        "config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "metrics.jsonl",
        "loss.png",
    ):
        assert (straight / name).is_file(), name
    assert config_io.config_from_json((straight / "config.json").read_text()) == config
    assert sorted(int(p.name) for p in (straight / "checkpoints").iterdir()) == [2, 4, 6]
    items = {p.name for p in (straight / "checkpoints/6").iterdir() if p.is_dir()}
    assert {"params", "optimizer", "position", "data", "config"} <= items
    rows = metrics.read_rows(straight / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6]
    assert rows[5]["loss"] < rows[0]["loss"] and rows[-1]["eval_loss"] > 0 and rows[-1]["unigram_entropy"] > 0
    assert len(rows[0]["router_max_load"]) == MODEL.num_layers


def test_resume_is_bit_exact(straight, config, tmp_path):
    train(config, tmp_path, steps=3)
    train(config, tmp_path, steps=6)
    assert state_files(tmp_path, config, 6) == state_files(straight, config, 6)
    # An evaluation at the end of the first half is a row of its own.
    assert [row for row in rows_of(tmp_path) if (row["step"], "eval_loss" in row) != (3, True)] == rows_of(straight)


def test_going_back_to_a_step_repeats_the_run(straight, config, tmp_path):
    train(config, tmp_path, steps=6)
    train(config, tmp_path, steps=4, resume="2")
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [2, 4]
    assert state_files(tmp_path, config, 4) == state_files(straight, config, 4)
    with pytest.raises(errors.TrainingError, match="--resume=no"):
        train(config, tmp_path, resume="no")
    with pytest.raises(RuntimeError, match="one of the steps of .*: 2, 4"):
        train(config, tmp_path, resume="3")


# Started as a program: the second save is killed before it can be complete.
KILLED = """
    import os, signal, sys
    from mmx_jax.checkpoints import manager
    from mmx_jax.config import io as config_io
    from mmx_jax.training import run

    save = manager.Checkpointer.save

    def save_and_die(self, step, *args, **kwargs):
        save(self, step, *args, **kwargs)
        if step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    manager.Checkpointer.save = save_and_die
    run.train(config_io.config_from_json(open(sys.argv[1]).read()), sys.argv[2])
"""


def write_config(config, folder):
    path = folder / "config_of_run.json"
    path.write_text(config_io.config_to_json(config))
    return path


def test_a_kill_in_mid_save_leaves_the_older_step_and_the_run_goes_on_as_before(straight, config, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(write_config(config, tmp_path)), str(tmp_path)]
    killed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert "2" in left and "4" not in left and any(name.startswith("4.") for name in left), left
    train(config, tmp_path, steps=6)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"2", "4", "6"}
    assert state_files(tmp_path, config, 6) == state_files(straight, config, 6)
    assert rows_of(tmp_path) == rows_of(straight)


def config_file(config, folder):
    path = folder / "config.py"
    path.write_text(
        "from mmx_jax.config.io import config_from_json\n"
        f"def get_config():\n    return config_from_json({config_io.config_to_json(config)!r})\n"
    )
    return path


def start_train(*flags, **options):
    command = [sys.executable, "train.py", *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    return subprocess.Popen(command, **pipes, **options)


def test_sigterm_saves_and_exits_with_0(config, tmp_path):
    training = dataclasses.replace(TRAINING, total_tokens=10**9)
    slow = dataclasses.replace(config, training=training, checkpoint=CheckpointConfig(save_every_steps=10**6))
    process = start_train(f"--config={config_file(slow, tmp_path)}", f"--workdir={tmp_path}")
    wait_until(lambda: len(metrics.read_rows(tmp_path / "metrics.jsonl")) >= 3, alive=lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, err
    rows = metrics.read_rows(tmp_path / "metrics.jsonl")
    steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
    assert steps == [rows[-1]["step"]]
    assert f"SIGTERM: saving step {steps[0]}" in out and f"stopped at step {steps[0]}" in out


def test_a_full_disk_stops_the_run_and_keeps_the_older_checkpoint(straight, config, tmp_path):

    shutil.copytree(straight, tmp_path / "run")
    # A limit on the size of files fails writes as a full disk does, at the first array of the next checkpoint.
    process = start_train(f"--config={config_file(config, tmp_path)}", f"--workdir={tmp_path / 'run'}")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (40_000, 40_000))
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 1
    assert "CheckpointError: a checkpoint could not be written" in err and "untouched: 2, 4, 6" in err, err
    assert state_files(tmp_path / "run", config, 6) == state_files(straight, config, 6)


def test_a_run_goes_on_on_another_mesh(straight, config, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    flags = ["--steps=7", "--set", "mesh.data=2", "--set", "mesh.fsdp=2", "--set", "mesh.expert=2"]
    process = start_train(
        f"--config={config_file(config, tmp_path)}",
        f"--workdir={tmp_path / 'run'}",
        *flags,
        env=fake_devices.environment(8),
    )
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, err
    assert "continues from step 6 with another mesh.fsdp: 1 -> 2" in out
    shutil.copytree(straight, tmp_path / "alone")
    train(config, tmp_path / "alone", steps=7)
    sharded, alone = (rows_of(tmp_path / name)[-2:] for name in ("run", "alone"))
    assert sharded[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-5)
    assert sharded[0]["gradient_norm"] == pytest.approx(alone[0]["gradient_norm"], rel=1e-4)
    assert sharded[1]["eval_loss"] == pytest.approx(alone[1]["eval_loss"], rel=1e-4)


def test_a_damaged_checkpoint_names_its_step_and_a_good_one(straight, config, tmp_path):

    shutil.copytree(straight, tmp_path / "run")
    largest = max((tmp_path / "run/checkpoints/6").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, which orbax reads back without a word
    largest.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"step 6 .* cannot be read: .*\n.*step 4 .* good: .* --resume=4"):
        train(config, tmp_path / "run")
    # In a process of its own: what tensorstore leaves behind a failed read comes up in later tests.
    largest.write_bytes(content[: len(content) // 2])
    process = start_train(f"--config={config_file(config, tmp_path)}", f"--workdir={tmp_path / 'run'}")
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 1 and "CheckpointError: step 6 in" in err and "--resume=4" in err, err
    assert train(config, tmp_path / "run", resume="4", steps=5).step == 5


def test_another_model_is_refused_by_the_names_of_its_leaves(straight, config):
    other = dataclasses.replace(config, model=dataclasses.replace(MODEL, layer_pattern=("softmax",), mlp_dim=16))
    checkpointer = Checkpointer(straight / "checkpoints", keep=99)
    with pytest.raises(RuntimeError) as error:
        checkpointer.restore(6, train_step.abstract_state(other, one_device_mesh(other)))
    checkpointer.close()
    assert "missing blocks/layer_0/attention/key" in str(error.value)
    assert "unknown blocks/layer_0/attention/gate" in str(error.value)


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    params = {"final_norm": {"scale": jnp.arange(4.0)}}
    state = {"step": jnp.int32(0), "params": params, "opt_state": optimizer.init_optimizer(TRAINING, params)}
    checkpointer = Checkpointer(tmp_path, keep=2)
    for number, eval_loss in enumerate([3.0, 1.0, None, 2.0, None, None], start=1):
        checkpointer.save(number, state, position={}, data={}, config={}, eval_loss=eval_loss)
    checkpointer.wait()
    assert checkpointer.steps() == [2, 5, 6]
    checkpointer.close()


def test_a_changed_config_is_refused_unless_harmless(straight, config, tmp_path):

    shutil.copytree(straight, tmp_path / "run")
    changed = config_io.apply_overrides(config, ["training.learning_rate=1", "monitoring.log_every_steps=2"])
    with pytest.raises(ConfigError, match=r"training.learning_rate: 0.01 -> 1.0") as error:
        train(changed, tmp_path / "run")
    assert "log_every_steps" not in str(error.value)
    stored, harmless = (json.loads(config_io.config_to_json(c)) for c in (config, changed))
    harmless["training"]["learning_rate"] = stored["training"]["learning_rate"]
    harmless["training"]["total_tokens"] *= 2
    assert same_run.check_same_run(stored, harmless) == [
        "monitoring.log_every_steps: 1 -> 2",
        f"training.total_tokens: {TRAINING.total_tokens} -> {2 * TRAINING.total_tokens}",
    ]


def stored_as(config, **training):
    """The JSON of a run; `training`: fields that it wrote in another way, as earlier versions did."""
    plain = json.loads(config_io.config_to_json(config))
    plain["training"] |= training
    return plain


def with_phases(config, *given, total=TRAINING.total_tokens):
    return dataclasses.replace(
        config,
        training=dataclasses.replace(TRAINING, total_tokens=total, learning_rate_phases=given),
    )


WARM = LearningRatePhase(shape="linear", tokens=512, start=0.0)
COSINE = LearningRatePhase(shape="cosine", tokens=1536, end=0.1)
END = LearningRatePhase(start=0.1, end=0.1)


def test_a_run_of_an_earlier_version_that_means_the_same_goes_on(config):
    """Its alphas were given where they now follow from the depth, its phases in tokens where they now are shares."""
    stored = stored_as(
        config,
        learning_rate_phases=[
            dict(shape="linear", tokens=512, start=0.0, end=1.0),
            dict(shape="cosine", tokens=1536, start=1.0, end=0.1),
        ],
    )
    stored["model"] |= dict.fromkeys(("lightning_alpha", "softmax_alpha", "mlp_alpha"), 4**0.25)
    shares = LearningRatePhase(shape="linear", share=0.25, start=0.0), LearningRatePhase(shape="cosine", end=0.1)
    now = stored_as(with_phases(config, *shares))
    assert same_run.check_same_run(stored, now) == []
    stored["model"]["mlp_alpha"] = 1.5
    with pytest.raises(ConfigError, match=r"model.mlp_alpha: 1.5 -> 1.41"):
        same_run.check_same_run(stored, now)


@pytest.mark.parametrize(
    ("old", "new", "total"),
    [
        ((LearningRatePhase(),), (LearningRatePhase(),), 4096),
        ((WARM, LearningRatePhase()), (WARM, LearningRatePhase()), 4096),
        ((WARM, LearningRatePhase()), (WARM, LearningRatePhase()), 1024),
        ((WARM, COSINE), (WARM, COSINE, END), 4096),
        ((WARM, LearningRatePhase()), (WARM, LearningRatePhase(tokens=1536), COSINE), 3584),
    ],
)
def test_a_run_may_become_longer_where_its_rates_so_far_stay(config, old, new, total):
    stored, current = with_phases(config, *old), with_phases(config, *new, total=total)
    current.training.check_schedule()
    differing = same_run.check_same_run(stored_as(stored), stored_as(current))
    assert f"training.total_tokens: 2048 -> {total}" in differing
    for tokens in range(0, min(2048, total), 128):  # what the answer promises
        assert schedule.learning_rate(stored.training, tokens) == schedule.learning_rate(current.training, tokens)


@pytest.mark.parametrize(
    ("old", "new", "total"),
    [
        ((WARM, LearningRatePhase(shape="cosine", end=0.1)),) * 2 + (4096,),
        ((LearningRatePhase(shape="linear", share=0.25, start=0.0), LearningRatePhase()),) * 2 + (4096,),
        ((WARM, LearningRatePhase()), (WARM, LearningRatePhase(tokens=1024), COSINE), 3072),
        ((LearningRatePhase(),), (END,), 2048),
    ],
)
def test_another_length_that_changes_rates_already_used_is_refused(config, old, new, total):
    stored, current = with_phases(config, *old), with_phases(config, *new, total=total)
    rates = [[schedule.learning_rate(c.training, at) for at in range(0, 2048, 128)] for c in (stored, current)]
    assert rates[0] != rates[1]
    with pytest.raises(ConfigError, match="learning_rate_phases: .* -> "):
        same_run.check_same_run(stored_as(stored), stored_as(current))


def test_a_run_whose_schedule_does_not_fit_leaves_no_folder(config, tmp_path):
    short = with_phases(config, WARM, COSINE, total=1024)
    with pytest.raises(ConfigError, match="learning_rate_phases take 2,048 tokens, and the run has 1,024"):
        train(short, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_where_data_lies_is_no_part_of_a_run(config):
    """Its content is, see test_data_identity.py; and so is how it is read."""
    sources = (SourceConfig(path="data"), SourceConfig(path="more", weight=2.0))
    moved = (SourceConfig(path="./data"), SourceConfig(path="/elsewhere", weight=2.0))

    def form_of(sources, on_bad_row="error", **fields):
        reading = ReadingConfig(on_bad_row=on_bad_row)
        data = dataclasses.replace(config.data, sources=sources, reading=reading, **fields)
        return json.loads(config_io.config_to_json(dataclasses.replace(config, data=data)))

    stored = form_of(sources, tokenizer="tok")
    del stored["data"]["reading"]  # as saved before there were such fields
    stored["data"]["prefetch"] = 2
    assert same_run.check_same_run(stored, form_of(moved, tokenizer="/other/tok", on_bad_row="skip")) == [
        "data.reading.on_bad_row: 'error' -> 'skip'",
        "data.sources.0.path: 'data' -> './data'",
        "data.sources.1.path: 'more' -> '/elsewhere'",
        "data.tokenizer: 'tok' -> '/other/tok'",
    ]
    for changed in (sources[:1], (sources[0], SourceConfig(path="more")), (*sources, SourceConfig(path="third"))):
        with pytest.raises(ConfigError, match=r"data\.sources\.[12]\.weight"):
            same_run.check_same_run(stored, form_of(changed, tokenizer="tok"))


def test_a_non_finite_loss_stops_the_run_with_names(config, tmp_path):
    wild = config_io.apply_overrides(
        config, ["training.learning_rate=1e16", "monitoring.max_nonfinite_steps=1", "checkpoint.save_every_steps=1"]
    )
    with pytest.raises(errors.NonFiniteError) as error:
        train(wild, tmp_path)
    text = str(error.value)
    assert text.startswith("step 3 is not finite")  # step 1 leaps, step 2 is skipped and not saved
    assert "gradients that are not finite: blocks/layer_0/attention/gate (layers 0), " in text
    assert "router by layer: " in text and "max_load" in text
    assert "step 1, is finite, and the very next step failed on it" in text  # nothing good was saved before it
    assert "it is the only one: start over in another --workdir with a lower learning rate" in text


# -- the program ------------------------------------------------------------------------------------------------------


def test_dry_run_prints_memory_and_reads_no_data(config, tmp_path):
    nowhere = dataclasses.replace(config, data=DataConfig(sources=(SourceConfig(path="/nonexistent"),)))
    lines = "\n".join(aot_training.dry_run(nowhere))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(model_params.abstract_params(MODEL)))
    assert f"parameters {count:,}" in lines and "HLO operations" in lines and "temporaries" in lines


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=nowhere.py"], "nowhere.py"),
        (["--config=configs/debug.py", "--set", "training.learning_rat=1"], "learning_rate"),
        (["--config=configs/debug.py", "--resume=maybe"], "give auto, no or a step number"),
        (["--config=configs/debug.py", "training.seed=1"], "--set training.seed=1"),
    ],
)
def test_a_bad_flag_gives_one_clear_line(flags, message):
    process = start_train(*flags)
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 1 and message in err and "Traceback" not in err, err
