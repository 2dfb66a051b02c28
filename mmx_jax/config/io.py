"""Reading, overriding and writing of `mmx_jax.config`: Python files, `--set` strings, JSON, print.

One function, `_build`, stands behind all of them: it turns plain values (dicts, lists, numbers, strings)
into the dataclasses by their annotations, which refuse what does not fit, and names the field.
"""

import dataclasses
import decimal
import difflib
import functools
import json
import os
import runpy
from collections.abc import Iterable, Iterator
from typing import Any

from mmx_jax.config.base import (
    ConfigError,
    checked,
    entry_kind,
    field_kinds,
    is_section,
    kind_name,
    optional_kind,
    shown,
    wrong_type,
)
from mmx_jax.config.run import Config
from mmx_jax.storage import json_io

_MAX_HINTS = 8  # unknown fields that a message names
_COMPARED = 100  # letters of a name, which in a file may be of any length: comparing takes its square
_MAX_INT_DIGITS = 30  # 1e999999999 is an integer that no memory holds


def load_config(path: str | os.PathLike) -> Config:
    """Runs the Python file at `path` and returns what its function `get_config()` returns.

    `__file__` is the path inside the file, so one config can load and change its neighbour
    (`configs/ablations/` does). Raises FileNotFoundError, and ConfigError where `get_config` is missing,
    returns something else, or builds a config with an impossible value, or its own code fails.
    """
    path = os.path.expanduser(os.fspath(path))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no config file {path!r}; a config is a .py file that defines get_config()")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if not callable(get_config):
            raise ConfigError("defines no function get_config() that returns a Config")
        config = get_config()
        if not isinstance(config, Config):
            raise ConfigError(f"get_config() returned {type(config).__name__}, expected Config")
        config.training.check_schedule()
        return config
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # whatever the code of the file raises
        raise ConfigError(f"{path} does not run: {type(error).__name__}: {error}") from error


def apply_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """Returns `config` with each `path.to.field=value` of `overrides` applied in order, then checked as a whole.

    Values are read by the annotation of their field: int (`1_000`, and `1e6` where it is integral), float,
    bool (`true`, `false`), str (as it stands), optional (`none`), tuples of scalars (`a,b,c` or JSON),
    tuples of dataclasses (a JSON list, in which left out fields take their defaults). An entry of such a
    tuple is reached by its index (`training.stages.0.tokens=1e9`); the index one past the end appends.

    Raises ConfigError: unknown path (with the nearest valid one), wrong type, impossible value, or an axis of the mesh
    that is named twice: the product of the axes is checked, so that an override that was forgotten would only surprise.
    """
    root, moved = _plain(config), moved_paths()
    axes = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        path = path.strip()
        if not equals:
            raise ConfigError(f"{override!r} is not of the form path.to.field=value")
        if path in moved:
            raise ConfigError(f"no field {path!r} any more: it is {moved[path]!r} now")
        if path in axes:
            raise ConfigError(f"{path} is named twice, with {axes[path]} and with {text}: give each axis once")
        if path.startswith("mesh."):
            axes[path] = text
        _set(root, path, text)
    changed = _build(Config, root, "")
    try:
        changed.training.check_schedule()
    except ConfigError as error:
        raise ConfigError(f"training: {error}") from error
    return changed


def resolved(plain: dict[str, Any]) -> dict[str, Any]:
    """A plain config in which values that follow from others are written out.

    Two configs that mean the same are then equal: alphas that were given and those that follow from the depth, phases
    of the learning rate in tokens and in shares of the run.

    Args:
      plain: what `config_to_json` wrote, of this version or an earlier one, parsed; fields left out take their default.
    """
    config = from_plain(plain)
    plain = _plain(config) | {"model": _plain(config.model.resolved())}
    for phase, end in zip(plain["training"]["learning_rate_phases"], config.training.phase_ends, strict=True):
        phase |= {"end_tokens": end, "tokens": 0, "share": 0.0}
    return plain


def config_to_json(config: Config) -> str:
    """The resolved config as JSON text; every field is written, also those at their default."""
    return json.dumps(_plain(config), indent=2, allow_nan=False) + "\n"


def config_from_json(text: str) -> Config:
    """The inverse of `config_to_json`, also of earlier versions. Unknown, missing and repeated keys are refused."""
    try:
        plain = json_io.loads(text)
    except json_io.JsonError as error:
        raise ConfigError(f"the config: {error}") from error
    return _build(Config, _upgraded(plain), "")


def from_plain(plain: dict[str, Any]) -> Config:
    """The Config of a parsed config.json of this version or an earlier one; fields left out take their default."""
    return _build(Config, _upgraded(plain), "", fill=True)


