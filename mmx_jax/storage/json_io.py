"""JSON from files that nobody vouches for: bounded, strict, and with one kind of error."""

import json
import os
import pathlib
from typing import Any


class JsonError(ValueError):
    """Text that is not the JSON expected; the message says what is wrong with it and where."""


def loads(data: str | bytes) -> Any:
    """Parses JSON (RFC 8259) more strictly than `json.loads`, which lets each of these pass or raises something else.

    Args:
      data: text, or its UTF-8 bytes.

    Raises:
      JsonError: not UTF-8, not JSON, nested too deeply, an integer of thousands of digits, NaN or Infinity, a key that
        occurs twice in one object, or a string with half of a surrogate pair, which no UTF-8 file can hold.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
        if "\\ud" in text or "\\uD" in text:  # only an escape can spell half a pair
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except JsonError:
        raise
    except RecursionError:
        raise JsonError("not JSON that can be read: nested too deeply") from None
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 text: {error}") from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise JsonError(f"holds {half}, half of a surrogate pair, which is no character") from None
    except ValueError as error:  # syntax, or an integer with more digits than Python converts
        raise JsonError(f"not JSON: {error}") from None
    return value


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object that a file holds; JsonError names the file, as OSError does where it cannot be read."""
    try:
        value = loads(pathlib.Path(path).read_bytes())
    except JsonError as error:
        raise JsonError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise JsonError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise JsonError(f"the key {ascii(twice)} occurs twice in one object")
    return value


def _constant(name: str):
    raise JsonError(f"holds {name}, which is no JSON number")
