"""Sources of documents: random access to the documents of files, whatever their format.

A source has a length and gives document `i` as `str`, or as a 1-D integer array where it is tokenised already.
Nothing here imports grain; pyarrow and array_record are imported by the sources that need them.
"""

import functools
import importlib
import json
import pathlib
import sysconfig
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mmx_jax.config import SourceConfig

Document = str | np.ndarray

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
    ".npy": "tokens",
}
_TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .html .py .pyi .c .cc .cpp .cu .cuh .h .hpp .java .js .ts .go .rs .rb .sh .jl .scala "
    ".cs .kt .swift .lua .pl .php .r .sql .css .xml .yaml .yml .toml .json .csv .tsv".split()
)
# A single text file would be one document, with nothing left to hold out: it is cut into pieces of about this size.
_TEXT_PIECE_BYTES = 16 * 1024
_STDLIB_SKIPPED = frozenset("test tests idle_test site-packages dist-packages idlelib lib2to3 __pycache__".split())
_ROW_GROUPS_KEPT = 4


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the remedy."""


class Source(Protocol):
    """Random access to documents; `name` is what messages call it."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


def import_extra(module: str):
    """Imports an optional dependency of the data pipeline, or says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"reading data needs {module.partition('.')[0]}: pip install mmx_jax[data]") from error


def _read_text(path: pathlib.Path) -> str:
    return _decode(path.read_bytes(), path)


def _decode(data: bytes, where) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text (byte {error.start}): leave it out, or name its format; the formats known by "
            f"suffix are {', '.join(sorted(_SUFFIXES))}"
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
        raise DataError(f"{where} has no field {field!r}; its fields are {', '.join(map(repr, sorted(row)))}{hint}")
    return row[field]


def _as_document(value, field: str, tokens: bool, where: str) -> Document:
    if not tokens:
        if not isinstance(value, str):
            raise DataError(f"field {field!r} of {where} holds a {type(value).__name__}, not text")
        return value
    array = np.asarray(value)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise DataError(f"field {field!r} of {where} is not a list of integers")
    return array.astype(np.int64)


def _json_row(data: bytes, where: str) -> dict:
    try:
        row = json.loads(data)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is a JSON {type(row).__name__}, not an object")
    return row


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

    def _document(self, row: dict, where: str) -> Document:
        return _as_document(_field_of(row, self._field, where), self._field, self._tokens, where)


class JsonLines(_Concatenated):
    """One JSON object a line; blank lines are skipped. The starts of all lines are found when opened."""

    def __init__(self, paths, name, field, tokens):
        self._lines = [_line_starts(path) for path in paths]  # per file [n, 2]: begin, end
        super().__init__(paths, [len(lines) for lines in self._lines], name, field, tokens)

    def __getitem__(self, index):
        file, row = self._locate(index)
        begin, end = self._lines[file][row]
        with open(self._paths[file], "rb") as stream:
            stream.seek(begin)
            data = stream.read(end - begin)
        where = f"the line at byte {begin} of {self._paths[file]}"
        return self._document(_json_row(data, where), where)


def _line_starts(path: pathlib.Path) -> np.ndarray:
    """[n, 2] int64: first byte and end of the lines that are not blank."""
    bounds, position = [], 0
    with open(path, "rb") as stream:
        for line in stream:
            if line.strip():
                bounds.append((position, position + len(line)))
            position += len(line)
    return np.array(bounds, np.int64).reshape(-1, 2)


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
        return self._document(_json_row(data, where), where)


def _open(path: pathlib.Path, kind: str, opener):
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
            except Exception as error:
                raise DataError(f"{path} is not a readable Parquet file: {error}") from error
            _field_of(dict.fromkeys(file.schema_arrow.names), field, str(path))
            self._files.append(file)
            groups += [(i, g, file.metadata.row_group(g).num_rows) for g in range(file.num_row_groups)]
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
        return _as_document(self._read_group(group)[row].as_py(), self._field, self._tokens, where)


class TokenArrays(_Concatenated):
    """`.npy` files, each a 1-D integer array in which every document ends with eos; memory-mapped."""

    def __init__(self, paths, name, eos_id: int | None):
        if eos_id is None:
            raise DataError(
                f"{name}: the documents of an .npy file end with eos; set data.tokenizer to one with an eos_token"
            )
        self._arrays = [_open(path, "NumPy", lambda p: np.load(p, mmap_mode="r")) for path in paths]
        self._bounds = []
        for path, array in zip(paths, self._arrays, strict=True):
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise DataError(f"{path} holds {array.dtype}{list(array.shape)}; a 1-D integer array is needed")
            ends = np.flatnonzero(array == eos_id) + 1
            if len(array) and (not len(ends) or ends[-1] < len(array)):
                ends = np.append(ends, len(array))
            self._bounds.append(np.concatenate([[0], ends]))
        super().__init__(paths, [len(bounds) - 1 for bounds in self._bounds], name, "", True)

    def __getitem__(self, index):
        file, row = self._locate(index)
        begin, end = self._bounds[file][row : row + 2]
        return np.asarray(self._arrays[file][begin:end], np.int64)


def standard_library() -> TextFiles:
    """The `.py` files of Python's standard library, without its tests: real text wherever Python is."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not _STDLIB_SKIPPED & set(path.relative_to(root).parts)]
    return TextFiles(_not_empty(sorted(files)), "the standard library")


