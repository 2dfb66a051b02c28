"""Generation as text: stop strings across token borders, conversations that keep their state, speeds."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from mmx_jax.data.tokenizer import Tokenizer
from mmx_jax.inference.detokenize import check_stop_strings, check_text, special_stops, stream_text
from mmx_jax.inference.inputs import GenerationError, ragged
from mmx_jax.inference.session import Session
from mmx_jax.inference.speed import Speed


class TextModel(Protocol):
    """`mmx_jax.inference.model.Model`, as far as text needs it."""

    tokenizer: Tokenizer | None

    def session(self, batch: int, **settings) -> Session: ...


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
