"""The lightning-attention layer: SiLU on q, k and v, decayed linear attention, norm, gate."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from mmx_jax.config import ModelConfig, RuntimeConfig
from mmx_jax.layers.linear import deepnorm_gain, einsum, product, silu, weight
from mmx_jax.layers.norm import gated_rms_norm
from mmx_jax.layers.segments import at_positions
from mmx_jax.parallel import lasp
from mmx_jax.parallel.lasp import LaspSpec
from mmx_jax.sharding import constrain, over_mesh, row_axis
from pallas_kernels.lightning_attention import gated_step, recurrent_step, serves_gated_step


def decay_slopes(num_layers: int, num_heads: int) -> np.ndarray:
    """Decay rates float32 [L, H]: the ALiBi ladder times (1 - l / (L - 1) + 1e-5), l the absolute layer."""

    def ladder(n):
        return 2.0 ** (-8.0 * np.arange(1, n + 1) / n)

    power = 1 << num_heads.bit_length() - 1  # ALiBi interleaves the next ladder for other head counts
    base = np.concatenate([ladder(power), ladder(2 * power)[0::2][: num_heads - power]])
    layer = np.arange(num_layers) / max(num_layers - 1, 1)
    return (base * (1 - layer + 1e-5)[:, None]).astype(np.float32)


class LightningWeights(NamedTuple):
    """Weights of one layer."""

    qkv: jax.Array  # [M, 3, H, D]
    gate: jax.Array  # [M, H, D]
    out: jax.Array  # [H, D, M]
    norm: jax.Array  # [H, D], scale of the output norm


class LightningAttention(nn.Module):
    """Lightning attention of one layer (docs/model.md, "Lightning attention"; arXiv 2501.08313, section 2.2).

    Returns the attention output [B, T, M] and, given a state float32 [B, H, D, D], the next one.

    `segment_ids`: int32 [B, T] as `number_segments` gives them, or None.
    `last`: int32 [B], the only position of each row whose output is wanted; it is [B, 1, M] then.
    """

    config: ModelConfig
    runtime: RuntimeConfig = RuntimeConfig()

    @nn.compact
    def __call__(self, x, slopes, segment_ids, state=None, last=None):
        c, runtime = self.config, self.runtime
        heads, dim, embed = c.num_heads, c.head_dim, c.hidden_size
        inner = heads * dim
        w = self._weights()
        decoding = state is not None and x.shape[1] == 1
        token_mask = None if segment_ids is None else segment_ids[:, 0] > 0
        # The states of several blocks lie in one stack, which a kernel would have to copy from and to.
        alone = decoding and c.num_blocks == 1
        if alone and serves_gated_step(x.dtype, slopes, state, implementation=runtime.lightning_implementation):
            return _few_kernels_step(x, w, c.lightning_norm_eps, slopes, state, token_mask)
        # Activations stay merged, [B, T, H*D]: a 4-D kernel argument triples the traffic on TPU.
        qkv = einsum("btm,mcf->btcf", x, w.qkv.reshape(embed, 3, inner))
        if decoding and x.shape[0] > 1:
            # Without it XLA computes each part in a kernel of its own, from the partial sums of the product.
            qkv = lax.optimization_barrier(qkv)
        # The gradient of a split is one concatenation.
        parts = jnp.split(qkv, 3, axis=2)  # pyright: ignore[reportArgumentType]
        q, k, v = (constrain(silu(part.squeeze(2)), "batch", "length", "heads_act") for part in parts)
        if decoding:
            output, state = recurrent_step(q[:, 0], k[:, 0], v[:, 0], slopes, state, token_mask)
            # The barrier keeps the sum of squares that follows over one axis, as XLA's kernel for a whole norm needs
            # it.
            output = lax.optimization_barrier(output[:, None])
        else:
            axis = row_axis(x.shape[1])
            spec = LaspSpec(axis, runtime.sequence_lightning, runtime.lightning_chunk, runtime.lightning_implementation)
            attend = functools.partial(lasp.lightning_attention, spec=spec)
            length = axis and "length"
            tokens, states = ("batch", length, "heads_act"), ("batch", "heads_act", None, None)
            in_axes = [tokens, tokens, tokens, ("heads_act",), ("batch", length), states]
            output, state = over_mesh(attend, in_axes, [tokens, states])(q, k, v, slopes, segment_ids, state)
        x, output = at_positions(x, last), at_positions(output, last)
        gate = einsum("btm,mf->btf", x, w.gate.reshape(embed, inner))
        output = gated_rms_norm(output, gate, w.norm.reshape(inner), c.lightning_norm_eps)
        output = constrain(output, "batch", "length", "heads_act")
        return einsum("btf,fm->btm", output, w.out.reshape(inner, embed)), state

    def _weights(self) -> LightningWeights:
        c = self.config
        heads, dim, embed = c.num_heads, c.head_dim, c.hidden_size
        inner, gain = heads * dim, deepnorm_gain(c)
        qkv_gain = np.array([1, 1, gain], np.float32)[:, None, None]  # DeepNorm scales v, not q and k
        projection = ("embed", "heads", "head_dim")
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("heads", "head_dim"))
        return LightningWeights(
            qkv=weight(
                self,
                "qkv",
                (embed, 3, heads, dim),
                ("embed", "qkv", "heads", "head_dim"),
                fan=(embed, inner),
                gain=qkv_gain,
            ),
            gate=weight(self, "gate", (embed, heads, dim), projection, fan=(embed, inner)),
            out=weight(self, "out", (heads, dim, embed), ("heads", "head_dim", "embed"), fan=(inner, embed), gain=gain),
            norm=self.param("norm", ones, (heads, dim), jnp.dtype(c.param_dtype)),  # pyright: ignore[reportArgumentType]
        )


def _few_kernels_step(x, w: LightningWeights, eps, slopes, state, token_mask):
    """One token x [B, 1, M] of decoding: a product, the kernel of the step, a product."""
    batch, _, embed = x.shape
    # Two rows at least: of a single one XLA would write products to memory and sum them, two kernels instead of one.
    count = max(2, batch)
    rows = jnp.broadcast_to(x[:, 0], (count, embed))
    # XLA merges both products into one, and the kernel takes its result as it is.
    projected = [einsum("rm,mf->rf", rows, weight.reshape(embed, -1)) for weight in (w.qkv, w.gate)]
    projected = jnp.concatenate(projected, axis=1)  # pyright: ignore[reportArgumentType]
    output, squares, state = gated_step(projected, slopes, state, w.norm.reshape(-1), token_mask)
    # Add the columns one by one: XLA would turn the sum of a row into a kernel of its own.
    total = sum(jnp.split(squares, squares.shape[1], axis=1))
    rms = lax.rsqrt(total / output.shape[1] + eps)
    rows = jnp.broadcast_to(output, (count, output.shape[1]))
    # The norm is one factor a row, so it may follow the product.
    update = product("rf,fm->rm", rows, w.out.reshape(-1, embed).astype(x.dtype))[:batch] * rms
    return update.astype(x.dtype)[:, None], state
