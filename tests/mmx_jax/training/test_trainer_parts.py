"""A `Trainer` that is handed its batches, validation, hooks and loss, without files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx_jax import sharding
from mmx_jax.config import CheckpointConfig, Config, ModelConfig, MonitoringConfig, RuntimeConfig, TrainingConfig
from mmx_jax.data.device_batch import batch_sharding
from mmx_jax.training import train_step
from mmx_jax.training.trainer import Hook, Position, Trainer
from mmx_jax.training.validate import HeldOut

CONFIG = Config(
    model=ModelConfig(
        vocab_size=32,
        hidden_size=16,
        num_layers=2,
        layer_pattern=("lightning", "softmax"),
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rotary_dim=4,
        mlp_dim=16,
        num_experts=1,
        experts_per_token=1,
        dtype="float32",
    ),
    runtime=RuntimeConfig(lightning_chunk=8, softmax_block=8, loss_chunk=16),
    training=TrainingConfig(total_tokens=6 * 32, sequence_length=16, batch_tokens=32, learning_rate=1e-2),
    checkpoint=CheckpointConfig(save_every_steps=2),
    monitoring=MonitoringConfig(eval_every_steps=3, log_every_steps=2),
)


class CountingBatches:
    """In place of the data pipeline: rows that count upwards, from another token in every step."""

    def __init__(self, mesh):
        self._sharding, self.plans = batch_sharding(mesh), []

    def next(self, plan):
        self.plans.append(plan)
        start = plan.tokens_seen // plan.tokens
        tokens = (start + np.arange(16) + 3 * np.arange(2)[:, None]).astype(np.int32) % 32
        batch = {
            "tokens": tokens,
            "targets": (tokens + 1) % 32,
            "segment_ids": np.ones_like(tokens),
            "positions": np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape),
        }
        return {name: jax.device_put(x, self._sharding) for name, x in batch.items()}


class Diary(Hook):
    """Writes down in which order a trainer calls its hooks."""

    def __init__(self):
        self.events, self.records = [], []

    def before_step(self, step):
        self.events.append(f"before {step}")

    def after_step(self, step):
        self.events.append(f"after {step}")

    def on_record(self, record):
        self.records.append(record)
        self.events.append(f"record {record.step}")

    def on_validation(self, trainer, held_out):
        self.events.append(f"validation {trainer.step} {held_out.loss}")

    def save(self, trainer):
        self.events.append(f"save {trainer.step}")


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(CONFIG.mesh, jax.devices()[:1])


def trained(mesh, **parts):
    """(trainer after its run, the parameters that it began with)."""
    with jax.set_mesh(mesh):
        state = train_step.init_state(CONFIG, mesh)
        first = jax.device_get(state["params"])
        trainer = Trainer(CONFIG, state, batches=CountingBatches(mesh), **parts)
        trainer.run()
    return trainer, first


def test_hooks_and_validation_are_called_as_the_config_says(mesh):
    diary = Diary()
    trainer, _ = trained(mesh, hooks=[diary], validation=lambda params, config: HeldOut(1.5, 0.25))
    trainer.save()
    trainer.validate()
    trainer.validate()  # once a step
    steps = [[f"before {n}", f"after {n}"] for n in range(1, 7)]
    steps[1] += ["record 2", "save 2"]
    steps[2] += ["validation 3 1.5"]
    steps[3] += ["record 4", "save 4"]
    steps[5] += ["record 6", "save 6", "validation 6 1.5"]
    assert diary.events == sum(steps, [])
    assert (trainer.step, trainer.tokens_seen, trainer.held_out_loss) == (6, 6 * 32, 1.5)
    assert diary.records[-1].metrics["loss"] == pytest.approx(trainer.loss)
    assert trainer.loss < diary.records[0].metrics["loss"]


def test_a_trainer_begins_where_it_is_told(mesh):
    batches = CountingBatches(mesh)
    with jax.set_mesh(mesh):
        state = train_step.init_state(CONFIG, mesh)
        trainer = Trainer(CONFIG, state, batches=batches, position=Position(step=4, tokens_seen=4 * 32))
        trainer.run(should_stop=lambda: trainer.step == 5)
    assert trainer.step == 5 and [plan.tokens_seen for plan in batches.plans] == [128]


def distance_to_zero(config, params, batch):
    """Another loss: half the squared norm of the embeddings, for every token of the batch."""
    objective, sums = train_step.microbatch_objective(config, params, batch)
    half = 0.5 * jnp.sum(jnp.square(params["embed"]["embedding"]))
    return half * sums["count"] + 0 * objective, sums | {"half_norm": half * sums["count"]}


def test_another_loss_function_is_the_one_that_is_minimised(mesh):
    diary = Diary()
    make_step = functools.partial(train_step.make_train_step, loss_fn=distance_to_zero)
    trainer, first = trained(mesh, hooks=[diary], make_step=make_step)
    halves = [record.metrics["half_norm"] for record in diary.records]
    begin = 0.5 * np.sum(np.square(first["embed"]["embedding"]))
    assert max(halves) < 0.6 * begin and halves[-1] < 0.5 * halves[0]
    # Weight decay alone moves the rest.
    rest = trainer.state["params"]["final_norm"]["scale"]
    np.testing.assert_array_equal(rest, first["final_norm"]["scale"])


def test_frozen_parameters_and_their_moments_stay_and_the_others_train(mesh):
    with jax.set_mesh(mesh):
        params = train_step.init_state(CONFIG, mesh)["params"]
    trainable = jax.tree_util.tree_map_with_path(lambda path, _: path[0].key != "blocks", params)
    make_step = functools.partial(train_step.make_train_step, trainable=trainable)
    trainer, first = trained(mesh, make_step=make_step)
    state = jax.device_get(trainer.state)
    jax.tree.map(np.testing.assert_array_equal, state["params"]["blocks"], first["blocks"])
    assert not any(map(np.any, jax.tree.leaves([state["opt_state"].mu["blocks"], state["opt_state"].nu["blocks"]])))
    for name in ("embed", "lm_head"):
        assert all(map(np.any, jax.tree.leaves(jax.tree.map(np.subtract, state["params"][name], first[name]))))
    # What is trained gets the gradient that it gets where all is trained.
    frozen = train_step.frozen(train_step.microbatch_objective, trainable)

    @jax.jit
    def gradients(params, batch):
        objectives = train_step.microbatch_objective, frozen
        return [train_step.accumulate_gradients(CONFIG, params, batch, 1, of)[0] for of in objectives]

    with jax.set_mesh(mesh):
        whole, part = gradients(params, CountingBatches(mesh).next(trainer_plan()))
    np.testing.assert_allclose(part["embed"]["embedding"], whole["embed"]["embedding"], rtol=1e-6, atol=1e-8)
    assert not any(map(np.any, jax.tree.leaves(jax.device_get(part["blocks"]))))


def trainer_plan():
    from mmx_jax.training import schedule

    return schedule.plan_step(CONFIG.training, 0)
