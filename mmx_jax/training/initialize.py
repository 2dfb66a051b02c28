"""The beginning of a run from the weights of a checkpoint: which may be taken, their tokenizer, the training state.

The run keeps the origin in WORKDIR/init_from.json. Once the run has a checkpoint of its own, that one is continued, and
the origin is not read again.
"""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from mmx_jax import distributed
from mmx_jax.checkpoints import load
from mmx_jax.config import Config, ConfigError, ModelConfig
from mmx_jax.data.tokenizer import Tokenizer
from mmx_jax.storage import json_io
from mmx_jax.training import optimizer, train_step

# How the function is computed, and how weights begin that are not loaded.
RUN_FIELDS = frozenset("dtype param_dtype initializer initializer_range".split())
# What a run may change on purpose: the length of the context, what training drops and adds to the loss, token roles.
TOLD_FIELDS = frozenset(
    """
    rope_theta max_position_embeddings capacity_factor capacity_scope expert_buffer router_aux_loss_coef
    bos_token_id eos_token_id pad_token_id
    """.split()
)
# Of these, --model_from_checkpoint takes what a model is published with.
PUBLISHED_FIELDS = frozenset("rope_theta max_position_embeddings bos_token_id eos_token_id pad_token_id".split())

_ORIGIN = "init_from.json"


class InitializationError(ConfigError):
    """A run that cannot begin from this checkpoint; the message names the fields or files and the remedy."""


def check_model(wanted: ModelConfig, stored: ModelConfig, path: str | os.PathLike) -> list[str]:
    """Lines about fields that the run changes on purpose.

    Raises:
      InitializationError: with every field in which the config asks for another model than the checkpoint holds.
    """
    wanted, stored = wanted.resolved(), stored.resolved()
    differing = [
        (field.name, getattr(stored, field.name), getattr(wanted, field.name))
        for field in dataclasses.fields(ModelConfig)
        if field.name not in RUN_FIELDS and not _agree(getattr(stored, field.name), getattr(wanted, field.name))
    ]
    refused = [
        f"model.{name}: {_shown(old)} in the checkpoint, {_shown(new)} in the config"
        for name, old, new in differing
        if name not in TOLD_FIELDS
    ]
    if refused:
        raise InitializationError(
            f"--init_from={path} holds another model than the config asks for:\n  "
            + "\n  ".join(refused)
            + "\nset these fields as the checkpoint has them, or take them all from it with --model_from_checkpoint"
        )
    return [f"model.{name} is {_shown(new)}; the checkpoint has {_shown(old)}" for name, old, new in differing]


def with_model_of(config: Config, path: str | os.PathLike, workdir: str | os.PathLike) -> Config:
    """`config` with what the checkpoint's model is; how it is run and trained stays.

    A run that has begun from `path` keeps the model of that time in its folder, and needs `path` no more.
    """
    origin = read_origin(workdir)
    if origin is not None and origin["path"] == _identity(path):
        stored = {name: tuple(value) if isinstance(value, list) else value for name, value in origin["model"].items()}
    else:
        stored = dataclasses.asdict(load.resolve(path).config)
    kept = RUN_FIELDS | (TOLD_FIELDS - PUBLISHED_FIELDS)
    taken = {name: value for name, value in stored.items() if name not in kept}
    try:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **taken))
    except (ConfigError, TypeError) as error:
        raise InitializationError(f"the config does not go with the model of {path}: {error}") from error


def check(config: Config, path: str | os.PathLike, workdir: str | os.PathLike, start: int) -> list[str]:
    """Checks, before anything is allocated, what --init_from means to the run, and records a new beginning.

    Args:
      path: the checkpoint; empty: the flag was not given.
      start: the step of the run's own checkpoint that it goes on from; 0: it begins.

    Returns:
      Lines for the user.

    Raises:
      InitializationError: the weights do not fit, or the run in `workdir` was begun otherwise.
      ConversionError: `path` holds no checkpoint.
    """
    origin = read_origin(workdir)
    if start:
        return _check_continued(path, workdir, origin) if path else []
    if not path:
        _check_not_forgotten(workdir, origin)
        return []
    source = load.resolve(path)
    notes = check_model(config.model, source.config, path)
    tokenizer_of(config, path)
    if distributed.is_first():
        write_origin(workdir, path, source.config)
    return [f"begins from the weights in {source.params_dir}, with a fresh optimizer", *notes]


def _check_continued(path, workdir, origin):
    if origin is None or origin["path"] != _identity(path):
        begun = "with new weights" if origin is None else f"from {origin['path']}"
        raise InitializationError(
            f"the run in {workdir} has checkpoints and was begun {begun}, so that --init_from={path} would be without "
            "effect: leave the flag out to continue the run, or choose another --workdir"
        )
    return [f"--init_from={path} has been taken at the beginning of this run; its own checkpoint goes on from there"]


