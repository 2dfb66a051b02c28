"""A run of several stages: each step is given the stage's length, rows, mixture, shuffle, RoPE base and rate.

The steps are recorded and compute nothing, so that what the loop hands to them is what is tested.
"""

import dataclasses
import io

import jax
import numpy as np
import pytest
import rich.console

from mmx_jax.checkpoints import load
from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.config import (
    BatchRampStep,
    CheckpointConfig,
    Config,
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
from mmx_jax.data import pipeline
from mmx_jax.data.tokenizer import Tokenizer
from mmx_jax.training import run as training_run
from mmx_jax.training import schedule, train_step
from tests.support import plain_steps

BASE, LONG_BASE = 1e4, 5e6
MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    num_layers=1,
    layer_pattern=("lightning",),
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    rotary_dim=4,
    rope_theta=BASE,
    max_position_embeddings=512,
    mlp_dim=16,
    num_experts=1,
    experts_per_token=1,
    dtype="float32",
)
# Stage 0: steps of 64, 64, then 128 tokens by the ramp; stage 1: 128 tokens in rows of 64; stage 2 as stage 0 again.
TRAINING = TrainingConfig(
    batch_tokens=64,
    batch_ramp=(BatchRampStep(from_tokens=128, batch_tokens=128),),
    learning_rate=1.0,
    learning_rate_phases=(LearningRatePhase(shape="linear", start=1.0, end=0.0),),
    stages=(
        StageConfig(tokens=256, sequence_length=32, source_weights=(7.0, 1.0)),
        StageConfig(tokens=256, sequence_length=64, source_weights=(1.0, 1.0), rope_theta=LONG_BASE),
        StageConfig(tokens=128, sequence_length=32, source_weights=(1.0, 7.0)),
    ),
)
# (stage, rows, length, tokens seen before) of every step.
STEPS = [(0, 2, 32, 0), (0, 2, 32, 64), (0, 4, 32, 128), (1, 2, 64, 256), (1, 2, 64, 384), (2, 4, 32, 512)]
BASES = [BASE, BASE, BASE, LONG_BASE, LONG_BASE, BASE]
TOKENS = sum(stage.tokens for stage in TRAINING.stages)


@dataclasses.dataclass
class Recorded:
    steps: list = dataclasses.field(default_factory=list)  # (RoPE base, batch on the host, rate)
    evaluations: list = dataclasses.field(default_factory=list)  # RoPE bases


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for name, letters in (("first", "abcd"), ("second", "wxyz")):
        (folder / name).mkdir()
        for number in range(12):
            text = " ".join("".join(rng.choice(list(letters), size=5)) for _ in range(60))
            (folder / name / f"{number}.txt").write_text(text)
    sources = tuple(SourceConfig(path=str(folder / name), weight=1.0) for name in ("first", "second"))
    return Config(
        name="stages",
        model=MODEL,
        runtime=RuntimeConfig(lightning_chunk=16),
        training=TRAINING,
        data=DataConfig(
            sources=sources, eval_fraction=0.2, packing_bins=4, seed=17, shards=1, reading=ReadingConfig(prefetch=0)
        ),
        checkpoint=CheckpointConfig(save_every_steps=1, keep=99, asynchronous=False),
        monitoring=MonitoringConfig(eval_batches=1, eval_every_steps=1),
    )


@pytest.fixture
def recorded(monkeypatch):
    calls = Recorded()

    def make_step(config, mesh):
        del mesh

        def step(state, batch, rate):
            batch = {key: np.array(value) for key, value in batch.items()}
            calls.steps.append((config.model.rope_theta, batch, float(rate)))
            return state | {"step": state["step"] + 1}, plain_steps.metrics_of(state["params"])

        return step

    def make_evaluation(config):
        def evaluate(params, batch):
            del params, batch
            calls.evaluations.append(config.model.rope_theta)
            return {"nll": np.float32(1), "correct": np.float32(1), "count": np.float32(2)}

        return evaluate

    monkeypatch.setattr(train_step, "make_train_step", make_step)
    monkeypatch.setattr(train_step, "make_eval_step", make_evaluation)
    monkeypatch.setattr(train_step, "init_state", plain_steps.zeros)
    return calls


