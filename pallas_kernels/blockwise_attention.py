"""Softmax attention in blocks of queries and keys, in plain XLA: any platform, memory linear in the length.

Blocks of queries are [B, K, R, D]: the R = G C query tokens of every query head that reads one key head, merged, so
that sums over both are one plain product. Blocks of keys and values are [B, K, C, D], of documents [B, C]. Where there
are several, they are stacked on the leading axis.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.einsum import product
from pallas_kernels.platform import cdiv

# Both finite, so that a block in which a query sees no key makes no NaN. The running maximum starts far above the
# masked scores: their exponentials are 0 even then.
_MASKED, _LOWEST_MAXIMUM = -1e30, -1e29


class Keys(NamedTuple):
    """Blocks of keys, with what belongs to them."""

    key: jax.Array  # [n, B, K, C, D]
    value: jax.Array  # [n, B, K, C, D]
    runs: jax.Array  # int32 [n, B, C], documents as `document_runs` numbers them, 0 at padding


class Results(NamedTuple):
    """What the backward needs to know of blocks of queries."""

    d_output: jax.Array  # [n, B, K, R, D]
    delta: jax.Array  # float32 [n, B, K, R], the sums of output times d_output
    log_sums: jax.Array  # float32 [n, B, K, R]


def causal_attention(q, k, v, runs, block):
    """Causal grouped-query attention inside documents.

    Args:
      q: [B, T, H, D]; k, v: [B, T, K, D].
      runs: int32 [B, T], as `document_runs` gives them.
      block: query and key tokens that scores are held for at once.

    Returns:
      [B, T, H, D] in the dtype of `v`; 0 at padding.
    """
    length = q.shape[1]
    block = min(block, length)
    padding = cdiv(length, block) * block - length
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    return _causal(block, q, k, v, jnp.pad(runs, ((0, 0), (0, padding))))[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal(block, q, k, v, runs):
    return _causal_forward(block, q, k, v, runs)[0]


def _causal_forward(block, q, k, v, runs):
    queries, keys = cut_queries(q, k.shape[2], block), cut_keys(k, v, runs, block)
    output, log_sums = causal_blocks(queries, keys, v.dtype)
    return merge(output, block), (q, k, v, runs, output, log_sums)


def _causal_backward(block, saved, d_output):
    q, k, v, runs, output, log_sums = saved
    queries, keys = cut_queries(q, k.shape[2], block), cut_keys(k, v, runs, block)
    results = results_of(cut_queries(d_output.astype(v.dtype), k.shape[2], block), output, log_sums)
    dq, dk, dv = (merge(x, block) for x in causal_gradients(queries, keys, results))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_causal.defvjp(_causal_forward, _causal_backward)


def together(tree):
    """The same, for jax one value: it would find that masks depend on no activation, and keep those of all blocks."""
    return lax.optimization_barrier(tree)


def cut_queries(q, kv_heads, block):
    """[B, T, H, D] -> [n, B, K, R, D]; T is a multiple of `block`."""
    batch, length, heads, dim = q.shape
    q = q.reshape(batch, length // block, block, kv_heads, heads // kv_heads, dim).transpose(1, 0, 3, 4, 2, 5)
    return q.reshape(length // block, batch, kv_heads, -1, dim)


def cut_keys(k, v, runs, block) -> Keys:
    """[B, T, K, D] twice and [B, T] -> `Keys`; T is a multiple of `block`."""
    batch, length, kv_heads, dim = k.shape
    k, v = (x.reshape(batch, length // block, block, kv_heads, dim).transpose(1, 0, 3, 2, 4) for x in (k, v))
    return Keys(k, v, runs.reshape(batch, length // block, block).swapaxes(0, 1))


def merge(x, block):
    """Blocks of queries or of keys -> [B, T, H, D] or [B, T, K, D]."""
    count, batch, kv_heads, _, dim = x.shape
    x = x.reshape(count, batch, kv_heads, -1, block, dim)
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, count * block, -1, dim)


def causal_blocks(queries, keys: Keys, dtype):
    """(output in `dtype` [n, B, K, R, D], log of the sums of exponentials float32 [n, B, K, R]) of whole rows."""
    groups = queries.shape[3] // keys.key.shape[3]

    def step(carry, pair):
        (output, log_sums), running = carry
        i, j = pair
        running = jax.tree.map(lambda empty, x: jnp.where(j == 0, empty, x), empty_carry(queries[0]), running)
        seen = _seen(keys.runs[i], keys.runs[j], groups, i == j)
        running = accumulate(running, queries[i], keys.key[j], keys.value[j], seen)
        finished, log_sum = finish(running)
        return ((output.at[i].set(finished.astype(dtype)), log_sums.at[i].set(log_sum)), running), None

    results = jnp.zeros(queries.shape, dtype), jnp.zeros(queries.shape[:-1])
    queries, keys, pairs = together((queries, keys, _pairs(queries.shape[0])))
    (results, _), _ = lax.scan(step, (results, empty_carry(queries[0])), pairs)
    return results


def results_of(d_output, output, log_sums) -> Results:
    delta = jnp.sum(d_output.astype(jnp.float32) * output.astype(jnp.float32), axis=-1)
    return Results(d_output, delta, log_sums)


def causal_gradients(queries, keys: Keys, results: Results):
    """Gradients to queries, keys and values, float32 in blocks."""
    groups = queries.shape[3] // keys.key.shape[3]

    def step(gradients, pair):
        i, j = pair
        block = Keys(keys.key[j], keys.value[j], keys.runs[j])
        seen = _seen(keys.runs[i], keys.runs[j], groups, i == j)
        dq, dk, dv = _block_gradients(queries[i], block, jax.tree.map(lambda x: x[i], results), seen)
        return (gradients[0].at[i].add(dq), gradients[1].at[j].add(dk), gradients[2].at[j].add(dv)), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (queries, keys.key, keys.value))
    queries, keys, results, pairs = together((queries, keys, results, _pairs(queries.shape[0])))
    return lax.scan(step, zeros, pairs)[0]


def attend_earlier(carry, queries, query_runs, keys: Keys):
    """Steps of the online softmax of all blocks of queries over all blocks of keys, each of them earlier in the row.

    Args:
      carry: of all blocks, as `empty_carry(queries)` begins it.
      query_runs: int32 [n, B, C].
    """
    groups = queries.shape[3] // query_runs.shape[2]

    def row(_, inputs):
        carry, query, own_runs = inputs

        def step(carry, block):
            seen = _seen(own_runs, block.runs, groups)
            return accumulate(carry, query, block.key, block.value, seen), None

        return None, lax.scan(step, carry, keys)[0]

    return lax.scan(row, None, (carry, queries, query_runs))[1]


def earlier_gradients(gradients, queries, query_runs, keys: Keys, results: Results):
    """Adds what `attend_earlier` gives to the float32 gradients (dq, (dk, dv)), in blocks."""
    groups = queries.shape[3] // query_runs.shape[2]
    dq, d_keys = gradients

    def row(d_keys, inputs):
        dq, query, own_runs, own_results = inputs

        def step(dq, inputs):
            block, (dk, dv) = inputs
            more = _block_gradients(query, block, own_results, _seen(own_runs, block.runs, groups))
            return dq + more[0], (dk + more[1], dv + more[2])

        dq, d_keys = lax.scan(step, dq, (keys, d_keys))
        return d_keys, dq

    d_keys, dq = lax.scan(row, d_keys, (dq, queries, query_runs, results))
    return dq, d_keys


def empty_carry(queries):
    """The carry of `accumulate` before the first step: (weighted sum, maximum and normaliser without the last axis)."""
    shape = queries.shape[:-1]
    return jnp.zeros(queries.shape, jnp.float32), jnp.full(shape, _LOWEST_MAXIMUM), jnp.zeros(shape)


def carry_of(output, log_sums, query_runs):
    """The carry of `accumulate` behind the steps that `causal_blocks` finished to these results, float32."""
    # A query that is no padding has seen itself.
    real = jnp.tile(query_runs > 0, (1, 1, log_sums.shape[3] // query_runs.shape[2]))[:, :, None]
    return output, jnp.where(real, log_sums, _LOWEST_MAXIMUM), jnp.where(real, jnp.ones_like(log_sums), 0.0)


def accumulate(carry, queries, key, value, seen):
    """One step of the online softmax: `queries` over the keys that `seen`, bool [B, 1 or K, R, C], allows."""
    total, maximum, normaliser = carry
    scores = jnp.where(seen, _scores(queries, key), _MASKED)
    new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - new_maximum[..., None])
    shrink = jnp.exp(maximum - new_maximum)
    values = product("bkrs,bksd->bkrd", weights.astype(queries.dtype), value.astype(queries.dtype))
    return total * shrink[..., None] + values, new_maximum, normaliser * shrink + jnp.sum(weights, axis=-1)


def finish(carry):
    """(output, log of the sum of exponentials); both 0 for queries that see nothing."""
    total, maximum, normaliser = carry
    empty = normaliser == 0
    safe = jnp.where(empty, 1.0, normaliser)
    return total / safe[..., None], jnp.where(empty, 0.0, maximum + jnp.log(safe))


def _scores(queries, key):
    return product("bkrd,bksd->bkrs", queries, key.astype(queries.dtype)) / np.sqrt(queries.shape[-1])


def _block_gradients(query, keys: Keys, results: Results, seen):
    """Contributions float32 of one block of queries and one of keys to dq, dk and dv."""
    weights = jnp.where(seen, jnp.exp(_scores(query, keys.key) - results.log_sums[..., None]), 0.0)
    d_weights = product("bkrd,bksd->bkrs", results.d_output, keys.value)
    d_scores = (weights * (d_weights - results.delta[..., None]) / np.sqrt(query.shape[-1])).astype(query.dtype)
    return (
        product("bkrs,bksd->bkrd", d_scores, keys.key),
        product("bkrs,bkrd->bksd", d_scores, query),
        product("bkrs,bkrd->bksd", weights.astype(keys.value.dtype), results.d_output),
    )


def _pairs(count):
    """(query block, key block) of the causal half, row by row: a static list, so no trip count is dynamic."""
    return np.array([(i, j) for i in range(count) for j in range(i + 1)], np.int32)


def _seen(query_runs, key_runs, groups, diagonal=False):
    """bool [B, 1, R, C]: inside one document, and on the diagonal causal."""
    seen = (query_runs[:, :, None] == key_runs[:, None, :]) & (key_runs > 0)[:, None, :]
    index = jnp.arange(key_runs.shape[1])
    seen &= (index[:, None] >= index) | jnp.logical_not(diagonal)
    return jnp.tile(seen, (1, groups, 1))[:, None]
