"""Softmax attention in blocks of queries and keys in plain XLA: any platform, memory linear in the length.

Blocks of queries are [B, K, R, D]: the R = G C query tokens of every query head that reads one key head, merged, so
that sums over both are one plain product. Blocks of keys and values are [B, K, C, D], of documents [B, C]. Where there
are several, they are stacked on the leading axis.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import platform
from pallas_kernels.einsum import product
from pallas_kernels.platform import cdiv

# Both finite, so that a block in which a query sees no key makes no NaN. The running maximum starts far above the
# masked scores: their exponentials are 0 even then.
_MASKED, _LOWEST_MAXIMUM = -1e30, -1e29


class Keys(NamedTuple):
    """Blocks of keys, with what belongs to them."""

    key: jax.Array  # [n, B, K, C, D]
    value: jax.Array  # [n, B, K, C, D]
    segment_ids: jax.Array  # int32 [n, B, C] as `number_segments` gives them, 0 at padding


class Residuals(NamedTuple):
    """Gradients to outputs and softmax statistics of blocks of queries, for the backward."""

    d_output: jax.Array  # [n, B, K, R, D]
    delta: jax.Array  # float32 [n, B, K, R], the sums of output times d_output
    log_sums: jax.Array  # float32 [n, B, K, R]


def check(q: Any, k: Any, v: Any, *, segmented: bool) -> None:
    """Blocks of XLA serve every shape."""
    del q, k, v, segmented


def forward(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, *, block: int) -> jax.Array:
    """See `api.softmax_attention`."""
    length = q.shape[1]
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    block = min(block, length)
    padding = cdiv(length, block) * block - length
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    return _attend(block, q, k, v, jnp.pad(segment_ids, ((0, 0), (0, padding))))[:, :length]  # pyright: ignore[reportIndexIssue]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(block, q, k, v, segment_ids):
    return _attend_forward(block, q, k, v, segment_ids)[0]


def _attend_forward(block, q, k, v, segment_ids):
    queries, keys = split_queries(q, k.shape[2], block), split_keys(k, v, segment_ids, block)
    output, log_sums = causal_blocks(queries, keys, v.dtype)
    return merge_blocks(output, block), (q, k, v, segment_ids, output, log_sums)


def _attend_backward(block, saved, d_output):
    q, k, v, segment_ids, output, log_sums = saved
    queries, keys = split_queries(q, k.shape[2], block), split_keys(k, v, segment_ids, block)
    residuals = residuals_of(split_queries(d_output.astype(v.dtype), k.shape[2], block), output, log_sums)
    dq, dk, dv = (merge_blocks(x, block) for x in causal_gradients(queries, keys, residuals))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def barrier(tree: Any) -> Any:
    """The same arrays behind one optimization barrier.

    Masks depend on no activation: without it jax would compute those of all blocks before the loop and keep them.
    """
    return lax.optimization_barrier(tree)


def split_queries(q: jax.Array, kv_heads: int, block: int) -> jax.Array:
    """[B, T, H, D] -> [n, B, K, R, D]; T is a multiple of `block`."""
    batch, length, heads, dim = q.shape
    q = q.reshape(batch, length // block, block, kv_heads, heads // kv_heads, dim).transpose(1, 0, 3, 4, 2, 5)
    return q.reshape(length // block, batch, kv_heads, -1, dim)


def split_keys(k: jax.Array, v: jax.Array, segment_ids: jax.Array, block: int) -> Keys:
    """[B, T, K, D] twice and [B, T] -> `Keys`; T is a multiple of `block`."""
    batch, length, kv_heads, dim = k.shape
    k, v = (x.reshape(batch, length // block, block, kv_heads, dim).transpose(1, 0, 3, 2, 4) for x in (k, v))
    return Keys(k, v, segment_ids.reshape(batch, length // block, block).swapaxes(0, 1))


def merge_blocks(x: jax.Array, block: int) -> jax.Array:
    """Blocks of queries or of keys -> [B, T, H, D] or [B, T, K, D]."""
    count, batch, kv_heads, _, dim = x.shape
    x = x.reshape(count, batch, kv_heads, -1, block, dim)
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, count * block, -1, dim)


def causal_blocks(queries: Any, keys: Keys, dtype: jax.typing.DTypeLike) -> tuple[Any, Any]:
    """(output in `dtype` [n, B, K, R, D], log of the sums of exponentials float32 [n, B, K, R]) of whole rows."""
    groups = queries.shape[3] // keys.key.shape[3]

    def step(carry, pair):
        (output, log_sums), running = carry
        i, j = pair
        running = jax.tree.map(lambda empty, x: jnp.where(j == 0, empty, x), empty_carry(queries[0]), running)
        seen = _seen(keys.segment_ids[i], keys.segment_ids[j], groups, i == j)
        running = accumulate(running, queries[i], keys.key[j], keys.value[j], seen)
        finished, log_sum = finish(running)
        return ((output.at[i].set(finished.astype(dtype)), log_sums.at[i].set(log_sum)), running), None

    results = jnp.zeros(queries.shape, dtype), jnp.zeros(queries.shape[:-1])
    queries, keys, pairs = barrier((queries, keys, _pairs(queries.shape[0])))
    (results, _), _ = lax.scan(step, (results, empty_carry(queries[0])), pairs)
    return results


def residuals_of(d_output: jax.Array, output: jax.Array, log_sums: jax.Array) -> Residuals:
    delta = jnp.sum(d_output.astype(jnp.float32) * output.astype(jnp.float32), axis=-1)
    return Residuals(d_output, delta, log_sums)


def causal_gradients(queries: Any, keys: Keys, residuals: Residuals) -> tuple[jax.Array, ...]:
    """Gradients to queries, keys and values, float32 in blocks."""
    groups = queries.shape[3] // keys.key.shape[3]

    def step(gradients, pair):
        i, j = pair
        block = Keys(keys.key[j], keys.value[j], keys.segment_ids[j])
        seen = _seen(keys.segment_ids[i], keys.segment_ids[j], groups, i == j)
        dq, dk, dv = _block_gradients(queries[i], block, jax.tree.map(lambda x: x[i], residuals), seen)
        return (gradients[0].at[i].add(dq), gradients[1].at[j].add(dk), gradients[2].at[j].add(dv)), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (queries, keys.key, keys.value))
    queries, keys, residuals, pairs = barrier((queries, keys, residuals, _pairs(queries.shape[0])))
    return lax.scan(step, zeros, pairs)[0]


def attend_earlier(carry: Any, queries: Any, query_ids: jax.Array, keys: Keys) -> Any:
    """Steps of the online softmax of all blocks of queries over all blocks of keys, each of them earlier in the row.

    Args:
      carry: of all blocks, as `empty_carry(queries)` begins it.
      query_ids: int32 [n, B, C].
    """
    groups = queries.shape[3] // query_ids.shape[2]

    def row(_, inputs):
        carry, query, own_ids = inputs

        def step(carry, block):
            seen = _seen(own_ids, block.segment_ids, groups)
            return accumulate(carry, query, block.key, block.value, seen), None

        return None, lax.scan(step, carry, keys)[0]

    return lax.scan(row, None, (carry, queries, query_ids))[1]


def earlier_gradients(gradients: Any, queries: Any, query_ids: jax.Array, keys: Keys, residuals: Residuals) -> Any:
    """Adds what `attend_earlier` gives to the float32 gradients (dq, (dk, dv)), in blocks."""
    groups = queries.shape[3] // query_ids.shape[2]
    dq, d_keys = gradients

    def row(d_keys, inputs):
        dq, query, own_ids, own_residuals = inputs

        def step(dq, inputs):
            block, (dk, dv) = inputs
            more = _block_gradients(query, block, own_residuals, _seen(own_ids, block.segment_ids, groups))
            return dq + more[0], (dk + more[1], dv + more[2])

        dq, d_keys = lax.scan(step, dq, (keys, d_keys))
        return d_keys, dq

    d_keys, dq = lax.scan(row, d_keys, (dq, queries, query_ids, residuals))
    return dq, d_keys


def cached_forward(q: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array, *, block: int) -> jax.Array:
    """See `api.cached_attention`."""
    length = q.shape[1]
    # Blocks of queries too: each reads the cache up to its own last slot alone, and its scores stay small. On
    # accelerators a trip round the loop over key blocks costs more than the scores that are masked. On the CPU larger
    # blocks than in training pay: their elementwise work is split between threads.
    block, queries = (2 * block, 2 * block) if platform.platform() == "cpu" else (block, 16 * block)
    if length <= queries:
        return _attend_cache(q, key, value, lengths, block)
    count = cdiv(length, queries)
    padded = jnp.pad(q, ((0, 0), (0, count * queries - length), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(q.shape[0], count, queries, *q.shape[2:]), 1, 0)
    starts = lengths + queries * jnp.arange(count)[:, None]  # [count, B]
    output = lax.map(lambda x: _attend_cache(x[0], key, value, x[1], block), (blocks, starts))
    return jnp.moveaxis(output, 0, 1).reshape(padded.shape)[:, :length]


def _attend_cache(q, key, value, lengths, block):
    """`cached_forward` of one block of queries."""
    batch, length, heads, dim = q.shape
    kv_heads, slots = key.shape[1:3]
    groups = heads // kv_heads
    grouped = q.reshape(batch, length, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    query_slot = jnp.tile(lengths[:, None] + jnp.arange(length), groups)  # [B, G T], of every row of `grouped`

    def attend(first, carry, size):
        start = jnp.minimum(first, slots - size)  # the last block may overlap the one before; it counts from `first`
        block_key, block_value = (lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in (key, value))
        slot = start + jnp.arange(size)
        seen = (slot <= query_slot[:, :, None]) & (slot >= first)
        return accumulate(carry, grouped, block_key, block_value, seen[:, None])

    carry = empty_carry(grouped)
    if length == 1 or slots <= block:  # one token's scores over the whole cache are small
        carry = attend(0, carry, slots)
    else:
        count = jnp.minimum((jnp.max(lengths) + length + block - 1) // block, cdiv(slots, block))
        carry = lax.fori_loop(0, count, lambda i, carry: attend(i * block, carry, block), carry)
    output, _ = finish(carry)
    output = output.reshape(batch, kv_heads, groups, length, dim)
    return output.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def empty_carry(queries: Any) -> Any:
    """The carry of `accumulate` before the first step: (weighted sum, maximum and normaliser without the last axis)."""
    shape = queries.shape[:-1]
    return jnp.zeros(queries.shape, jnp.float32), jnp.full(shape, _LOWEST_MAXIMUM), jnp.zeros(shape)


def carry_of(output: jax.Array, log_sums: jax.Array, query_ids: jax.Array) -> Any:
    """The carry of `accumulate` behind the steps that `causal_blocks` finished to these results, float32."""
    # A query that is no padding has seen itself.
    token_mask = jnp.tile(query_ids > 0, (1, 1, log_sums.shape[3] // query_ids.shape[2]))[:, :, None]
    return output, jnp.where(token_mask, log_sums, _LOWEST_MAXIMUM), jnp.where(token_mask, jnp.ones_like(log_sums), 0.0)


def accumulate(carry: Any, queries: Any, key: jax.Array, value: jax.Array, seen: jax.Array) -> Any:
    """One step of the online softmax: `queries` over the keys that `seen`, bool [B, 1 or K, R, C], allows."""
    total, maximum, normaliser = carry
    scores = jnp.where(seen, _scores(queries, key), _MASKED)
    new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - new_maximum[..., None])
    shrink = jnp.exp(maximum - new_maximum)
    values = product("bkrs,bksd->bkrd", weights.astype(queries.dtype), value.astype(queries.dtype))
    return total * shrink[..., None] + values, new_maximum, normaliser * shrink + jnp.sum(weights, axis=-1)


def finish(carry: Any) -> Any:
    """(output, log of the sum of exponentials); both 0 for queries that see nothing."""
    total, maximum, normaliser = carry
    empty = normaliser == 0
    safe = jnp.where(empty, 1.0, normaliser)
    return total / safe[..., None], jnp.where(empty, 0.0, maximum + jnp.log(safe))


def _scores(queries, key):
    return product("bkrd,bksd->bkrs", queries, key.astype(queries.dtype)) / np.sqrt(queries.shape[-1])


def _block_gradients(query, keys: Keys, residuals: Residuals, seen):
    """Contributions float32 of one block of queries and one of keys to dq, dk and dv."""
    weights = jnp.where(seen, jnp.exp(_scores(query, keys.key) - residuals.log_sums[..., None]), 0.0)
    d_weights = product("bkrd,bksd->bkrs", residuals.d_output, keys.value)
    d_scores = (weights * (d_weights - residuals.delta[..., None]) / np.sqrt(query.shape[-1])).astype(query.dtype)
    return (
        product("bkrs,bksd->bkrd", d_scores, keys.key),
        product("bkrs,bkrd->bksd", d_scores, query),
        product("bkrs,bkrd->bksd", weights.astype(keys.value.dtype), residuals.d_output),
    )


def _pairs(count):
    """(query block, key block) of the causal half, row by row: a static list, so no trip count is dynamic."""
    return np.array([(i, j) for i in range(count) for j in range(i + 1)], np.int32)


def _seen(query_ids, key_ids, groups, diagonal=False):
    """bool [B, 1, R, C]: inside one document, and on the diagonal causal."""
    seen = (query_ids[:, :, None] == key_ids[:, None, :]) & (key_ids > 0)[:, None, :]
    index = jnp.arange(key_ids.shape[1])
    seen &= (index[:, None] >= index) | jnp.logical_not(diagonal)
    return jnp.tile(seen, (1, groups, 1))[:, None]
