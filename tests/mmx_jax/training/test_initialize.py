"""Runs that begin from the weights of a checkpoint: what they compute, what they refuse, what a resumption does."""

import dataclasses
import io
import json
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
import rich.console

import mmx_jax
from mmx_jax import metrics, sharding
from mmx_jax.checkpoints import load
from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    MonitoringConfig,
    ReadingConfig,
    RuntimeConfig,
    SourceConfig,
    TrainingConfig,
)
from mmx_jax.config import io as config_io
from mmx_jax.convert.import_hf import import_checkpoint
from mmx_jax.data import pipeline as data_pipeline
from mmx_jax.data.tokenizer import Tokenizer
from mmx_jax.models import params as model_params
from mmx_jax.training import initialize
from mmx_jax.training import run as training_run
from tests.support.fake_devices import environment
from tests.support.paths import REPOSITORY

FIXTURE = REPOSITORY / "tests/fixtures/text/tiny/hf"
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
    router_aux_loss_coef=0.001,
    dtype="float32",
)
TEXTS = [f"number {i} says " + " ".join("state decay query key value norm".split()[i % 5 :] * 20) for i in range(20)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return Config(
        name="test",
        model=MODEL,
        data=DataConfig(
            sources=(SourceConfig(path=str(folder)),),
            eval_fraction=0.2,
            packing_bins=4,
            reading=ReadingConfig(prefetch=0),
        ),
        training=TrainingConfig(
            total_tokens=8 * 256,
            sequence_length=32,
            batch_tokens=256,
            learning_rate=1e-2,
        ),
        runtime=RuntimeConfig(lightning_chunk=16, softmax_block=32, loss_chunk=64),
        checkpoint=CheckpointConfig(save_every_steps=2, keep=8),
        monitoring=MonitoringConfig(eval_batches=2),
    )


def save_model(folder, tokenizer, edit=None, **changes):
    """A Hugging Face folder of random weights."""
    model = dataclasses.replace(MODEL, **changes)
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (0.2 * draw.standard_normal(leaf.shape)).astype(np.float32), model_params.abstract_params(model)
    )
    if edit:
        edit(params)
    if tokenizer is not None:
        tokenizer.save(folder.with_name("tokenizer"))
    tokenizer_dir = None if tokenizer is None else folder.with_name("tokenizer")
    load.save_huggingface(params, model, folder, tokenizer_dir=tokenizer_dir)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module")
def pretrained(tokenizer, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("pretrained") / "hf", tokenizer)


def train(config, workdir, **options):
    """(result, what was printed)."""
    out = io.StringIO()
    result = training_run.train(config, workdir, console=rich.console.Console(file=out, width=400), **options)
    return result, out.getvalue()


@pytest.fixture(scope="module")
def begun(config, pretrained, tmp_path_factory):
    """A run of two steps from the pretrained weights."""
    workdir = tmp_path_factory.mktemp("begun")
    return workdir, *train(config, workdir, steps=2, init_from=str(pretrained))


def one_device_mesh():
    return sharding.make_mesh(Config().mesh, jax.devices()[:1])


def held_out_loss(config, checkpoint):
    """By the Python interface: every document's part of a row alone, without packing."""
    model = mmx_jax.from_pretrained(checkpoint)
    length = config.training.sequence_length
    rows = config.training.batch_tokens // length
    batches = data_pipeline.make_eval_batches(
        config.data, model.tokenizer, sequence_length=length, rows=rows, batches=2
    )
    tokens, scored = [], []
    for batch in batches:
        for row, targets, segments in zip(batch["tokens"], batch["targets"], batch["segment_ids"], strict=True):
            for segment in np.unique(segments[targets >= 0]):
                (inside,) = np.nonzero((segments == segment) & (targets >= 0))
                piece = np.append(row[inside], targets[inside[-1]])
                tokens.append(np.pad(piece, (0, length + 1 - len(piece))))
                scored.append(np.arange(length + 1) < len(piece))
    scored = np.array(scored)
    return -model.score(np.array(tokens), scored).sum(dtype=np.float64) / (scored.sum() - len(scored))


def test_a_run_begins_with_the_loss_of_the_weights_and_improves_on_it(begun, config, pretrained):
    workdir, result, text = begun
    rows = metrics.read_rows(workdir / "metrics.jsonl")
    assert rows[0]["step"] == 0 and rows[0]["eval_loss"] == pytest.approx(held_out_loss(config, pretrained), rel=1e-5)
    assert result.eval_loss < rows[0]["eval_loss"] and "with a fresh optimizer" in text
    assert (workdir / "tokenizer/tokenizer.json").read_text() == (pretrained / "tokenizer.json").read_text()


