"""Where the rows of a JSON-lines file begin, found in one pass of bounded memory."""

import dataclasses
import pathlib
import re
import zlib

import numpy as np

from mmx_jax.data.file_bytes import DataError, blocks_of, read_at, reading

_NEWLINE = ord("\n")
_WHITESPACE = b" \t\n\r\x0b\x0c"
_UTF8_MARK = b"\xef\xbb\xbf"
_OTHER_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
# An escaped surrogate that has no partner beside it. Text such as "\\ud800" (an escaped backslash), a pair behind a
# backslash and one cut by the end of a block match too: a match makes a row worth parsing, no more.
_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<![^\\]\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
_PAIR_BYTES = 13  # and the byte before it


@dataclasses.dataclass(frozen=True)
class RowIndex:
    """The rows of a file: its lines that are not blank.

    Attributes:
      starts: int64 [n + 1], the first byte of every row, and the size of the file. Blank lines belong to the row
        before them: JSON does not mind.
      blank_lines: int64, for every blank line how many rows stand before it.
      suspects: rows that may hold half of a surrogate pair, ascending.
      checksum: of all bytes.
    """

    starts: np.ndarray
    blank_lines: np.ndarray
    suspects: list[int]
    checksum: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def line_number(self, row: int) -> int:
        """Of a row in its file, counted from 1."""
        return row + 1 + int(np.searchsorted(self.blank_lines, row, side="right"))


def index_rows(path: pathlib.Path) -> RowIndex:
    """Reads the file once; holds 16 bytes a row at the peak, of which 8 are kept.

    Raises:
      DataError: the file cannot be read, or is UTF-16 or UTF-32.
    """
    starts, blanks, suspects = [], [], set()
    with reading(path), open(path, "rb") as stream:
        mark = stream.read(4)
        if mark.startswith(_OTHER_MARKS):
            raise DataError(f"{path} is UTF-16 or UTF-32 text: convert it to UTF-8 (iconv -t UTF-8)")
        position = len(_UTF8_MARK) if mark.startswith(_UTF8_MARK) else 0
        stream.seek(position)
        rows, checksum, line_begins, before = 0, 0, True, b""
        for block in blocks_of(stream):
            lines = _line_starts(block, line_begins)
            blank = _blank_lines(block, lines, path, position)
            kept = lines[~blank] + position
            if b"\\ud" in block or b"\\uD" in block or b"\\" in before:
                for match in _LONE_SURROGATE.finditer(before + block):
                    place = position - len(before) + match.start()
                    suspects.add(max(0, rows + int(np.searchsorted(kept, place, side="right")) - 1))
            if blank.any():
                blanks.append(rows + np.cumsum(~blank)[blank])
            starts.append(kept)
            rows += len(kept)
            position += len(block)
            checksum = zlib.crc32(block, checksum)
            line_begins, before = block[-1] == _NEWLINE, (before + block[-_PAIR_BYTES:])[-_PAIR_BYTES:]
    starts.append(np.array([position], np.int64))
    return RowIndex(
        np.concatenate(starts), np.concatenate([np.zeros(0, np.int64), *blanks]), sorted(suspects), checksum
    )


def _line_starts(block: bytes, line_begins: bool) -> np.ndarray:
    """int64: where lines start in a block; at its beginning if `line_begins`."""
    after = np.flatnonzero(np.frombuffer(block, np.uint8) == _NEWLINE) + 1
    if len(after) and after[-1] == len(block):
        after = after[:-1]
    return np.concatenate([np.zeros(1, np.int64), after]) if line_begins else after


def _blank_lines(block: bytes, lines: np.ndarray, path: pathlib.Path, position: int) -> np.ndarray:
    """bool: which of the lines that start at `lines` of a block at `position` of the file hold no text."""
    first = np.frombuffer(block, np.uint8)[lines]
    blank = first == _NEWLINE
    spaces = np.isin(first, np.frombuffer(_WHITESPACE, np.uint8)) & ~blank
    for i in np.flatnonzero(spaces):
        begin, end = int(lines[i]), block.find(b"\n", lines[i])
        text = block[begin : len(block) if end < 0 else end].strip(_WHITESPACE)
        blank[i] = not text and (end >= 0 or _rest_is_blank(path, position + len(block)))
    return blank


def _rest_is_blank(path: pathlib.Path, position: int) -> bool:
    """Whether a line holds no text from `position` of the file on."""
    size = path.stat().st_size
    while position < size:
        part = read_at(path, position, min(1 << 16, size - position))
        line, newline, _ = part.partition(b"\n")
        if line.strip(_WHITESPACE):
            return False
        if newline:
            return True
        position += len(part)
    return True
