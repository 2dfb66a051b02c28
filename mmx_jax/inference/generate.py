"""Decoding: prefill in buckets and chunks, a loop of steps inside one jit, sequences that go on where they stopped."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mmx_jax.config import ModelConfig
from mmx_jax.inference import sampling
from mmx_jax.layers.softmax_attention import KeyValueCache
from mmx_jax.models.cache import LAYER_AXES, DecodeState, init_state
from mmx_jax.models.decoder import Decoder, head_logits
from mmx_jax.sharding import constrain

DECODE_STEPS = 32  # most tokens of one dispatch
NOT_FINITE = -2  # in place of a token that was to be drawn from NaN or infinity
PREFILL_CHUNK = 1024
_SMALLEST_BUCKET = 16
_SCORE_PIECE = 64  # tokens whose logits are held at once


class GenerationError(ValueError):
    """Tokens or settings that cannot be generated from; the message names them and the remedy."""


def inference_config(config: ModelConfig, dtype: str) -> ModelConfig:
    """The model as it generates, with weights and computation in `dtype`.

    A token's result must not hang on its neighbours, so nothing is dropped whatever training did.
    """
    return dataclasses.replace(
        config, dtype=dtype, param_dtype=dtype, capacity_factor=None, expert_buffer=None, remat="none"
    )


def check_lengths(config: ModelConfig, prompt_length: int, context: int):
    """Raises GenerationError where no `context` holds the prompt, or the model has no such context."""
    if prompt_length > context:
        raise GenerationError(f"a prompt of {prompt_length} tokens needs a context of as many; got {context}")
    if context > config.max_position_embeddings:
        raise GenerationError(f"{context} tokens exceed max_position_embeddings={config.max_position_embeddings}")


def power_of_two(n: int) -> int:
    """Bucket of a prompt piece: `n` rounded up to a power of two, 16 or more."""
    return max(_SMALLEST_BUCKET, 1 << (n - 1).bit_length())


def slot_bucket(n: int) -> int:
    """Bucket of a whole length: a multiple of 64, from 512 on of a quarter to an eighth of `n`."""
    step = max(64, 1 << max(n.bit_length() - 3, 0))
    return -(-n // step) * step


def check_tokens(config: ModelConfig, tokens, mask=None) -> tuple[np.ndarray, np.ndarray]:
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
        raise GenerationError("mask must hold 1 at real tokens and 0 at padding, as integers or booleans")
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


def left_align(tokens, mask) -> tuple[np.ndarray, np.ndarray]:
    """Moves the real tokens of every row to its left, in order, and cuts columns that hold none."""
    return ragged([row[real] for row, real in zip(tokens, mask, strict=True)])


def on_mesh(mesh):
    """The context in which arrays are sharded over `mesh`; None: a single device."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


@functools.partial(jax.jit, static_argnames="config")
def forward(config: ModelConfig, params, tokens, segment_ids):
    """(float32 logits [B, T, V] of whole rows, bool [B, T] that is True where all of them are finite)."""
    logits = Decoder(config).apply({"params": params}, tokens, segment_ids).logits
    return logits, jnp.all(jnp.isfinite(logits), axis=-1)


@jax.jit
def _all_finite(params):
    return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), params)


def not_finite_error(config: ModelConfig, params, where: str) -> GenerationError:
    """The error for logits that are NaN or infinite; it reads all weights once to tell the cause.

    Args:
      where: the tokens that it happened at, such as "row 0, token 17".
    """
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(_all_finite(params)))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, finite in leaves if not finite]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        cause = (
            f"the weights hold NaN or infinity in {', '.join(names[:3])}{more}: the training diverged or the file is "
            "damaged; take an earlier or another checkpoint"
        )
    elif config.dtype != "float32":
        cause = f"all weights are finite, so the computation overflowed in {config.dtype}; try dtype float32"
    else:
        cause = "all weights are finite, so the computation overflowed in float32; the weights are too large"
    return GenerationError(f"the logits at {where} are NaN or infinite: {cause}")