def test_every_kind_of_checkpoint_gives_the_same_parameters_and_a_fresh_optimizer(begun, config, pretrained, tmp_path):
    import_checkpoint(pretrained, tmp_path / "ours")
    with jax.set_mesh(mesh := one_device_mesh()):
        states = [jax.device_get(initialize.load_state(config, mesh, p)) for p in (pretrained, tmp_path / "ours")]
        trained = jax.device_get(initialize.load_state(config, mesh, begun[0]))
        step = jax.device_get(initialize.load_state(config, mesh, begun[0] / "checkpoints/2"))
    jax.tree.map(np.testing.assert_array_equal, *states)
    jax.tree.map(np.testing.assert_array_equal, trained, step)
    _, stored = load.load_params(begun[0])
    jax.tree.map(np.testing.assert_array_equal, trained["params"], jax.device_get(stored))
    assert any(map(np.any, jax.tree.leaves(jax.tree.map(np.subtract, trained["params"], states[0]["params"]))))
    for state in (trained, *states):
        assert state["step"] == 0 and not any(map(np.any, jax.tree.leaves(state["opt_state"])))


def test_a_run_goes_on_from_a_step_of_another_with_another_recipe(begun, config, tmp_path):
    recipe = config_io.apply_overrides(config, ["training.learning_rate=1e-4", "training.sequence_length=64"])
    _, text = train(recipe, tmp_path, steps=1, init_from=str(begun[0] / "checkpoints/2"))
    rows = metrics.read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 1] and rows[1]["learning_rate"] == 1e-4
    assert rows[0]["eval_loss"] == pytest.approx(held_out_loss(recipe, begun[0]), rel=1e-5)


def test_the_master_weights_are_float32_and_the_released_layout_is_read_as_inference_reads_it(tmp_path):
    stored = load.resolve(FIXTURE).config
    model = dataclasses.replace(stored, param_dtype="float32", dtype="bfloat16")
    config = Config(
        model=model, runtime=RuntimeConfig(remat="full"), training=TrainingConfig(sequence_length=64, batch_tokens=256)
    )
    with jax.set_mesh(mesh := one_device_mesh()):
        params = initialize.load_state(config, mesh, FIXTURE)["params"]
        jax.tree.map(np.testing.assert_array_equal, params, mmx_jax.from_pretrained(FIXTURE).params)
        half = dataclasses.replace(config, model=dataclasses.replace(config.model, param_dtype="bfloat16"))
        dtypes = jax.tree.map(lambda leaf: leaf.dtype.name, initialize.load_state(half, mesh, FIXTURE)["params"])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    router = {
        dtype for path, dtype in jax.tree_util.tree_leaves_with_path(dtypes) if "router" in jax.tree_util.keystr(path)
    }
    assert router == {"float32"} and "bfloat16" in jax.tree.leaves(dtypes)


REFUSED = {field.name for field in dataclasses.fields(ModelConfig)} - initialize.RUN_FIELDS - initialize.TOLD_FIELDS


@pytest.mark.parametrize("name", sorted(REFUSED - {"router_jitter_noise"}))  # which has but one value
def test_every_field_that_makes_another_function_is_refused_by_name(name):
    value = getattr(MODEL.resolved(), name)
    other = {"layer_pattern": ("softmax", "lightning"), "postnorm": False}.get(name, value * 2)
    stored = dataclasses.replace(MODEL, **{name: other}, **({"num_layers": 4} if name == "layer_pattern" else {}))
    with pytest.raises(initialize.InitializationError, match=rf"model\.{name}: .* in the checkpoint") as error:
        initialize.check_model(MODEL, stored, "x")
    assert "--model_from_checkpoint" in str(error.value)


def test_what_is_changed_on_purpose_is_told_and_how_it_is_run_is_not():
    run = dict(dtype="bfloat16", param_dtype="bfloat16", initializer_range=0.1)
    assert initialize.check_model(dataclasses.replace(MODEL, **run), MODEL, "x") == []
    longer = dataclasses.replace(MODEL, rope_theta=5e6, max_position_embeddings=8192)
    lines = initialize.check_model(longer, MODEL, "x")
    assert len(lines) == 2 and "rope_theta is 5000000.0; the checkpoint has 10000000.0" in lines[0]
    rounded = dataclasses.replace(MODEL, lightning_alpha=float(f"{MODEL.resolved().lightning_alpha:.9g}"))
    assert initialize.check_model(rounded, MODEL, "x") == []


def test_all_differences_are_listed_before_anything_is_made(config, pretrained, tmp_path):
    other = dataclasses.replace(config, model=dataclasses.replace(MODEL, mlp_dim=64, postnorm=False))
    with pytest.raises(initialize.InitializationError, match=r"model\.mlp_dim: 32 .* 64 (.|\n)*model\.postnorm: True"):
        train(other, tmp_path, init_from=str(pretrained))
    assert not (tmp_path / "init_from.json").exists()


