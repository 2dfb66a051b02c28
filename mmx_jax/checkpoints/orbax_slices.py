"""Orbax parameter trees, written and read slice by slice.

Orbax saves whole leaves, and a stacked leaf of the 456B model has 36 GB. So orbax itself saves a tree of the same
structure with one element a leaf, in its layout of one zarr (v2) array a leaf; each array is then recreated at its
true shape, with chunks that are exactly (parts of) one Hugging Face tensor, and every chunk is written as the file
that the zarr specification says it is. Orbax restores the result like any other checkpoint, shardings included.
"""

import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging

from mmx_jax.checkpoints.checksums import RunningChecksums, stored_checksums
from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.checkpoints.hf_mapping import Mapping, copy_strips
from mmx_jax.checkpoints.safetensors import atomic_file, raw_bytes
from mmx_jax.storage.array_files import ArrayFolder

MAX_CHUNK_BYTES = 128 * 2**20
CACHE_BYTES = 256 * 2**20  # of decoded chunks, where a chunk holds more than one tensor
LAYOUT_BYTES = 4 * 2**20  # of the metadata that orbax writes, generously
Path_ = tuple[str, ...]  # of a leaf in the tree


def unflatten(leaves: dict[Path_, Any]) -> dict[str, Any]:
    """path -> leaf as nested dicts."""
    tree = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def flatten(tree: dict) -> dict[Path_, Any]:
    """Nested dicts as path -> leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(str(key.key) for key in path): leaf for path, leaf in leaves}


def chunk_shape(shape: tuple[int, ...], leading: int, itemsize: int) -> tuple[int, ...]:
    """Chunks of one slice (`leading` axes of size 1), split along the longest axes down to MAX_CHUNK_BYTES."""
    chunk = [1] * leading + list(shape[leading:])
    while math.prod(chunk) * itemsize > MAX_CHUNK_BYTES:
        axis = max(range(leading, len(chunk)), key=lambda axis: chunk[axis])
        # The smallest divisor keeps every chunk whole and lined up with how meshes cut the axis.
        divisor = next((d for d in range(2, 65) if chunk[axis] % d == 0), 2)
        chunk[axis] = -(-chunk[axis] // divisor)
    return tuple(chunk)


class ParamsWriter:
    """Writes an orbax parameter tree in `folder`, one slice at a time.

    Args:
      folder: `DIR/params`; made anew unless `resume`.
      shapes: path -> shape of every parameter.
      dtypes: path -> dtype of every parameter.
      leading: path -> how many leading axes index slices (0, 1 block or 2 block and expert).
    """

    def __init__(self, folder: Path, shapes, dtypes, leading, *, resume: bool = False):
        self.folder = folder
        self._dtypes = dtypes
        self._shapes = shapes
        self._chunks = {path: chunk_shape(shapes[path], leading[path], dtypes[path].itemsize) for path in shapes}
        if not resume:
            self._create()

    def _create(self):
        if self.folder.exists():
            shutil.rmtree(self.folder)
        _probe_disk(self.folder.parent)
        tiny = {path: np.zeros((1,) * len(shape), self._dtypes[path]) for path, shape in self._shapes.items()}
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # orbax warns that there is no OCDBT to merge, which is what is asked for
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
                checkpointer.save(self.folder.absolute(), unflatten(tiny))
        finally:
            logging.set_verbosity(verbosity)
        for path, shape in self._shapes.items():
            array = self._array(path)
            if not array.is_dir():
                raise ConversionError(f"{array}: this orbax version names its arrays otherwise; use another version")
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": str(array.absolute())},
                "metadata": {"compressor": None, "dimension_separator": ".", "chunks": list(self._chunks[path])},
            }
            dtype = ts.dtype(self._dtypes[path])
            ts.open(spec, create=True, delete_existing=True, dtype=dtype, shape=shape).result()

    def _array(self, path):
        return self.folder / ".".join(path)

    def _parts(self, path, index, slice_shape) -> Iterator[tuple[Path, tuple[slice, ...], tuple[int, ...]]]:
        """(file, region of the slice, chunk) of every chunk of `leaf[index]`."""
        chunk = self._chunks[path][len(index) :]
        counts = [-(-size // step) for size, step in zip(slice_shape, chunk, strict=True)]
        for position in itertools.product(*map(range, counts)):
            region = tuple(slice(p * step, (p + 1) * step) for p, step in zip(position, chunk, strict=True))
            yield self._array(path) / ".".join(map(str, index + position)), region, chunk

    def write(self, path: Path_, index: tuple[int, ...], piece: np.ndarray) -> None:
        """Writes `leaf[index] = piece`; `piece` may be a transposed view. It is on disk on return."""
        for file, region, chunk in self._parts(path, index, piece.shape):
            part = piece[region]
            # Chunks at the edge of an array are stored in full.
            buffer = np.zeros(chunk, piece.dtype) if part.shape != chunk else np.empty(chunk, piece.dtype)
            copy_strips(buffer[tuple(slice(size) for size in part.shape)], part)
            with atomic_file(file) as out:
                out.write(raw_bytes(buffer))

    def is_written(self, path: Path_, index: tuple[int, ...], slice_shape: tuple[int, ...]) -> bool:
        """Whether every chunk of `leaf[index]` is there at its full size."""
        return all(
            file.is_file() and file.stat().st_size == math.prod(chunk) * self._dtypes[path].itemsize
            for file, _, chunk in self._parts(path, index, slice_shape)
        )


def _probe_disk(folder: Path):
    """Raises OSError where LAYOUT_BYTES cannot be had: orbax answers a full disk with pages of tracebacks."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, LAYOUT_BYTES)


class ParamsReader:
    """Reads slices of an orbax parameter tree, ours or one that training saved."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                metadata = flatten(checkpointer.metadata(folder.absolute()).item_metadata.tree)
            self._arrays = ArrayFolder(folder, CACHE_BYTES)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ConversionError(f"{folder}: not an orbax parameter tree ({_first_line(error)})") from None
        self.shapes = {path: tuple(leaf.shape) for path, leaf in metadata.items()}
        self.dtypes = {path: np.dtype(leaf.dtype) for path, leaf in metadata.items()}
        self.checksums = RunningChecksums(folder, stored_checksums(folder))

    def read_hf(self, mapping: Mapping) -> np.ndarray:
        """The Hugging Face tensor of a mapping, contiguous, in the dtype on disk; `checksums` takes note of it."""
        out = np.empty(mapping.hf_shape, self.dtypes[mapping.leaf])
        view = mapping.to_mmx(out)
        self.checksums.begin(mapping.hf)
        try:
            store = self._arrays.open(".".join(mapping.leaf))
            piece = store[mapping.index] if mapping.index else store
            step = chunk_shape(piece.shape, 0, out.dtype.itemsize)
            counts = [-(-size // width) for size, width in zip(piece.shape, step, strict=True)]
            for position in itertools.product(*map(range, counts)):
                region = tuple(slice(p * width, (p + 1) * width) for p, width in zip(position, step, strict=True))
                region = tuple(
                    slice(part.start, min(part.stop, size)) for part, size in zip(region, piece.shape, strict=True)
                )
                values = piece[region].read().result()
                copy_strips(view[region], values)
                origin = (*mapping.index, *(part.start for part in region))
                self.checksums.add(
                    mapping.hf, values.reshape((1,) * len(mapping.index) + values.shape), origin, store.shape
                )
        except ValueError as error:
            raise ConversionError(
                f"{self.folder}: cannot read {'/'.join(mapping.leaf)}{list(mapping.index)}: {_first_line(error)}"
            ) from None
        return out


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
