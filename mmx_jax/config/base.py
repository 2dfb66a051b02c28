"""The base of all sections of a configuration: fields are checked against their annotations when one is built."""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

# The largest size of a dimension, which indices of 32 bits reach, and the smallest positive number of float32.
MAX_SIZE = 2**31 - 1
FLOAT32_TINY = 2.0**-126


class ConfigError(ValueError):
    """A configuration that cannot be; the message names the field and the remedy."""


class Section:
    """Base of every configuration dataclass: no way of building one leads past the check of its fields.

    A subclass is a frozen dataclass whose annotations are int, float, bool, str, X | None, tuple[X, ...] or a Section.

    Attributes:
      MOVED: fields that earlier versions had here, with their path in a `Config` now.
    """

    MOVED: typing.ClassVar[Mapping[str, str]] = {}

    def __new__(cls, **fields):
        for name in fields.keys() & cls.MOVED.keys():
            raise ConfigError(f"{cls.__name__} has no field {name!r} any more: it is {cls.MOVED[name]} now")
        return super().__new__(cls)

    def __post_init__(self):
        for name, kind in field_kinds(type(self)).items():
            object.__setattr__(self, name, checked(kind, getattr(self, name), name))
        self.check()

    def check(self) -> None:
        """Raises ConfigError where fields of the right type hold impossible values, or do not fit together."""


def added(default: Any) -> Any:
    """A field that earlier versions did not have: a config.json that lacks it is read with this default."""
    return dataclasses.field(default=default, metadata={"added": True})


@functools.cache
def field_kinds(cls: type) -> dict[str, Any]:
    """Name -> annotation of every field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def is_section(kind: Any) -> typing.TypeGuard[type]:
    """Whether an annotation is a dataclass."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def optional_kind(kind: Any) -> Any:
    """X of `X | None`, else None."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        (inner,) = (member for member in typing.get_args(kind) if member is not types.NoneType)
        return inner
    return None


def entry_kind(kind: Any) -> Any:
    """X of `tuple[X, ...]`, else None."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None


def kind_name(kind: Any) -> str:
    """An annotation in words, for messages."""
    if inner := optional_kind(kind):
        return f"{kind_name(inner)} or none"
    if entry := entry_kind(kind):
        return f"a list of {kind_name(entry)}"
    return kind.__name__


def wrong_type(path: str, kind: Any, value: Any) -> ConfigError:
    return ConfigError(f"{path}={shown(value)}: expected {kind_name(kind)}")


def checked(kind: Any, value: Any, path: str) -> Any:
    """`value` as a field with the annotation `kind` holds it: lists become tuples, and integers floats.

    Args:
      path: name of the field, for the errors.

    Raises:
      ConfigError: another type, a float that is not finite, an integer beyond 64 bits, or text that UTF-8 cannot hold.
    """
    if inner := optional_kind(kind):
        return None if value is None else checked(inner, value, path)
    if entry := entry_kind(kind):
        if not isinstance(value, list | tuple):
            raise wrong_type(path, kind, value)
        return tuple(checked(entry, member, f"{path}.{index}") for index, member in enumerate(value))
    # bool is a subclass of int, and True is no layer count.
    if isinstance(value, bool) and kind is not bool:
        raise wrong_type(path, kind, value)
    if kind is float and isinstance(value, int):
        try:
            value = float(value)
        except OverflowError:
            raise wrong_type(path, kind, value) from None
    if not isinstance(value, kind):
        raise wrong_type(path, kind, value)
    return _SCALARS[kind](value, path) if kind in _SCALARS else value


def _finite(value: float, path: str) -> float:
    if not math.isfinite(value):
        raise ConfigError(f"{path}={value} is not finite")
    return float(value)  # NumPy's float64 is a float too


def _in_64_bits(value: int, path: str) -> int:
    if not -(2**63) <= value < 2**63:
        raise ConfigError(f"{path}={shown(value)} does not fit 64 bits")
    return int(value)


def _text(value: str, path: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise ConfigError(f"{path}={ascii(value)} holds {half}, which is no character and has no UTF-8") from None
    return value


_SCALARS = {float: _finite, int: _in_64_bits, str: _text}


def shown(value: Any) -> str:
    try:
        shown = repr(value)
    except ValueError:  # more digits than Python converts
        return "an integer of thousands of digits"
    return shown if len(shown) < 80 else shown[:77] + "..."


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def require_positive(config: Section, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name}={value!r} must be positive")
        require(value >= FLOAT32_TINY, f"{name}={value!r} is zero in float32, the smallest is {FLOAT32_TINY:.2e}")


def require_not_negative(config: Section, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{name}={value!r} must not be negative")


def require_sizes(config: Section, *names: str) -> None:
    """Of dimensions of arrays."""
    require_positive(config, *names)
    for name in names:
        value = getattr(config, name)
        require(value <= MAX_SIZE, f"{name}={value!r} is larger than any array, at most {MAX_SIZE:,}")


def require_choice(config: Section, **choices: tuple[str, ...]) -> None:
    for name, allowed in choices.items():
        value = getattr(config, name)
        require(value in allowed, f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
