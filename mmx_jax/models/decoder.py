"""The decoder: embedding, scanned hybrid blocks, head (docs/model.md)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mmx_jax.config import ModelConfig, RuntimeConfig
from mmx_jax.layers.lightning_attention import LightningAttention, decay_slopes
from mmx_jax.layers.linear import product
from mmx_jax.layers.moe import MixtureOfExperts, RouterStats, takes_norm
from mmx_jax.layers.norm import RMSNorm
from mmx_jax.layers.segments import at_positions, number_segments, segment_positions
from mmx_jax.layers.softmax_attention import SoftmaxAttention
from mmx_jax.models.cache import DecodeState
from mmx_jax.sharding import constrain


class LayerInputs(NamedTuple):
    """Inputs that all layers of a forward pass share."""

    positions: jax.Array  # int32 [B, T]
    segment_ids: jax.Array | None  # int32 [B, T], 0 at padding
    lengths: jax.Array | None  # int32 [B], tokens of each row in the cache before this pass; None without a cache
    last: jax.Array | None = None  # int32 [B], the only position of each row that is needed after this layer


def _attend_lightning(config, runtime, x, shared, slopes, state):
    return LightningAttention(config, runtime, name="attention")(x, slopes, shared.segment_ids, state, shared.last)


def _attend_softmax(config, runtime, x, shared, slopes, state):
    del slopes
    attention = SoftmaxAttention(config, runtime, name="attention")
    return attention(x, shared.positions, shared.segment_ids, state, shared.lengths, shared.last)


# Kind of layer -> (config, runtime, x, LayerInputs, slopes [H], state) -> (output, state).
LAYER_KINDS = {"lightning": _attend_lightning, "softmax": _attend_softmax}

_POLICIES = jax.checkpoint_policies
_REMAT_POLICIES = {
    "full": _POLICIES.nothing_saveable,
    # Everything that took a product is kept: projections, and what the kernels give.
    "dots": _POLICIES.save_from_both_policies(
        _POLICIES.dots_with_no_batch_dims_saveable,
        _POLICIES.save_only_these_names("grouped_swiglu", "lightning_attention"),
    ),
    "attention_out": _POLICIES.save_only_these_names("attention_out"),
}


class DecoderLayer(nn.Module):
    """One attention and one mixture of experts, each with its residual (docs/model.md, "Residuals")."""

    config: ModelConfig
    kind: str
    runtime: RuntimeConfig = RuntimeConfig()

    @nn.compact
    def __call__(self, x, shared: LayerInputs, slopes, state):
        c = self.config
        alpha, beta = c.residual_scales(self.kind)

        decoding = state is not None and x.shape[1] == 1

        attention_norm, mlp_norm = (
            RMSNorm(c.rms_norm_eps, c.param_dtype, name=name) for name in ("attention_norm", "mlp_norm")
        )

        def normed(norm, x):
            y = norm(x)
            # Without it XLA recomputes the norm in every reader, from a sum of squares that is a kernel of its own.
            return lax.optimization_barrier(y) if decoding else y

        def residual(x, r, update, alpha, beta):
            # DeepNorm: with postnorm the branch that is kept is the normed input, not x.
            return constrain(alpha * (r if c.postnorm else x) + beta * update, "batch", "length", "embed_act")

        r = normed(attention_norm, x)
        update, state = LAYER_KINDS[self.kind](c, self.runtime, r, shared, slopes, state)
        update = checkpoint_name(update, "attention_out")
        x, r, segment_ids = (at_positions(y, shared.last) for y in (x, r, shared.segment_ids))
        x = residual(x, r, update, alpha, beta)
        experts = MixtureOfExperts(c, self.runtime, name="mlp")
        if decoding and takes_norm(c, self.runtime, x):
            moe = experts(x, segment_ids, mlp_norm)
            r = moe.normed
        else:
            r = normed(mlp_norm, x)
            moe = experts(r, segment_ids)
        return residual(x, r, moe.output, *c.residual_scales("mlp")), state, moe.stats


class HybridBlock(nn.Module):
    """One repetition of the layer pattern: the body of the scan over blocks."""

    config: ModelConfig
    runtime: RuntimeConfig

    @nn.compact
    def __call__(self, carry, scanned, shared: LayerInputs):
        c, runtime = self.config, self.runtime
        x, states = carry
        index, slopes = scanned  # int32 (), float32 [P, H]
        layer_class = DecoderLayer
        if runtime.remat != "none":
            # `prevent_cse` puts barriers around the repeated layer. They are needed except where it is alone in its
            # loop: without a loop (one trip is none) XLA would merge it with the first computation and keep that; in a
            # loop of several layers it would repeat a layer before the gradient of the next one has arrived.
            alone = runtime.scan_blocks and c.num_blocks > 1 and len(c.layer_pattern) == 1
            layer_class = nn.remat(DecoderLayer, policy=_REMAT_POLICIES[runtime.remat], prevent_cse=not alone)
        stats = []
        for i, kind in enumerate(c.layer_pattern):
            name = f"layer_{i}"
            # All blocks of a scan run one program, so the last layer can leave work out only where there is one block.
            final = c.num_blocks == 1 and i == len(c.layer_pattern) - 1
            own = shared if final else shared._replace(last=None)
            state = None
            if states is not None:
                # The stacked states are part of the carry: scan inputs and outputs would be copied whole.
                state = jax.tree.map(lambda s: lax.dynamic_index_in_dim(s, index, keepdims=False), states[name])
            x, state, layer_stats = layer_class(c, kind, runtime, name=name)(x, own, slopes[i], state)
            if states is not None:
                put = functools.partial(lax.dynamic_update_index_in_dim, index=index, axis=0)
                states = {**states, name: jax.tree.map(lambda s, new, put=put: put(s, new), states[name], state)}
            stats.append(layer_stats)
        stats = jax.tree.map(lambda *s: jnp.stack(s), *stats)
        if x.shape == carry[0].shape:
            return (x, states), (stats, None)
        return (carry[0], states), (stats, x)  # picked positions, in a shape that a scan cannot carry


class VocabularyMatrix(nn.Module):
    """A [V, M] parameter: the embedding, or the head, which is not tied to it."""

    config: ModelConfig
    param_name: str

    @nn.compact
    def __call__(self):
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(c.initializer_range), ("vocab", "embed"))
        return self.param(self.param_name, init, (c.vocab_size, c.hidden_size), jnp.dtype(c.param_dtype))


class DecoderOutput(NamedTuple):
    """Result of a forward pass."""

    hidden: jax.Array  # [B, T, M] after the final norm
    logits: jax.Array | None  # float32 [B, T, V]
    state: DecodeState | None
    router: RouterStats  # leaves [L, ...]


class Decoder(nn.Module):
    """A MiniMax-Text-01 decoder of any size and layer pattern (docs/model.md)."""

    config: ModelConfig
    runtime: RuntimeConfig = RuntimeConfig()

    @nn.compact
    def __call__(
        self,
        tokens,
        segment_ids=None,
        positions=None,
        *,
        embeddings=None,
        state: DecodeState | None = None,
        last=None,
        logits=True,
    ) -> "DecoderOutput":
        """Runs the model over whole rows, or over the next tokens of the sequences in `state`.

        Args:
          tokens: int32 [B, T]; None with `embeddings`.
          segment_ids: int32 [B, T]; 0 is padding, a run of one positive id is a document. None: one document a
            row. With `state` a row is one sequence whose tokens stand at the left, and only padding is read from it.
          positions: int32 [B, T] for RoPE; None counts the tokens of each document from 0.
          embeddings: [B, T, M] in the model's dtype, in place of those of tokens: as `embed` gives them, some of them
            replaced, say, by those of an image.
          state: continue from it, each row at its own length; its slots must hold T more tokens.
          last: with `state`, int32 [B]: the last token of each row, where it alone is wanted. Hidden and
            logits are then [B, 1, ...], and the last layer leaves out what only other positions need.
          logits: False leaves the head out.
        """
        c = self.config
        table = VocabularyMatrix(c, "embedding", name="embed")()
        head = VocabularyMatrix(c, "kernel", name="lm_head")()
        x = _look_up(c, table, tokens) if embeddings is None else embeddings
        shared, state = _layer_inputs(x.shape[:2], segment_ids, positions, state)
        shared = shared._replace(last=last)
        x = constrain(x, "batch", "length", "embed_act")

        blocks = nn.scan(
            HybridBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.num_blocks,
            unroll=1 if self.runtime.scan_blocks else c.num_blocks,
            metadata_params={nn.PARTITION_NAME: "block"},
        )(c, self.runtime, name="blocks")
        slopes = decay_slopes(c.num_layers, c.num_heads).reshape(c.num_blocks, len(c.layer_pattern), c.num_heads)
        scanned = jnp.arange(c.num_blocks), jnp.asarray(slopes)
        (x, layers), (stats, picked) = blocks((x, state.layers if state is not None else None), scanned, shared)

        x = at_positions(x, last) if picked is None else picked[0]
        hidden = RMSNorm(c.rms_norm_eps, c.param_dtype, name="final_norm")(x)
        stats = jax.tree.map(lambda s: s.reshape(c.num_layers, *s.shape[2:]), stats)
        state = None if state is None else state.replace(layers=layers)
        return DecoderOutput(hidden, head_logits(hidden, head) if logits else None, state, stats)  # pyright: ignore[reportArgumentType]


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden [..., M] and head [V, M]: inputs as they are, accumulated in float32."""
    return product("...m,vm->...v", hidden, head.astype(hidden.dtype))


def embed(config: ModelConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """Embeddings [B, T, M] of tokens int32 [B, T] in the model's dtype: the first step of `Decoder`, apart."""
    return _look_up(config, params["embed"]["embedding"], tokens)


def _look_up(config, table, tokens):
    return jnp.take(table, tokens, axis=0).astype(config.dtype)


def _layer_inputs(shape, segment_ids, positions, state):
    """(LayerInputs, the state with the lengths after this pass)."""
    if state is None:
        segment_ids = None if segment_ids is None else number_segments(segment_ids)
        if positions is None:
            positions = segment_positions(jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids)
        return LayerInputs(positions, segment_ids, None), None
    token_mask = jnp.ones(shape, bool) if segment_ids is None else segment_ids > 0
    if positions is None:
        positions = state.lengths[:, None] + jnp.arange(shape[1])
    shared = LayerInputs(positions, None if segment_ids is None else token_mask.astype(jnp.int32), state.lengths)
    return shared, state.replace(lengths=state.lengths + jnp.sum(token_mask, axis=1, dtype=jnp.int32))
