"""MiniMax-Text-01 models of any size in PyTorch, for transformers (written by mmx_jax, loaded beside the weights).

What a model computes, layer by layer:

    r = RMSNorm(x);  y  = alpha * (r if postnorm else x) + beta * Attention(r)
    r = RMSNorm(y);  x' = alpha * (r if postnorm else y) + beta * Experts(r)

Attention is lightning attention (linear attention with a decay for each head) or softmax attention, by layer. Experts
are SwiGLU, chosen by a softmax router, their weights renormalised. Parameters are named as in the released checkpoint.

Router, decays, lightning states and logits are float32 whatever the weights are. No factor of a decay is left out
between blocks or calls. Padding, at either side or between, leaves the results of the other tokens as they are. The
cost of lightning attention is linear in the length, in time and in memory.

Axis letters: B batch, T tokens of this call, S tokens so far, H heads, K key-value heads, D head dim, M hidden size,
R = B * T rows, E experts, C tokens of a block.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import logging

from .configuration_mmx import LIGHTNING, MiniMaxText01Config

logger = logging.get_logger(__name__)

# The argument and the output that carry the cache: "past_key_values", since transformers 5.24 "cache".
CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(MoeCausalLMOutputWithPast)} else "past_key_values"
QUERY_BLOCK = 1024  # queries that meet a mask at once in softmax attention


class MiniMaxText01Cache(Cache):
    """What decoding keeps: keys and values of softmax layers, float32 states of lightning layers, and the padding.

    A state [B, H, D, D] has the size of one token's worth whatever the length, and cannot be rolled back.
    """

    is_croppable = False
    is_compileable = False
    offloading = False

    def __init__(self, config: MiniMaxText01Config):
        self.layers = []  # of transformers' own kinds: none
        self.kinds = config.layer_kinds
        self.length = 0  # tokens so far, padding included
        self.token_mask: torch.Tensor | None = None  # bool [B, S], False at padding; None: no padding so far
        self.entries: list[tuple[torch.Tensor, ...]] = [()] * len(self.kinds)

    def __len__(self):
        return len(self.kinds)

    def append(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys and values [B, K, T, D] of a softmax layer; returns all of them, [B, K, S, D]."""
        if self.entries[layer_idx]:
            keys, values = (
                torch.cat([old, new], dim=2) for old, new in zip(self.entries[layer_idx], (keys, values), strict=True)
            )
        self.entries[layer_idx] = keys, values
        return keys, values

    def get_state(self, layer_idx: int) -> torch.Tensor | None:
        """float32 [B, H, D, D] of a lightning layer; None before its first token."""
        return self.entries[layer_idx][0] if self.entries[layer_idx] else None

    def set_state(self, layer_idx: int, state: torch.Tensor):
        self.entries[layer_idx] = (state,)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)  # of layers that know no length; here all do

    @property
    def is_initialized(self) -> bool:
        return self.length > 0

    @property
    def batch_size(self) -> int:
        return next((entry[0].shape[0] for entry in self.entries if entry), -1)

    def reset(self):
        self.length, self.token_mask, self.entries = 0, None, [()] * len(self.kinds)

    def reorder_cache(self, beam_idx: torch.Tensor):
        """Row i becomes what row `beam_idx[i]` was."""
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: torch.Tensor):
        self._map_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int):
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, *args, **kwargs):
        raise RuntimeError("lightning states cannot be rolled back: assisted decoding is not supported")

    def _map_rows(self, function):
        self.entries = [tuple(map(function, entry)) for entry in self.entries]
        if self.token_mask is not None:
            self.token_mask = function(self.token_mask)


