"""The softmax-attention layer: grouped-query attention with partial RoPE, and its key-value cache."""

import functools
from typing import NamedTuple

import jax
from flax import linen as nn
from jax import lax

from mmx_jax.config import ModelConfig
from mmx_jax.layers.attention_ops import cached_attention, causal_attention
from mmx_jax.layers.linear import deepnorm_gain, einsum, weight
from mmx_jax.layers.rotary import apply_rotary
from mmx_jax.layers.segments import at_positions
from mmx_jax.sharding import constrain, over_mesh, row_axis


class KeyValueCache(NamedTuple):
    """Keys (after RoPE) and values [B, K, S, D] of one layer; slots are filled from the left, padding included."""

    key: jax.Array
    value: jax.Array


class CacheView(NamedTuple):
    """What every softmax layer shares about the cache in one forward pass."""

    cursor: jax.Array  # int32 (), first slot that this pass writes
    real: jax.Array  # bool [B, S], slots that hold a token after this pass


class SoftmaxAttention(nn.Module):
    """Spec C.4. Returns the attention output [B, T, M] and, given a cache, the cache with the new slots.

    `last`, with a cache: int32 [B], the last real position of each row, which alone is computed then, [B, 1, M].
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x, positions, segment_ids, cache: KeyValueCache | None = None, view: CacheView | None = None, last=None
    ):
        c = self.config
        heads, kv_heads, dim, embed = c.num_heads, c.num_kv_heads, c.head_dim, c.hidden_size

        def project(x, name, n, axis, gain=1.0):
            w = weight(
                self, c, name, (embed, n, dim), ("embed", axis, "head_dim"), fan_in=embed, fan_out=n * dim, gain=gain
            )
            return einsum("btm,mf->btf", x, w.reshape(embed, n * dim)).reshape(*x.shape[:2], n, dim)

        asking = at_positions(x, last)
        q = project(asking, "query", heads, "heads")
        k = project(x, "key", kv_heads, "kv_heads")
        v = project(x, "value", kv_heads, "kv_heads", deepnorm_gain(c))
        w_out = weight(
            self, c, "out", (heads, dim, embed), ("heads", "head_dim", "embed"),
            fan_in=heads * dim, fan_out=embed, gain=deepnorm_gain(c),
        )  # fmt: skip
        places = at_positions(positions, last), positions
        q, k = (
            apply_rotary(y, p, rotary_dim=c.rotary_dim, theta=c.rope_theta) for y, p in zip((q, k), places, strict=True)
        )
        q, k, v = (constrain(y, "batch", "length", "heads_act", None) for y in (q, k, v))
        if cache is None:
            axis = row_axis(x.shape[1])
            attend = functools.partial(
                causal_attention, axis=axis, method=c.sequence_softmax, implementation=c.softmax_implementation,
                block=c.softmax_block,
            )  # fmt: skip
            length = axis and "length"
            tokens = "batch", length, "heads_act", None
            in_axes = [tokens, tokens, tokens, ("batch", length)]
            output = over_mesh(attend, in_axes, tokens)(q, k, v, segment_ids)
        else:
            cache = KeyValueCache(*(_write(old, new, view.cursor) for old, new in zip(cache, (k, v), strict=True)))
            # Behind a row's last real token there is padding only, so it may stand in the last slot.
            first = view.cursor + x.shape[1] - q.shape[1]
            output = cached_attention(
                q, cache.key, cache.value, first, view.real, implementation=c.softmax_implementation,
                block=c.softmax_block,
            )  # fmt: skip
        output = output.reshape(*asking.shape[:2], heads * dim)
        return einsum("btf,fm->btm", output, w_out.reshape(heads * dim, embed)), cache


def _write(cache, new, cursor):
    """Writes [B, T, K, D] into the slots of [B, K, S, D] from `cursor` on."""
    return lax.dynamic_update_slice_in_dim(cache, new.swapaxes(1, 2).astype(cache.dtype), cursor, axis=2)