def beside(params, tree):
    """Arrays put where the parameters are, or on all their devices.

    What jit returns is committed to a device; an argument that is not would make its first call compile apart.
    """
    place = jax.tree.leaves(params)[0].sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec())
    return jax.device_put(tree, place)


def new_state(config: ModelConfig, params, batch: int, slots: int) -> DecodeState:
    """An empty state where the parameters are, sharded over the ambient mesh if there is one."""
    state = _new_state(config, batch, slots)
    return beside(params, state) if jax.sharding.get_abstract_mesh().empty else state


@functools.partial(jax.jit, static_argnames=("config", "batch", "slots"))
def _new_state(config, batch, slots):
    state = init_state(config, batch, slots)
    return state.replace(layers=jax.tree.map(lambda x: constrain(x, *LAYER_AXES), state.layers))


@functools.partial(jax.jit, static_argnames="slots")
def with_slots(state: DecodeState, slots: int) -> DecodeState:
    """The same state with more room; lightning states have no length."""
    extra = slots - state.real.shape[1]

    def widen(layer):
        if not isinstance(layer, KeyValueCache):
            return layer
        return KeyValueCache(*(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra), (0, 0))) for x in layer))

    layers = {name: widen(layer) for name, layer in state.layers.items()}
    return state.replace(layers=layers, real=jnp.pad(state.real, ((0, 0), (0, extra))))


def _advance(config, params, tokens, mask, state, last=None):
    """(hidden [B, T, M], state) of one piece, without slots for the columns at its right that are all padding.

    `last` as the decoder takes it.
    """
    ids = mask.astype(jnp.int32)
    out = Decoder(config).apply({"params": params}, tokens, ids, state=state, last=last, logits=False)
    used = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]) + 1, 0))
    return out.hidden, out.state.replace(cursor=state.cursor + used)


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("last", "state"))
def prefill_piece(config: ModelConfig, params, tokens, mask, last, state: DecodeState):
    """(last, state) behind one piece of a prompt: tokens, mask [B, T]; last [B, M], the hidden state of the last real
    token of each row so far."""
    index = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), -1), axis=1)  # of the last real token, or -1
    hidden, state = _advance(config, params, tokens, mask, state, jnp.maximum(index, 0))
    return jnp.where((index >= 0)[:, None], hidden[:, 0], last), state


@jax.jit
def _head(params, hidden):
    return head_logits(hidden, params["lm_head"]["kernel"])


