"""Tokens that a user gives: checked, padded, aligned."""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import numpy as np

from mmx_jax.config import ModelConfig

# One row of token ids, or several, as an array or as sequences that may differ in length; masks likewise.
TokenRows: TypeAlias = np.ndarray | jax.Array | Sequence[int] | Sequence[Sequence[int]]


class GenerationError(ValueError):
    """Tokens or settings that cannot be generated from; the message names them and the remedy."""


def check_lengths(config: ModelConfig, prompt_length: int, context: int) -> None:
    """Raises GenerationError where no `context` holds the prompt, or the model has no such context."""
    if prompt_length > context:
        raise GenerationError(f"a prompt of {prompt_length} tokens needs a context of as many; got {context}")
    if context > config.max_position_embeddings:
        raise GenerationError(f"{context} tokens exceed max_position_embeddings={config.max_position_embeddings}")


def check_tokens(
    config: ModelConfig, tokens: TokenRows, mask: TokenRows | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [B, T], mask bool [B, T]) of what a user gave.

    Args:
      tokens: integers [B, T]; [T] is one row. Without a mask the rows may differ in length, and shorter ones are padded
        at the left.
      mask: of the shape of `tokens`; None is a mask of ones.

    Raises:
      GenerationError: a shape, dtype or value that cannot be.
    """
    tokens, mask = _as_arrays(tokens, mask)
    if mask.shape != tokens.shape:
        raise GenerationError(f"mask {mask.shape} must have the shape of tokens, {tokens.shape}")
    if not (mask.dtype == bool or np.issubdtype(mask.dtype, np.integer)) or not np.isin(mask, (0, 1)).all():
        raise GenerationError("mask must hold 1 at tokens and 0 at padding, as integers or booleans")
    if tokens.ndim == 1:
        tokens, mask = tokens[None], mask[None]
    if tokens.ndim != 2:
        raise GenerationError(f"tokens must be [B, T], or [T] of one row; got shape {tokens.shape}")
    if 0 in tokens.shape:
        raise GenerationError(f"tokens are empty, of shape {tokens.shape}; give at least one token in every row")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise GenerationError(f"tokens must be integers, got {tokens.dtype}")
    mask = mask.astype(bool)
    wrong = mask & ((tokens < 0) | (tokens >= config.vocab_size))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise GenerationError(
            f"token {tokens[row, column]} at row {row}, column {column} is outside the vocabulary, "
            f"0 to {config.vocab_size - 1}"
        )
    return np.where(mask, tokens, 0).astype(np.int32), mask


def _as_arrays(tokens, mask) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(tokens, str | bytes) or _is_list(tokens) and any(isinstance(row, str | bytes) for row in tokens):
        raise GenerationError(
            "tokens are integers, not text: give text to model.complete(...), or encode it with model.tokenizer.encode"
        )
    try:
        if _is_list(tokens) and len({_length(row) for row in tokens}) > 1:
            if mask is not None:
                raise GenerationError("rows of different lengths take no mask: pad them yourself, or leave mask= out")
            return _pad_left(tokens)
        tokens = np.asarray(tokens)
        return tokens, np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
    except GenerationError:
        raise
    except (ValueError, TypeError) as error:
        raise GenerationError(f"tokens and mask must be lists or arrays of integers [B, T]: {error}") from None


def _is_list(value) -> bool:
    return isinstance(value, list | tuple)


def _length(row) -> int:
    """Of a row of tokens; -1 of a single token."""
    return len(row) if _is_list(row) else next(iter(np.shape(row)), -1)


def _pad_left(rows) -> tuple[np.ndarray, np.ndarray]:
    rows = [np.asarray(row) for row in rows]
    for i, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0 or not np.issubdtype(row.dtype, np.integer):
            kind = "is empty" if row.size == 0 else f"has shape {row.shape} and dtype {row.dtype}"
            raise GenerationError(f"row {i} of the tokens {kind}; every row must hold integers [T]")
    counts = np.array([row.size for row in rows])
    mask = np.arange(counts.max()) >= counts.max() - counts[:, None]
    tokens = np.zeros(mask.shape, np.int64)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask


def ragged(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [B, T], mask bool [B, T]) of rows of different lengths, padded at the right."""
    counts = np.array([len(row) for row in rows], int)
    mask = np.arange(counts.max(initial=0)) < counts[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = [token for row in rows for token in row]
    return tokens, mask


def left_align(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moves the tokens of every row to its left, in order, and cuts columns that hold none."""
    return ragged([row[own] for row, own in zip(tokens, mask, strict=True)])
