"""What a run keeps when something goes wrong: refused starts, damage, numbers that are not finite, failing ends.

The steps are not those of a model, which would have to be compiled: each adds its rate, times the mean of its batch, to
every parameter. All around them is what a run is made of.
"""

import dataclasses
import hashlib
import importlib.util
import io
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import tensorstore as ts

from mmx_jax import metrics
from mmx_jax.checkpoints import export_hf, load
from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.manager import Checkpointer, CheckpointError, NotFiniteError
from mmx_jax.config import (
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
    TrainingConfig,
)
from mmx_jax.convert import verify
from mmx_jax.storage import filesystem, locking
from mmx_jax.storage.array_files import ArrayFolder
from mmx_jax.training import errors, optimizer, train_step, trainer
from mmx_jax.training import run as training_run
from tests.support import plain_steps

MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    num_layers=1,
    layer_pattern=("lightning",),
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    rotary_dim=4,
    max_position_embeddings=512,
    mlp_dim=16,
    num_experts=1,
    experts_per_token=1,
    dtype="float32",
)


def make_step(config, mesh):
    def step(state, batch, rate):
        params = jax.device_get(state["params"])
        finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
        with np.errstate(over="ignore", invalid="ignore"):
            change = np.float32(rate) * np.asarray(batch["tokens"]).mean(dtype=np.float32)
        new = jax.tree.map(lambda leaf: jax.device_put(leaf + change if finite else leaf), params)
        row = plain_steps.metrics_of(new, loss=new["final_norm"]["scale"].mean(), finite=finite)
        return {"step": state["step"] + 1, "params": new, "opt_state": state["opt_state"]}, row

    return step


def steps_that_fail(where):
    """`make_step`, whose metrics say that a step is not finite where `where(state before it)`."""

    def make_failing(config, mesh):
        step = make_step(config, mesh)

        def failing(state, batch, rate):
            fails = where(state)
            state, row = step(state, batch, rate)
            return state, row | ({"finite": False, "loss": np.float32(np.nan)} if fails else {})

        return failing

    return make_failing


def make_evaluation(config):
    def evaluate(params, batch):
        return {"nll": np.float32(np.asarray(params["final_norm"]["scale"])[0]), "correct": 1.0, "count": 2.0}

    return evaluate


@pytest.fixture(scope="module", autouse=True)
def without_a_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "make_train_step", make_step)
        patch.setattr(train_step, "make_eval_step", make_evaluation)
        patch.setattr(train_step, "init_state", plain_steps.zeros)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for number in range(12):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(["state", "decay", "query", "key"], size=120)))
    return Config(
        name="safe",
        model=MODEL,
        data=DataConfig(
            sources=(SourceConfig(path=str(folder)),),
            reading=ReadingConfig(prefetch=0),
            eval_fraction=0.2,
            packing_bins=4,
        ),
        training=TrainingConfig(
            total_tokens=6 * 128,
            sequence_length=32,
            batch_tokens=128,
            learning_rate=1e-2,
        ),
        checkpoint=CheckpointConfig(save_every_steps=2, keep=4, asynchronous=False),
        runtime=RuntimeConfig(lightning_chunk=16, loss_chunk=64),
        monitoring=MonitoringConfig(eval_batches=1),
    )


def train(config, workdir, **options):
    """(result, what was printed)"""
    out = io.StringIO()
    result = training_run.train(config, workdir, console=rich.console.Console(file=out, width=1000), **options)
    return result, out.getvalue()


