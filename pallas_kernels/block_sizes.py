"""Block sizes of the kernels: what was measured on this device for this shape, or else what a heuristic says.

A kernel asks while it is traced, and thereby can be tuned by `python -m pallas_kernels.autotune`:

    tile = Tile(**block_sizes.choose(
        "grouped_matmul", "megablox", "rows", dict(rows=8192, depth=6144, ...), candidates=..., heuristic=...
    ))

The table is pallas_kernels/block_sizes.json, or the file that the environment variable PALLAS_KERNELS_TUNING_TABLE
names. Compiled ahead of time there is no device, and the heuristic decides.
"""

import contextlib
import contextvars
import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels.platform import platform

_LOG = logging.getLogger(__name__)
VARIABLE = "PALLAS_KERNELS_TUNING_TABLE"

Shape = dict[str, int | str]
Parameters = dict[str, int]


class TableError(ValueError):
    """A tuning table cannot be read; the message names the file and what is wrong."""


class Kernel(NamedTuple):
    """A kernel with block sizes of its own."""

    op: str
    implementation: str
    name: str  # among the kernels of the implementation


class Choice(NamedTuple):
    """One question that a traced program asked."""

    kernel: Kernel
    shape: Shape
    candidates: list[Parameters]
    heuristic: Parameters

    def offers(self, parameters: Parameters) -> bool:
        return parameters == self.heuristic or parameters in self.candidates


# What a table holds of each entry, and the type of it.
_FIELDS: dict[str, Any] = dict(
    op=str, implementation=str, kernel=str, device=str, shape=dict, parameters=dict, ms=(int, float), jax=str
)

_FORCED: contextvars.ContextVar[dict[Kernel, Parameters]] = contextvars.ContextVar("forced", default={})  # noqa: B039
_RECORD: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar("record", default=None)


def choose(
    op: str,
    implementation: str,
    name: str,
    shape: Shape,
    *,
    candidates: Callable[[], list[Parameters]],
    heuristic: Callable[[], Parameters],
) -> Parameters:
    """The parameters of a kernel: the table's for exactly this shape and device, else the heuristic's.

    Args:
      op, implementation, name: the kernel.
      shape: what the choice depends on, by name.
      candidates: what may be chosen besides. An entry that is not among them is of another version: it is left out,
        and logged.
      heuristic: what is chosen without an entry.

    Raises:
      TableError: the table cannot be read.
    """
    kernel = Kernel(op, implementation, name)
    if (record := _RECORD.get()) is not None:
        record.append(Choice(kernel, shape, candidates(), heuristic()))
    is_forced = kernel in _FORCED.get()
    found = _FORCED.get()[kernel] if is_forced else _index(table_path()).get(_key(*kernel, device(), shape))
    if found is None or found in candidates():
        return found or heuristic()
    if not is_forced and found != heuristic():
        _LOG.warning("the tuning table gives %s for %s of %s, which has no such candidate", found, shape, kernel)
    return heuristic()


@contextlib.contextmanager
def forced(parameters: dict[Kernel, Parameters]) -> Iterator[None]:
    """Makes `choose` answer these inside, where they are candidates. What jit traced before keeps what it chose."""
    token = _FORCED.set(parameters)
    try:
        yield
    finally:
        _FORCED.reset(token)


@contextlib.contextmanager
def recorded() -> Iterator[Any]:
    """A list that every `choose` inside adds a `Choice` to."""
    record: list[Choice] = []
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


def device() -> str | None:
    """The kind of the device at hand, or None where a program is compiled for another platform."""
    own = jax.devices()[0]
    return own.device_kind if own.platform == platform() else None


def table_path() -> Path:
    """The file that `choose` reads."""
    return Path(os.environ.get(VARIABLE) or Path(__file__).with_name("block_sizes.json"))


def load(path: Path) -> list[dict]:
    """The entries of a table.

    Raises:
      TableError: there is no such file, or it is no table. The message names the file and what is wrong.
    """
    try:
        table = json.loads(path.read_text())
    except OSError as error:
        raise TableError(f"cannot read the tuning table {path}: {error.strerror}") from error
    except ValueError as error:
        raise TableError(f"the tuning table {path} is not JSON ({error}); fix or replace it") from error
    entries = table.get("entries") if isinstance(table, dict) else None
    if not isinstance(entries, list):
        raise TableError(f'the tuning table {path} is not {{"entries": [...]}}; fix or replace it')
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or set(entry) != set(_FIELDS):
            raise TableError(f"entry {number} of the tuning table {path} must have the fields {', '.join(_FIELDS)}")
        for field, kind in _FIELDS.items():
            if not isinstance(entry[field], kind):
                raise TableError(f"entry {number} of the tuning table {path}: {field} is {entry[field]!r}")
    return entries


def store(path: Path, kernel: Kernel, shape: Shape, parameters: Parameters, ms: float) -> None:
    """Puts what was measured on the device at hand into a table, in place of what it had for the same.

    Raises:
      TableError: what is there is no table.
      OSError: it cannot be written.
    """
    op, implementation, name = kernel
    entry = dict(
        op=op,
        implementation=implementation,
        kernel=name,
        device=device(),
        shape=shape,
        parameters=parameters,
        ms=ms,
        jax=jax.__version__,
    )
    entries = load(path) if path.exists() else []
    save(path, [*(e for e in entries if _key_of(e) != _key_of(entry)), entry])


def check_writable(path: Path) -> None:
    """Raises what `store` would, and changes nothing."""
    if path.exists():
        load(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
        pass


def save(path: Path, entries: list[dict]) -> None:
    """Replaces a table as a whole, or not at all.

    Raises:
      OSError: it cannot be written.
    """
    lines = ",\n".join(json.dumps(entry) for entry in sorted(entries, key=_key_of))
    # Beside the table, for a rename is atomic within a file system only.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(f'{{"entries": [\n{lines}\n]}}\n')
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    _index.cache_clear()


@functools.cache
def _index(path: Path) -> dict[tuple, Parameters]:
    return {_key_of(entry): entry["parameters"] for entry in load(path)}


def _key_of(entry):
    return _key(entry["op"], entry["implementation"], entry["kernel"], entry["device"], entry["shape"])


def _key(op, implementation, name, device_kind, shape):
    return op, implementation, name, str(device_kind), json.dumps(shape, sort_keys=True)