class MiniMaxText01RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, times a learned scale."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class MiniMaxText01Float32Linear(nn.Linear):
    """A product in float32 whatever the weight, the input or autocast are: the router, and the head."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


def decay_slopes(num_layers: int, num_heads: int) -> torch.Tensor:
    """Decay rates float32 [L, H]: the ladder of ALiBi times (1 - l / (L - 1) + 1e-5), l the layer.

    A number of heads that is no power of two interleaves the next ladder, as ALiBi does.
    """

    def ladder(n):
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    power = 1 << num_heads.bit_length() - 1
    base = ladder(power) + ladder(2 * power)[0::2][: num_heads - power]
    factors = [1 - layer / max(num_layers - 1, 1) + 1e-5 for layer in range(num_layers)]
    # Rounded once, from Python's doubles. No buffer: one made on the meta device would stay empty.
    return torch.tensor([[rate * factor for rate in base] for factor in factors], dtype=torch.float32)


def lightning_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence S_t = exp(-s) S_(t-1) + k_t^T v_t, o_t = q_t S_t, block by block.

    Inside a block, o_i = sum over j <= i of exp(-s (i - j)) (q_i . k_j) v_j, and what came before it adds
    exp(-s (i + 1)) q_i S. Padding adds nothing and does not count as time.

    Args:
      q, k, v: float32 [B, H, T, D].
      slopes: float32 [H].
      state: float32 [B, H, D, D], or None for zeros.
      token_mask: bool [B, T], False at padding, or None.
      block_size: tokens of a block; any gives the same result.

    Returns:
      (float32 [B, H, T, D], the next state).
    """
    if token_mask is not None:
        v = v.masked_fill(~token_mask[:, None, :, None], 0)
    rate = slopes[None, :, None]  # [1, H, 1]
    outputs, decays, length = [], None, q.shape[2]
    for start in range(0, length, block_size):
        stop = min(start + block_size, length)
        q_block, k_block, v_block = (x[:, :, start:stop] for x in (q, k, v))
        if token_mask is not None:
            decays = _block_decays(token_mask[:, start:stop].cumsum(1).float(), rate)
        elif decays is None or decays[0].shape[-1] != stop - start:
            decays = _block_decays(torch.arange(1, stop - start + 1, device=q.device).float()[None], rate)
        within, since_begin, until_end, whole = decays
        output = (q_block @ k_block.transpose(-1, -2) * within) @ v_block
        update = (k_block * until_end).transpose(-1, -2) @ v_block
        if state is not None:
            output = output + (q_block @ state) * since_begin
            update = whole * state + update
        state = update
        outputs.append(output)
    return torch.cat(outputs, dim=2), state


