"""Which files a source is made of, in which format they are, and which files of its folder are skipped."""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

from mmx_jax.config import SourceConfig
from mmx_jax.data.file_bytes import COMPRESSED_SUFFIXES, DataError, compression, evenly, read_at, read_head

SUFFIXES = {
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
_COMPRESSIBLE = ("jsonl", "text")  # formats that are read decompressed
_HEAD_BYTES = 1 << 20
_LOOKED_INTO = 16  # files of one suffix
_ROWS, _ARRAY = "JSON lines", "one JSON array"


@dataclasses.dataclass(frozen=True)
class SourceFiles:
    """The files of a source, none of them empty, in order; `form` is text, jsonl, parquet, arrayrecord or tokens."""

    form: str
    paths: list[pathlib.Path]
    notes: list[str]


def find_files(config: SourceConfig) -> SourceFiles:
    """A file is taken as it is, a folder is searched for files of the format.

    Raises:
      FileNotFoundError: no such path.
      DataError: nothing in it, or an unclear format.
    """
    path = pathlib.Path(config.path).expanduser()
    if path.is_file():
        if not path.stat().st_size:
            raise DataError(f"data source {path} is empty")
        form, notes = (config.format, []) if config.format != "auto" else _form_of_file(path, config)
        return SourceFiles(form, [path], notes)
    if not path.is_dir():
        raise FileNotFoundError(f"data source {path} does not exist")
    files, skipped = _walk(path)
    form, suffixes, notes = _form_of_folder(path, files, config)
    chosen = [file for file in files if suffixes is None or _taken(file, form, suffixes)]
    if not chosen:
        found = sorted({file.suffix or file.name for file in files})
        raise DataError(f"{path} holds no {form} files; the suffixes in it are {', '.join(found) or 'none at all'}")
    taken = set(chosen)
    for file in files:
        if file not in taken:
            skipped[file.suffix.lower() or "no suffix"].append(file)
    full = [file for file in chosen if file.stat().st_size]
    skipped["empty"] += [file for file in chosen if not file.stat().st_size]
    if not full:
        raise DataError(f"data source {path} is empty")
    return SourceFiles(form, full, notes + _skipped_lines(path, skipped, len(full)))


def container(files: Sequence[pathlib.Path], form: str) -> str:
    """The format of the files themselves: that of pre-tokenised rows goes by suffix."""
    if form != "tokens":
        return form
    kinds = sorted({SUFFIXES.get(kind_suffix(file)) or file.suffix or file.name for file in files})
    if len(kinds) > 1 or kinds[0] not in SUFFIXES.values():
        kinds = [_magic_form(read_at(files[0], 0, min(8, files[0].stat().st_size)))] if len(files) == 1 else kinds
    if len(kinds) > 1 or kinds[0] not in SUFFIXES.values():
        found = ", ".join(sorted({file.suffix or file.name for file in files}))
        raise DataError(
            f"format='tokens' needs .npy, .jsonl, .parquet or .array_record files of one kind, found {found}"
        )
    return kinds[0]


def kind_suffix(path: pathlib.Path) -> str:
    """The suffix that names the format, in lower case: `.jsonl` of a.jsonl and of a.jsonl.gz."""
    suffix = path.suffix.lower()
    return pathlib.PurePath(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


def _walk(root: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, list[pathlib.Path]]]:
    """(files in order, those that are never read, by reason)."""
    files, skipped = [], collections.defaultdict(list)

    def fail(error):
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    for folder, subfolders, names in os.walk(root, onerror=fail):
        here = pathlib.Path(folder)
        skipped["links to folders, which are not followed"] += [
            here / name for name in subfolders if not _is_hidden(name) and (here / name).is_symlink()
        ]
        skipped["hidden"] += [here / name for name in [*subfolders, *names] if _is_hidden(name)]
        subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
        for path in (here / name for name in names if not _is_hidden(name)):
            if path.is_file():
                files.append(path)
            else:
                skipped["broken links or no files"].append(path)
    return sorted(files), skipped


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _taken(file: pathlib.Path, form: str, suffixes: Iterable[str]) -> bool:
    if kind_suffix(file) not in suffixes:
        return False
    by_itself = SUFFIXES.get(kind_suffix(file), "text") if form == "tokens" else form
    return file.suffix.lower() not in COMPRESSED_SUFFIXES or by_itself in _COMPRESSIBLE


def _skipped_lines(root: pathlib.Path, skipped: dict[str, list[pathlib.Path]], taken: int) -> list[str]:
    groups = {reason: files for reason, files in sorted(skipped.items()) if files}
    if not groups:
        return []
    total = sum(map(len, groups.values()))
    parts = [f"{len(files)} {reason} (as {files[0].relative_to(root)})" for reason, files in groups.items()]
    parts = parts[:8] + ([f"and {len(parts) - 8} more kinds"] if len(parts) > 8 else [])
    return [f"data source {root}: {taken} files are read, {total} are skipped: {', '.join(parts)}"]


# -- format by suffix, then by content --------------------------------------------------------------------------------


def _form_of_file(path: pathlib.Path, config: SourceConfig) -> tuple[str, list[str]]:
    by_suffix = SUFFIXES.get(kind_suffix(path), "text")
    head = read_head(path, _HEAD_BYTES)
    form = _magic_form(head) or by_suffix
    if form == "text" == by_suffix:
        found = _text_kind(head, config)
        if found == _ARRAY:
            raise _array_error(path)
        form = "jsonl" if found == _ROWS else "text"
    if form not in _COMPRESSIBLE and (kind := compression(path)):
        raise DataError(f"{path} is compressed ({kind}), which is read of JSON lines and text only: decompress it")
    if form == by_suffix:
        return form, []
    return form, [
        f"data source {path} is read as {form}, which it is by its content; set format= of the source to change it"
    ]


def _form_of_folder(
    root: pathlib.Path, files: Sequence[pathlib.Path], config: SourceConfig
) -> tuple[str, set[str] | None, list[str]]:
    """(format, suffixes of its files or None for all, notes)"""
    by_suffix = collections.defaultdict(list)
    for file in files:
        by_suffix[kind_suffix(file)].append(file)
    form = config.format
    if form == "text":
        return form, None, []
    if form == "auto":
        found = sorted({SUFFIXES[suffix] for suffix in by_suffix if suffix in SUFFIXES})
        if len(found) > 1:
            raise DataError(f"{root} holds files of the formats {', '.join(found)}: set format= of the source to one")
        if not found:
            return _form_of_text_folder(root, by_suffix, config)
        form = found[0]
    if config.format in ("auto", "jsonl", "parquet", "arrayrecord"):
        wanted = {suffix for suffix, kind in SUFFIXES.items() if kind == form}
    else:
        wanted = set(SUFFIXES)
    if config.format == "jsonl":
        texts = {suffix: paths for suffix, paths in by_suffix.items() if suffix in _TEXT_SUFFIXES}
        wanted |= {suffix for suffix, paths in texts.items() if _kind_of_all(paths, config) == _ROWS}
    return form, wanted, []


def _form_of_text_folder(root: pathlib.Path, by_suffix: dict, config: SourceConfig) -> tuple[str, set[str], list[str]]:
    """JSON lines and arrays under names of text are found by content, and count where most bytes are theirs."""
    texts = {suffix: paths for suffix, paths in by_suffix.items() if suffix in _TEXT_SUFFIXES}
    kinds = {suffix: _kind_of_all(paths, config) for suffix, paths in texts.items()}
    sizes = {suffix: sum(path.stat().st_size for path in paths) for suffix, paths in texts.items()}

    def has_most(kind):
        return 2 * sum(sizes[suffix] for suffix in texts if kinds[suffix] == kind) > sum(sizes.values())

    if has_most(_ARRAY):
        raise _array_error(next(texts[suffix][0] for suffix in texts if kinds[suffix] == _ARRAY))
    rows = {suffix for suffix in texts if kinds[suffix] == _ROWS}
    if has_most(_ROWS):
        names = ", ".join(sorted(rows))
        return (
            "jsonl",
            rows,
            [f"data source {root}: the {names} files are read as jsonl, which they are by their content"],
        )
    notes = [
        f"data source {root}: the {suffix} files hold {kinds[suffix]} and are read as plain text"
        + ("; set format=jsonl of the source to read their rows alone" if kinds[suffix] == _ROWS else "")
        for suffix in sorted(texts)
        if kinds[suffix]
    ]
    return "text", set(_TEXT_SUFFIXES), notes


def _kind_of_all(paths: Sequence[pathlib.Path], config: SourceConfig) -> str | None:
    """The kind of JSON, lines or arrays, that a sample of the files all hold; None if neither."""
    with_content = [path for path in paths if path.stat().st_size]
    kinds = set()
    for i in evenly(len(with_content), _LOOKED_INTO) if with_content else ():
        kinds.add(_text_kind(read_head(with_content[i], _HEAD_BYTES), config))
        if None in kinds:
            return None
    return kinds.pop() if len(kinds) == 1 else None


def _magic_form(head: bytes) -> str:
    """The format that the first bytes of a file name, or ""."""
    return "parquet" if head.startswith(b"PAR1") else "tokens" if head.startswith(b"\x93NUMPY") else ""


def _text_kind(head: bytes, config: SourceConfig) -> str | None:
    """Whether text is JSON lines, or one JSON array of rows, by its beginning.

    JSON lines are objects of which the first has a field of the source, or which are several.
    """
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    fields = {config.text_field, config.tokens_field}
    if text.startswith("["):
        row = _leading_json(text[1:].lstrip())
        return _ARRAY if isinstance(row, dict) and fields & row.keys() else None
    if not text.startswith("{"):
        return None
    lines = [line for line in text.split("\n") if line.strip()][:2]
    rows = [_whole_json(line) for line in lines]
    if not isinstance(rows[0], dict):
        return None
    return _ROWS if fields & rows[0].keys() or (len(rows) > 1 and isinstance(rows[1], dict)) else None


def _leading_json(text: str):
    try:
        return json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        return None


def _whole_json(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _array_error(path: pathlib.Path) -> DataError:
    return DataError(
        f"{path} is one JSON array, of which rows cannot be read one by one: write an object a line, "
        f"`jq -c '.[]' {path.name} > {path.with_suffix('.jsonl').name}`; or set format='text' of the source"
    )
