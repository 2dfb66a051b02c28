"""Kinds of checkpoint paths, and one interface to its tensors in the Hugging Face layout."""

import dataclasses
import os
from pathlib import Path

import numpy as np

from mmx_jax.checkpoints import hf_mapping, hub, json_files
from mmx_jax.checkpoints.errors import ConversionError, shown
from mmx_jax.checkpoints.hf_config import model_config_from_hf
from mmx_jax.checkpoints.orbax_slices import ParamsReader
from mmx_jax.checkpoints.safetensors import INDEX_NAME, SINGLE_NAME, SafetensorsFolder, TensorSpec, open_folder
from mmx_jax.config import Config, ConfigError, ModelConfig
from mmx_jax.config.io import config_from_json
from mmx_jax.storage import filesystem as files

# Files that travel with the weights. The remote code is what `auto_map` of a released config points to.
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "configuration_minimax*.py",
    "modeling_minimax*.py",
)


@dataclasses.dataclass(frozen=True)
class WeightsSource:
    """A checkpoint that was found: `params_dir` holds safetensors ("huggingface") or an orbax tree."""

    kind: str  # "huggingface", "weights" or "run"
    params_dir: Path
    config: ModelConfig
    tokenizer_dir: Path | None

    @property
    def folder(self) -> Path | None:
        """Where the files lie that travel with the weights."""
        places = {"huggingface": self.params_dir, "weights": self.params_dir.parent}
        return places.get(self.kind, self.tokenizer_dir)


def resolve(path: str | os.PathLike) -> WeightsSource:
    """Finds out what lies at `path`.

    Args:
      path: a Hugging Face folder, a weights folder of `convert import`, a training run folder (its newest step is
        taken), or one step of a run.

    Raises:
      ConversionError: none of these, or its config is missing or wrong.
    """
    path = files.expand(path)
    if not path.is_dir():
        raise ConversionError(f"{path}: no such folder; give the folder of a checkpoint{hub.advice(path)}")
    if os.path.lexists(path / INDEX_NAME) or os.path.lexists(path / SINGLE_NAME):
        return WeightsSource("huggingface", path, read_hf_config(path), _tokenizer_dir(path))
    if (path / "checkpoints").is_dir():
        return _run(path, path / "checkpoints" / str(_newest_step(path / "checkpoints")))
    if (path / "params").is_dir():
        if path.parent.name == "checkpoints" and _is_step(path):
            return _run(path.parent.parent, path)
        return WeightsSource("weights", path / "params", read_config(path).model, _tokenizer_dir(path))
    hint = ""
    if (partial := path.with_name(path.name + ".partial")).exists():
        hint = f"; {partial.name} beside it is an unfinished conversion"
    raise ConversionError(
        f"{path}: not a checkpoint: it holds neither {SINGLE_NAME} nor {INDEX_NAME} (a Hugging Face folder), "
        f"nor params (a converted one), nor checkpoints (a training run){hint}"
    )


def _run(run, step):
    if not (step / "params").is_dir():
        raise ConversionError(f"{step}: the training step holds no params; name another step of the run")
    return WeightsSource("run", step / "params", _model_of(run, step), _tokenizer_dir(run / "tokenizer"))


def _model_of(run, step):
    """The model as the stage trained it that the run was in at `step`: a stage may have a RoPE base of its own."""
    config = read_config(run)
    stages = config.training.resolved_stages
    if all(stage.rope_theta is None for stage in stages):
        return config.model
    path = step / "position" / "metadata"
    index = json_files.read_object(path).get("stage_index")
    index = 0 if index is None else index  # None before the first batch
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(stages):
        raise ConversionError(f"{path}: stage_index={shown(index)}, and the run has {len(stages)} stages; copy it anew")
    return config.in_stage(index).model


def _newest_step(folder):
    steps = [int(entry.name) for entry in folder.iterdir() if _is_step(entry) and (entry / "params").is_dir()]
    if not steps:
        raise ConversionError(f"{folder}: holds no finished step; let the training run save one")
    return max(steps)


def _is_step(folder):
    return folder.name.isascii() and folder.name.isdigit()  # "²" is a digit too, and no number


def _tokenizer_dir(folder):
    return folder if (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists() else None


def read_config(folder: Path) -> Config:
    """The resolved config stored beside our own checkpoints."""
    try:
        return config_from_json(json_files.read_text(folder / "config.json"))
    except (OSError, ConfigError) as error:
        raise ConversionError(f"{folder / 'config.json'}: {error}") from None


def read_hf_config(folder: Path) -> ModelConfig:
    """The model of a Hugging Face folder."""
    config = json_files.read_object(folder / "config.json")
    try:
        return model_config_from_hf(config)
    except (ConversionError, ConfigError) as error:
        raise ConversionError(f"{folder / 'config.json'}: {error}") from None


def carried_files(folder: Path) -> list[Path]:
    """The tokenizer and generation files of a folder.

    Raises:
      ConversionError: one of them is only a pointer to the file that it should be.
    """
    files = sorted({file for pattern in CARRIED for file in folder.glob(pattern) if not file.is_dir()})
    for file in files:
        json_files.check_itself(file)
    return files


class HuggingFaceTensors:
    """The tensors of a Hugging Face folder, without the derived buffers."""

    checksums = None  # there are none in such a folder

    def __init__(self, source: WeightsSource):
        self.config = source.config
        self.folder: SafetensorsFolder = open_folder(source.params_dir)
        hf_mapping.check_count(self.config, len(self.folder.entries), str(source.params_dir))
        self.mappings = hf_mapping.expand(self.config)
        self.dropped = hf_mapping.check_tensors(self.config, self.mappings, self.folder.entries, str(source.params_dir))
        self.specs: dict[str, TensorSpec] = {m.hf: self.folder.entries[m.hf] for m in self.mappings}

    def read(self, mapping: hf_mapping.Mapping) -> np.ndarray:
        return self.folder.entries[mapping.hf].read()


class ParamsTensors:
    """The tensors that an orbax parameter tree makes in the Hugging Face layout."""

    def __init__(self, source: WeightsSource):
        self.config = source.config
        self._reader = ParamsReader(source.params_dir)
        self.mappings = hf_mapping.match_parameters(self.config, self._reader.shapes)
        for path, dtype in self._reader.dtypes.items():
            if dtype.name not in hf_mapping.WEIGHT_DTYPES:
                raise ConversionError(
                    f"{source.params_dir}: {'/'.join(path)} has dtype {dtype.name}, expected one of "
                    f"{', '.join(hf_mapping.WEIGHT_DTYPES)}; cast it first"
                )
        self.checksums = self._reader.checksums
        self.specs = {m.hf: TensorSpec(m.hf, self._reader.dtypes[m.leaf], m.hf_shape) for m in self.mappings}

    def read(self, mapping: hf_mapping.Mapping) -> np.ndarray:
        return self._reader.read_hf(mapping)


def open_tensors(source: WeightsSource) -> HuggingFaceTensors | ParamsTensors:
    """The tensors of any checkpoint in the Hugging Face layout, checked against its config."""
    return (HuggingFaceTensors if source.kind == "huggingface" else ParamsTensors)(source)
