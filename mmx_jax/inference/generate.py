"""Decoding: prefill in buckets and chunks, and a loop of decoding steps inside one jit.

The jitted functions take a `Decoder` as static argument: the config of a model and of its runtime.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from mmx_jax.config import ModelConfig, RuntimeConfig
from mmx_jax.inference import sampling
from mmx_jax.inference.inputs import GenerationError, left_align
from mmx_jax.layers.softmax_attention import KeyValueCache
from mmx_jax.models.cache import LAYER_AXES, DecodeState, init_state
from mmx_jax.models.decoder import Decoder, DecoderOutput, head_logits
from mmx_jax.sharding import constrain

DECODE_STEPS = 32  # most tokens of one dispatch
NOT_FINITE = -2  # in place of a token that was to be drawn from NaN or infinity
PREFILL_CHUNK = 1024
_SMALLEST_BUCKET = 16
_SCORE_PIECE = 64  # tokens whose logits are held at once


def inference_config(config: ModelConfig, dtype: str) -> ModelConfig:
    """The config of the model as it generates, with weights and computation in `dtype`.

    A token's result must not hang on its neighbours, so nothing is dropped whatever training did.
    """
    return dataclasses.replace(config, dtype=dtype, param_dtype=dtype, capacity_factor=None, expert_buffer=None)


def inference_decoder(config: ModelConfig, dtype: str, runtime: RuntimeConfig = RuntimeConfig()) -> Decoder:
    """The decoder of `inference_config`; nothing is differentiated, so that nothing is computed again."""
    return Decoder(inference_config(config, dtype), dataclasses.replace(runtime, remat="none"))


def power_of_two(n: int) -> int:
    """Bucket of a prompt piece: `n` rounded up to a power of two, 16 or more."""
    return max(_SMALLEST_BUCKET, 1 << (n - 1).bit_length())


def slot_bucket(n: int) -> int:
    """Bucket of a whole length: a multiple of 64, from 512 on of a quarter to an eighth of `n`."""
    step = max(64, 1 << max(n.bit_length() - 3, 0))
    return -(-n // step) * step


def on_mesh(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager:
    """The context in which arrays are sharded over `mesh`; None: a single device."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