def _block_decays(time: torch.Tensor, rate: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The decays of one block.

    Args:
      time: float32 [B or 1, C], tokens of the block up to each, itself included.
      rate: float32 [1, H, 1].

    Returns:
      Between two tokens [B, H, C, C], from the begin of the block [B, H, C, 1], to its end [B, H, C, 1], over all of it
      [B, H, 1, 1].
    """
    distance = (time[:, None, :, None] - time[:, None, None, :]).clamp(min=0)
    within = torch.exp(-rate[..., None] * distance).tril()
    since_begin = torch.exp(-rate * time[:, None])[..., None]
    until_end = torch.exp(-rate * (time[:, None, -1:] - time[:, None]))[..., None]
    return within, since_begin, until_end, since_begin[:, :, -1:]


class MiniMaxText01LightningAttention(nn.Module):
    """SiLU on q, k and v; decayed linear attention without positions; norm; gate."""

    def __init__(self, config: MiniMaxText01Config, layer_idx: int):
        super().__init__()
        self.layer_idx, self.block_size = layer_idx, config.block_size
        self.heads, self.dim = config.num_attention_heads, config.head_dim
        inner = self.heads * self.dim
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * inner, bias=False)
        self.output_gate = nn.Linear(config.hidden_size, inner, bias=False)
        self.norm = MiniMaxText01RMSNorm(inner, config.lightning_norm_eps)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x, shared: "LayerInputs", cache: MiniMaxText01Cache | None) -> torch.Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            qkv = F.silu(qkv.float()).to(qkv.dtype).float()
            q, k, v = qkv.view(batch, length, self.heads, 3 * self.dim).transpose(1, 2).split(self.dim, dim=-1)
            state = None if cache is None else cache.get_state(self.layer_idx)
            slopes = shared.slopes[self.layer_idx].to(x.device)
            output, state = lightning_attention(q, k, v, slopes, state, shared.tokens_on(x.device), self.block_size)
            output = self.norm(output.transpose(1, 2).reshape(batch, length, self.heads * self.dim))
        if cache is not None:
            cache.set_state(self.layer_idx, state)
        gate = self.output_gate(x)
        return self.out_proj((torch.sigmoid(gate.float()) * output).to(gate.dtype))


class MiniMaxText01Attention(nn.Module):
    """Causal softmax attention with grouped keys and values; the first `rotary_dim` dims of a head rotate."""

    def __init__(self, config: MiniMaxText01Config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, config.hidden_size, bias=False)

    def forward(self, x, shared: "LayerInputs", cache: MiniMaxText01Cache | None) -> torch.Tensor:
        batch, length, _ = x.shape
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (project(x).view(batch, length, -1, self.dim).transpose(1, 2) for project in projections)
        q, k = (apply_rotary(y, shared.cos, shared.sin) for y in (q, k))
        if cache is not None:
            k, v = cache.append(self.layer_idx, k, v)
        output = causal_attention(q, k, v, shared.keys_on(x.device))
        return self.o_proj(output.transpose(1, 2).reshape(batch, length, self.heads * self.dim))


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the leading dims of x [B, H, T, D] in float32; dim i pairs with i + n, n = cos.shape[-1]."""
    if not cos.shape[-1]:
        return x
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    first, second, cos, sin = first.float(), second.float(), cos.to(x.device), sin.to(x.device)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*(part.to(x.dtype) for part in rotated), rest], dim=-1)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of the last T of S tokens to all up to each.

    Args:
      q: [B, H, T, D]; k, v: [B, K, S, D].
      key_mask: bool [B, S], False at padding, or None.

    Returns:
      [B, H, T, D].
    """
    batch, heads, length, dim = q.shape
    kv_heads, total = k.shape[1], k.shape[2]
    if key_mask is None and length == total > 1:
        if heads != kv_heads:
            k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # Heads that share keys stand behind one another as queries, so that keys and values are not copied for each.
    groups = heads // kv_heads
    q = q.reshape(batch, kv_heads, groups, length, dim)
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        part = q[:, :, :, start : start + QUERY_BLOCK]
        count, seen = part.shape[3], total - length + min(start + QUERY_BLOCK, length)
        mask = None
        if key_mask is not None or count > 1:
            place = torch.arange(seen - count, seen, device=q.device)[:, None]
            column = torch.arange(seen, device=q.device)
            mask = (column <= place)[None]  # [1, count, seen]
            if key_mask is not None:
                # Padding sees itself: a row that may see nothing would be NaN, and spread.
                mask = mask & (key_mask[:, None, :seen] | (column == place))
            mask = mask[:, None, None].expand(-1, 1, groups, -1, -1).reshape(-1, 1, groups * count, seen)
        output = F.scaled_dot_product_attention(
            part.reshape(batch, kv_heads, groups * count, dim), k[:, :, :seen], v[:, :, :seen], attn_mask=mask
        )
        outputs.append(output.view(batch, kv_heads, groups, count, dim))
    return torch.cat(outputs, dim=3).view(batch, heads, length, dim)


class MiniMaxText01MLP(nn.Module):
    """One expert: w2(silu(w1 x) * w3 x), the activation in float32."""

    def __init__(self, config: MiniMaxText01Config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.w1(x)
        return self.w2((F.silu(gate.float()) * self.w3(x).float()).to(gate.dtype))


class MiniMaxText01SparseMoeBlock(nn.Module):
    """Every token through its `num_experts_per_tok` experts; none is dropped."""

    def __init__(self, config: MiniMaxText01Config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = MiniMaxText01Float32Linear(config.hidden_size, config.num_local_experts)
        self.experts = nn.ModuleList(MiniMaxText01MLP(config) for _ in range(config.num_local_experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ([B, T, M], router logits float32 [R, E])."""
        rows = x.reshape(-1, x.shape[-1])
        logits = self.gate(rows)
        # A stable sort: among equals the lowest index goes first.
        probability, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        weights, chosen = probability[:, : self.top_k], order[:, : self.top_k]
        weights = weights / weights.sum(-1, keepdim=True)
        output = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        for expert in chosen.unique().tolist():
            token, choice = torch.where(chosen == expert)
            update = self.experts[expert](rows[token]).float() * weights[token, choice, None]
            output = output.index_add(0, token, update)
        return output.to(x.dtype).view(x.shape), logits


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """What all layers of a forward pass share."""

    slopes: torch.Tensor  # float32 [L, H]
    cos: torch.Tensor  # float32 [B, 1, T, rotary_dim / 2]
    sin: torch.Tensor
    token_mask: torch.Tensor | None  # bool [B, T], False at padding; None: none of these tokens
    key_mask: torch.Tensor | None  # bool [B, S]; None: no padding so far

    def tokens_on(self, device) -> torch.Tensor | None:
        return None if self.token_mask is None else self.token_mask.to(device)

    def keys_on(self, device) -> torch.Tensor | None:
        return None if self.key_mask is None else self.key_mask.to(device)


