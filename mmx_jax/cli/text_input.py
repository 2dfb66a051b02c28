"""Text that infer.py reads from files and standard input, and its report on a scored text. Defines no flags."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from mmx_jax.cli.arguments import UsageError

BYTE_ORDER_MARK = "\ufeff"


def read_text(path: str) -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors write first.

    Raises:
      UsageError: the file does not exist, or is not UTF-8.
    """
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise UsageError(f"{file}: no such file")
    return decode_text(file.read_bytes(), str(file)).removeprefix(BYTE_ORDER_MARK)


def decode_text(data: bytes, name: str) -> str:
    """`data` as text; raises UsageError, with the position, if it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        hint = "it looks like UTF-16; save it as UTF-8" if utf16 else f"{error.reason} at byte {error.start}"
        raise UsageError(f"{name} is not UTF-8 text: {hint}") from None


def turns(stdin: BinaryIO, say: Callable[[str], None]) -> Iterator[str]:
    """Yields the lines of standard input that are not blank; a prompt `> ` on standard error precedes each.

    A line that is not UTF-8 raises UsageError. At a terminal it is reported with `say` instead, to be typed again.
    """
    number = 0
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = stdin.readline()
        if not line:
            say("")
            return
        number += 1
        try:
            text = decode_text(line, f"line {number} of standard input")
        except UsageError as error:
            if not stdin.isatty():
                raise
            say(f"{error}; the line was ignored")
            continue
        if text.strip():
            yield text.removeprefix(BYTE_ORDER_MARK).rstrip("\r\n")


def score_lines(total: float, tokens: int, size: int) -> list[str]:
    """The report on a text of log-probability `total` (nats), of `tokens` tokens and `size` bytes."""
    mean = -total / (tokens - 1)
    # A float overflows above e^709.
    perplexity = f"{math.exp(mean):.4f}" if mean < 700 else f"e^{mean:.1f}, more than a float holds"
    return [
        f"tokens             {tokens} (the first one is given, the others are scored)",
        f"log-probability    {total:.4f} nats",
        f"mean nll           {mean:.4f} nats per token",
        f"perplexity         {perplexity}",
        f"bits per byte      {-total / math.log(2) / size:.4f} (of the whole file)",
    ]
