"""The softmax-attention layer: grouped-query attention with partial RoPE, and its key-value cache."""

import functools
from typing import NamedTuple

import jax
from flax import linen as nn
from jax import lax

from mmx_jax.config import ModelConfig, RuntimeConfig
from mmx_jax.layers.linear import deepnorm_gain, einsum, weight
from mmx_jax.layers.rotary import apply_rotary
from mmx_jax.layers.segments import at_positions
from mmx_jax.parallel import ring_attention
from mmx_jax.parallel.ring_attention import RingSpec
from mmx_jax.sharding import constrain, over_mesh, row_axis
from pallas_kernels.softmax_attention import cached_attention


class KeyValueCache(NamedTuple):
    """Keys (after RoPE) and values [B, K, S, D] of one layer; token i of a row lies in slot i."""

    key: jax.Array
    value: jax.Array


class SoftmaxAttention(nn.Module):
    """Grouped-query attention with partial RoPE (docs/model.md, "Softmax attention").

    Returns the attention output [B, T, M] and, given a cache, the cache with the new tokens in it.

    With a cache the tokens of a row stand at its left, padding at its right. `lengths`: int32 [B], tokens that the
    cache holds of each row. `last`: int32 [B], the last token of each row, whose output alone is computed then, [B, 1,
    M].
    """

    config: ModelConfig
    runtime: RuntimeConfig = RuntimeConfig()

    @nn.compact
    def __call__(self, x, positions, segment_ids, cache: KeyValueCache | None = None, lengths=None, last=None):
        c, runtime = self.config, self.runtime
        heads, kv_heads, dim, embed = c.num_heads, c.num_kv_heads, c.head_dim, c.hidden_size

        def project(x, name, n, axis, gain=1.0):
            w = weight(self, name, (embed, n, dim), ("embed", axis, "head_dim"), fan=(embed, n * dim), gain=gain)
            return einsum("btm,mf->btf", x, w.reshape(embed, n * dim)).reshape(*x.shape[:2], n, dim)  # pyright: ignore[reportAttributeAccessIssue]

        asking = at_positions(x, last)
        gain = deepnorm_gain(c)
        q = project(asking, "query", heads, "heads")
        k = project(x, "key", kv_heads, "kv_heads")
        v = project(x, "value", kv_heads, "kv_heads", gain)
        w_out = weight(
            self, "out", (heads, dim, embed), ("heads", "head_dim", "embed"), fan=(heads * dim, embed), gain=gain
        )
        places = at_positions(positions, last), positions
        q, k = (
            apply_rotary(y, p, rotary_dim=c.rotary_dim, theta=c.rope_theta) for y, p in zip((q, k), places, strict=True)
        )
        q, k, v = (constrain(y, "batch", "length", "heads_act", None) for y in (q, k, v))
        if cache is None:
            axis = row_axis(x.shape[1])
            spec = RingSpec(axis, runtime.sequence_softmax, runtime.softmax_implementation, runtime.softmax_block)
            attend = functools.partial(ring_attention.softmax_attention, spec=spec)
            length = axis and "length"
            tokens = "batch", length, "heads_act", None
            in_axes = [tokens, tokens, tokens, ("batch", length)]
            output = over_mesh(attend, in_axes, tokens)(q, k, v, segment_ids)
        else:
            assert lengths is not None, "a cache comes with the lengths of its rows"
            cache = KeyValueCache(*(_write(old, new, lengths) for old, new in zip(cache, (k, v), strict=True)))
            first = lengths if last is None else lengths + last  # slot of the first query
            output = cached_attention(
                q,
                cache.key,
                cache.value,
                first,
                implementation=runtime.softmax_implementation,
                block=runtime.softmax_block,
            )
        output = output.reshape(*asking.shape[:2], heads * dim)
        return einsum("btf,fm->btm", output, w_out.reshape(heads * dim, embed)), cache


def _write(cache, new, lengths):
    """Writes new [B, T, K, D] into the slots lengths[b], lengths[b] + 1, ... of each row of cache [B, K, S, D].

    Padding is written too, and the next tokens overwrite it: no query sees a slot beyond its own.
    """
    new = new.swapaxes(1, 2).astype(cache.dtype)
    if cache.shape[0] == 1:  # a slice in place; of several rows it is a scatter
        return lax.dynamic_update_slice_in_dim(cache, new, lengths[0], axis=2)
    return jax.vmap(lambda row, x, start: lax.dynamic_update_slice_in_dim(row, x, start, axis=1))(cache, new, lengths)