def _not_empty(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    return [path for path in paths if path.stat().st_size]


def _is_hidden(path: pathlib.Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _files_of(path: pathlib.Path, form: str) -> tuple[str, list[pathlib.Path]]:
    """(format, files) of a source: a file is taken as it is, a folder is searched for files of the format."""
    if path.is_file():
        return (_SUFFIXES.get(path.suffix.lower(), "text") if form == "auto" else form), [path]
    if not path.is_dir():
        raise FileNotFoundError(f"data source {path} does not exist")
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path)))
    if form == "auto":
        found = sorted({_SUFFIXES[file.suffix.lower()] for file in files if file.suffix.lower() in _SUFFIXES})
        if len(found) > 1:
            raise DataError(f"{path} holds files of the formats {', '.join(found)}: set format= of the source to one")
        form = found[0] if found else "text"
        wanted = {suffix for suffix, kind in _SUFFIXES.items() if kind == form} or _TEXT_SUFFIXES
    elif form == "text":
        return form, files
    else:
        wanted = {suffix for suffix, kind in _SUFFIXES.items() if form in (kind, "tokens")}
    chosen = [file for file in files if file.suffix.lower() in wanted]
    if not chosen:
        suffixes = sorted({file.suffix or file.name for file in files})
        raise DataError(f"{path} holds no {form} files; the suffixes in it are {', '.join(suffixes) or 'none at all'}")
    return form, chosen


def open_source(config: SourceConfig, eos_id: int | None = None) -> Source:
    """Opens one source.

    Args:
      config: its path and format. Format "auto" goes by suffix: `.jsonl`, `.parquet`, `.array_record` (JSON
        records) hold text in `text_field`; `.npy` holds tokens; any other file is UTF-8 text. "tokens" reads
        `tokens_field` of rows, or `.npy`. In a folder every text file is a document; a single text file is cut
        into documents of at most 16 Ki characters at paragraph ends.
      eos_id: ends the documents of `.npy` files.

    Raises:
      FileNotFoundError: no such path.
      DataError: nothing in it, an unclear format, a corrupt or undecodable file, a missing field.
    """
    path = pathlib.Path(config.path).expanduser()
    form, files = _files_of(path, config.format)
    files = _not_empty(files)
    if not files:
        raise DataError(f"data source {path} is empty")
    tokens = form == "tokens"
    field = config.tokens_field if tokens else config.text_field
    if form == "text":
        source = TextFiles(files, str(path)) if path.is_dir() else TextPieces(path)
    else:
        source = _open_rows(files, _container(files, form), str(path), field, tokens, eos_id)
    if not len(source):
        raise DataError(f"data source {path} is empty")
    return source


def _container(files: Sequence[pathlib.Path], form: str) -> str:
    """The format of the files themselves: that of pre-tokenised rows goes by suffix."""
    if form != "tokens":
        return form
    kinds = sorted({_SUFFIXES.get(file.suffix.lower(), file.suffix or file.name) for file in files})
    if len(kinds) > 1 or kinds[0] not in _SUFFIXES.values():
        raise DataError(
            f"format='tokens' needs .npy, .jsonl, .parquet or .array_record files of one kind, found {', '.join(kinds)}"
        )
    return kinds[0]


def _open_rows(files, container: str, name: str, field: str, tokens: bool, eos_id: int | None) -> Source:
    if container == "tokens":
        return TokenArrays(files, name, eos_id)
    return {"jsonl": JsonLines, "parquet": Parquet, "arrayrecord": ArrayRecords}[container](files, name, field, tokens)
