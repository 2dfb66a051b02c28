"""Training losses: cross entropy in chunks over a large vocabulary, and the load-balancing loss of the router."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmx_jax.sharding import constrain
from pallas_kernels.einsum import product


class CrossEntropy(NamedTuple):
    """Sums over the tokens that have a target; divide by `count` after adding what belongs together.

    Sums, so that micro-batches and data-parallel shards average right. All float32 scalars.

    Attributes:
      objective: what is differentiated: `nll + z_loss_coef * z`. The other fields carry no gradient.
      nll: sum of -log p(target), nats.
      z: sum of logsumexp(logits)^2.
      correct: number of tokens whose target has the largest logit.
      count: number of tokens with a target.
    """

    objective: jax.Array
    nll: jax.Array
    z: jax.Array
    correct: jax.Array
    count: jax.Array


def chunked_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    chunk: int,
    z_loss_coef: float = 0.0,
    groups: int = 1,
    parts: int = 1,
) -> CrossEntropy:
    """Cross entropy of a linear head; at most `chunk` tokens of a group have logits at one time, backward included.

    The gradients are computed in the forward scan, where the logits are at hand: the backward pass only
    scales them, so the head costs three products in all and no logits are ever recomputed or stored.

    Args:
      hidden: [B, T, M], float32 or bfloat16.
      head: [V, M]; it is multiplied in the dtype of `hidden`, with float32 accumulation and float32 logits.
      targets: int [B, T]; tokens with a negative target do not count.
      chunk: tokens of each group per step of the scan, in which the whole head is read and its gradient added to.
      z_loss_coef: weight of the z-loss, the squared logsumexp (arXiv 2204.02311, section 5).
      groups: shards of the batch axis, a divisor of B. Every group takes part in every step and sums its own
        gradient of the head, so that the shards add theirs up once, after the scan, instead of in every step.
      parts: shards of the length, a divisor of T, which then makes that many groups of each.

    Returns:
      CrossEntropy. The gradient with respect to `head` is accumulated in float32.
    """
    if hidden.shape[:2] != targets.shape or hidden.shape[2:] != head.shape[1:]:
        raise ValueError(
            f"hidden {hidden.shape}, head {head.shape} and targets {targets.shape} are not [B, T, M], [V, M], [B, T]"
        )
    if chunk < 1:
        raise ValueError(f"{chunk=} must be positive")
    if hidden.shape[0] % groups:
        raise ValueError(f"{groups=} does not divide the {hidden.shape[0]} rows")
    if hidden.shape[1] % parts:
        raise ValueError(f"{parts=} does not divide the {hidden.shape[1]} tokens of a row")

    def cut(x):  # parts of rows as rows of their own, those of one shard together
        x = x.reshape(groups, -1, parts, x.shape[1] // parts, *x.shape[2:])
        return x.swapaxes(1, 2).reshape(-1, *x.shape[3:])

    with jax.named_scope("loss"):
        objective, sums = _cross_entropy(cut(hidden), head, cut(targets), chunk, z_loss_coef, groups * parts)  # pyright: ignore[reportGeneralTypeIssues]
    return CrossEntropy(objective, *jax.lax.stop_gradient(sums))


def load_balancing_loss(stats: Any, *, form: str = "switch", pooling: str = "pooled") -> tuple[jax.Array, jax.Array]:
    """Load-balancing loss of the router (docs/model.md, "Losses"); f carries no gradient, P does.

    Args:
      stats: `assignments` and `probability` [L, E], `tokens` [L], of one micro-batch.
      form: "switch": E sum_e f_e P_e, k at uniform load; "report": (1/E) sum_e f_e P_e (section 2.1 of the report).
      pooling: "pooled": f and P are means over all layers and tokens; "per_layer": the mean of the layers' losses.

    Returns:
      (loss, per_layer): float32 scalar and [L]. f sums to the number of experts per token.
    """
    num_experts = stats.assignments.shape[-1]
    scale = {"switch": float(num_experts), "report": 1.0 / num_experts}[form]

    def balance(assignments, probability, tokens):
        tokens = jnp.maximum(tokens, 1.0)[..., None]
        fraction = jax.lax.stop_gradient(assignments / tokens)
        return scale * jnp.sum(fraction * (probability / tokens), axis=-1)

    per_layer = balance(stats.assignments, stats.probability, stats.tokens)
    if pooling == "per_layer":
        return jnp.mean(per_layer), per_layer
    return balance(stats.assignments.sum(0), stats.probability.sum(0), stats.tokens.sum(0)), per_layer


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _cross_entropy(hidden, head, targets, chunk, z_loss_coef, groups):
    weight = _gathered_head(head, hidden.dtype)

    def step(sums, inputs):
        x, t = inputs
        return jax.tree.map(jnp.add, sums, _chunk_sums(_logits(x, weight), t)[0]), None

    sums, _ = jax.lax.scan(step, _zero_sums(), _split(hidden, targets, chunk, groups))
    return sums[0] + z_loss_coef * sums[1], sums


def _cross_entropy_forward(hidden, head, targets, chunk, z_loss_coef, groups):
    weight = _gathered_head(head, hidden.dtype)

    def step(carry, inputs):
        sums, dhead = carry
        x, t = inputs  # [G, C, M], [G, C]
        logits = _logits(x, weight)
        chunk_sums, log_z = _chunk_sums(logits, t)
        # d objective / d logits = p - onehot + z_loss_coef * 2 log_z p, and nothing where there is no target
        scale = (1.0 + 2.0 * z_loss_coef * log_z)[..., None]
        dlogits = scale * jnp.exp(logits - log_z[..., None]) - _is_target(logits, t)
        dlogits = jnp.where((t >= 0)[..., None], dlogits, 0.0).astype(x.dtype)
        dx = product("gcv,vm->gcm", dlogits, weight)
        dhead = constrain(dhead + product("gcv,gcm->gvm", dlogits, x), "tokens", "vocab", None)
        return (jax.tree.map(jnp.add, sums, chunk_sums), dhead), dx.astype(x.dtype)

    init = _zero_sums(), jnp.zeros((groups, *head.shape), jnp.float32)
    (sums, dhead), dx = jax.lax.scan(step, init, _split(hidden, targets, chunk, groups))
    # The empty array carries the head's dtype, which a residual cannot otherwise name.
    residuals = _join(dx, hidden.shape, chunk), dhead.sum(0), jnp.zeros((0,), head.dtype)
    return (sums[0] + z_loss_coef * sums[1], sums), residuals


def _cross_entropy_backward(chunk, z_loss_coef, groups, residuals, cotangents):
    dhidden, dhead, head_dtype = residuals
    scale, _ = cotangents
    return (scale * dhidden).astype(dhidden.dtype), (scale * dhead).astype(head_dtype.dtype), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _gathered_head(head, dtype):
    """The head in the dtype of the products, gathered over the shards of M once rather than in every step."""
    return constrain(head.astype(dtype), "vocab", None)


def _logits(x, weight):
    return product("gcm,vm->gcv", x, weight)


def _is_target(logits, targets):
    # A comparison, not a gather or scatter: it fuses, and it partitions over the vocabulary.
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]


def _zero_sums():
    return (jnp.zeros((), jnp.float32),) * 4


def _chunk_sums(logits, targets):
    """((nll, z, correct, count) of one chunk, logsumexp [G, C])."""
    token_mask = targets >= 0
    top = jnp.max(logits, axis=-1)
    log_z = top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
    chosen = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1)
    return (
        jnp.sum(jnp.where(token_mask, log_z - chosen, 0.0)),
        jnp.sum(jnp.where(token_mask, log_z**2, 0.0)),
        jnp.sum(token_mask & (chosen == top), dtype=jnp.float32),
        jnp.sum(token_mask, dtype=jnp.float32),
    ), log_z


def _tile(rows, length, chunk):
    """(rows, tokens of each row) of one group's chunk: all rows, unless there are more of them than `chunk`."""
    tile_rows = min(rows, chunk)
    return tile_rows, min(length, max(1, chunk // tile_rows))


def _split(hidden, targets, chunk, groups):
    """[B, T, M] and [B, T] -> [n, G, C, M] and [n, G, C], filled up with tokens without a target."""
    _, length, width = hidden.shape
    rows = hidden.shape[0] // groups
    r, t = _tile(rows, length, chunk)
    row_tiles, time_tiles = -(-rows // r), -(-length // t)
    pad = (0, 0), (0, row_tiles * r - rows), (0, time_tiles * t - length)
    hidden = jnp.pad(hidden.reshape(groups, rows, length, width), (*pad, (0, 0)))
    targets = jnp.pad(targets.reshape(groups, rows, length), pad, constant_values=-1)
    hidden = hidden.reshape(groups, row_tiles, r, time_tiles, t, width).transpose(1, 3, 0, 2, 4, 5)
    targets = targets.reshape(groups, row_tiles, r, time_tiles, t).transpose(1, 3, 0, 2, 4)
    hidden = constrain(hidden.reshape(-1, groups, r * t, width), None, "tokens", None, None)
    return hidden, constrain(targets.reshape(-1, groups, r * t), None, "tokens", None)


def _join(chunks, shape, chunk):
    """The inverse of `_split` for [n, G, C, M]."""
    groups, width = chunks.shape[1], chunks.shape[3]
    rows, length = shape[0] // groups, shape[1]
    r, t = _tile(rows, length, chunk)
    row_tiles, time_tiles = -(-rows // r), -(-length // t)
    joined = chunks.reshape(row_tiles, time_tiles, groups, r, t, width).transpose(2, 0, 3, 1, 4, 5)
    joined = joined.reshape(groups, row_tiles * r, time_tiles * t, width)[:, :rows, :length]
    return joined.reshape(shape)
