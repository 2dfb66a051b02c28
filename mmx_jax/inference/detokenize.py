"""Tokens to text as they come: stop strings across token borders."""

from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from mmx_jax.data.tokenizer import Tokenizer
from mmx_jax.inference.inputs import GenerationError
from mmx_jax.inference.session import Session


def check_text(text: str, name: str) -> str:
    """`text`, if it is one.

    Raises:
      GenerationError: not a string, or one with half of a surrogate pair, as undecodable bytes leave behind.
    """
    if not isinstance(text, str):
        raise GenerationError(f"{name} must be text, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise GenerationError(f"{name} holds {half} at character {error.start}, which is no character") from None
    return text


def check_stop_strings(stop_strings: Sequence[str]) -> tuple[str, ...]:
    """The stop strings as a tuple.

    Raises:
      GenerationError: one that is empty or no text, or a single string in place of the list.
    """
    if isinstance(stop_strings, str):
        raise GenerationError(f"stop strings are a list: give [{stop_strings!r}]")
    for stop in stop_strings:
        if not check_text(stop, "a stop string"):
            raise GenerationError("a stop string is empty")
    return tuple(stop_strings)


def special_stops(tokenizer: Tokenizer, stop_strings: Sequence[str]) -> set[int]:
    """Ids of the special tokens that stop strings begin with: decoded text leaves these out, so their ids stop."""
    special = {token: i for i, token in tokenizer.shown_as_nothing.items()}
    return {i for stop in stop_strings for token, i in special.items() if stop.startswith(token)}


class TextStream:
    """The text of one sequence, token by token; it ends before the first stop string.

    Text that may yet become a stop string is held back until that is settled. Special tokens are not shown, but a stop
    string may hold them.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        self._decoder = tokenizer.stream()
        self._stop_strings = list(check_stop_strings(stop_strings))
        # A special token of a stop string is one character here, of those that no text holds.
        self._marks: dict[int, str] = {}
        for i, token in tokenizer.shown_as_nothing.items():
            if any(token in stop for stop in stop_strings):
                self._marks[i] = mark = chr(0xD800 + len(self._marks))
                self._stop_strings += [stop.replace(token, mark) for stop in self._stop_strings if token in stop]
        self._no_marks = str.maketrans(dict.fromkeys(self._marks.values()))
        self._held = ""
        self.stopped = False  # a stop string was met; what follows is not shown

    def step(self, token: int) -> str:
        """Adds a token; returns the text that is now certain."""
        if self.stopped:
            return ""
        return self._add((self._decoder.step(token) or "") + self._marks.get(int(token), ""))

    def finish(self) -> str:
        """The text that was held back, once no token follows."""
        if self.stopped:
            return ""
        text = self._add(self._decoder.finish() or "")
        text, self._held = text + self._held.translate(self._no_marks), ""
        return text

    def _add(self, text):
        text = self._held + text
        found = [at for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)].translate(self._no_marks)
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[certain:]
        return text[:certain].translate(self._no_marks)


def _overlap(text, stop):
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(
    session: Session,
    pieces: Iterable[np.ndarray],
    tokenizer: Tokenizer,
    *,
    stop_tokens: Collection[int],
    stop_strings: Sequence[str] = (),
) -> Iterator[tuple[int, str]]:
    """The text that a session writes, as it is written.

    Args:
      pieces: `session.stream(...)`.
      stop_tokens: as the session has them; their text is not shown.
      stop_strings: a row ends before one of these, which may span tokens.

    Yields:
      (row, text), text never empty, in the order in which it is made.
    """
    streams = None
    for piece in pieces:
        streams = streams or [TextStream(tokenizer, stop_strings) for _ in piece]
        for row, (stream, tokens) in enumerate(zip(streams, piece, strict=True)):
            for token in tokens:
                if token < 0 or token in stop_tokens:
                    break
                if text := stream.step(token):
                    yield row, text
            if stream.stopped and not session.done[row]:
                session.finish(row)
    for row, stream in enumerate(streams or ()):
        if text := stream.finish():
            yield row, text
