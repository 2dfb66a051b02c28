"""How rows are cut for the Mosaic GPU kernel: into chunks, and into segments of time.

A program of the kernel walks the time of one head and 64 value columns, so few heads leave most of the GPU without
work. Then time is cut into segments that are walked at once, as if they were rows of the batch: a first pass finds
the state that each segment adds to what is behind it, and these are combined here into the entry states of all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import mosaic_gpu_common
from pallas_kernels.platform import cdiv

CHUNK = 64  # tokens: the rows of one wgmma


def segments(programs, length) -> int:
    """Into how many segments to cut rows of `length` tokens, where `programs` would walk them whole.

    A multiprocessor alone walks chunks little faster than when all of them share the memory, and the first pass reads
    half of the tensors again.
    """
    chunks = cdiv(length, CHUNK)

    def cost(count):
        waves = cdiv(programs * count, mosaic_gpu_common.MULTIPROCESSORS)
        share = min(1.0, programs * count / mosaic_gpu_common.MULTIPROCESSORS)
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


class Segments(NamedTuple):
    """What is known about segments of time, int32 [B, S]."""

    tokens: jax.Array  # real ones
    lefts: jax.Array  # documents of the states at the left ends
    rights: jax.Array  # and at the right ends


def whole_segments(batch, count, length) -> Segments:
    """The `count` segments of rows that are one document without padding, each of `length` tokens."""
    ones = np.ones((batch, count), np.int32)  # of numpy, so that what follows from it is known to the compiler
    return Segments(length * ones, ones, ones)


def segments_of(tokens, started, count) -> Segments:
    """The `count` segments of each row, from the real tokens of its chunks and the documents that start in them.

    Args:
      tokens, started: int32 [B, N].
    """
    tokens, started = (jnp.sum(x.reshape(x.shape[0], count, -1), axis=2) for x in (tokens, started))
    rights = 1 + jnp.cumsum(started, axis=1)
    return Segments(tokens, rights - started, rights)


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
