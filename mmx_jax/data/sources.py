"""Sources of documents: random access to the documents of files, whatever their format.

A source has a length and gives document `i` as `str`, or as a 1-D integer array where it is tokenised already.
Nothing here imports grain; pyarrow and array_record are imported by the sources that need them.
"""

import functools
import importlib
import itertools
import json
import pathlib
import sysconfig
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from mmx_jax.config import SourceConfig
from mmx_jax.data.file_bytes import BadRowError, DataError, plain_copy, read_at, read_plain
from mmx_jax.data.row_index import index_rows
from mmx_jax.data.source_files import SUFFIXES, SourceFiles, container, find_files

__all__ = ["BadRowError", "CheckedSource", "DataError", "Document", "Source", "import_extra", "open_source"]

Document = str | np.ndarray

# A single text file would be one document, with nothing left to hold out: it is cut into pieces of about this size.
_TEXT_PIECE_BYTES = 16 * 1024
_STDLIB_SKIPPED = frozenset("test tests idle_test site-packages dist-packages idlelib lib2to3 __pycache__".split())
_ROW_GROUPS_KEPT = 4
# Sources up to these sizes are read through when opened, so that a bad row is found before the first step.
_READ_THROUGH_BYTES = 32 << 20
_READ_THROUGH_DOCUMENTS = 10_000
_TOKENS_AT_ONCE = 1 << 20


class Source(Protocol):
    """Random access to documents; `name` is what messages call it."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


class CheckedSource:
    """A source whose bad rows are errors that say what to do, or are skipped: then they are empty documents.

    Attributes:
      paths: the files.
      notes: what the user should know, a line each.
      bad_rows: why each row skipped so far was, by its number (or the hash of its tokens).
      without_tokens: hashes of documents of which the tokenizer leaves nothing.
    """

    def __init__(self, documents: Source, paths: Sequence[pathlib.Path], notes: Sequence[str], on_bad_row: str):
        self.name = documents.name
        self.paths = list(paths)
        self.notes = list(notes)
        self.bad_rows: dict[Hashable, str] = {}
        self.without_tokens: set[float] = set()
        self._documents = documents
        self._skips = on_bad_row == "skip"

    def __len__(self):
        return len(self._documents)

    def __getitem__(self, index: int) -> Document:
        try:
            return self._documents[index]
        except BadRowError as error:
            self.skip(int(index), error)
            return ""

    @property
    def checksums(self) -> list[int] | None:
        """Of every file, where opening reads all of it."""
        return getattr(self._documents, "checksums", None)

    def skip(self, key: Hashable, error: BadRowError) -> None:
        """Counts a bad row; raises where the config wants no row skipped."""
        if not self._skips:
            remedy = "fix or remove it, or set data.reading.on_bad_row=skip to skip such rows"
            raise BadRowError(f"{error}: {remedy}") from error
        self.bad_rows.setdefault(key, str(error))

    def check(self) -> None:
        """Reads a small source through, and of a large one the rows that looked suspicious when it was opened."""
        size = sum(path.stat().st_size for path in self.paths)
        small = size <= _READ_THROUGH_BYTES and len(self) <= _READ_THROUGH_DOCUMENTS
        for index in range(len(self)) if small else getattr(self._documents, "suspects", ()):
            self[index]
        if len(self.bad_rows) == len(self):
            first = next(iter(self.bad_rows.values()))
            raise DataError(f"data source {self.name}: all of its {len(self)} rows are bad, the first: {first}")

    def summary(self) -> list[str]:
        """Lines for the user on rows skipped so far; empty if none was."""
        lines = []
        if self.bad_rows:
            first = next(iter(self.bad_rows.values()))
            lines.append(f"data source {self.name}: {len(self.bad_rows)} bad rows were skipped, the first: {first}")
        if self.without_tokens:
            lines.append(
                f"data source {self.name}: {len(self.without_tokens)} documents were skipped: the tokenizer makes no "
                "token of them"
            )
        return lines


def import_extra(module: str) -> Any:
    """Imports an optional dependency of the data pipeline, or says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"reading data needs {module.partition('.')[0]}: pip install mmx_jax[data]") from error