def format_config(config: Config) -> str:
    """An aligned listing of the fields that differ from their default, values in the syntax of `apply_overrides`."""
    rows = list(_rows(_plain(config), _plain(Config()), ""))
    changed = [(path, text) for path, text, differs in rows if differs]
    width = max((len(path) for path, _ in changed), default=0)
    lines = [f"  {path:<{width}}  {text}".rstrip() for path, text in changed]
    head = "configuration, where it differs from the defaults:" if lines else "configuration: all defaults"
    return "\n".join([head, *lines, f"  ({len(rows) - len(changed)} other fields have their default)"])


def field_paths() -> list[str]:
    """The dotted path of every field of a Config."""
    return list(_paths(Config, ""))


@functools.cache
def moved_paths() -> dict[str, str]:
    """Paths of fields that earlier versions had, and where these are now."""
    return dict(_moved(Config, ""))


def _moved(cls: type, prefix: str) -> Iterator[tuple[str, str]]:
    for name, path in cls.MOVED.items():
        yield f"{prefix}{name}", path
    for name, kind in field_kinds(cls).items():
        if is_section(kind):
            yield from _moved(kind, f"{prefix}{name}.")


def _upgraded(plain: Any) -> Any:
    """A plain config as this version writes it: fields of earlier versions are put where they are now."""
    if not isinstance(plain, dict):
        return plain
    root = _copy(plain)
    for old, new in moved_paths().items():
        *parents, leaf = old.split(".")
        node = functools.reduce(lambda node, name: node.get(name) if isinstance(node, dict) else None, parents, root)
        if not isinstance(node, dict) or leaf not in node:
            continue
        *new_parents, new_leaf = new.split(".")
        value, kind, target = node.pop(leaf), Config, root
        for name in new_parents:
            kind = field_kinds(kind)[name]
            target = target.setdefault(name, _defaults(kind)) if isinstance(target, dict) else None
        if isinstance(target, dict):  # or the error is raised where it is built
            target[new_leaf] = value
    return root


def _copy(plain: Any, depth: int = 3) -> Any:
    """Dicts copied down to `depth`, that of the sections of a `Config`; other values are shared."""
    if not isinstance(plain, dict) or not depth:
        return plain
    return {key: _copy(value, depth - 1) for key, value in plain.items()}


# Plain values: what JSON knows. Tuples become lists, dataclasses dicts.


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return value


def _rows(plain: dict, default: dict, prefix: str) -> Iterator[tuple[str, str, bool]]:
    """(path, value text, differs) of every leaf; tuples of dataclasses give one row an entry and field."""
    for name, value in plain.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _rows(value, default[name], f"{path}.")
        elif value and isinstance(value, list) and isinstance(value[0], dict):
            for index, entry in enumerate(value):
                for field, text in entry.items():
                    yield f"{path}.{index}.{field}", _text(text), value != default[name]
        else:
            yield path, _text(value), value != default[name]


