"""An export names code that is there and that computes the model."""

import json
import shutil

import pytest

from mmx_jax.checkpoints import export_hf, model_code
from mmx_jax.checkpoints.hf_config import model_config_from_hf, model_config_to_hf
from mmx_jax.config import ModelConfig
from mmx_jax.convert import import_hf
from tests.support.paths import FIXTURES

TEXT = FIXTURES / "text"
ORIGINAL, HF = TEXT / "tiny" / "orig", TEXT / "tiny" / "hf"
FULL = dict(rotary_dim=16, head_dim=16, num_heads=4, num_kv_heads=2)


def hf_config(folder):
    return json.loads((folder / "config.json").read_text())


def named_files(folder):
    return {reference.split(".")[0] + ".py" for reference in hf_config(folder)["auto_map"].values()}


@pytest.mark.parametrize("naming", ["original", "transformers"])
def test_auto_map_names_files_that_are_there(tmp_path, naming):
    export_hf.export_checkpoint(HF, tmp_path / "out", naming=naming)
    assert named_files(tmp_path / "out") == {"configuration_mmx.py", "modeling_mmx.py"}
    for file in model_code.SHIPPED:
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("name", "family"), [("minimax_text_01", "MiniMaxText01"), ("minimax_m1", "MiniMaxM1")])
def test_released_code_stays_what_it_was(tmp_path, name, family):
    source = tmp_path / "source"
    shutil.copytree(ORIGINAL, source)
    files = f"configuration_{name}.py", f"modeling_{name}.py"
    for file in files:
        (source / file).write_text(f"# {file}\n")
    (source / "tokenizer.json").write_text("{}")
    auto_map = {
        "AutoConfig": f"configuration_{name}.{family}Config",
        "AutoModelForCausalLM": f"modeling_{name}.{family}ForCausalLM",
    }
    released = hf_config(ORIGINAL) | {"auto_map": auto_map, "model_type": name}
    released |= {"architectures": [f"{family}ForCausalLM"], "pad_token_id": None}
    (source / "config.json").write_text(json.dumps(released))
    import_hf.import_checkpoint(source, tmp_path / "weights")
    for step in (tmp_path / "weights", source):  # by way of a checkpoint of ours, and at once
        out = tmp_path / f"out of {step.name}"
        export_hf.export_checkpoint(step, out)
        assert hf_config(out) == released
        assert [(out / file).read_text() for file in files] == [f"# {file}\n" for file in files]
        assert not (out / "modeling_mmx.py").exists()
    export_hf.export_checkpoint(tmp_path / "weights", tmp_path / "other", naming="transformers")
    assert named_files(tmp_path / "other") == {"configuration_mmx.py", "modeling_mmx.py"}


def test_half_of_the_released_code_is_not_named(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ORIGINAL, source)
    (source / "configuration_minimax_text_01.py").write_text("")
    (tmp_path / "generation_config.json").write_text("of another model")  # beside the folder, not in it
    export_hf.export_checkpoint(source, tmp_path / "out")
    assert named_files(tmp_path / "out") == {"configuration_mmx.py", "modeling_mmx.py"}
    assert not (tmp_path / "out" / "generation_config.json").exists()


INEXACT = {
    "rotary_dim": (dict(rotary_dim=8), "rotates all 16 dims of a head, where the model rotates 8"),
    "postnorm": (dict(postnorm=False), "postnorm=False"),
    "heads": (dict(num_heads=6), "decay rates for 6 heads"),
    "last layer": (dict(layer_pattern=("softmax", "lightning")), "last layer"),
    "eps": (dict(lightning_norm_eps=1e-5), "lightning_norm_eps=1e-05"),
}


@pytest.mark.parametrize("name", sorted(INEXACT))
def test_transformers_own_class_is_not_named_where_it_computes_otherwise(name):
    changes, reason = INEXACT[name]
    code = model_code.choose(ModelConfig(**FULL | changes), "transformers", "float32", ())
    assert reason in code.warning and "trust_remote_code=True" in code.warning
    assert code.keys["model_type"] != "minimax" and code.keys["architectures"] != ["MiniMaxForCausalLM"]


def test_transformers_own_class_is_named_where_it_computes_the_same():
    code = model_code.choose(ModelConfig(**FULL), "transformers", "float32", ())
    assert not code.warning and code.keys["model_type"] == "minimax"
    assert "left-padded" in code.notes[-1]
    only_softmax = ModelConfig(**FULL | dict(num_heads=6, layer_pattern=("softmax",)))
    assert not model_code.choose(only_softmax, "transformers", "float32", ()).warning
    assert "bfloat16" in model_code.choose(ModelConfig(**FULL), "transformers", "bfloat16", ()).warning


def test_the_report_begins_with_the_warning(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(export_hf.logging, "warning", lambda *message: logged.append(message))
    report = export_hf.export_checkpoint(ORIGINAL, tmp_path / "out", naming="transformers")
    assert report.splitlines()[0].startswith("WARNING: transformers' own MiniMax class computes another function")
    assert "rotates all 32 dims" in str(logged)
    assert "WARNING" not in export_hf.export_checkpoint(ORIGINAL, tmp_path / "out2")


def test_dropping_of_tokens_is_told():
    code = model_code.choose(ModelConfig(capacity_factor=1.25), "original", "float32", ())
    assert "drops no token: capacity_factor=1.25 is omitted" in code.notes[0]


@pytest.mark.parametrize("naming", ["original", "transformers"])
def test_lightning_norm_eps_survives(naming):
    config = ModelConfig(lightning_norm_eps=1e-5)
    written = model_config_to_hf(config, naming)
    assert written["lightning_norm_eps"] == 1e-5
    assert model_config_from_hf(written) == config.resolved()
    assert "lightning_norm_eps" not in model_config_to_hf(ModelConfig(), naming)
    names = {"configuration_minimax_text_01.py", "modeling_minimax_text_01.py"}  # whose eps is fixed
    assert model_code.choose(config, "original", "float32", names).files == model_code.SHIPPED


def test_the_dtype_is_named_for_a_loader_that_asks_the_first_tensor(tmp_path):
    """In a file the float32 routers come first, whatever the other weights are."""
    for naming, key in (("original", "torch_dtype"), ("transformers", "dtype")):
        export_hf.export_checkpoint(TEXT / "tiny_bf16" / "orig", tmp_path / naming, naming=naming)
        assert hf_config(tmp_path / naming)[key] == "bfloat16"