class MiniMaxText01DecoderLayer(GradientCheckpointingLayer):
    """One attention and one mixture of experts, each with its residual."""

    def __init__(self, config: MiniMaxText01Config, layer_idx: int):
        super().__init__()
        kind = config.layer_kinds[layer_idx]
        attention = MiniMaxText01LightningAttention if kind == LIGHTNING else MiniMaxText01Attention
        self.self_attn = attention(config, layer_idx)
        self.block_sparse_moe = MiniMaxText01SparseMoeBlock(config)
        self.input_layernorm = MiniMaxText01RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MiniMaxText01RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.postnorm = config.postnorm
        self.attention_scales, self.mlp_scales = config.residual_scales(kind), config.residual_scales("mlp")

    def forward(self, x, shared: LayerInputs, cache: MiniMaxText01Cache | None = None):
        """Returns ([B, T, M], router logits float32 [R, E])."""
        normed = self.input_layernorm(x)
        x = self._residual(x, normed, self.self_attn(normed, shared, cache), *self.attention_scales)
        normed = self.post_attention_layernorm(x)
        update, router_logits = self.block_sparse_moe(normed)
        return self._residual(x, normed, update, *self.mlp_scales), router_logits

    def _residual(self, x, normed, update, alpha, beta):
        return alpha * (normed if self.postnorm else x) + beta * update


class MiniMaxText01PreTrainedModel(PreTrainedModel):
    """What both models share with transformers."""

    config_class = MiniMaxText01Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniMaxText01DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = ["block_sparse_moe.gate"]
    _supports_sdpa = True
    _can_compile_fullgraph = False  # which experts run is known on the host only

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, MiniMaxText01RMSNorm):
            nn.init.ones_(module.weight)