def _text(value: Any) -> str:
    """The text that `apply_overrides` reads back as `value`."""
    if isinstance(value, list):
        return ",".join(map(_text, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= 1_000_000:
        return f"{value:_}"
    return str(value)


# Annotations and their plain values.


def _defaults(cls: type, *, added_only: bool = False) -> dict[str, Any]:
    """Plain values of the fields of `cls` that have a default; `added_only`: of those that `config_base.added` made."""
    return {
        field.name: _plain(field.default)
        for field in dataclasses.fields(cls)
        if field.default is not dataclasses.MISSING and ("added" in field.metadata or not added_only)
    }


def _build(kind: Any, value: Any, path: str, *, fill: bool = False) -> Any:
    """The object of annotation `kind` that the plain `value` describes.

    Args:
      kind: an annotation.
      value: a plain value.
      path: dotted path of the field, for the errors; empty for the whole config.
      fill: fields left out take the defaults of their dataclass; otherwise they are an error.
    """
    if is_section(kind):
        return _build_dataclass(kind, value, path, fill=fill)
    if inner := optional_kind(kind):
        return None if value is None else _build(inner, value, path, fill=fill)
    if entry := entry_kind(kind):
        if not isinstance(value, list):
            raise wrong_type(path, kind, value)
        return tuple(_build(entry, member, f"{path}.{index}", fill=fill) for index, member in enumerate(value))
    return checked(kind, value, path)


def _build_dataclass(cls: type, value: Any, path: str, *, fill: bool) -> Any:
    where = path or "config"
    if not isinstance(value, dict):
        raise wrong_type(where, cls, value)
    value = _defaults(cls, added_only=not fill) | value
    kinds = field_kinds(cls)
    unknown = [name for name in value if name not in kinds]
    if unknown:
        hints = "; ".join(f"{shown(name)}, nearest is {_nearest(name, kinds)!r}" for name in unknown[:_MAX_HINTS])
        more = f" and {len(unknown) - _MAX_HINTS} more" if len(unknown) > _MAX_HINTS else ""
        raise ConfigError(f"{where}: unknown field {hints}{more}")
    missing = [name for name in kinds if name not in value]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    children = {
        name: _build(kind, value[name], f"{path}.{name}".lstrip("."), fill=fill) for name, kind in kinds.items()
    }
    try:
        return cls(**children)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


# Overrides.


def _set(root: dict, path: str, text: str):
    """Writes the plain value of `text` at `path` into `root`, the plain form of a Config."""
    *parents, leaf = path.split(".")
    kind, node = Config, root
    for depth, part in enumerate(parents):
        kind, node = _child(kind, node, part, path, ".".join(parents[:depth]))
    parent = ".".join(parents)
    kind, _ = _child(kind, node, leaf, path, parent)
    if is_section(kind):
        raise ConfigError(
            f"{path} is a group of fields: set one of them, {', '.join(f'{path}.{n}' for n in field_kinds(kind))}"
        )
    node[int(leaf) if isinstance(node, list) else leaf] = _parse(kind, text, path)


def _child(kind: Any, node: Any, part: str, path: str, parent: str) -> tuple[Any, Any]:
    """(annotation, plain value) of the field or entry `part` of `node`, which has the annotation `kind`."""
    if is_section(kind):
        kinds = field_kinds(kind)
        if part not in kinds:
            raise ConfigError(f"no field {path!r}; the nearest is {_nearest_path(path, parent, kind)!r}")
        return kinds[part], node.get(part)  # absent: a required field of an entry that was just appended
    entry = entry_kind(kind)
    if entry is None:
        raise ConfigError(f"no field {path!r}: {parent} is a single value, {kind_name(kind)}")
    if not (part.isascii() and part.isdigit()) or int(part) > len(node):
        raise ConfigError(f"no field {path!r}: {parent} has {len(node)} entries, and {len(node)} appends one more")
    if int(part) == len(node):
        node.append(_defaults(entry) if is_section(entry) else None)
    return entry, node[int(part)]


def _nearest(name: str, names: Iterable[str]) -> str:
    return max(names, key=lambda candidate: difflib.SequenceMatcher(None, name[:_COMPARED], candidate).ratio())


def _nearest_path(path: str, parent: str, kind: type) -> str:
    """The valid path most like `path`: inside an entry of a tuple its fields, else any path of a Config.

    The likeness of the last names counts as much as that of the whole, so that `training.hidden_size`
    finds `model.hidden_size`.
    """
    if any(part.isdigit() for part in parent.split(".")):
        return f"{parent}.{_nearest(path.rpartition('.')[2], field_kinds(kind))}"

    whole, last = path[:_COMPARED], path.rpartition(".")[2][:_COMPARED]

    def likeness(candidate: str) -> float:
        of_whole = difflib.SequenceMatcher(None, whole, candidate).ratio()
        return of_whole + difflib.SequenceMatcher(None, last, candidate.rpartition(".")[2]).ratio()

    return max(_paths(Config, ""), key=likeness)


def _paths(cls: type, prefix: str) -> Iterator[str]:
    for name, kind in field_kinds(cls).items():
        if is_section(kind):
            yield from _paths(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _parse(kind: Any, text: str, path: str) -> Any:
    """The plain value that `text` means for the annotation `kind`."""
    if inner := optional_kind(kind):
        return None if text.strip().lower() in ("none", "null") else _parse(inner, text, path)
    if entry := entry_kind(kind):
        return _parse_tuple(entry, text, path)
    if kind is str:
        return text
    stripped = text.strip()
    if kind is bool and stripped.lower() in ("true", "false"):
        return stripped.lower() == "true"
    try:
        if kind is int:
            return _parse_int(stripped)
        if kind is float:
            return float(stripped)
    except ValueError:
        pass
    raise wrong_type(path, kind, text)


def _parse_int(text: str) -> int:
    """An int, also in scientific notation (`1e6`); exact, unlike a way through float."""
    try:
        number = decimal.Decimal(text)
    except decimal.InvalidOperation:
        raise ValueError(text) from None
    if not number.is_finite() or number.adjusted() > _MAX_INT_DIGITS or number != number.to_integral_value():
        raise ValueError(text)
    return int(number)


def _parse_tuple(entry: Any, text: str, path: str) -> list:
    stripped = text.strip()
    if not stripped:
        return []
    if stripped.startswith("["):
        try:
            values = json_io.loads(stripped)
        except json_io.JsonError as error:
            raise ConfigError(f"{path}={stripped!r} is not a JSON list: {error}") from error
        return _plain(_build(tuple[entry, ...], values, path, fill=True))
    if is_section(entry):
        raise ConfigError(
            f"{path}={text!r}: expected a JSON list of objects with the fields {', '.join(field_kinds(entry))}; "
            f"or set {path}.0.FIELD=value"
        )
    return [_parse(entry, member.strip(), f"{path}.{index}") for index, member in enumerate(stripped.split(","))]
