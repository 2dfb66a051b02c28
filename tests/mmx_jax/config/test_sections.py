"""Fields that moved to another section, and what of a configuration a resumption may change."""

import dataclasses
import json

import pytest

from mmx_jax.config import Config, ConfigError, DataConfig, ModelConfig, RuntimeConfig, TrainingConfig, load_config
from mmx_jax.config import io as config_io

MOVED = config_io.moved_paths()
SECTIONS = {"model": ModelConfig, "training": TrainingConfig, "data": DataConfig}


def value_at(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_is_an_error_that_names_the_new_one(old):
    with pytest.raises(ConfigError, match=f"no field '{old}' any more: it is '{MOVED[old]}' now"):
        config_io.apply_overrides(Config(), [f"{old}=1"])
    section, name = old.split(".")
    with pytest.raises(ConfigError, match=f"no field '{name}' any more: it is {MOVED[old]} now"):
        SECTIONS[section](**{name: 1})
    with pytest.raises(ConfigError, match=f"it is {MOVED[old]} now"):
        dataclasses.replace(SECTIONS[section](), **{name: 1})
    value_at(Config(), MOVED[old])  # exists


def test_a_config_file_with_an_old_field_is_refused_by_file_and_new_path(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from mmx_jax.config import Config, ModelConfig\n"
        "def get_config():\n    return Config(model=ModelConfig(remat='full'))\n"
    )
    with pytest.raises(ConfigError, match=r"own\.py: ModelConfig has no field 'remat' any more: it is runtime\.remat"):
        load_config(path)


def test_a_config_of_an_earlier_version_is_read_with_its_values():
    config = config_io.apply_overrides(
        Config(),
        ["runtime.remat=dots", "runtime.loss_chunk=7", "monitoring.log_every_steps=3", "data.reading.prefetch=5"],
    )
    earlier = json.loads(config_io.config_to_json(config))
    for old, new in MOVED.items():
        section, name = old.split(".")
        earlier[section][name] = value_at(config, new)
    del earlier["runtime"], earlier["monitoring"], earlier["data"]["reading"]
    assert config_io.config_from_json(json.dumps(earlier)) == config
    assert config_io.resolved(earlier) == config_io.resolved(json.loads(config_io.config_to_json(config)))
    earlier["model"]["remat"] = "all of it"
    with pytest.raises(ConfigError, match="runtime: remat='all of it' is not one of"):
        config_io.config_from_json(json.dumps(earlier))


@pytest.mark.parametrize("section", ["runtime", "data"])
def test_a_section_that_is_no_object_is_refused(section):
    earlier = json.loads(config_io.config_to_json(Config()))
    earlier["model"]["remat"] = "full"
    earlier[section] = 3
    with pytest.raises(ConfigError, match=section):
        config_io.config_from_json(json.dumps(earlier))


def may_change(config, path):
    return path.startswith(config.resumable)


def test_what_a_resumption_may_change_follows_from_the_section():
    config = Config()
    for path in config_io.field_paths():
        section = path.rpartition(".")[0]
        harmless = section in ("", "mesh", "runtime", "checkpoint", "monitoring", "data.reading")
        assert may_change(config, path) == harmless, path


@pytest.mark.parametrize(
    ("model", "mesh", "token_groups"),
    [
        (dict(capacity_factor=1.0), True, True),
        (dict(capacity_factor=1.0, capacity_scope="local"), False, True),
        (dict(capacity_scope="local"), True, True),  # dropless
        (dict(expert_buffer=2.0), False, False),
    ],
)
def test_what_drops_rows_by_the_layout_of_the_mesh_keeps_that_layout(model, mesh, token_groups):
    config = Config(model=ModelConfig(**model))
    assert may_change(config, "mesh.expert") == mesh
    assert may_change(config, "runtime.token_groups") == token_groups
    others = [field.name for field in dataclasses.fields(RuntimeConfig) if field.name != "token_groups"]
    assert all(may_change(config, f"runtime.{name}") for name in others)
