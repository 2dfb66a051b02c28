"""Checks of command-line arguments before flags are parsed, for both mains."""

import sys
from collections.abc import Sequence


class UsageError(ValueError):
    """Flags that contradict each other, or a text or a file that cannot be read."""


def check_text(argv: Sequence[str]) -> None:
    """Refuses arguments that are not UTF-8 text; Python passes their bytes on as lone surrogates.

    Args:
      argv: the program and its arguments, as `sys.argv`.

    Raises:
      UsageError: an argument is not UTF-8; the message names the flag and the byte.
    """
    for i, argument in enumerate(argv[1:], start=1):
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError as error:
            before = argv[i - 1] if i > 1 and "=" not in argv[i - 1] else ""  # in `--flag value`
            name = _flag(argument) or _flag(before) or f"argument {i}"
            code = ord(argument[error.start])
            byte = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"the code point U+{code:04X}"
            raise UsageError(f"{name} is not UTF-8 text: it holds {byte}; give text in UTF-8") from None


def check_or_exit(program: str, argv: Sequence[str]) -> None:
    """`check_text` for a main: an error is one line on standard error and exit status 1."""
    try:
        check_text(argv)
    except UsageError as error:
        sys.exit(f"{program}: {error}")


def _flag(argument: str) -> str:
    """`--name` of `--name=value` or `--name`; "" for anything else."""
    name = argument.partition("=")[0]
    return name if name.startswith("-") and name.isprintable() and name.isascii() else ""


def printable(text: object) -> str:
    """A message that every terminal can show: characters that UTF-8 cannot encode are escaped."""
    return str(text).encode("utf-8", errors="backslashreplace").decode("utf-8")
