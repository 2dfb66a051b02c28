"""Shapes and constants of a decoder."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

from mmx_jax.config.base import (
    ConfigError,
    Section,
    require,
    require_choice,
    require_not_negative,
    require_positive,
    require_sizes,
)

LAYER_KINDS = ("lightning", "softmax")
BRANCHES = (*LAYER_KINDS, "mlp")  # of a layer, each with its residual
FLOAT_DTYPES = ("float32", "bfloat16")
CAPACITY_SCOPES = ("global", "local")
_MAX_LAYERS = 100_000  # the kinds of all layers are listed one by one


def shortest_period(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest pattern whose repetition gives `kinds`; `kinds` itself where there is none."""
    for period in range(1, len(kinds) + 1):
        if len(kinds) % period == 0 and kinds == kinds[:period] * (len(kinds) // period):
            return kinds[:period]
    raise ConfigError("layer_pattern is empty: name at least one layer kind")


def deepnorm_alpha(num_layers: int) -> float:
    """Residual scale of DeepNorm, (2 N)^(1/4) (arXiv 2203.00555, Table 1; section 4.2 of the report)."""
    return math.pow(2 * num_layers, 0.25)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Shapes and constants of one decoder: what is computed, not how. The defaults are those of MiniMax-Text-01.

    `layer_pattern` is repeated `num_layers / len(layer_pattern)` times; every repetition is one hybrid
    block, and the blocks are scanned. An aperiodic stack is one block of its own length.
    """

    vocab_size: int = 200064
    hidden_size: int = 6144
    num_layers: int = 80
    layer_pattern: tuple[str, ...] = ("lightning",) * 7 + ("softmax",)
    num_heads: int = 64
    num_kv_heads: int = 8
    head_dim: int = 128
    rotary_dim: int = 64  # the first `rotary_dim` of `head_dim` dims rotate, in softmax layers only
    rope_theta: float = 1e7
    max_position_embeddings: int = 10_240_000

    mlp_dim: int = 9216  # of one expert
    num_experts: int = 32  # 1 is a dense SwiGLU layer
    experts_per_token: int = 2
    capacity_factor: float | None = None  # None: dropless; else tokens over the capacity are dropped
    # On a mesh of several devices, where these drop rows by the layout of the mesh:
    capacity_scope: str = "global"  # "local": every device drops what its own tokens have too many of
    expert_buffer: float | None = None  # rows a device takes at once, times the even share; None: all that may come
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0

    postnorm: bool = True  # DeepNorm: the residual is the normed input; False is classic pre-norm
    lightning_alpha: float | None = None  # None: (2 num_layers)^(1/4) of DeepNorm with postnorm, else 1
    lightning_beta: float = 1.0
    softmax_alpha: float | None = None
    softmax_beta: float = 1.0
    mlp_alpha: float | None = None
    mlp_beta: float = 1.0
    rms_norm_eps: float = 1e-5
    lightning_norm_eps: float = 1e-6  # the output norm of lightning attention has its own

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    initializer_range: float = 0.02  # carried for the Hugging Face config; see `initializer`
    initializer: str = "deepnorm_xavier"  # Xavier, with the DeepNorm gain (8 N)^-1/4 on v, o and the MLP

    dtype: str = "bfloat16"  # activations and matmul inputs; float32 asks for full float32 products
    param_dtype: str = "float32"  # the router is float32 whatever this says

    MOVED: ClassVar[Mapping[str, str]] = {
        "scan_blocks": "runtime.scan_blocks",
        "remat": "runtime.remat",
        "lightning_implementation": "runtime.lightning_implementation",
        "lightning_chunk": "runtime.lightning_chunk",
        "softmax_implementation": "runtime.softmax_implementation",
        "softmax_block": "runtime.softmax_block",
        "moe_implementation": "runtime.moe_implementation",
        "sequence_lightning": "runtime.sequence_lightning",
        "sequence_softmax": "runtime.sequence_softmax",
        "token_groups": "runtime.token_groups",
    }

    def check(self) -> None:
        require_sizes(
            self,
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
            "num_experts",
            "experts_per_token",
            "max_position_embeddings",
        )
        require_positive(self, "rope_theta", "rms_norm_eps", "lightning_norm_eps")
        require_not_negative(self, "router_aux_loss_coef", "initializer_range")
        require(self.num_layers <= _MAX_LAYERS, f"num_layers={self.num_layers} is more than {_MAX_LAYERS:,}")
        require(bool(self.layer_pattern), "layer_pattern is empty: name at least one layer kind")
        for kind in self.layer_pattern:
            require(kind in LAYER_KINDS, f"layer_pattern holds {kind!r}; the kinds are {', '.join(LAYER_KINDS)}")
        period = len(self.layer_pattern)
        below = self.num_layers // period * period
        possible = f"{below} and {below + period} are" if below else f"{period} is"
        require(
            self.num_layers % period == 0,
            f"num_layers={self.num_layers} is not a multiple of the {period} layers of layer_pattern, {possible}; "
            "give the whole stack as the pattern if it has no period",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}",
        )
        require(
            0 <= self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0,
            f"rotary_dim={self.rotary_dim} must be even and at most head_dim={self.head_dim}",
        )
        require(
            self.experts_per_token <= self.num_experts,
            f"experts_per_token={self.experts_per_token} exceeds num_experts={self.num_experts}",
        )
        require(
            self.capacity_factor is None or self.capacity_factor > 0,
            f"capacity_factor={self.capacity_factor} must be positive, or None for dropless routing",
        )
        require(
            self.expert_buffer is None or self.expert_buffer > 0,
            f"expert_buffer={self.expert_buffer} must be positive, or None for room for all rows",
        )
        require(
            self.router_jitter_noise == 0,
            f"router_jitter_noise={self.router_jitter_noise} is not supported; the released models use 0",
        )
        require_choice(
            self,
            dtype=FLOAT_DTYPES,
            param_dtype=FLOAT_DTYPES,
            initializer=("deepnorm_xavier", "normal"),
            capacity_scope=CAPACITY_SCOPES,
        )

    @property
    def num_blocks(self) -> int:
        return self.num_layers // len(self.layer_pattern)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of every layer, by absolute index."""
        return self.layer_pattern * self.num_blocks

    def residual_scales(self, branch: str) -> tuple[float, float]:
        """(alpha, beta) of a residual; branch: a layer kind, for that of its attention, or "mlp".

        alpha scales what is kept, beta what is added. An alpha of None follows from the depth.
        """
        alpha, beta = getattr(self, f"{branch}_alpha"), getattr(self, f"{branch}_beta")
        if alpha is None:
            alpha = deepnorm_alpha(self.num_layers) if self.postnorm else 1.0
        return alpha, beta

    def resolved(self) -> "ModelConfig":
        """The same model with every alpha given: two configs that mean the same are then equal."""
        alphas = {f"{branch}_alpha": self.residual_scales(branch)[0] for branch in BRANCHES}
        return dataclasses.replace(self, **alphas)