def train(config, workdir, **options):
    return training_run.train(config, workdir, console=rich.console.Console(file=io.StringIO()), **options)


def expected_batches(config, tokenizer):
    """The rows of each stage from an iterator of its own, taken in the order of the steps."""
    iterators, batches = {}, []
    units = [2, 1, 2]  # rows that every batch of the ramp is a multiple of, by stage
    for stage, rows, length, _ in STEPS:
        if stage not in iterators:
            iterators[stage] = pipeline.make_train_iterator(
                config.data,
                tokenizer,
                sequence_length=length,
                rows=units[stage],
                source_weights=TRAINING.stages[stage].source_weights,
                seed=17 + stage,
            )
        parts = [next(iterators[stage]) for _ in range(rows // units[stage])]
        batches.append({key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
    for iterator in iterators.values():
        iterator.close()
    return batches


def by_row(batch):
    """The rows as a multiset: how they are laid out over micro-batches and devices is tested elsewhere."""
    keys = sorted(batch)
    return sorted(tuple(batch[key][row].tobytes() for key in keys) for row in range(len(batch[keys[0]])))


def test_every_step_is_given_what_its_stage_says(config, recorded, tmp_path):
    result = train(config, tmp_path / "run")
    assert (result.step, result.tokens_seen) == (len(STEPS), TOKENS)
    assert [base for base, _, _ in recorded.steps] == BASES
    assert [batch["tokens"].shape for _, batch, _ in recorded.steps] == [(rows, t) for _, rows, t, _ in STEPS]
    rates = [rate for _, _, rate in recorded.steps]
    np.testing.assert_allclose(rates, [1 - seen / TOKENS for *_, seen in STEPS], rtol=1e-6)
    tokenizer = Tokenizer.load(tmp_path / "run" / "tokenizer")
    for (_, got, _), want in zip(recorded.steps, expected_batches(config, tokenizer), strict=True):
        assert by_row(got) == by_row(want)
    first = [0, 0, 0]  # rows of the first source, by stage; a row holds documents of one source
    for (stage, *_), (_, batch, _) in zip(STEPS, recorded.steps, strict=True):
        first[stage] += sum(not set(tokenizer.decode(row)) & set("wxyz") for row in batch["tokens"].tolist())
    assert first == [8, 2, 1]  # of 8, 4 and 4, where the shares are 7/8, 1/2 and 1/8
    assert recorded.evaluations == BASES  # an evaluation a step, with the base of its stage
    assert result.eval_loss == 0.5  # nats per token: the evaluations here find 1 nat in 2 tokens


def test_the_end_of_a_run_is_foreseen():
    assert schedule.end_of_run(TRAINING, 0, 0) == schedule.end_of_run(TRAINING, 2, 128) == (len(STEPS), TOKENS)
    assert schedule.end_of_run(TRAINING, 0, 0, last_step=4) == (4, STEPS[4][-1])


def test_a_run_resumed_in_any_stage_is_given_the_same(config, recorded, tmp_path):
    train(config, tmp_path / "whole")
    whole = list(recorded.steps)
    recorded.steps.clear()
    for steps in range(1, len(STEPS) + 1):
        train(config, tmp_path / "cut", steps=steps)
    assert len(recorded.steps) == len(whole)
    for (base, batch, rate), (want_base, want_batch, want_rate) in zip(recorded.steps, whole, strict=True):
        assert (base, rate) == (want_base, want_rate)
        jax.tree.map(np.testing.assert_array_equal, batch, want_batch)


def test_a_checkpoint_is_read_with_the_rope_base_of_its_stage(config, recorded, tmp_path):
    train(config, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [load.resolve(checkpoints / str(step + 1)).config.rope_theta for step in range(len(STEPS))] == BASES
    assert load.resolve(tmp_path / "run").config == MODEL
    position = checkpoints / "4" / "position" / "metadata"
    position.write_text('{"stage_index": 3, "tokens_seen": 0}')
    with pytest.raises(ConversionError, match=r"position/metadata: stage_index=3, and the run has 3 stages"):
        load.resolve(checkpoints / "4")
    position.unlink()
    with pytest.raises(ConversionError, match=r"position/metadata: no such file"):
        load.resolve(checkpoints / "4")