def test_the_model_can_be_taken_from_the_checkpoint(config, pretrained, tmp_path):
    other = dataclasses.replace(config, model=ModelConfig(dtype="float32", router_aux_loss_coef=0.001))
    of_tokenizer = load.resolve(pretrained).config
    ids = {name: getattr(of_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    published = dataclasses.replace(MODEL, **ids).resolved()
    assert initialize.with_model_of(other, pretrained, tmp_path).model.resolved() == published
    initialize.check(config, str(pretrained), tmp_path, 0)
    (tmp_path / "moved").mkdir()
    origin = json.loads((tmp_path / "init_from.json").read_text())
    (tmp_path / "init_from.json").write_text(json.dumps(origin | {"path": "/gone"}))
    # Of the time when the run began.
    assert initialize.with_model_of(other, "/gone", tmp_path).model.resolved() == published
    with pytest.raises(ConversionError, match="no such folder"):
        initialize.with_model_of(other, "/elsewhere", tmp_path)


def test_a_tokenizer_that_does_not_fit_the_weights_is_refused(config, pretrained, tokenizer, tmp_path):
    other = Tokenizer.train(["zebra zoo zigzag " * 30], 300)
    for name, each in (("same", tokenizer), ("other", other)):
        each.save(tmp_path / name)

    def named(folder):
        return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(tmp_path / folder)))

    assert initialize.tokenizer_of(named("same"), pretrained).backend.get_vocab() == tokenizer.backend.get_vocab()
    with pytest.raises(initialize.InitializationError, match="data.tokenizer=.*other is not the tokenizer .* leave"):
        train(named("other"), tmp_path / "run", init_from=str(pretrained))
    other.save(tmp_path / "crashed/tokenizer")
    with pytest.raises(initialize.InitializationError, match="crashed/tokenizer is not .* another --workdir"):
        train(config, tmp_path / "crashed", init_from=str(pretrained))


def test_no_tokenizer_is_trained_on_top_of_weights(config, tmp_path):
    bare = save_model(tmp_path / "hf", None)
    with pytest.raises(initialize.InitializationError, match="holds no tokenizer.json.*data.tokenizer=FOLDER"):
        train(config, tmp_path / "run", init_from=str(bare))


def test_a_resumed_run_takes_its_own_checkpoint_and_says_so(begun, config, pretrained, tmp_path):
    workdir = begun[0]
    result, text = train(config, workdir, steps=3, init_from=str(pretrained))
    assert result.step == 3 and "has been taken at the beginning of this run" in text
    assert "RESUMED from step 2 (512 tokens seen)" in text and "step 3/3" in text
    with pytest.raises(initialize.InitializationError, match="--init_from=/elsewhere would be without effect"):
        train(config, workdir, steps=4, init_from="/elsewhere")
    result, text = train(config, workdir, steps=4)
    assert result.step == 4 and "init_from" not in text


def test_a_run_that_was_begun_otherwise_refuses_the_weights(config, pretrained, tmp_path):
    with pytest.raises(initialize.InitializationError, match="begun with new weights"):
        initialize.check(config, str(pretrained), tmp_path, 2)
    initialize.check(config, str(pretrained), tmp_path, 0)
    with pytest.raises(initialize.InitializationError, match="has no checkpoint yet: give the flag again"):
        initialize.check(config, "", tmp_path, 0)
    (tmp_path / "init_from.json").write_text("{")
    with pytest.raises(initialize.InitializationError, match="init_from.json is damaged"):
        initialize.check(config, "", tmp_path, 2)


def test_weights_that_are_not_finite_are_refused_by_name(config, tokenizer, tmp_path):
    def edit(params):
        params["blocks"]["layer_1"]["mlp"]["down"][0, 0, 0, 0] = np.nan

    broken = save_model(tmp_path / "hf", tokenizer, edit)
    with pytest.raises(initialize.InitializationError, match=r"not finite, in blocks/layer_1/mlp/down: take"):
        train(config, tmp_path / "run", init_from=str(broken))


SHARDED = """
    import sys
    import jax, numpy as np
    from mmx_jax import sharding
    from mmx_jax.checkpoints import load
    from mmx_jax.config import io as config_io
    from mmx_jax.training import initialize
    config = config_io.config_from_json(open(sys.argv[1]).read())
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        params = initialize.load_state(config, mesh, sys.argv[2])["params"]
    _, whole = load.load_params(sys.argv[2])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, whole)
    print(len({str(leaf.sharding.spec) for leaf in jax.tree.leaves(params)}))
"""


def test_sharded_equals_unsharded(config, pretrained, tmp_path):
    config = config_io.apply_overrides(config, ["mesh.data=1", "mesh.fsdp=2", "mesh.expert=2"])
    (tmp_path / "config.json").write_text(config_io.config_to_json(config))
    command = [sys.executable, "-c", textwrap.dedent(SHARDED), tmp_path / "config.json", pretrained]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment(4))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3  # several layouts
