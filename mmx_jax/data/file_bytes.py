"""Bytes of data files: read in place, decompressed where need be, and known by what they hold."""

import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import pathlib
import tempfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

COMPRESSED_SUFFIXES = frozenset((".gz", ".bz2", ".xz", ".zst"))
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
_MAGIC_BYTES = 8
_SAMPLE_BYTES = 64 * 1024
_BLOCK_BYTES = 1 << 20


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the remedy."""


class BadRowError(DataError):
    """One row or document that cannot be used; `data.reading.on_bad_row=skip` leaves it out."""


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Names the file where the system cannot read it."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def read_at(path: pathlib.Path, begin: int, size: int) -> bytes:
    """`size` bytes of a file from `begin` on; DataError where they are not there (any more).

    A file that is cut off under a memory map would end the process with SIGBUS; here it is an error like others.
    """
    with reading(path), open(path, "rb", buffering=0) as stream:
        parts, position = [], begin
        while position < begin + size:
            part = os.pread(stream.fileno(), begin + size - position, position)
            if not part:
                raise DataError(
                    f"{path} has become shorter since it was opened: it ends at byte {position} of {begin + size}; "
                    "data must not change during a run"
                )
            parts.append(part)
            position += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, the first and the last among them, evenly spaced."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))]


def content_digest(path: pathlib.Path, blocks: int) -> str:
    """Hexadecimal digest of a file's size and content: of all of it, or of `blocks` 64 KiB of it, ends included."""
    with reading(path):
        size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=12)
    pieces = -(-size // _SAMPLE_BYTES)
    for piece in evenly(pieces, blocks) if pieces else ():
        begin = piece * _SAMPLE_BYTES
        digest.update(read_at(path, begin, min(_SAMPLE_BYTES, size - begin)))
    return digest.hexdigest()


# -- compression ------------------------------------------------------------------------------------------------------


def compression(path: pathlib.Path) -> str | None:
    """The compression of a file by its first bytes, whatever its name says."""
    with reading(path), open(path, "rb") as stream:
        return _compression(stream.read(_MAGIC_BYTES))


def _compression(head: bytes) -> str | None:
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)


@contextlib.contextmanager
def open_plain(path: pathlib.Path) -> Iterator[BinaryIO]:
    """The content of a file, decompressed where it is compressed; all members of it, one after another.

    Raises:
      DataError: the file cannot be read, or is damaged or cut off; also from within the block.
    """
    kind = None
    try:
        with open(path, "rb") as stream:
            kind = _compression(stream.peek(_MAGIC_BYTES))
            with _decompressed(stream, kind, path) as plain:
                yield plain
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        what = f"decompressed ({kind}): it is damaged or cut off" if kind else "read"
        raise DataError(f"{path} cannot be {what}: {error}") from error


def _decompressed(stream: BinaryIO, kind: str | None, path: pathlib.Path):
    if kind == "zstandard":
        try:
            import pyarrow
        except ImportError as error:
            raise ImportError(f"{path} is compressed with zstandard: pip install mmx_jax[data]") from error
        return pyarrow.input_stream(stream, compression="zstd")
    readers = {None: contextlib.nullcontext, "gzip": _gzip_file, "bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}
    return readers[kind](stream)


def _gzip_file(stream: BinaryIO) -> gzip.GzipFile:
    return gzip.GzipFile(fileobj=stream)


def blocks_of(stream: BinaryIO) -> Iterator[bytes]:
    """The rest of a stream, in pieces of 1 MiB."""
    while block := stream.read(_BLOCK_BYTES):
        yield bytes(block)


def read_plain(path: pathlib.Path) -> bytes:
    """The whole content, decompressed."""
    with open_plain(path) as stream:
        return b"".join(blocks_of(stream))


def read_head(path: pathlib.Path, size: int) -> bytes:
    """The first bytes of the content, decompressed; fewer where it is shorter."""
    with open_plain(path) as stream:
        return bytes(stream.read(size))


def default_cache_dir() -> pathlib.Path:
    """Where decompressed copies go."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "mmx_jax" / "decompressed"


def plain_copy(path: pathlib.Path, cache_dir: str = "") -> pathlib.Path:
    """The file itself, or a decompressed copy of it: a compressed file cannot be read at a place of choice.

    The copy is made once and kept in `cache_dir` ("": `default_cache_dir`); it is named after the content, size and
    time of the file, and its own size.

    Raises:
      DataError: the file is damaged, or the copy cannot be written.
    """
    if compression(path) is None:
        return path
    folder = pathlib.Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    stat = path.stat()
    name = hashlib.blake2b(f"{content_digest(path, 64)} {stat.st_mtime_ns} {stat.st_ino}".encode(), digest_size=12)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for copy in folder.glob(f"{name.hexdigest()}.*"):
            if copy.suffix == f".{copy.stat().st_size}":
                return copy
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    except OSError as error:
        raise _copy_error(path, folder, error) from error
    try:
        with os.fdopen(handle, "wb") as copy, open_plain(path) as stream:
            for block in blocks_of(stream):
                _write(copy, block, path, folder)
        target = folder / f"{name.hexdigest()}.{os.stat(temporary).st_size}"
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return target


def _write(copy: BinaryIO, block: bytes, path: pathlib.Path, folder: pathlib.Path):
    try:
        copy.write(block)
    except OSError as error:
        raise _copy_error(path, folder, error) from error


def _copy_error(path: pathlib.Path, folder: pathlib.Path, error: OSError) -> DataError:
    return DataError(
        f"{path} is compressed, and its decompressed copy cannot be written to {folder}: {error.strerror or error}; "
        "set data.reading.cache_dir to a folder with room, or decompress the file yourself"
    )
