"""Reading and writing safetensors files and folders, in bounded memory and without trusting a header.

A file is `<u64 header length><JSON header><tensor bytes>`; the header maps a name to dtype, shape and offsets.
Ours differs from the safetensors package in that fp8 works in NumPy, that tensors are streamed in and out one at
a time, and that every defect is an error naming the file and the tensor.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging

from mmx_jax.checkpoints import json_files
from mmx_jax.checkpoints.errors import ConversionError, shown
from mmx_jax.storage import file_kinds, json_io

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
MAX_AXES = 32  # of a tensor, as NumPy had it before 2.0
# The sub-byte dtypes F4, F6_E2M3 and F6_E3M2 have no NumPy counterpart that is packed as on disk.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The safetensors package writes tensors by descending rank of the dtype, then by name; the same order makes our
# files byte-identical to its own.
WRITE_ORDER: Sequence[str] = (
    "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64".split()
)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one tensor of a safetensors file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class TensorEntry(TensorSpec):
    """Where one tensor lies: `offset` is counted from the start of the file."""

    path: Path
    offset: int

    def map(self) -> np.ndarray:
        """The tensor as a read-only memory map: only what is sliced out of it is read."""
        if self.nbytes == 0:
            return np.zeros(self.shape, self.dtype)
        raw = np.memmap(self.path, np.uint8, "r", self.offset, (self.nbytes,))
        return raw.view(self.dtype).reshape(self.shape)

    def read(self) -> np.ndarray:
        """The tensor in memory of its own, so that an I/O error is an exception and not a SIGBUS."""
        out = np.empty(self.nbytes, np.uint8)
        view, done = out.data, 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            while done < self.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise ConversionError(f"{self.path}: the file ends inside {self.name!r}; copy or download it again")
                done += count
        return out.view(self.dtype).reshape(self.shape)


def read_header(path: str | os.PathLike) -> tuple[dict[str, TensorEntry], dict[str, str], str]:
    """Reads and checks the header of a safetensors file.

    Returns:
      The entries by name in file order, the `__metadata__` strings, and the sha256 of the header's bytes.

    Raises:
      ConversionError: the file is not exactly what its header says, down to the last byte.
      OSError: it cannot be read.
    """
    path = Path(path)
    json_files.check_regular(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        raw = file.read(length) if length <= MAX_HEADER_BYTES else b""
    if len(prefix) < 8 or len(raw) < length:
        raise ConversionError(f"{path}: {_not_safetensors(path, length, size)}; copy or download it again")
    header = _parse_header(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ConversionError(f"{path}: wrong header: __metadata__ must map strings to strings")
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_cover(path, entries, 8 + length, size)
    return entries, metadata, hashlib.sha256(prefix + raw).hexdigest()


def _head(path):
    with open(path, "rb") as file:
        return file.read(file_kinds.HEAD_BYTES)


def _not_safetensors(path, length, size):
    """Why a file has no header, in words."""
    head = _head(path)
    if kind := file_kinds.recognize(head):
        return f"not a safetensors file, but {kind}"
    if size < 8:
        return f"truncated: {size} bytes, too few for a safetensors header"
    if length <= MAX_HEADER_BYTES:
        return f"truncated: the header needs {8 + length} bytes, the file has {size}"
    quoted = file_kinds.quote(head)
    begins = f", and it begins with the text {quoted}" if quoted else ""
    return f"wrong header: it claims {length} bytes for itself{begins}; not a safetensors file"


def _parse_header(path, raw):
    try:
        header = json_io.loads(raw)
    except json_io.JsonError as error:
        kind = file_kinds.recognize(_head(path))
        instead = f"but {kind}" if kind else "or damaged"
        raise ConversionError(f"{path}: wrong header: {error}; not a safetensors file, {instead}") from None
    if not isinstance(header, dict):
        raise ConversionError(f"{path}: wrong header: a JSON object is expected, found {type(header).__name__}")
    return header


def _is_size(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry(path, name, value, data_start):
    where = f"{path}: wrong header: tensor {shown(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ConversionError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConversionError(f"{where} has dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(map(_is_size, shape)):
        raise ConversionError(f"{where} has shape {shown(shape)}; a list of at most {MAX_AXES} sizes is expected")
    if math.prod(size for size in shape if size) * DTYPES[dtype].itemsize >= 2**63:  # also beside a size of 0
        raise ConversionError(f"{where} has shape {shown(shape)}, which no memory can hold")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise ConversionError(f"{where} has data_offsets {shown(offsets)}; a begin and an end are expected")
    entry = TensorEntry(name, DTYPES[dtype], tuple(shape), path, data_start + offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes:
        raise ConversionError(
            f"{where} of {dtype}{shown(shape)} needs {entry.nbytes} bytes, its offsets {offsets} do not span that"
        )
    return entry


def _check_cover(path, entries, start, size):
    position = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != position:
            defect = "overlaps the tensor before it" if entry.offset < position else "leaves a hole before it"
            raise ConversionError(f"{path}: wrong header: tensor {shown(entry.name)} {defect}")
        position += entry.nbytes
    if size < position:
        raise ConversionError(
            f"{path}: truncated: the header describes {position} bytes, the file has {size}; copy or download it again"
        )
    if size > position:
        raise ConversionError(
            f"{path}: {size - position} bytes too long: the header describes {position} bytes, the file has {size}"
        )


@dataclasses.dataclass(frozen=True)
class SafetensorsFolder:
    """The tensors of a single or sharded checkpoint, and what identifies its files."""

    path: Path
    entries: dict[str, TensorEntry]
    fingerprint: dict[str, list]  # file -> [size, mtime in ns, sha256 of the header]
    ignored: tuple[str, ...] = ()  # "NAME in FILE" of copies that the index takes from another shard

    def check_unchanged(self, fingerprint: dict[str, list], since: str) -> None:
        for name in sorted(set(self.fingerprint) | set(fingerprint)):
            if self.fingerprint.get(name) != fingerprint.get(name):
                raise ConversionError(f"{self.path / name}: changed since {since}; start over with --overwrite")


def open_folder(path: str | os.PathLike) -> SafetensorsFolder:
    """Opens a folder with `model.safetensors`, or with an index and shards of any names, and checks all headers.

    The index says which shard a tensor is taken from; a copy in another one is ignored, with a warning.

    Raises:
      ConversionError: a shard is missing or damaged, or index and shards name different tensors.
    """
    path = Path(path)
    index_path, single_path = path / INDEX_NAME, path / SINGLE_NAME
    single, index = (os.path.lexists(file) for file in (single_path, index_path))
    if index and single:
        raise ConversionError(f"{path}: holds both {SINGLE_NAME} and {INDEX_NAME}; remove the one that is stale")
    if single:
        entries, _, digest = read_header(single_path)
        return SafetensorsFolder(path, entries, {SINGLE_NAME: _file_fingerprint(single_path, digest)})
    if not index:
        raise ConversionError(f"{path}: holds neither {SINGLE_NAME} nor {INDEX_NAME}; give the folder of a checkpoint")
    return _open_shards(path, _read_index(index_path))


def _open_shards(path: Path, weight_map: dict[str, str]) -> SafetensorsFolder:
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        listed.setdefault(file, set()).add(name)
    entries, fingerprint, ignored = {}, {}, []
    for file in sorted(listed):
        if not os.path.lexists(path / file):
            raise ConversionError(f"{path / file}: missing shard, named in {INDEX_NAME}; download it")
        shard, _, digest = read_header(path / file)
        fingerprint[file] = _file_fingerprint(path / file, digest)
        absent, surplus = sorted(listed[file] - set(shard)), sorted(set(shard) - listed[file])
        if absent:
            raise ConversionError(f"{path / file}: lacks {summarize(absent)}, which {INDEX_NAME} expects in it")
        if unlisted := [name for name in surplus if name not in weight_map]:
            raise ConversionError(f"{path / file}: holds {summarize(unlisted)}, which {INDEX_NAME} does not list")
        ignored += [f"{name} in {file}" for name in surplus]
        entries |= {name: shard[name] for name in shard if name in listed[file]}
    if ignored:
        logging.warning("%s: ignored, as %s names another shard: %s", path, INDEX_NAME, summarize(ignored))
    return SafetensorsFolder(path, entries, fingerprint, tuple(ignored))


def _file_fingerprint(path, digest):
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, digest]


def _read_index(path):
    weight_map = json_files.read_object(path).get("weight_map")
    remedy = f"{path}: not a safetensors index"
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{remedy}: it has no weight_map of tensor names to file names; download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise ConversionError(f"{remedy}: weight_map has {shown(file)} for {shown(name)}, not the name of a file")
        if not is_file_name(file):
            raise ConversionError(
                f"{path}: shard name {shown(file)} is no file name or leaves the folder; only plain names are allowed"
            )
    return weight_map


def is_file_name(text: str) -> bool:
    """Whether a text from a file names a file beside it, and nothing elsewhere."""
    return text not in ("", "..") and Path(text).name == text and text.isprintable() and len(os.fsencode(text)) <= 255


def summarize(names: Sequence[str], limit: int = 8) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(shown, names[:limit])) + more


def plan_shards(specs: list[TensorSpec], shard_size: int, naming: str) -> dict[str, list[TensorSpec]]:
    """Distributes tensors over files of at most `shard_size` bytes (a larger tensor has a file of its own).

    File names count from 0 in the original naming and from 1 in transformers'; a single file is model.safetensors.
    """
    shards, filled = [], 0
    for spec in specs:
        if not shards or filled + spec.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    base = 0 if naming == "original" else 1
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, base)}


def write_index(path: Path, shards: dict[str, list[TensorSpec]]) -> None:
    """Writes the index of several shards; `total_size` is the number of tensor bytes."""
    weight_map = {spec.name: file for file, specs in shards.items() for spec in specs}
    total = sum(spec.nbytes for specs in shards.values() for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_atomically(path, json.dumps(index, indent=2) + "\n")


def file_order(specs: list[TensorSpec]) -> list[TensorSpec]:
    """The order in which `write_shard` writes tensors."""
    return sorted(specs, key=lambda spec: (-WRITE_ORDER.index(DTYPE_NAMES[spec.dtype]), spec.name))


def write_shard(
    path: Path, specs: list[TensorSpec], tensors: Iterator[np.ndarray], on_bytes: Callable[[int], None] = lambda _: None
) -> str:
    """Streams one safetensors file: header first, then each tensor, in `file_order(specs)`.

    Args:
      path: the final name; it appears when the file is whole and on disk.
      specs: what the file holds.
      tensors: the arrays in `file_order(specs)`; each is let go before the next is asked for.
      on_bytes: called with the number of bytes after each tensor.

    Returns:
      The sha256 of the file, in hex.
    """
    specs = file_order(specs)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in specs:
        offsets = [position, position + spec.nbytes]
        header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        position += spec.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        for piece in (len(raw).to_bytes(8, "little"), raw):
            file.write(piece)
            digest.update(piece)
        for spec in specs:
            tensor = next(tensors)
            if tensor.dtype != spec.dtype or tensor.shape != spec.shape:
                raise ConversionError(
                    f"{path}: {spec.name!r} should be {spec.dtype}{list(spec.shape)}, "
                    f"got {tensor.dtype}{list(tensor.shape)}"
                )
            data = raw_bytes(tensor)
            file.write(data)
            digest.update(data)
            on_bytes(spec.nbytes)
            del tensor, data
    return digest.hexdigest()


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of a C-contiguous array, without a copy."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Any]:
    """A file for writing bytes that takes its name only once whole and on disk; nothing is left on an error."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb", buffering=0) as file:
            yield _CompleteWriter(file)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class _CompleteWriter:
    """Raw file whose `write` writes everything: the kernel stops after 2 GiB at a time."""

    def __init__(self, file):
        self._file = file

    def write(self, data):
        view = memoryview(data).cast("B")
        while len(view):
            view = view[self._file.write(view) :]


def write_atomically(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        if text:
            file.write(text.encode())


def fsync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
