"""Generation as text: stop strings across token borders, conversations that keep their state, speeds."""

import time
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from mmx_jax.generate import GenerationError, Session, ragged
from mmx_jax.model import Model
from mmx_jax.tokenizer import Tokenizer


class TextStream:
    """The text of one sequence, token by token; it ends before the first stop string.

    Text that may yet become a stop string is held back until that is settled.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        if "" in stop_strings:
            raise GenerationError("a stop string is empty")
        self._decoder = tokenizer.stream()
        self._stop_strings = tuple(stop_strings)
        self._held = ""
        self.stopped = False  # a stop string was met; what follows is not shown

    def step(self, token: int) -> str:
        """Adds a token; returns the text that is now certain."""
        return "" if self.stopped else self._add(self._decoder.step(token) or "")

    def finish(self) -> str:
        """What was held back, once no token follows."""
        if self.stopped:
            return ""
        text = self._add(self._decoder.finish() or "")
        text, self._held = text + self._held, ""
        return text

    def _add(self, text):
        text = self._held + text
        found = [at for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[certain:]
        return text[:certain]


def _overlap(text, stop):
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(
    session: Session, pieces: Iterable[np.ndarray], tokenizer: Tokenizer, *, stop_tokens: Collection[int],
    stop_strings: Sequence[str] = (),
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """Text of what a session writes.

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


class Speed:
    """Tokens and seconds of prefill and decoding, as they are measured around a session."""

    def __init__(self):
        self._prefill = self._decode = (0, 0.0)
        self._first = True

    def extend(self, session: Session, tokens, mask=None, *, reserve: int):
        """`session.extend`, timed."""
        begin = time.perf_counter()
        session.extend(tokens, mask, reserve=reserve)
        self._prefill = int(np.sum(mask)) if mask is not None else np.size(tokens), time.perf_counter() - begin

    def watch(self, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The pieces, timed; the first one compiles, so it is left out of the rate."""
        first, count, seconds = True, 0, 0.0
        begin = time.perf_counter()
        for piece in pieces:
            if not first:
                count, seconds = count + int((piece >= 0).sum()), seconds + time.perf_counter() - begin
            first = False
            self._decode = count, seconds
            yield piece
            begin = time.perf_counter()

    def __str__(self):
        (read, read_seconds), (written, write_seconds) = self._prefill, self._decode
        compiled = " (compilation included)" if self._first else ""
        self._first = False
        text = f"prefill: {read} tokens, {read / max(read_seconds, 1e-9):.1f} tokens/s{compiled}"
        if written:
            text += f"; decode: {written} tokens behind the first, {written / max(write_seconds, 1e-9):.1f} tokens/s"
        return text


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [B, T], mask bool [B, T]); special tokens in the text are read as such.

    Raises:
      GenerationError: a prompt is empty.
    """
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    for i, row in enumerate(rows):
        if not row:
            raise GenerationError(f"prompt {i + 1} of {len(rows)} is empty: give some text to continue")
    return ragged(rows)


class Conversation:
    """A chat. The decode state stays between turns; of a new turn only the new text is read.

    The whole conversation is read again where the template writes an earlier turn otherwise than it was generated
    (reasoning that is dropped, a reply cut at a stop string).

    Args:
      model: with a tokenizer.
      template: a key of `mmx_jax.tokenizer.TEMPLATES`; None takes the tokenizer's own.
      stop_tokens: end a reply.
      settings: of `Model.session`.
    """

    def __init__(
        self, model: Model, *, template: str | None = None, max_new_tokens: int, stop_tokens: Sequence[int],
        stop_strings: Sequence[str] = (), **settings,
    ):  # fmt: skip
        self._model, self._template, self._max_new_tokens = model, template, max_new_tokens
        self._stop_tokens, self._stop_strings = tuple(stop_tokens), tuple(stop_strings)
        self._settings = settings
        self._context: str | None = None  # the text that the session has read and written; None: unknown
        self.messages: list[dict] = []
        self.session: Session | None = None
        self.speed = Speed()

    def reply(self, text: str) -> Iterator[str]:
        """Says `text` and yields the reply in pieces.

        Raises:
          ChatError: there is no template, or it cannot render the messages.
          GenerationError: the conversation exceeds `max_position_embeddings`; the turn is then taken back.
        """
        tokenizer = self._model.tokenizer
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = tokenizer.apply_chat(messages, self._template)
        known, self._context = self._context, None
        new = prompt
        if known is not None and prompt.startswith(known):
            new = prompt[len(known) :]
        else:
            self.session = self._model.session(1, stop_tokens=self._stop_tokens, **self._settings)
        tokens, _ = encode_prompts(tokenizer, [new])
        try:
            self.speed.extend(self.session, tokens, reserve=self._max_new_tokens)
        except GenerationError:
            self._context = None if new is prompt else known  # nothing was read
            raise
        return self._replies(messages, prompt)

    def _replies(self, messages, prompt):
        tokenizer, written, answer = self._model.tokenizer, [], []

        def record(pieces):
            for piece in pieces:
                written.extend(piece[0][piece[0] >= 0].tolist())
                yield piece

        try:
            pieces = record(self.speed.watch(self.session.stream(self._max_new_tokens)))
            for _, text in stream_text(
                self.session, pieces, tokenizer, stop_tokens=self._stop_tokens, stop_strings=self._stop_strings
            ):
                answer.append(text)
                yield text
            self._context = prompt + tokenizer.decode(written, skip_special_tokens=False)
        finally:  # also when the reader loses patience; the next turn then starts from the text
            self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]