def steps_of(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    """A run that ended at step 4 of 6."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    train(config, workdir, steps=4)
    return workdir


@pytest.fixture
def run(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    return tmp_path / "run"


def damage(workdir, step):
    """Changes one value of a parameter. All files stay readable: a failed read of orbax comes up in later tests."""
    stored = ArrayFolder(workdir / f"checkpoints/{step}/params").open("lm_head.kernel").spec().to_json()
    array = ts.open(stored, open=True, read=True, write=True).result()
    array[0, 0].write(array[0, 0].read().result() + 1).result()


def changed(config, monitoring=(), **training):
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, **training),
        monitoring=dataclasses.replace(config.monitoring, **dict(monitoring)),
    )


# -- starts -----------------------------------------------------------------------------------------------------------


def test_a_finished_run_started_again_changes_nothing(run, config):
    before = contents(run)
    for resume in ("auto", "4"):
        result, text = train(config, run, steps=4, resume=resume)
        assert "finished at step 4" in text and (result.step, result.interrupted) == (4, False)
    assert contents(run) == before
    rows = metrics.read_rows(run / "metrics.jsonl")
    assert [result.loss, result.eval_loss] == [rows[3]["loss"], rows[4]["eval_loss"]]


def test_an_end_without_its_evaluation_gets_that_alone(run, config):
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(rows[:-1]))
    train(config, run, steps=4)
    assert (run / "metrics.jsonl").read_text().splitlines(keepends=True) == rows


def test_a_run_in_use_is_refused_by_the_name_of_its_holder_and_untouched(run, config):
    before = contents(run)
    with locking.held(run / "run.lock"):
        with pytest.raises(locking.LockedError, match="in use by another process: process"):
            train(config, run, steps=5)
        # Reading it is allowed.
        load.load_params(run)
    assert contents(run) == before


@pytest.mark.parametrize("name", ["run [x]", "a\\b", "gs://bucket/run"])
def test_a_folder_that_could_not_be_read_back_is_refused_before_anything_is_made(name, config, tmp_path):
    with pytest.raises(filesystem.PathError):
        train(config, name if "://" in name else str(tmp_path / name), steps=1)
    assert list(tmp_path.iterdir()) == []


def test_going_back_to_a_damaged_step_gives_up_nothing(run, config):
    damage(run, 2)
    before = contents(run)
    with pytest.raises(CheckpointError, match="step 2 .* cannot be read"):
        train(config, run, resume="2", steps=4)
    assert contents(run) == before


def test_a_named_step_may_go_on_with_another_optimizer_and_order_of_data(run, config):
    other = changed(config, learning_rate=3e-3, gradient_clip=0.5)
    other = dataclasses.replace(other, data=dataclasses.replace(config.data, seed=7))
    with pytest.raises(ConfigError, match="--resume=N, these may change: training.learning_rate, "):
        train(other, run)
    result, text = train(other, run, resume="2", steps=3)
    assert result.step == 3 and steps_of(run) == [2, 3]
    assert "another training.learning_rate: 0.01 -> 0.003" in text and "start over in the order of seed 7" in text
    assert "discarded the later steps 4" in text
    assert metrics.read_rows(run / "metrics.jsonl")[2]["learning_rate"] == 3e-3
    wider = dataclasses.replace(other, model=dataclasses.replace(MODEL, mlp_dim=32))
    with pytest.raises(ConfigError, match="model.mlp_dim"):
        train(wider, run, resume="2")


# -- ends -------------------------------------------------------------------------------------------------------------


def test_without_matplotlib_a_run_says_so_at_its_start_and_ends_well(run, config, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    (run / "loss.png").unlink()
    result, text = train(config, run, steps=5)
    assert result.step == 5 and text.index("loss.png will not be drawn") < text.index("held-out loss")
    assert not (run / "loss.png").exists()


def test_a_failing_evaluation_and_a_failing_picture_find_the_last_step_saved(run, config, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("this failed")

    monkeypatch.setattr(metrics, "plot_loss", fail)
    result, text = train(config, run, steps=5)
    assert result.step == 5 and "loss.png was not drawn: RuntimeError: this failed" in text
    monkeypatch.setattr(trainer.Trainer, "validate", fail)
    with pytest.raises(RuntimeError, match="this failed"):
        train(config, run)
    assert steps_of(run) == [2, 4, 5, 6]


def test_numbers_that_blow_up_push_out_no_good_step_and_the_advice_works(config, tmp_path):
    phases = (LearningRatePhase(tokens=2 * 128), LearningRatePhase(start=1e43, end=1e43))
    wild = changed(config, learning_rate_phases=phases, monitoring=dict(eval_every_steps=1))
    wild = dataclasses.replace(wild, checkpoint=CheckpointConfig(save_every_steps=1, keep=1))
    with pytest.raises(errors.NonFiniteError) as error:
        train(wild, tmp_path)
    assert "step 3 is not saved: not finite are params/" in str(error.value)
    assert "last good checkpoint: step 2 in " in str(error.value) and "--resume=2 --set training." in str(error.value)
    calm = changed(wild, learning_rate_phases=(LearningRatePhase(),), learning_rate=1e-3)
    result, _ = train(calm, tmp_path, resume="2", steps=3)
    assert result.step == 3 and np.isfinite(result.loss)


@pytest.mark.parametrize(("bad", "stops_at"), [({2, 4, 6}, None), ({2, 4, 5}, 5)])
def test_only_steps_in_a_row_use_up_the_steps_that_may_be_skipped(config, tmp_path, monkeypatch, bad, stops_at):
    failing = steps_that_fail(lambda state: int(state["step"]) + 1 in bad)
    monkeypatch.setattr(train_step, "make_train_step", failing)
    config = changed(config, monitoring=dict(max_nonfinite_steps=1))
    if stops_at is None:
        assert train(config, tmp_path)[0].step == 6
    else:
        with pytest.raises(errors.NonFiniteError, match=rf"^step {stops_at} is not finite.*2 such steps in a row, 1"):
            train(config, tmp_path)


def test_a_finite_step_on_which_the_next_one_fails_is_not_called_good(config, tmp_path, monkeypatch):
    """As of weights that a leap has made so large that their loss overflows: a lower rate comes too late for them."""
    failing = steps_that_fail(lambda state: state["params"]["final_norm"]["scale"].mean() > 10)
    monkeypatch.setattr(train_step, "make_train_step", failing)
    rates = [LearningRatePhase(tokens=2 * 128, start=1e-2, end=1e-2), LearningRatePhase(start=1.0, end=1.0)]
    wild = changed(config, learning_rate_phases=tuple(rates), learning_rate=0.1)
    wild = dataclasses.replace(wild, checkpoint=CheckpointConfig(save_every_steps=1, keep=4))
    calm = changed(wild, learning_rate_phases=(LearningRatePhase(),), learning_rate=1e-3)
    with pytest.raises(errors.NonFiniteError) as error:
        train(wild, tmp_path / "run")
    failed = int(str(error.value).split()[1])
    saved = steps_of(tmp_path / "run")
    assert failed > 3 and saved[-1] == failed - 1
    assert f"step {failed - 1}, is finite, and the very next step failed on it" in str(error.value)
    advice = f"last good checkpoint: step {failed - 2}, which finite steps followed; continue from there with a lower "
    assert f"{advice}learning rate, as in --resume={failed - 2} --set training.learning_rate=0.01" in str(error.value)
    result, _ = train(calm, tmp_path / "run", resume=str(failed - 2), steps=failed)
    assert result.step == failed and np.isfinite(result.loss)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def a_state(value=1.0):
    params = {"final_norm": {"scale": jnp.full(4, value)}, "w": jnp.arange(40.0).reshape(5, 8)}
    return {"step": jnp.int32(0), "params": params, "opt_state": optimizer.init_optimizer(TrainingConfig(), params)}


def save(checkpointer, step, **options):
    checkpointer.save(step, a_state(), position={"tokens_seen": step}, data={}, config={}, **options)


def test_only_finite_losses_compete_and_only_finite_states_are_saved(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    for step, loss in enumerate([2.0, np.nan, np.inf, 3.0], start=1):
        save(checkpointer, step, eval_loss=loss)
    with pytest.raises(NotFiniteError, match="step 5 is not saved: not finite are params/final_norm/scale"):
        checkpointer.save(5, a_state(np.nan), position={}, data={}, config={})
    checkpointer.wait()
    assert checkpointer.steps() == [1, 4] and checkpointer.last_good() == 4
    checkpointer.close()
    checkpointer = Checkpointer(tmp_path, keep=1)  # which knows the losses from disk
    save(checkpointer, 6)
    checkpointer.wait()
    assert checkpointer.steps_on_disk() == [1, 6]
    checkpointer.close()


@pytest.mark.parametrize("file", ["manifest.ocdbt", "_METADATA"])
def test_a_save_that_cannot_be_read_back_is_an_error_and_deletes_nothing(tmp_path, monkeypatch, file):
    monkeypatch.setattr(Checkpointer, "poll", lambda checkpointer: None)  # the file is damaged before it is read back
    checkpointer = Checkpointer(tmp_path, keep=1)
    save(checkpointer, 1)
    checkpointer.wait()
    save(checkpointer, 2)
    checkpointer._manager.wait_until_finished()
    (tmp_path / f"2/params/{file}").write_bytes(b"")
    with pytest.raises(CheckpointError, match="step 2 was written .* cannot be read back"):
        checkpointer.wait()
    assert checkpointer.steps_on_disk() == [1, 2]
    checkpointer.close()


def test_a_state_on_disk_that_is_not_finite_is_not_continued(tmp_path, monkeypatch):
    from mmx_jax.checkpoints import manager

    checkpointer = Checkpointer(tmp_path, asynchronous=False)
    save(checkpointer, 1)
    sums = manager._checksums
    monkeypatch.setattr(manager, "_checksums", lambda *arguments: (sums(*arguments)[0], []))  # as once
    checkpointer.save(2, a_state(np.inf), position={}, data={}, config={})
    monkeypatch.undo()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), a_state())
    with pytest.raises(CheckpointError, match=r"not finite are params/final_norm/scale(.|\n)*--resume=1"):
        checkpointer.restore(2, abstract)
    checkpointer.close()


def test_a_damaged_step_is_neither_exported_nor_loaded(run, tmp_path, capsys):
    export_hf.export_checkpoint(run, tmp_path / "good")
    _, kept = load.load_params(run, param_dtype="float32")
    _, cast = load.load_params(run, param_dtype="bfloat16")
    assert cast["lm_head"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(cast["lm_head"]["kernel"], kept["lm_head"]["kernel"].astype(jnp.bfloat16))
    damage(run, 4)
    message = "step 4 in .*checkpoints.*damaged(.|\n)*another step of the run: .*checkpoints/2"
    for read in (
        lambda: export_hf.export_checkpoint(run, tmp_path / "bad"),
        lambda: verify.verify_checkpoints(run, tmp_path / "good", print_line=lambda line: None),
        lambda: load.load_params(run, param_dtype="float32"),
        lambda: load.load_params(run, param_dtype="bfloat16"),
    ):
        with pytest.raises(ConversionError, match=message):
            read()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "run"]
