"""How rows are cut for the Mosaic GPU kernel: into chunks, which documents meet in a chunk, and segments of time.

A program of the kernel walks the time of one head and 64 value columns, so few heads leave most of the GPU without
work. Then time is cut into segments that are walked at once, as if they were rows of the batch: a first pass finds
the state that each segment adds to what is behind it, and these are combined here into the entry states of all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.platform import cdiv

CHUNK = 64  # tokens: the rows of one wgmma
CONTINUES, STARTS, MIXED = range(3)  # kinds of chunks, see `Documents`
RUNS, EXPONENTS, SCALARS = range(3)  # rows of a chunk in `table`
PADDING = 1 << 20  # in place of an exponent
KIND, TOKENS, ENTRY, EXIT, FRESH, DROPPED = range(6)  # its scalars


class Documents(NamedTuple):
    """What is known about documents, int32; R rows of N chunks, C tokens in a chunk.

    A state between two chunks is of the document of the last real token to its left, and of document 1 where there is
    none. A chunk is MIXED if it has padding or several documents. One document fills the others, and it either
    CONTINUES from the left or STARTS with the chunk.
    """

    kinds: jax.Array  # [R, N]
    lefts: jax.Array  # [R, N] documents of the states to the left
    rights: jax.Array  # [R, N] and to the right
    tokens: jax.Array  # [R, N] real tokens
    runs: jax.Array  # [R, N, C]


def segments(programs, length) -> int:
    """Into how many segments to cut rows of `length` tokens, where `programs` would walk them whole.

    A multiprocessor alone walks chunks little faster than when all of them share the memory, and the first pass reads
    half of the tensors again.
    """
    chunks = cdiv(length, CHUNK)

    def cost(count):
        waves = cdiv(programs * count, hopper.MULTIPROCESSORS)
        share = min(1.0, programs * count / hopper.MULTIPROCESSORS)
        return waves * cdiv(chunks, count) * max(0.9, share) * (1.0 if count == 1 else 1.5) + 8 * (count > 1)

    return min((2**i for i in range(8)), key=cost)


def cut(x, count):
    """[B, T, ...] to rows [B * count, T / count, ...] of whole chunks, with zeros behind the end."""
    batch, length, *rest = x.shape
    chunks = cdiv(length, CHUNK * count)
    padding = chunks * CHUNK * count - length
    if padding:
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0) for _ in rest)))
    return x.reshape(batch * count, chunks * CHUNK, *rest)


def join(x, batch, length):
    """The inverse of `cut`."""
    return x.reshape(batch, -1, *x.shape[2:])[:, :length]


def documents(runs, batch, length, count):
    """`Documents` of the rows that `cut` makes, or None if each is one document without padding."""
    if runs is None:
        if length % (CHUNK * count) == 0:
            return None
        runs = jnp.ones((batch, length), jnp.int32)
    runs = cut(runs, count).reshape(batch, -1, CHUNK)
    last = jnp.max(runs, axis=2)
    rights = jnp.maximum(lax.cummax(last, axis=1), 1)
    lefts = jnp.pad(rights, ((0, 0), (1, 0)), constant_values=1)[:, :-1]
    one = (jnp.min(runs, axis=2) == last) & (last > 0)
    kinds = jnp.where(one, jnp.where(last == lefts, CONTINUES, STARTS), MIXED)
    tokens = jnp.sum(runs > 0, axis=2, dtype=jnp.int32)
    facts = kinds, lefts, rights, tokens, runs
    return Documents(*(x.reshape(batch * count, -1, *x.shape[2:]) for x in facts))


def table(documents, *, reverse):
    """What the kernel reads about each chunk, int32 [R, N, 3, 2 C].

    RUNS: those of the tokens, then the same but equal to no run at padding. EXPONENTS: of the weights of v and then of
    the output over the slope, c_i - m and m - c_i (see mosaic_gpu.py), or PADDING. SCALARS: the KIND, the real TOKENS,
    the documents of the ENTRY and EXIT states, FRESH where a scan that begins here drops its entry state, and DROPPED
    where the exit state ends with its document.
    """
    kinds, lefts, rights, tokens, runs = documents
    real = runs > 0
    count = lax.cumsum(real.astype(jnp.int32), axis=2, reverse=reverse) - CHUNK // 2
    exponents = jnp.concatenate([jnp.where(real, x, PADDING) for x in (count, -count)], axis=2)
    starts = (kinds == STARTS).astype(jnp.int32)
    never = jnp.zeros_like(starts)
    if reverse:
        scalars = kinds, tokens, rights, lefts, never, starts
    else:
        scalars = kinds, tokens, lefts, rights, starts, jnp.roll(starts, -1, axis=1).at[:, -1].set(0)
    scalars = jnp.pad(jnp.stack(scalars, axis=2), ((0, 0), (0, 0), (0, 2 * CHUNK - len(scalars))))
    return jnp.stack([jnp.concatenate([runs, jnp.where(real, runs, -1)], axis=2), exponents, scalars], axis=2)


class Segments(NamedTuple):
    """What is known about segments of time, int32 [B, S]."""

    tokens: jax.Array  # real ones
    lefts: jax.Array  # documents of the states at the left ends
    rights: jax.Array  # and at the right ends


def segments_of(documents, batch, count, length) -> Segments:
    """The `count` segments of each row, of `length` tokens, from the `documents` of them all."""
    if documents is None:
        ones = np.ones((batch, count), np.int32)  # of numpy, so that what follows from it is known to the compiler
        return Segments(length * ones, ones, ones)
    parts = jnp.sum(documents.tokens, axis=1), documents.lefts[:, 0], documents.rights[:, -1]
    return Segments(*(x.reshape(batch, count) for x in parts))


def carried(entries, slopes, segments):
    """What is left of entry states float32 [B * S, H, D, D] where their segments end."""
    distance = jnp.where(segments.lefts == segments.rights, segments.tokens.astype(np.float32), jnp.inf)
    return jnp.exp(-slopes * distance.reshape(-1, 1))[..., None, None] * entries


def entry_states(initial, own, slopes, segments, *, reverse):
    """The states with which the segments of a row begin.

    Args:
      initial: float32 [B, H, D, D], the entry state of the row, at its right end in `reverse`.
      own: float32 [B * S, H, D, D], the exit states of the segments from zero.
      segments: `Segments`.

    Returns:
      float32 [B * S, H, D, D].
    """
    batch, heads, dim, _ = initial.shape
    count = own.shape[0] // batch
    order = np.arange(count)
    tokens, lefts, rights = segments
    if reverse:
        lefts, rights, order = rights, lefts, order[::-1]
    # Real tokens that the scan has passed where a segment begins and where it ends.
    begins = jnp.sum(jnp.where(order[:, None] > order, tokens[:, None], 0), axis=2)
    ends = begins + tokens
    # The initial state is that of a segment of no tokens before all others.
    first = np.argmin(order)
    order_of_sources = np.append(-1, order)
    ends = jnp.concatenate([jnp.zeros_like(ends[:, :1]), ends], axis=1)
    rights = jnp.concatenate([lefts[:, first, None], rights], axis=1)
    reaches = (order_of_sources < order[:, None]) & (rights[:, None] == lefts[:, :, None])  # [B, S, S + 1]
    distance = jnp.where(reaches, (begins[:, :, None] - ends[:, None]).astype(jnp.float32), jnp.inf)
    weights = jnp.exp(-slopes * distance[..., None])[..., None, None]  # [B, S, S + 1, H, 1, 1]
    states = jnp.concatenate([initial[:, None], own.reshape(batch, count, heads, dim, dim)], axis=1)
    return jnp.sum(weights * states[:, None], axis=2).reshape(own.shape)
