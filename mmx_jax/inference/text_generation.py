"""Generation as text: stop strings across token borders, conversations that keep their state, speeds."""

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from mmx_jax.data.chat_template import ChatError
from mmx_jax.data.tokenizer import Tokenizer
from mmx_jax.inference.generate import GenerationError, Session, ragged


class TextModel(Protocol):
    """`mmx_jax.inference.model.Model`, as far as text needs it."""

    tokenizer: Tokenizer | None

    def session(self, batch: int, **settings) -> Session: ...


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
        """What was held back, once no token follows."""
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

    An empty prompt is the tokenizer's bos token.

    Raises:
      GenerationError: a prompt is no text, or it is empty and the tokenizer has no bos token.
    """
    rows = []
    for i, prompt in enumerate(prompts):
        name = f"prompt {i + 1} of {len(prompts)}"
        row = tokenizer.encode(check_text(prompt, name))
        if not row and tokenizer.bos_id is None:
            raise GenerationError(f"{name} is empty, and the tokenizer has no bos token: give some text to continue")
        rows.append(row or [tokenizer.bos_id])
    return ragged(rows)


def complete(
    model: TextModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop_tokens: Iterable[int],
    stop_strings: Sequence[str] = (),
    speed: Speed | None = None,
    **settings,
) -> Iterator[tuple[int, str]]:
    """Continues prompts as one batch.

    Args:
      stop_tokens: a row ends with one of these; with the special tokens that stop strings begin with, too.
      stop_strings: a row ends before one of these.
      speed: is told tokens and seconds.
      settings: of `Model.session`.

    Yields:
      (row, text), as `stream_text`.

    Raises:
      GenerationError: the model has no tokenizer, or a prompt or a setting that cannot be.
    """
    if model.tokenizer is None:
        raise GenerationError("this model has no tokenizer: put tokenizer.json beside the weights, or use generate")
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens={max_new_tokens} must be positive")
    stops = tuple(sorted({*stop_tokens, *special_stops(model.tokenizer, check_stop_strings(stop_strings))}))
    tokens, mask = encode_prompts(model.tokenizer, prompts)
    session, speed = model.session(len(prompts), stop_tokens=stops, **settings), speed or Speed()
    speed.extend(session, tokens, mask, reserve=max_new_tokens)
    pieces = speed.watch(session.stream(max_new_tokens))
    return stream_text(session, pieces, model.tokenizer, stop_tokens=stops, stop_strings=stop_strings)


class Conversation:
    """A chat. The decode state stays between turns; of a new turn only the new text is read.

    The whole conversation is read again where the template writes an earlier turn otherwise than it was generated
    (reasoning that is dropped, a reply cut at a stop string).

    Args:
      model: with a tokenizer.
      template: a key of `mmx_jax.data.tokenizer.TEMPLATES`; None takes the tokenizer's own.
      system: the system message, if any.
      stop_tokens: end a reply, as the special tokens do that stop strings begin with.
      settings: of `Model.session`.

    Raises:
      ChatError: the template does not write the system message.
      GenerationError: a text or a stop string that cannot be.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        template: str | None = None,
        system: str | None = None,
        max_new_tokens: int,
        stop_tokens: Sequence[int],
        stop_strings: Sequence[str] = (),
        **settings,
    ):
        self._model, self._template, self._max_new_tokens = model, template, max_new_tokens
        self._stop_strings = check_stop_strings(stop_strings)
        self._stop_tokens = tuple(sorted({*stop_tokens, *special_stops(model.tokenizer, self._stop_strings)}))
        self._settings = settings
        self._context: str | None = None  # the text that the session has read and written; None: unknown
        self.messages: list[dict] = []
        if system is not None:
            self.messages.append({"role": "system", "content": check_text(system, "the system message")})
            self._check_system(system)
        self.session: Session | None = None
        self.speed = Speed()

    def _check_system(self, system: str):
        """Some templates of other models leave a system message out without a word."""
        rendered = self._model.tokenizer.apply_chat([*self.messages, {"role": "user", "content": "hi"}], self._template)
        if system.strip() not in rendered:
            raise ChatError("the chat template leaves the system message out: say it in the first turn instead")

    def reply(self, text: str) -> Iterator[str]:
        """Says `text` and yields the reply in pieces.

        Raises:
          ChatError: there is no template, or it cannot render the messages.
          GenerationError: the turn is no text, or the conversation exceeds `max_position_embeddings`; the turn is
            then taken back.
        """
        tokenizer = self._model.tokenizer
        messages = [*self.messages, {"role": "user", "content": check_text(text, "the turn")}]
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
