"""The checksums that a training step holds of its parameters, checked against what is read of them."""

import threading
from collections.abc import Mapping as MappingOf
from pathlib import Path
from typing import Any

import numpy as np

from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.safetensors import summarize
from mmx_jax.storage import json_io
from mmx_jax.storage.array_files import region_checksum

Path_ = tuple[str, ...]  # of a leaf in the tree


def stored_checksums(params_dir: Path) -> dict[Path_, int]:
    """Checksum by parameter of the training step that `params_dir` lies in; {} where it holds none.

    Raises:
      ConversionError: they are damaged.
    """
    file = params_dir.parent / "checksums" / "metadata"
    if not file.is_file():
        return {}
    try:
        values = json_io.read_object(file)
    except (json_io.JsonError, OSError) as error:
        raise ConversionError(f"{error}; {remedy(params_dir)}") from None
    return {tuple(name.split("/")[1:]): value for name, value in values.items() if name.startswith("params/")}


def remedy(params_dir: Path) -> str:
    """The remedy for a damaged training step, for an error message."""
    step, run = params_dir.parent, params_dir.parent.parent
    others = [entry for entry in run.iterdir() if entry.name.isdigit() and entry != step]
    if not others:
        return "no other step of the run is there"
    names = ", ".join(str(entry) for entry in sorted(others, key=lambda entry: int(entry.name))[-4:])
    return f"take another step of the run: {names}"


def check(params_dir: Path, found: MappingOf[Path_, int], expected: MappingOf[Path_, int]) -> None:
    """Raises ConversionError, naming step and parameters, where checksums differ."""
    damaged = sorted("/".join(path) for path, value in found.items() if expected.get(path) != value)
    if damaged:
        raise ConversionError(
            f"step {params_dir.parent.name} in {params_dir.parent.parent}: is damaged: what is read is not what was "
            f"saved, by the checksums of {summarize(damaged)}; {remedy(params_dir)}"
        )


class RunningChecksums:
    """The checksums of parameters that are read slice by slice, tensor by tensor, in any order and by any thread."""

    def __init__(self, params_dir: Path, expected: dict[Path_, int]):
        self._params_dir, self._expected = params_dir, expected
        self._parts: dict[str, int] = {}  # by tensor
        self._lock = threading.Lock()

    def begin(self, tensor: str) -> None:
        """The tensor is read from its start, perhaps once more."""
        self._parts[tensor] = 0

    def add(self, tensor: str, values: np.ndarray, origin: tuple[int, ...], shape: tuple[int, ...]) -> None:
        """`values`, of the tensor, lie at `origin` of its parameter of `shape`."""
        if self._expected:
            part = region_checksum(values, origin, shape)
            with self._lock:
                self._parts[tensor] = (self._parts[tensor] + part) % 2**32

    def parts(self, tensors: list[str]) -> dict[str, int]:
        """Contributions of those tensors, to be kept so that they need not be read again."""
        return {tensor: self._parts[tensor] for tensor in tensors}

    def restore(self, parts: MappingOf[str, int]) -> None:
        """Takes what `parts` gave for tensors that are not read again."""
        self._parts.update(parts)

    def check(self, mappings: Any) -> None:
        """Raises ConversionError unless the parameters, all of which were read, are those that were saved."""
        if not self._expected:
            return
        found: dict[Path_, int] = {}
        for mapping in mappings:
            found[mapping.leaf] = (found.get(mapping.leaf, 0) + self._parts[mapping.hf]) % 2**32
        check(self._params_dir, found, self._expected)