def pieces(width: int, chunk: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, bucket) of the pieces of a prompt: whole chunks, then the rest in a power of two."""
    for start in range(0, width, chunk):
        stop = min(start + chunk, width)
        yield start, stop, chunk if stop - start == chunk else min(power_of_two(stop - start), chunk)


def _piece(x, start, stop, bucket):
    return np.pad(x[:, start:stop], ((0, 0), (0, bucket - (stop - start))))


def slots_needed(width: int, chunk: int) -> int:
    """Slots that prefill of `width` columns writes to, the padding of its last piece included."""
    start, _, bucket = list(pieces(width, chunk))[-1]
    return start + bucket


def slots_for(prompt_length: int, context: int, chunk: int) -> int:
    """Slots of a state that takes a prompt and then decodes up to a context."""
    return slot_bucket(max(slots_needed(prompt_length, chunk), context))


def prefill(config: ModelConfig, params, tokens, mask, state: DecodeState, *, chunk: int = PREFILL_CHUNK):
    """Runs prompts through the model; it continues `state`, so that the next turn of a chat is a prefill too.

    Compiles once for `chunk` and each smaller power of two. Only the last real token of a row meets the head.

    Args:
      tokens: int [B, T]; mask: bool [B, T], True at real tokens, wherever they stand.
      state: with `slots_needed(T, chunk)` free slots; it is donated.
      chunk: tokens of a row in one pass.

    Returns:
      (float32 logits [B, V] behind the last real token, state). A row needs a real token for its logits.
    """
    last = beside(params, np.zeros((tokens.shape[0], config.hidden_size), jnp.dtype(config.dtype)))
    for piece in pieces(tokens.shape[1], chunk):
        last, state = prefill_piece(config, params, _piece(tokens, *piece), _piece(mask, *piece), last, state)
    return _head(params, last), state


class DecodeCarry(NamedTuple):
    """What goes from one decoding step to the next."""

    state: DecodeState
    logits: jax.Array  # float32 [B, V] of the next token
    count: jax.Array  # int32 (), tokens drawn so far
    done: jax.Array  # bool [B], rows that met a stop token
    seen: jax.Array | None  # bool [B, V], tokens of the context, for the repetition penalty


@functools.partial(jax.jit, static_argnames=("config", "vocab_size"), donate_argnames="carry")
def decode(config: ModelConfig, params, carry: DecodeCarry, keys, sampler, stop_ids, steps, *, vocab_size):
    """Draws up to `steps` tokens of each row, fewer once all rows are done.

    Args:
      keys: jax keys [B].
      sampler: `mmx_jax.inference.sampling.Sampler`.
      stop_ids: int32 [n]; the row is done behind one of these. -1 stands for none.
      steps: int32 (), at most `DECODE_STEPS`; the state needs as many free slots.
      vocab_size: ids from here on are never drawn.

    Returns:
      (tokens int32 [B, DECODE_STEPS], -1 where none was drawn, number of steps int32 (), carry). A row whose logits
      are not finite is done, and has `NOT_FINITE` there.
    """
    model = Decoder(config)

    def more(loop):
        step, _, carry = loop
        return (step < steps) & ~jnp.all(carry.done)

    def draw(loop):
        step, tokens, carry = loop
        real = ~carry.done
        token = sampling.choose(carry.logits, keys, carry.count, sampler, carry.seen, vocab_size)
        unused = jnp.arange(carry.logits.shape[-1]) >= vocab_size
        finite = jnp.all(jnp.isfinite(carry.logits) | unused, axis=-1)
        drawn = jnp.where(finite, token, NOT_FINITE)
        tokens = lax.dynamic_update_slice_in_dim(tokens, jnp.where(real, drawn, -1)[:, None], step, axis=1)
        out = model.apply({"params": params}, token[:, None], real[:, None].astype(jnp.int32), state=carry.state)
        seen = carry.seen
        if seen is not None:
            seen = seen.at[jnp.arange(token.shape[0]), token].max(real)
        carry = DecodeCarry(
            state=out.state,
            logits=jnp.where(real[:, None], out.logits[:, 0], carry.logits),
            count=carry.count + 1,
            done=carry.done | ~finite | jnp.any(token[:, None] == stop_ids, axis=1),
            seen=seen,
        )
        return step + 1, tokens, carry

    tokens = jnp.full((carry.logits.shape[0], DECODE_STEPS), -1, jnp.int32)
    step, tokens, carry = lax.while_loop(more, draw, (jnp.int32(0), tokens, carry))
    return tokens, step, carry


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def _score_piece(config, params, tokens, mask, targets, state):
    hidden, state = _advance(config, params, tokens, mask, state)

    def log_probability(piece):
        hidden, targets = piece
        logits = head_logits(hidden, params["lm_head"]["kernel"])
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    batch, length = tokens.shape
    size = min(length, _SCORE_PIECE)
    count = -(-length // size)
    cut = lambda x: jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))  # noqa: E731
    split = lambda x: cut(x).reshape(batch, count, size, *x.shape[2:]).swapaxes(0, 1)  # noqa: E731
    scores = lax.map(log_probability, (split(hidden), split(targets)))
    return scores.swapaxes(0, 1).reshape(batch, count * size)[:, :length], state


def score(config: ModelConfig, params, tokens, mask, *, chunk: int = PREFILL_CHUNK) -> np.ndarray:
    """Log-probabilities (nats) float32 [B, T] of each token given those before it in the row.

    The first real token of a row is given and has 0, as has padding. Runs in chunks that carry the state.
    """
    result = np.zeros(tokens.shape, np.float32)
    tokens, aligned = left_align(tokens, mask)
    inputs, targets, real = tokens[:, :-1], tokens[:, 1:], aligned[:, 1:]
    if inputs.shape[1] == 0:
        return result
    state = new_state(config, params, len(tokens), slot_bucket(slots_needed(inputs.shape[1], chunk)))
    scores = np.zeros(tokens.shape, np.float32)
    for piece in pieces(inputs.shape[1], chunk):
        start, stop, _ = piece
        values, state = _score_piece(config, params, *(_piece(x, *piece) for x in (inputs, real, targets)), state)
        values = np.where(real[:, start:stop], np.asarray(values)[:, : stop - start], 0)
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            column = np.flatnonzero(mask[row])[start + 1 + column]
            raise not_finite_error(config, params, f"row {row}, column {column}")
        scores[:, start + 1 : stop + 1] = values
    result[mask] = scores[aligned]
    return result


class Session:
    """A batch of sequences in decoding: `extend` reads tokens, `decode` writes tokens, in any order.

    Args:
      config, params: the model.
      sampling_params: how tokens are drawn.
      seed: see `mmx_jax.inference.sampling.row_keys`.
      stop_tokens: a row ends behind one of these.
      vocab_size: ids from here on are never drawn. None: the model's.
      prefill_chunk: tokens of a row in one pass of `extend`.
      mesh: where the parameters lie; None: on one device.

    Raises:
      GenerationError, SamplingError: a setting that cannot be.
    """

    def __init__(
        self, config: ModelConfig, params, batch: int, *, sampling_params: sampling.SamplingParams, seed=0,
        stop_tokens: Sequence[int] = (), vocab_size: int | None = None, prefill_chunk: int = PREFILL_CHUNK, mesh=None,
    ):  # fmt: skip
        if prefill_chunk < 1:
            raise GenerationError(f"prefill_chunk={prefill_chunk} must be positive")
        for token in stop_tokens:
            if not 0 <= token < config.vocab_size:
                raise GenerationError(f"stop token {token} is outside the vocabulary, 0 to {config.vocab_size - 1}")
        self._config, self._params, self._mesh, self._chunk = config, params, mesh, prefill_chunk
        self._vocab_size = min(vocab_size or config.vocab_size, config.vocab_size)
        self._sampler, self._keys = sampling_params.sampler(), sampling.row_keys(seed, batch)
        # In buckets too, so that one more stop token does not compile anew.
        self._stop_ids = np.full(power_of_two(len(stop_tokens)), -1, np.int32)
        self._stop_ids[: len(stop_tokens)] = stop_tokens
        self._carry: DecodeCarry | None = None
        self._seen = np.zeros((batch, config.vocab_size), bool) if self._sampler.repetition_penalty else None
        self._batch, self._slots, self._cursor = batch, 0, 0
        self.lengths = np.zeros(batch, int)  # real tokens of each row, at most
        self.done = np.zeros(batch, bool)  # rows that met a stop token
        self._failure: GenerationError | None = None  # what ended the session

    def __repr__(self) -> str:
        lengths = ", ".join(map(str, self.lengths[:8])) + (", ..." if self._batch > 8 else "")
        return (
            f"Session(batch={self._batch}, lengths=[{lengths}], done={int(self.done.sum())}, slots={self._slots}, "
            f"dtype={self._config.dtype})"
        )

    @property
    def logits(self) -> np.ndarray:
        """float32 [B, V] of the next token."""
        if self._carry is None:
            raise GenerationError("a sequence begins with tokens to read: call extend before logits")
        logits = np.asarray(self._carry.logits)
        if not (finite := np.isfinite(logits[:, : self._vocab_size]).all(axis=1)).all():
            row = int(np.argmin(finite))
            raise not_finite_error(self._config, self._params, f"row {row} behind {self.lengths[row]} tokens")
        return logits

    @property
    def state(self) -> DecodeState:
        """The state as it stands; the next call takes its buffers."""
        return self._carry.state

    def extend(self, tokens, mask=None, *, reserve: int = 0):
        """Reads tokens [B, T], a real one in every row at least; all rows then go on.

        Args:
          mask: 1 at real tokens, 0 at padding, which may be anywhere.
          reserve: number of tokens to be decoded next, for which room is made at once.

        Raises:
          GenerationError: tokens that cannot be, or more than `max_position_embeddings`.
        """
        self._check_alive()
        tokens, mask = check_tokens(self._config, tokens, mask)
        if len(tokens) != self._batch:
            raise GenerationError(f"{len(tokens)} rows of tokens for {self._batch} sequences")
        if not mask.any(axis=1).all():
            raise GenerationError(f"row {int(np.argmin(mask.any(axis=1)))} holds no real token: its mask is all 0")
        self._check_context(self.lengths + mask.sum(axis=1) + reserve)
        tokens, mask = left_align(tokens, mask)
        width = tokens.shape[1]
        with on_mesh(self._mesh):
            state = self._room(max(slots_needed(width, self._chunk), width + reserve))
            logits, state = prefill(self._config, self._params, tokens, mask, state, chunk=self._chunk)
            seen, count = None, np.int32(0)
            if self._seen is not None:
                seen = self._seen if self._carry is None else np.array(self._carry.seen)
                rows = np.broadcast_to(np.arange(len(tokens))[:, None], tokens.shape)
                seen[rows[mask], tokens[mask]] = True
            if self._carry is not None:
                count = self._carry.count
            count, done, seen = beside(self._params, (count, np.zeros(self._batch, bool), seen))
            self._carry = DecodeCarry(state, logits, count, done, seen)
            jax.block_until_ready(logits)
        self.done = np.zeros(self._batch, bool)
        self._cursor += width
        self.lengths = self.lengths + mask.sum(axis=1)

    def decode(self, steps: int) -> np.ndarray:
        """Writes up to min(steps, `DECODE_STEPS`) tokens: int32 [B, n], -1 behind a row's stop token.

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
            tokens, taken, self._carry = decode(
                self._config, self._params, carry, self._keys, self._sampler, self._stop_ids, np.int32(steps),
                vocab_size=self._vocab_size,
            )  # fmt: skip
        taken = int(taken)
        tokens = np.asarray(tokens)[:, :taken]
        self._check_finite(tokens)
        self._cursor += taken
        self.lengths = self.lengths + (tokens >= 0).sum(axis=1)
        self.done = np.array(self._carry.done)
        return tokens

    def stream(self, max_new_tokens: int, steps: int = 8) -> Iterator[np.ndarray]:
        """What `decode` gives, as it is made: the first token alone, then `steps` at a time."""
        remaining = max_new_tokens
        while remaining and (piece := self.decode(1 if remaining == max_new_tokens else min(steps, remaining))).size:
            remaining -= piece.shape[1]
            yield piece

    def finish(self, row: int):
        """Lets a row end here."""
        self.done[row] = True
        self._carry = self._carry._replace(done=beside(self._params, self.done.copy()))

    def _check_alive(self):
        if self._failure is not None:
            raise GenerationError(f"this session has ended: {self._failure}")

    def _check_finite(self, tokens):
        """Raises for the first row of decoded tokens that has `NOT_FINITE`."""
        if (failed := np.argwhere(tokens == NOT_FINITE)).size:
            row, column = failed[0]
            where = f"row {row} behind {self.lengths[row] + column} tokens"
            self._failure = not_finite_error(self._config, self._params, where)
            raise self._failure

    def _check_context(self, lengths):
        limit = self._config.max_position_embeddings
        if (longest := int(lengths.max(initial=0))) > limit:
            raise GenerationError(
                f"{longest} tokens of prompt and continuation exceed max_position_embeddings={limit} of the model; "
                "shorten the prompt or ask for fewer new tokens"
            )

    def _room(self, more: int) -> DecodeState:
        """The state with slots for `more` columns."""
        needed = self._cursor + more
        if self._carry is None:
            self._slots = slot_bucket(needed)
            return new_state(self._config, self._params, self._batch, self._slots)
        if needed > self._slots:
            self._slots = slot_bucket(needed)
            return with_slots(self._carry.state, self._slots)
        return self._carry.state
