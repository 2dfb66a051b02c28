"""Sequences in decoding that are read and written in turns."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from mmx_jax.inference import sampling
from mmx_jax.inference.generate import (
    DECODE_STEPS,
    NOT_FINITE,
    PREFILL_CHUNK,
    DecodeCarry,
    SamplingInputs,
    decode,
    new_state,
    not_finite_error,
    on_mesh,
    place_like,
    power_of_two,
    prefill,
    slot_bucket,
    slots_needed,
    with_slots,
)
from mmx_jax.inference.inputs import GenerationError, TokenRows, check_tokens, left_align
from mmx_jax.models.cache import DecodeState
from mmx_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """How the sequences of a `Session` are drawn and read."""

    sampling_params: sampling.SamplingParams = sampling.SamplingParams()
    seed: int | Sequence[int] = 0  # see `mmx_jax.inference.sampling.row_keys`
    stop_tokens: Sequence[int] = ()  # a row ends after one of these
    vocab_size: int | None = None  # ids from here on are never drawn; None: the model's
    prefill_chunk: int = PREFILL_CHUNK  # tokens of a row in one pass of `extend`


class Session:
    """A batch of sequences in decoding: `extend` reads tokens, `decode` writes tokens, in any order.

    Args:
      model: config and runtime of the model.
      params: its parameters.
      settings: how tokens are drawn and read.
      mesh: where the parameters lie; None: on one device.

    Raises:
      GenerationError, SamplingError: a setting that cannot be.
    """

    def __init__(
        self, model: Decoder, params, batch: int, settings: SessionSettings, *, mesh: jax.sharding.Mesh | None = None
    ):
        config = model.config
        prefill_chunk, stop_tokens = settings.prefill_chunk, settings.stop_tokens
        if prefill_chunk < 1:
            raise GenerationError(f"prefill_chunk={prefill_chunk} must be positive")
        for token in stop_tokens:
            if not 0 <= token < config.vocab_size:
                raise GenerationError(f"stop token {token} is outside the vocabulary, 0 to {config.vocab_size - 1}")
        self._model, self._params, self._mesh, self._chunk = model, params, mesh, prefill_chunk
        self._vocab_size = min(settings.vocab_size or config.vocab_size, config.vocab_size)
        self._sampler, self._keys = settings.sampling_params.sampler(), sampling.row_keys(settings.seed, batch)
        # In buckets too, so that one more stop token does not compile anew.
        self._stop_ids = np.full(power_of_two(len(stop_tokens)), -1, np.int32)
        self._stop_ids[: len(stop_tokens)] = stop_tokens
        self._carry: DecodeCarry | None = None
        self._seen = np.zeros((batch, config.vocab_size), bool) if self._sampler.repetition_penalty else None
        self._batch, self._slots = batch, 0
        self.lengths = np.zeros(batch, int)  # tokens of each row
        self.done = np.zeros(batch, bool)  # rows that met a stop token
        self._failure: GenerationError | None = None  # what ended the session

    def __repr__(self) -> str:
        lengths = ", ".join(map(str, self.lengths[:8])) + (", ..." if self._batch > 8 else "")
        return (
            f"Session(batch={self._batch}, lengths=[{lengths}], done={int(self.done.sum())}, slots={self._slots}, "
            f"dtype={self._model.config.dtype})"
        )

    @property
    def logits(self) -> np.ndarray:
        """float32 [B, V] of the next token."""
        if self._carry is None:
            raise GenerationError("a sequence begins with tokens to read: call extend before logits")
        logits = np.asarray(self._carry.logits)
        if not (finite := np.isfinite(logits[:, : self._vocab_size]).all(axis=1)).all():
            row = int(np.argmin(finite))
            raise not_finite_error(self._model.config, self._params, f"row {row} after {self.lengths[row]} tokens")
        return logits

    @property
    def state(self) -> DecodeState:
        """The state as it stands; the next call takes its buffers."""
        if self._carry is None:
            raise GenerationError("a sequence begins with tokens to read: call extend before state")
        return self._carry.state

    def extend(self, tokens: TokenRows, mask: TokenRows | None = None, *, reserve: int = 0) -> None:
        """Reads tokens [B, T], at least one in every row; all rows then go on.

        Args:
          mask: 1 at tokens, 0 at padding, which may be anywhere.
          reserve: number of tokens to be decoded next, for which room is made at once.

        Raises:
          GenerationError: tokens that cannot be, or more than `max_position_embeddings`.
        """
        self._check_alive()
        tokens, mask = check_tokens(self._model.config, tokens, mask)
        if len(tokens) != self._batch:
            raise GenerationError(f"{len(tokens)} rows of tokens for {self._batch} sequences")
        if not mask.any(axis=1).all():
            raise GenerationError(f"row {int(np.argmin(mask.any(axis=1)))} holds no token: its mask is all 0")
        self._check_context(self.lengths + mask.sum(axis=1) + reserve)
        tokens, mask = left_align(tokens, mask)
        width = tokens.shape[1]
        with on_mesh(self._mesh):
            state = self._room(max(slots_needed(width, self._chunk), width + reserve))
            logits, state = prefill(self._model, self._params, tokens, mask, state, chunk=self._chunk)
            seen, count = None, np.int32(0)
            if self._seen is not None:
                seen = self._seen if self._carry is None else np.array(self._carry.seen)
                rows = np.broadcast_to(np.arange(len(tokens))[:, None], tokens.shape)
                seen[rows[mask], tokens[mask]] = True
            if self._carry is not None:
                count = self._carry.count
            count, done, seen = place_like(self._params, (count, np.zeros(self._batch, bool), seen))
            self._carry = DecodeCarry(state, logits, count, done, seen)
            jax.block_until_ready(logits)
        self.done = np.zeros(self._batch, bool)
        self.lengths = self.lengths + mask.sum(axis=1)

    def decode(self, steps: int) -> np.ndarray:
        """Writes up to min(steps, `DECODE_STEPS`) tokens: int32 [B, n], -1 after a row's stop token.

        n is smaller, and in the end 0, once all rows are done.

        Raises:
          GenerationError: nothing was read yet, the context would exceed `max_position_embeddings`, or the logits are
            NaN or infinite; the last one ends the session.
        """
        self._check_alive()
        if self._carry is None:
            raise GenerationError("a sequence begins with tokens to read: call extend before decode")
        if self.done.all() or steps < 1:
            return np.zeros((self._batch, 0), np.int32)
        steps = min(steps, DECODE_STEPS)
        self._check_context(self.lengths[~self.done] + steps)
        with on_mesh(self._mesh):
            carry = self._carry._replace(state=self._room(steps))
            inputs = SamplingInputs(self._keys, self._sampler, self._stop_ids)
            tokens, taken, carry = decode(
                self._model, self._params, carry, inputs, np.int32(steps), vocab_size=self._vocab_size
            )
        self._carry = carry
        taken = int(taken)
        tokens = np.asarray(tokens)[:, :taken]
        self._check_finite(tokens)
        self.lengths = self.lengths + (tokens >= 0).sum(axis=1)
        self.done = np.array(carry.done)
        return tokens

    def stream(self, max_new_tokens: int, steps: int = 8) -> Iterator[np.ndarray]:
        """The tokens of `decode` as they are made: the first one alone, then `steps` at a time."""
        remaining = max_new_tokens
        while remaining and (piece := self.decode(1 if remaining == max_new_tokens else min(steps, remaining))).size:
            remaining -= piece.shape[1]
            yield piece

    def finish(self, row: int) -> None:
        """Lets a row end here."""
        self.done[row] = True
        if self._carry is not None:
            self._carry = self._carry._replace(done=place_like(self._params, self.done.copy()))

    def _check_alive(self):
        if self._failure is not None:
            raise GenerationError(f"this session has ended: {self._failure}")

    def _check_finite(self, tokens):
        """Raises for the first row of decoded tokens that has `NOT_FINITE`."""
        if (failed := np.argwhere(tokens == NOT_FINITE)).size:
            row, column = failed[0]
            where = f"row {row} after {self.lengths[row] + column} tokens"
            self._failure = not_finite_error(self._model.config, self._params, where)
            raise self._failure

    def _check_context(self, lengths):
        limit = self._model.config.max_position_embeddings
        if (longest := int(lengths.max(initial=0))) > limit:
            raise GenerationError(
                f"{longest} tokens of prompt and continuation exceed max_position_embeddings={limit} of the model; "
                "shorten the prompt or ask for fewer new tokens"
            )

    def _room(self, more: int) -> DecodeState:
        """The state with slots for `more` tokens of the longest row."""
        needed = int(self.lengths.max()) + more
        if self._carry is None:
            self._slots = slot_bucket(needed)
            return new_state(self._model.config, self._params, self._batch, self._slots)
        if needed > self._slots:
            self._slots = slot_bucket(needed)
            return with_slots(self._carry.state, self._slots)
        return self._carry.state