class MiniMaxText01Model(MiniMaxText01PreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: MiniMaxText01Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MiniMaxText01DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = MiniMaxText01RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: MiniMaxText01Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        cache: MiniMaxText01Cache | None = None,
        **kwargs,
    ):
        """Runs whole rows, or the next tokens of those in the cache.

        Args:
          input_ids: int [B, T]; or `inputs_embeds`: [B, T, M].
          attention_mask: [B, S] or, of these tokens alone, [B, T]: 1 at tokens, 0 at padding, which may be anywhere.
          position_ids: int [B, T], for rotation. None counts the tokens of each row.
          past_key_values, cache: two names for a cache of this class, which is extended in place.
          use_cache: makes one where none is given.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        if output_attentions or (output_attentions is None and config.output_attentions):
            raise ValueError("output_attentions is not supported: lightning attention has no matrix of weights")
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        shared = self._layer_inputs(x, attention_mask, position_ids, cache)
        hidden_states, router_logits = [x], []
        for layer in self.layers:
            x, logits = layer(x, shared=shared, cache=cache)
            if output_router_logits:
                router_logits.append(logits)
            if output_hidden_states:
                hidden_states.append(x)
        x = self.norm(x)
        output = MoeModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*hidden_states[:-1], x) if output_hidden_states else None,
            router_logits=tuple(router_logits) if output_router_logits else None,
            **{CACHE: cache},
        )
        return output if _wants_dict(config, return_dict) else output.to_tuple()

    def _cache(self, cache, use_cache):
        if cache is not None and not isinstance(cache, MiniMaxText01Cache):
            raise ValueError(
                f"a cache of class {type(cache).__name__} cannot hold lightning states: give none, or "
                f"{MiniMaxText01Cache.__name__}(model.config)"
            )
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None or use_cache:
                logger.warning_once("no cache is kept where layers are computed again for their gradients")
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return MiniMaxText01Cache(self.config) if cache is None and use_cache else cache

    def _layer_inputs(self, x, attention_mask, position_ids, cache) -> LayerInputs:
        config, (batch, length, _) = self.config, x.shape
        token_mask, key_mask = _masks(attention_mask, cache, batch, length, x.device)
        if position_ids is None:
            position_ids = _positions(token_mask, key_mask, 0 if cache is None else cache.length, length, x.device)
        elif length > 1:
            _check_not_packed(position_ids, token_mask)
        if cache is not None:
            cache.length, cache.token_mask = cache.length + length, key_mask
        half = config.rotary_dim // 2
        ladder = [config.rope_base ** (-2.0 * i / config.rotary_dim) for i in range(half)]
        angle = position_ids[:, None, :, None].float() * torch.tensor(ladder, dtype=torch.float32, device=x.device)
        slopes = decay_slopes(config.num_hidden_layers, config.num_attention_heads).to(x.device)
        return LayerInputs(slopes, angle.cos(), angle.sin(), token_mask, key_mask)


def _masks(attention_mask, cache, batch, length, device):
    """(bool [B, T] of these tokens, bool [B, S] of all so far), each None where nothing is padding."""
    past = 0 if cache is None else cache.length
    old = None if cache is None else cache.token_mask
    new = None
    if attention_mask is not None:
        if attention_mask.shape not in ((batch, length), (batch, past + length)):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; needed is one entry for each token, "
                f"{(batch, past + length)}, or for each token of this call, {(batch, length)}"
            )
        new = attention_mask[:, -length:].to(device) > 0
        if bool(new.all()):
            new = None
    if old is None and new is None:
        return None, None
    ones = torch.ones((batch, past), dtype=torch.bool, device=device) if old is None else old.to(device)
    return new, torch.cat([ones, torch.ones_like(ones[:, :1]).expand(-1, length) if new is None else new], dim=1)


def _positions(token_mask, key_mask, past, length, device):
    """int [B or 1, T]: how many tokens of its row stand before each."""
    if key_mask is None:
        return torch.arange(past, past + length, device=device)[None]
    return (key_mask.cumsum(1) - 1).clamp(min=0)[:, -length:]


def _check_not_packed(position_ids, token_mask):
    steps = position_ids[:, 1:] < position_ids[:, :-1]
    if token_mask is not None:
        steps = steps & token_mask[:, 1:] & token_mask[:, :-1]
    if bool(steps.any()):
        raise ValueError(
            "position_ids begin anew inside a row: packed documents would see each other here; give one document a row"
        )


def _wants_dict(config, return_dict):
    return config.return_dict if return_dict is None else return_dict


class MiniMaxText01ForCausalLM(MiniMaxText01PreTrainedModel, GenerationMixin):
    """The model with its head, which is not tied to the embedding. Logits are float32."""

    def __init__(self, config: MiniMaxText01Config):
        super().__init__(config)
        self.model = MiniMaxText01Model(config)
        self.lm_head = MiniMaxText01Float32Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: MiniMaxText01Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: MiniMaxText01Cache | None = None,
        **kwargs,
    ):
        """As `MiniMaxText01Model`, with the logits.

        Args:
          labels: int [B, T], -100 where there is none; the loss is that of the next token.
          output_router_logits: adds `router_aux_loss_coef` times the load-balancing loss to the loss.
          logits_to_keep: logits of so many last tokens (0: all), or of the tokens at these indices.
        """
        config = self.config
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_router_logits=output_router_logits,
            return_dict=True,
            cache=cache,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)
        if output_router_logits:
            aux_loss = load_balancing_loss(outputs.router_logits, config.num_experts_per_tok, attention_mask)
            if loss is not None:
                loss = loss + config.router_aux_loss_coef * aux_loss.to(loss.device)
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )
        return output if _wants_dict(config, return_dict) else output.to_tuple()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` would make one without lightning states

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Gives `generate` a cache of this model, so that it may read a prompt in pieces (`prefill_chunk_size`)."""
        if generation_config.use_cache is False or model_kwargs.get(CACHE) is not None:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.cache_implementation is not None:
            logger.warning_once(
                f"cache_implementation={generation_config.cache_implementation!r} is ignored: this model has its own"
            )
        model_kwargs[CACHE] = MiniMaxText01Cache(self.config)


def load_balancing_loss(router_logits, top_k: int, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """E * sum over experts of f_e * P_e, means over all layers and all tokens that are no padding.

    Args:
      router_logits: a tuple of float32 [R, E], one for each layer.
      top_k: experts of a token.
      attention_mask: [B, T], or None.

    Returns:
      float32 []; f_e is the number of assignments to e for each token, P_e the mean probability of e.
    """
    device = router_logits[0].device
    weight = None if attention_mask is None else (attention_mask.reshape(-1) > 0).float().to(device)
    assigned = probability = tokens = 0
    for logits in router_logits:
        p = logits.to(device).softmax(-1)
        chosen = p.sort(dim=-1, descending=True, stable=True)[1][:, :top_k]
        own = torch.ones(p.shape[0], device=device) if weight is None else weight
        assigned = assigned + F.one_hot(chosen, p.shape[-1]).sum(1).float().T @ own
        probability = probability + own @ p
        tokens = tokens + own.sum()
    return router_logits[0].shape[-1] * torch.sum(assigned / tokens * (probability / tokens))


__all__ = ["MiniMaxText01Cache", "MiniMaxText01ForCausalLM", "MiniMaxText01Model", "MiniMaxText01PreTrainedModel"]