def _check_not_forgotten(workdir, origin):
    if origin is not None:
        raise InitializationError(
            f"the run in {workdir} was begun with --init_from={origin['path']} and has no checkpoint yet: give "
            f"the flag again, choose another --workdir, or begin with new weights after removing its {_ORIGIN}"
        )


def tokenizer_of(config: Config, path: str | os.PathLike) -> Tokenizer:
    """The tokenizer that goes with the checkpoint's weights.

    Raises:
      InitializationError: the config names one whose vocabulary is another, or neither has one.
    """
    folder = load.resolve(path).tokenizer_dir
    if not config.data.tokenizer:
        if folder is None:
            raise InitializationError(
                f"--init_from={path} holds no tokenizer.json, and a new tokenizer would not fit its weights: put the "
                "tokenizer's files beside the weights, or name them with --set data.tokenizer=FOLDER"
            )
        return Tokenizer.load(folder)
    named = Tokenizer.load(config.data.tokenizer)
    if folder is not None:
        remedy = "leave data.tokenizer empty to take the checkpoint's"
        check_vocabulary(named, Tokenizer.load(folder), f"data.tokenizer={config.data.tokenizer}", remedy)
    return named


def check_vocabulary(tokenizer: Tokenizer, stored: Tokenizer, name: str, remedy: str) -> None:
    """Raises InitializationError where a token has another id than in the checkpoint's tokenizer."""
    ours, theirs = (each.backend.get_vocab(with_added_tokens=True) for each in (tokenizer, stored))
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if differing:
        examples = ", ".join(
            f"{token!r} ({theirs.get(token)} there, {ours.get(token)} here)" for token in differing[:3]
        )
        raise InitializationError(
            f"{name} is not the tokenizer of --init_from: {len(differing)} tokens have another id, such as {examples}; "
            + remedy
        )


def load_state(config: Config, mesh: jax.sharding.Mesh, path: str | os.PathLike) -> Any:
    """A new training state with the parameters of the checkpoint; each process reads what its shards need.

    Raises:
      ConversionError: the checkpoint is damaged.
      InitializationError: it holds numbers that are not finite.
    """
    shardings = train_step.state_shardings(config, mesh)
    _, params = load.load_params(path, param_dtype=config.model.param_dtype, shardings=shardings["params"])
    all_finite = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree), out_shardings=shardings["step"]
    )
    broken = [
        "/".join(key.key for key in keys)
        for keys, value in jax.tree_util.tree_leaves_with_path(jax.device_get(all_finite(params)))
        if not value
    ]
    if broken:
        more = f" and {len(broken) - 6} more" if len(broken) > 6 else ""
        raise InitializationError(
            f"--init_from={path} holds numbers that are not finite, in {', '.join(broken[:6])}{more}: take another "
            "step of the run, or the weights from their source again"
        )

    def rest(params):
        return {"step": jnp.zeros((), jnp.int32), "opt_state": optimizer.init_optimizer(config.training, params)}

    places = {name: shardings[name] for name in ("step", "opt_state")}
    return {"params": params, **jax.jit(rest, out_shardings=places)(params)}


def read_origin(workdir: str | os.PathLike) -> dict | None:
    """{"path", "model"} of the checkpoint that the run began from; None: it began with new weights."""
    file = pathlib.Path(workdir) / _ORIGIN
    if not file.exists():
        return None
    try:
        origin = json_io.read_object(file)
        if not isinstance(origin.get("path"), str) or not isinstance(origin.get("model"), dict):
            raise InitializationError(f"{file} lacks the path or the model of a checkpoint: restore or remove it")
    except json_io.JsonError as error:
        raise InitializationError(f"{file} is damaged ({error}): restore or remove it") from error
    return origin


def write_origin(workdir: str | os.PathLike, path: str | os.PathLike, model: ModelConfig) -> None:
    """Records that the run in `workdir` begins from the checkpoint `path`."""
    file = pathlib.Path(workdir) / _ORIGIN
    temporary = file.with_suffix(".tmp")
    text = json.dumps({"path": _identity(path), "model": dataclasses.asdict(model)}, indent=2)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, file)


def _identity(path) -> str:
    return str(pathlib.Path(path).absolute())


def _agree(old, new) -> bool:
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=1e-6)  # what a decimal of another writer may differ by
    return old == new


def _shown(value) -> str:
    return ",".join(value) if isinstance(value, tuple) else repr(value)
