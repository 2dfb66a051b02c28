"""The definition of softmax attention, quadratic in T: every other backend is tested against it."""

from typing import Any

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a query that sees no key must not make a NaN in the gradient


def check(q: Any, k: Any, v: Any, *, segmented: bool) -> None:
    """The definition serves every shape."""
    del q, k, v, segmented


def forward(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, *, block: int) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v over the tokens of the same document up to the query's own; see `api`."""
    del block
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    queries, keys, values = (x.astype(jnp.float32) for x in (q, k, v))
    keys, values = (jnp.repeat(x, group, axis=2) for x in (keys, values))
    scores = jnp.einsum("bthd,bshd->bhts", queries, keys, precision="highest") / q.shape[-1] ** 0.5
    same_document = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, None, :]
    seen = (same_document & jnp.tril(jnp.ones((length, length), bool)))[:, None]
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1), 0.0)
    return jnp.einsum("bhts,bshd->bthd", weights, values, precision="highest").astype(v.dtype)
