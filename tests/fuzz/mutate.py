"""Damage to bytes, with a view to their structure: JSON, safetensors, or none."""

import json
import random

INTERESTING_TEXT = (
    "",
    "a",
    "\x00",
    "\u202e",
    "\ud800",
    "\U0001f600",
    "../../x",
    "/etc/passwd",
    "model.safetensors",
    "F32",
    "%s%n{0}",
    "__metadata__",
    "__class__",
    "9" * 40,
    "x" * 10_000,
    "-",
    "²",
    "NaN",
    "1e5",
    "true",
    "none",
)
INTERESTING_NUMBERS = (
    0,
    1,
    -1,
    2,
    64,
    255,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**6,
    10**9,
    10**30,
    10**400,
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e300,
    float("inf"),
    float("-inf"),
    float("nan"),
    4.0,
    True,
    False,
)
# Text that `json.dumps` would not write, put in the place of a value.
RAW_JSON = (
    "[" * 100_000,
    '{"a":' * 50_000,
    "9" * 5_000,
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    '{"a":1,"a":2}',
    "nul",
    "",
    ",",
    "1" + "0" * 4_000,
    '"\\ud83d"',
    '"\\ude00\\ud83d"',
    "'a'",
    "0x10",
    "01",
    "1_000",
    "[" * 900 + "]" * 900,
    "[" + "0," * 50_000 + "0]",
    "{" + ",".join(f'"k{i}":0' for i in range(20_000)) + "}",
)
MAGIC = (
    b"\x00" * 8,
    b"\xff" * 8,
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"PK\x03\x04",
    b"\x80\x04",
    b"\x1f\x8b",
    b"<html>",
    b"\r\n",
    b"{",
    b"]",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"\x93NUMPY",
    b"\xc3",
    b"\xed\xa0\x80",
)
_MARK = "\u0001raw\u0001"


def mutate(draw: random.Random, data: bytes, corpus: list[bytes], form: str) -> bytes:
    """A damaged copy of `data`; the same draws give the same copy.

    Args:
      draw: where all chance comes from.
      data: valid content.
      corpus: other valid contents, to take pieces from.
      form: "json", "jsonl", "safetensors" or "bytes".
    """
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        if form == "bytes" or draw.random() < 0.2:
            data = _mutate_bytes(draw, data, corpus)
        elif form == "safetensors":
            length = int.from_bytes(data[:8], "little")
            header = _mutate_json(draw, data[8 : 8 + length])
            data = len(header).to_bytes(8, "little") + header + data[8 + length :]
        elif form == "jsonl":
            lines = data.split(b"\n")
            at = draw.randrange(len(lines))
            lines[at] = _mutate_json(draw, lines[at])
            data = b"\n".join(lines)
        else:
            data = _mutate_json(draw, data)
    return data


def _mutate_bytes(draw, data, corpus):
    begin = draw.randrange(len(data) + 1)
    end = min(len(data), begin + draw.choice((1, 1, 2, 8, 100, 10_000)))
    kind = draw.randrange(7)
    if kind == 0 and data:
        begin = min(begin, len(data) - 1)
        return data[:begin] + bytes([data[begin] ^ (1 << draw.randrange(8))]) + data[begin + 1 :]
    if kind == 1:
        return data[:begin]
    if kind == 2:
        return data[:begin] + data[end:]
    if kind == 3:
        return data[:end] + data[begin:end] * draw.choice((1, 2, 50)) + data[end:]
    if kind == 4:
        return data[:begin] + draw.randbytes(draw.choice((1, 4, 30))) + data[end:]
    if kind == 5:
        return data[:begin] + draw.choice(MAGIC) + data[begin if draw.random() < 0.5 else end :]
    other = draw.choice(corpus)
    return data[:begin] + other[draw.randrange(len(other) + 1) :]


def _mutate_json(draw, data):
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _mutate_bytes(draw, data, [data])
    raw = draw.choice(RAW_JSON) if draw.random() < 0.2 else None
    places = _places(value)
    if not places:
        value = _odd_value(draw, value) if raw is None else _MARK
    else:
        _change_place(draw, *draw.choice(places), raw)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    if draw.random() < 0.05:  # the same key twice
        text = text.replace("{", '{"twice": 1, "twice": 2, ', 1)
    return text.replace(json.dumps(_MARK), raw or "", 1).encode("utf-8", "surrogatepass")


def _change_place(draw, holder, key, raw):
    kind = draw.randrange(6)
    if raw is not None:
        holder[key] = _MARK
    elif kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice(INTERESTING_TEXT)] = holder.pop(key)
    elif kind == 1:
        holder.extend([holder[key]] * draw.choice((1, 3, 100)))
    else:
        holder[key] = _odd_value(draw, holder[key])


def _places(value):
    """(container, key) of every value within a JSON value."""
    places, pending = [], [value]
    while pending:
        holder = pending.pop()
        if isinstance(holder, dict | list):
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            places += [(holder, key) for key in keys]
            pending += [holder[key] for key in keys]
    return places


def _odd_value(draw, old):
    kind = draw.randrange(8)
    if kind == 0:
        return draw.choice(INTERESTING_TEXT)
    if kind == 1 and isinstance(old, int | float):
        return draw.choice((-old, old + 1, old * 2, old - 1, str(old), float(old) if abs(old) < 1e300 else old))
    if kind == 2:
        return draw.choice((None, [], {}, [None], {"": None}, [[]], True))
    if kind == 3:
        return [old] * draw.choice((1, 2, 1000))
    if kind == 4:
        return {draw.choice(INTERESTING_TEXT): old}
    if kind == 5 and isinstance(old, str):
        at = draw.randrange(len(old) + 1)
        return old[:at] + draw.choice(INTERESTING_TEXT) + old[at:]
    if kind == 6:
        return draw.getrandbits(draw.choice((4, 16, 40, 200)))
    return draw.choice(INTERESTING_NUMBERS)