@functools.partial(jax.jit, static_argnames="model")
def forward(model: Decoder, params: Any, tokens: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(float32 logits [B, T, V] of whole rows, bool [B, T] that is True where all of them are finite)."""
    logits = cast(DecoderOutput, model.apply({"params": params}, tokens, segment_ids)).logits
    assert logits is not None, "asked for by default"
    return logits, jnp.all(jnp.isfinite(logits), axis=-1)


@jax.jit
def _all_finite(params):
    return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), params)


def not_finite_error(config: ModelConfig, params: Any, where: str) -> GenerationError:
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


def place_like(params: Any, tree: Any) -> Any:
    """Arrays on the device of the parameters, or replicated over all of their devices.

    Results of jit are committed to a device; arguments that are not would make the first call compile apart.
    """
    place = jax.tree.leaves(params)[0].sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec())
    return jax.device_put(tree, place)


def new_state(config: ModelConfig, params: Any, batch: int, slots: int) -> DecodeState:
    """An empty state where the parameters are, sharded over the ambient mesh if there is one."""
    state = _new_state(config, batch, slots)
    return place_like(params, state) if jax.sharding.get_abstract_mesh().empty else state


@functools.partial(jax.jit, static_argnames=("config", "batch", "slots"))
def _new_state(config, batch, slots):
    state = init_state(config, batch, slots)
    return state.replace(layers=jax.tree.map(lambda x: constrain(x, *LAYER_AXES), state.layers))


@functools.partial(jax.jit, static_argnames="slots")
def with_slots(state: DecodeState, slots: int) -> DecodeState:
    """The same state with room for `slots` tokens of each row; lightning states have no length."""

    def widen(layer):
        if not isinstance(layer, KeyValueCache):
            return layer
        return KeyValueCache(*(jnp.pad(x, ((0, 0),) * 3 + ((0, slots - x.shape[3]), (0, 0))) for x in layer))

    return state.replace(layers={name: widen(layer) for name, layer in state.layers.items()})


def _advance(model, params, tokens, token_mask, state, last=None):
    """(hidden [B, T, M], state) after one piece of tokens; `last` as the decoder takes it."""
    segment_ids = token_mask.astype(jnp.int32)
    out = model.apply({"params": params}, tokens, segment_ids, state=state, last=last, logits=False)
    out = cast(DecoderOutput, out)
    return out.hidden, cast(DecodeState, out.state)


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("last", "state"))
def prefill_piece(
    model: Decoder, params: Any, tokens: jax.Array, token_mask: jax.Array, last: jax.Array, state: DecodeState
) -> tuple[jax.Array, DecodeState]:
    """One piece of prompts.

    Args:
      tokens: int32 [B, T]; token_mask: bool [B, T], True at tokens, which stand at the left of their row.
      last: [B, M], hidden state of the last token of each row so far; it is donated, as is `state`.

    Returns:
      (last, state) after the piece.
    """
    index = jnp.max(jnp.where(token_mask, jnp.arange(token_mask.shape[1]), -1), axis=1)  # of the last token, or -1
    hidden, state = _advance(model, params, tokens, token_mask, state, jnp.maximum(index, 0))
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


def prefill(
    model: Decoder,
    params: Any,
    tokens: jax.Array | np.ndarray,
    token_mask: jax.Array | np.ndarray,
    state: DecodeState,
    *,
    chunk: int = PREFILL_CHUNK,
) -> tuple[jax.Array, DecodeState]:
    """Runs prompts through the model; it continues `state`, so that the next turn of a chat is a prefill too.

    Compiles once for `chunk` and each smaller power of two. Only the last token of a row meets the head.

    Args:
      tokens: int [B, T]; token_mask: bool [B, T], True at tokens, which stand at the left of their row.
      state: with `slots_needed(T, chunk)` free slots; it is donated.
      chunk: tokens of a row in one pass.

    Returns:
      (float32 logits [B, V] after the last token, state). A row needs a token for its logits.
    """
    config = model.config
    last = place_like(params, np.zeros((tokens.shape[0], config.hidden_size), jnp.dtype(config.dtype)))
    for piece in pieces(tokens.shape[1], chunk):
        last, state = prefill_piece(model, params, _piece(tokens, *piece), _piece(token_mask, *piece), last, state)
    return _head(params, last), state


class DecodeCarry(NamedTuple):
    """State of a batch between two decoding steps."""

    state: DecodeState
    logits: jax.Array  # float32 [B, V] of the next token
    count: jax.Array  # int32 (), tokens drawn so far
    done: jax.Array  # bool [B], rows that met a stop token
    seen: jax.Array | None  # bool [B, V], tokens of the context, for the repetition penalty


class SamplingInputs(NamedTuple):
    """How tokens are drawn and what ends a row."""

    keys: jax.Array  # jax keys [B]
    sampler: sampling.Sampler
    stop_ids: ArrayLike  # int32 [n]; a row is done after one of these. -1 stands for none


@functools.partial(jax.jit, static_argnames=("model", "vocab_size"), donate_argnames="carry")
def decode(
    model: Decoder, params: Any, carry: DecodeCarry, inputs: SamplingInputs, steps: ArrayLike, *, vocab_size: int
) -> tuple[jax.Array, jax.Array, DecodeCarry]:
    """Draws up to `steps` tokens of each row, fewer once all rows are done.

    Args:
      steps: int32 (), at most `DECODE_STEPS`; the state needs as many free slots.
      vocab_size: ids from here on are never drawn.

    Returns:
      (tokens int32 [B, DECODE_STEPS], -1 where none was drawn, number of steps int32 (), carry). A row whose logits
      are not finite is done, and has `NOT_FINITE` there.
    """

    def more(loop):
        step, _, carry = loop
        return (step < steps) & ~jnp.all(carry.done)

    def draw(loop):
        step, tokens, carry = loop
        active = ~carry.done
        token = sampling.choose(carry.logits, inputs.keys, carry.count, inputs.sampler, carry.seen, vocab_size)
        unused = jnp.arange(carry.logits.shape[-1]) >= vocab_size
        finite = jnp.all(jnp.isfinite(carry.logits) | unused, axis=-1)
        drawn = jnp.where(active, jnp.where(finite, token, NOT_FINITE), -1)
        tokens = lax.dynamic_update_slice_in_dim(tokens, drawn[:, None], step, axis=1)
        segment_ids = active[:, None].astype(jnp.int32)
        out = cast(DecoderOutput, model.apply({"params": params}, token[:, None], segment_ids, state=carry.state))
        assert out.logits is not None and out.state is not None, "a state goes in, and logits are asked for by default"
        seen = carry.seen
        if seen is not None:
            seen = seen.at[jnp.arange(token.shape[0]), token].max(active)
        carry = DecodeCarry(
            state=out.state,
            logits=jnp.where(active[:, None], out.logits[:, 0], carry.logits),
            count=carry.count + 1,
            done=carry.done | ~finite | jnp.any(token[:, None] == inputs.stop_ids, axis=1),
            seen=seen,
        )
        return step + 1, tokens, carry

    tokens = jnp.full((carry.logits.shape[0], DECODE_STEPS), -1, jnp.int32)
    step, tokens, carry = lax.while_loop(more, draw, (jnp.int32(0), tokens, carry))
    return tokens, step, carry


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def _score_piece(model, params, tokens, token_mask, targets, state):
    hidden, state = _advance(model, params, tokens, token_mask, state)
    batch, length = tokens.shape
    size = min(length, _SCORE_PIECE)
    count = -(-length // size)

    def split(x):
        """[B, T, ...] -> [count, B, size, ...]."""
        x = jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, count, size, *x.shape[2:]).swapaxes(0, 1)

    def log_probability(piece):
        hidden, targets = piece
        logits = head_logits(hidden, params["lm_head"]["kernel"])
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    scores = lax.map(log_probability, (split(hidden), split(targets)))
    return scores.swapaxes(0, 1).reshape(batch, count * size)[:, :length], state


def score(
    model: Decoder, params: Any, tokens: np.ndarray, mask: np.ndarray, *, chunk: int = PREFILL_CHUNK
) -> np.ndarray:
    """Log-probabilities (nats) float32 [B, T] of each token given those before it in the row.

    The first token of a row is given and has 0, as has padding. Runs in chunks that carry the state.

    Args:
      tokens: int [B, T]; mask: bool [B, T], True at tokens, wherever they stand.
    """
    result = np.zeros(tokens.shape, np.float32)
    tokens, aligned = left_align(tokens, mask)
    inputs, targets, token_mask = tokens[:, :-1], tokens[:, 1:], aligned[:, 1:]
    if inputs.shape[1] == 0:
        return result
    state = new_state(model.config, params, len(tokens), slot_bucket(slots_needed(inputs.shape[1], chunk)))
    scores = np.zeros(tokens.shape, np.float32)
    for piece in pieces(inputs.shape[1], chunk):
        start, stop, _ = piece
        arrays = (_piece(x, *piece) for x in (inputs, token_mask, targets))
        values, state = _score_piece(model, params, *arrays, state)
        values = np.where(token_mask[:, start:stop], np.asarray(values)[:, : stop - start], 0)
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            column = np.flatnonzero(mask[row])[start + 1 + column]
            raise not_finite_error(model.config, params, f"row {row}, column {column}")
        scores[:, start + 1 : stop + 1] = values
    result[mask] = scores[aligned]
    return result
