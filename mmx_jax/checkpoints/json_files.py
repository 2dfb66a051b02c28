"""Text and JSON files of a checkpoint: every defect is a ConversionError that says what the file is instead."""

import os
from pathlib import Path
from typing import Any

from mmx_jax.checkpoints.errors import ConversionError
from mmx_jax.storage import file_kinds, json_io

MAX_JSON_BYTES = 100_000_000
# An answer of a server that was saved under the name of the file consists of some of these.
_OF_AN_ERROR = {
    "error",
    "errors",
    "message",
    "detail",
    "status",
    "statusCode",
    "code",
    "request_id",
    "documentation_url",
}


def check_regular(path: Path) -> None:
    """Raises ConversionError unless `path` is a regular file: opening a pipe would wait for ever."""
    if problem := file_kinds.not_regular(path):
        raise ConversionError(f"{path}: {problem}; a file is needed, copy or download it again")


def check_itself(path: Path) -> None:
    """Raises ConversionError where only a pointer to a file, or a broken link, has its name."""
    check_regular(path)
    with open(path, "rb") as file:
        kind = file_kinds.pointer(file.read(file_kinds.HEAD_BYTES))
    if kind:
        raise ConversionError(f"{path}: not the file itself, but {kind}")


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file; ConversionError for anything else, such as a pointer to the file."""
    path = Path(path)
    check_regular(path)
    with open(path, "rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise ConversionError(f"{path}: has more than {MAX_JSON_BYTES:,} bytes, and no such file is that large")
    if kind := file_kinds.recognize(raw[: file_kinds.HEAD_BYTES]):
        raise ConversionError(f"{path}: not the file itself, but {kind}")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path}: not UTF-8 text: {error}; download it again") from None


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object that a file holds."""
    text = read_text(path)
    quoted = file_kinds.quote(text[: file_kinds.HEAD_BYTES].encode())
    try:
        value = json_io.loads(text)
    except json_io.JsonError as error:
        raise ConversionError(f"{path}: {error}; it begins with {quoted}; download it again") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: holds a JSON {type(value).__name__}; a JSON object is expected")
    if value and set(value) <= _OF_AN_ERROR:
        raise ConversionError(f"{path}: the message of a server ({quoted}), not the file itself; download it again")
    return value