def _read_text(path: pathlib.Path) -> str:
    data = read_plain(path)
    if data.count(0) * 100 > len(data):
        raise BadRowError(
            f"{path} is no text: it holds {data.count(bytes(1))} NUL bytes, as binary files and UTF-16 do"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRowError(
            f"{path} is not UTF-8 text (byte {error.start}); the formats known by suffix are "
            f"{', '.join(sorted(SUFFIXES))}"
        ) from error


class TextFiles:
    """Every file is a document."""

    def __init__(self, paths: Sequence[pathlib.Path], name: str):
        self.name = name
        self._paths = paths

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, index):
        return _read_text(self._paths[index])


class TextPieces:
    """One text file, cut at the ends of paragraphs, or of lines where a paragraph is long."""

    def __init__(self, path: pathlib.Path):
        self.name = str(path)
        self._pieces = cut_text(_read_text(path), _TEXT_PIECE_BYTES)

    def __len__(self):
        return len(self._pieces)

    def __getitem__(self, index):
        return self._pieces[index]


def cut_text(text: str, size: int) -> list[str]:
    """Cuts a text into pieces of at most `size` characters which, joined, are the text.

    A cut falls after the last blank line that lets the piece fill half its size, else after the last line end,
    else where the size is reached.
    """
    pieces, begin = [], 0
    while len(text) - begin > size:
        end = begin + size
        for mark in ("\n\n", "\n"):
            cut = text.rfind(mark, begin + size // 2, end)
            if cut >= 0:
                end = cut + len(mark)
                break
        pieces.append(text[begin:end])
        begin = end
    return pieces + [text[begin:]] if begin < len(text) else pieces


def _field_of(row: dict, field: str, where: str):
    if field not in row:
        hint = "; set format='tokens' for rows that are tokenised" if "tokens" in row else ""
        names = ", ".join(map(ascii, itertools.islice(sorted(row), 20)))
        raise BadRowError(f"{where} has no field {field!r}; its fields are {names or 'none'}{hint}")
    return row[field]


def _as_document(value, field: str, tokens: bool, where: str) -> Document:
    if not tokens:
        if not isinstance(value, str):
            raise BadRowError(f"field {field!r} of {where} holds a {type(value).__name__}, not text")
        return value
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # lists of several lengths
        array = np.zeros((0, 0))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise BadRowError(f"field {field!r} of {where} is not a list of integers")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise BadRowError(f"field {field!r} of {where} holds {array.max()}, which is no token")
    return array.astype(np.int64)


def _json_row(data: bytes, where: str) -> dict:
    """The object of a row. Python's own reader: rows are many, and keys that occur twice or NaN harm no text."""
    try:
        text = data.decode("utf-8")
        row = json.loads(text)
    except UnicodeDecodeError as error:
        raise BadRowError(f"{where} is not UTF-8 (byte {error.start} of the row)") from error
    except RecursionError as error:
        raise BadRowError(f"{where} is not JSON that can be read: nested too deeply") from error
    except ValueError as error:  # syntax, or an integer with more digits than Python converts
        raise BadRowError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadRowError(f"{where} is a JSON {type(row).__name__}, not an object")
    return row


def _check_text(document: Document, data: bytes, where: str):
    """Only an escape can spell half of a surrogate pair, which is legal JSON and no text."""
    if isinstance(document, str) and (b"\\ud" in data or b"\\uD" in data):
        try:
            document.encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(document[error.start])
            raise BadRowError(f"the text of {where} holds {half}, half of a surrogate pair and no character") from error


class _Concatenated:
    """Rows of several files in one numbering; `counts` are the rows of each."""

    def __init__(self, paths: Sequence[pathlib.Path], counts: Sequence[int], name: str, field: str, tokens: bool):
        self.name = name
        self._paths = paths
        self._ends = np.cumsum(counts)
        self._field = field
        self._tokens = tokens

    def __len__(self):
        return int(self._ends[-1])

    def _locate(self, index: int) -> tuple[int, int]:
        """(file, row in it)"""
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, int(index - (self._ends[file - 1] if file else 0))

    def _json_document(self, data: bytes, where: str) -> Document:
        value = _field_of(_json_row(data, where), self._field, where)
        document = _as_document(value, self._field, self._tokens, where)
        _check_text(document, data, where)
        return document


class JsonLines(_Concatenated):
    """One JSON object a line; blank lines are skipped. The starts of all lines are found when opened.

    Args:
      paths: what messages name.
      plain: the same files, decompressed.
    """

    def __init__(self, paths, plain: Sequence[pathlib.Path], name, field, tokens):
        self._plain = plain
        self._indices = [index_rows(path) for path in plain]
        self.checksums = [index.checksum for index in self._indices]
        super().__init__(paths, [len(index) for index in self._indices], name, field, tokens)

    @property
    def suspects(self) -> list[int]:
        """Rows that may be no text, by what their bytes hold."""
        ends = [0, *self._ends]
        return [int(ends[file]) + row for file, index in enumerate(self._indices) for row in index.suspects]

    def __getitem__(self, index):
        file, row = self._locate(index)
        begin, end = map(int, self._indices[file].starts[row : row + 2])
        data = read_at(self._plain[file], begin, end - begin)
        where = f"line {self._indices[file].line_number(row)} (at byte {begin}) of {self._paths[file]}"
        return self._json_document(data, where)


class ArrayRecords(_Concatenated):
    """ArrayRecord files whose records are JSON objects."""

    def __init__(self, paths, name, field, tokens):
        module = import_extra("array_record.python.array_record_data_source")
        self._readers = [_open(path, "ArrayRecord", lambda p: module.ArrayRecordDataSource(str(p))) for path in paths]
        super().__init__(paths, [len(reader) for reader in self._readers], name, field, tokens)

    def __getitem__(self, index):
        file, row = self._locate(index)
        where = f"record {row} of {self._paths[file]}"
        try:
            data = self._readers[file][row]
        except Exception as error:
            raise DataError(f"{where} cannot be read: {error}") from error
        return self._json_document(data, where)


def _open(path: pathlib.Path, kind: str, opener: Callable):
    try:
        reader = opener(path)
        len(reader)  # ArrayRecord reads its footer here
        return reader
    except Exception as error:
        raise DataError(f"{path} is not a readable {kind} file: {error}") from error


class Parquet(_Concatenated):
    """Rows of Parquet files.

    The last few row groups are kept decoded: with large row groups set `data.shuffle_buffer`, so that neighbours
    are read together.
    """

    def __init__(self, paths, name, field, tokens):
        parquet = import_extra("pyarrow.parquet")
        self._files, groups = [], []  # groups: (file, row group in it, rows)
        for i, path in enumerate(paths):
            try:
                file = parquet.ParquetFile(path)
                names = file.schema_arrow.names
                groups += [(i, g, file.metadata.row_group(g).num_rows) for g in range(file.num_row_groups)]
            except Exception as error:
                raise DataError(f"{path} is not a readable Parquet file: {error}") from error
            _field_of(dict.fromkeys(names), field, str(path))
            self._files.append(file)
        self._groups = [(i, g) for i, g, _ in groups]
        self._read_group = functools.lru_cache(_ROW_GROUPS_KEPT)(self._read_group)
        super().__init__(paths, [rows for _, _, rows in groups] or [0], name, field, tokens)

    def _read_group(self, group: int):
        i, g = self._groups[group]
        try:
            return self._files[i].read_row_group(g, columns=[self._field]).column(0)
        except Exception as error:
            raise DataError(f"row group {g} of {self._paths[i]} cannot be read: {error}") from error

    def __getitem__(self, index):
        group, row = self._locate(index)
        where = f"row {row} of row group {self._groups[group][1]} of {self._paths[self._groups[group][0]]}"
        column = self._read_group(group)
        try:
            value = column[row].as_py()
        except UnicodeDecodeError as error:
            raise BadRowError(f"{where} is not UTF-8 (byte {error.start} of the text)") from error
        except Exception as error:
            raise DataError(f"{where} cannot be read: {error}") from error
        return _as_document(value, self._field, self._tokens, where)


class TokenArrays(_Concatenated):
    """`.npy` files, each a 1-D integer array in which every document ends with eos."""

    def __init__(self, paths, name, eos_id: int | None):
        if eos_id is None:
            raise DataError(
                f"{name}: the documents of an .npy file end with eos; set data.tokenizer to one with an eos_token"
            )
        self._layouts = [_open(path, "NumPy", _npy_layout) for path in paths]  # (first byte, dtype, tokens)
        self._bounds = []
        for path, (_, dtype, shape) in zip(paths, self._layouts, strict=True):
            if len(shape) != 1 or dtype.kind not in "iu":
                raise DataError(f"{path} holds {dtype}{list(shape)}; a 1-D integer array is needed")
            parts = [np.zeros(1, np.int64)]
            for begin in range(0, shape[0], _TOKENS_AT_ONCE):
                tokens = self._read(path, begin, min(begin + _TOKENS_AT_ONCE, shape[0]), len(self._bounds))
                parts.append(np.flatnonzero(tokens == eos_id) + begin + 1)
            bounds = np.concatenate(parts)
            self._bounds.append(bounds if bounds[-1] == shape[0] else np.append(bounds, shape[0]))
        super().__init__(paths, [len(bounds) - 1 for bounds in self._bounds], name, "", True)

    def __getitem__(self, index):
        file, row = self._locate(index)
        begin, end = map(int, self._bounds[file][row : row + 2])
        tokens = self._read(self._paths[file], begin, end, file)
        if tokens.dtype == np.uint64 and tokens.max() > np.iinfo(np.int64).max:
            raise BadRowError(f"the document at token {begin} of {self._paths[file]} holds {tokens.max()}, no token")
        return tokens.astype(np.int64)

    def _read(self, path: pathlib.Path, begin: int, end: int, file: int) -> np.ndarray:
        offset, dtype, _ = self._layouts[file]
        return np.frombuffer(read_at(path, offset + begin * dtype.itemsize, (end - begin) * dtype.itemsize), dtype)


def _npy_layout(path: pathlib.Path) -> tuple[int, np.dtype, tuple[int, ...]]:
    """(first byte, dtype, shape) of the array in a file; no memory map is kept, see `read_at`."""
    array = np.load(path, mmap_mode="r")
    return array.offset, array.dtype, array.shape


def standard_library() -> TextFiles:
    """The `.py` files of Python's standard library, without its tests: real text wherever Python is."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not _STDLIB_SKIPPED & set(path.relative_to(root).parts)]
    return TextFiles([path for path in sorted(files) if path.stat().st_size], "the standard library")


def open_standard_library() -> CheckedSource:
    """`standard_library`, as `open_source` opens others."""
    documents = standard_library()
    return CheckedSource(documents, documents._paths, (), "error")


def open_source(
    config: SourceConfig, eos_id: int | None = None, *, on_bad_row: str = "error", cache_dir: str = ""
) -> CheckedSource:
    """Opens one source.

    Args:
      config: its path and format. Format "auto" goes by suffix: `.jsonl`, `.parquet`, `.array_record` (JSON
        records) hold text in `text_field`; `.npy` holds tokens; any other file is UTF-8 text, or JSON lines where it
        holds them. "tokens" reads `tokens_field` of rows, or `.npy`. In a folder every text file is a document; a
        single text file is cut into documents of at most 16 Ki characters at paragraph ends. JSON lines and text may
        be compressed with gzip, bzip2, xz or zstandard.
      eos_id: ends the documents of `.npy` files.
      on_bad_row: "error", or "skip" to leave out what cannot be read.
      cache_dir: of decompressed copies, see `files.plain_copy`.

    Raises:
      FileNotFoundError: no such path.
      DataError: nothing in it, an unclear format, a corrupt or undecodable file, a missing field.
    """
    files = find_files(config)
    path = pathlib.Path(config.path).expanduser()
    if files.form == "text":
        documents = TextFiles(files.paths, str(path)) if path.is_dir() else TextPieces(path)
        notes = []
    else:
        documents, notes = _open_rows(files, config, str(path), eos_id, cache_dir)
    if not len(documents):
        raise DataError(f"data source {path} is empty")
    source = CheckedSource(documents, files.paths, files.notes + notes, on_bad_row)
    source.check()
    return source


def _open_rows(
    files: SourceFiles, config: SourceConfig, name: str, eos_id: int | None, cache_dir: str
) -> tuple[Source, list[str]]:
    tokens = files.form == "tokens"
    field = config.tokens_field if tokens else config.text_field
    kind = container(files.paths, files.form)
    if kind == "tokens":
        return TokenArrays(files.paths, name, eos_id), []
    if kind == "jsonl":
        plain = [plain_copy(path, cache_dir) for path in files.paths]
        return JsonLines(files.paths, plain, name, field, tokens), _copy_notes(name, set(plain) - set(files.paths))
    return {"parquet": Parquet, "arrayrecord": ArrayRecords}[kind](files.paths, name, field, tokens), []


def _copy_notes(name: str, copies: Collection[pathlib.Path]) -> list[str]:
    if not copies:
        return []
    size = sum(copy.stat().st_size for copy in copies) / 2**20
    return [
        f"data source {name}: {len(copies)} compressed files are read from decompressed copies in "
        f"{next(iter(copies)).parent} ({size:,.1f} MiB), which may be deleted when no run reads them"
    ]
