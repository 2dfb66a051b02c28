"""Choosing the next token: pure functions over float32 logits [B, V]."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class SamplingError(ValueError):
    """A sampling setting that cannot be; the message names it and its range."""


def _require(ok: bool, message: str):
    if not ok:
        raise SamplingError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. They apply in this order: penalty, temperature, top-k, top-p, min-p.

    Raises:
      SamplingError: a value outside its range.
    """

    temperature: float = 0.0  # 0 is greedy: the largest logit, the lowest id among equals
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # keep the fewest tokens whose probabilities sum to at least p
    min_p: float | None = None  # keep tokens at least this probable relative to the likeliest
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens in the context

    def __post_init__(self):
        t, k, penalty = self.temperature, self.top_k, self.repetition_penalty
        _require(math.isfinite(t) and t >= 0, f"temperature={t} must be 0 (greedy) or positive")
        whole = isinstance(k, int | np.integer) and not isinstance(k, bool)
        _require(k is None or (whole and k >= 1), f"top_k={k} must be a positive integer, or None for no limit")
        _require(self.top_p is None or 0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1], or be None")
        _require(self.min_p is None or 0 <= self.min_p <= 1, f"min_p={self.min_p} must lie in [0, 1], or be None")
        _require(math.isfinite(penalty) and penalty > 0, f"repetition_penalty={penalty} must be positive; 1 is none")

    def sampler(self) -> "Sampler":
        """The same as a pytree: another value of a setting in use does not compile anew."""
        if self.temperature == 0:
            return Sampler(None, None, None, None, self._penalty())
        optional = {
            "top_k": None if self.top_k is None else np.int32(min(self.top_k, np.iinfo(np.int32).max)),
            "top_p": None if self.top_p is None else np.float32(self.top_p),
            "min_p": None if self.min_p is None else np.float32(self.min_p),
        }
        return Sampler(np.float32(max(self.temperature, 1e-30)), **optional, repetition_penalty=self._penalty())

    def _penalty(self):
        return None if self.repetition_penalty == 1 else np.float32(self.repetition_penalty)


class Sampler(NamedTuple):
    """`SamplingParams` as scalars; None is a setting that is not in use, and of the temperature it means greedy."""

    temperature: ArrayLike | None
    top_k: ArrayLike | None
    top_p: ArrayLike | None
    min_p: ArrayLike | None
    repetition_penalty: ArrayLike | None


def row_keys(seed: int | Sequence[int], batch: int) -> jax.Array:
    """One random key per row: row b of a batch gets seed + b, as it would alone with that seed.

    Args:
      seed: one integer, or one for each row; 0 <= seed < 2**32.

    Returns:
      jax keys [B].
    """
    seeds = np.asarray(seed)
    _require(np.issubdtype(seeds.dtype, np.integer), f"seed={seed!r} must be an integer, or one for each row")
    _require(seeds.shape in ((), (batch,)), f"{seeds.size} seeds for {batch} rows: give one, or one for each row")
    _require(bool((seeds >= 0).all() and (seeds < 2**32).all()), f"seed={seed!r} must lie in [0, 2**32)")
    if seeds.ndim == 0:
        seeds = (int(seeds) + np.arange(batch)) % 2**32
    return jax.vmap(jax.random.key)(seeds.astype(np.uint32))


def mask_unused(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Ids from `vocab_size` on are padding of the embedding and never chosen."""
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def penalize(logits: jax.Array, seen: jax.Array, penalty: ArrayLike) -> jax.Array:
    """Repetition penalty of arXiv 1909.05858, section 4.1. seen: bool [B, V]."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sort_descending(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(values [B, V] from the largest on, their ids int32 [B, V]); the lower id comes first among equals."""
    ids = jnp.argsort(-logits, axis=-1, stable=True).astype(jnp.int32)
    return jnp.take_along_axis(logits, ids, axis=-1), ids


def keep_top_k(values: jax.Array, k: ArrayLike) -> jax.Array:
    """The first k of sorted values; the others become -inf."""
    return jnp.where(jnp.arange(values.shape[-1]) < k, values, -jnp.inf)


def keep_top_p(values: jax.Array, p: ArrayLike) -> jax.Array:
    """The shortest head of sorted values with probability p or more, at least the first; the others become -inf."""
    probability = jax.nn.softmax(values, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    first = jnp.arange(values.shape[-1]) == 0  # p may underflow to 0 in float32
    return jnp.where((before < p) | first, values, -jnp.inf)


def keep_min_p(values: jax.Array, min_p: ArrayLike) -> jax.Array:
    """Sorted values whose probability is at least `min_p` of the first one's; the others become -inf."""
    return jnp.where(values >= values[..., :1] + jnp.log(min_p), values, -jnp.inf)


def choose(
    logits: jax.Array, keys: jax.Array, count: jax.Array, sampler: Sampler, seen: jax.Array | None, vocab_size: int
) -> jax.Array:
    """The next token of every row.

    Args:
      logits: float32 [B, V].
      keys: jax keys [B]; with `count`, int32 (), the number of tokens drawn before, they give the randomness.
      seen: bool [B, V], tokens of the context; read by the repetition penalty only.
      vocab_size: ids from here on are never chosen.

    Returns:
      int32 [B].
    """
    logits = mask_unused(logits, vocab_size)
    if sampler.repetition_penalty is not None:
        assert seen is not None, "the penalty counts tokens of the context"
        logits = penalize(logits, seen, sampler.repetition_penalty)
    if sampler.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Shifted first: logits over a tiny temperature would overflow.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampler.temperature
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, count)
    draw = jax.vmap(jax.random.categorical)
    filters = (keep_top_k, sampler.top_k), (keep_top_p, sampler.top_p), (keep_min_p, sampler.min_p)
    if all(value is None for _, value in filters):
        return draw(keys, logits).astype(jnp.int32)
    values, ids = sort_descending(logits)
    for keep, value in filters:
        if value is not None:
            values = keep(values, value)
    return jnp.take_along_axis(ids, draw(keys, values)[:, None], axis=-1)[:, 0]
