"""Analytic FLOPs, one multiply-add being two, and model FLOPs utilisation.

Only matrix products count; norms, softmax, rotary embedding and gates elementwise do not. Nothing here asks the
compiler: `cost_analysis` counts a scan body once and knows no kernel.
"""

import math

from mmx_jax.config import ModelConfig

_CHUNK = 256  # of lightning attention, where the runtime leaves it open

# Dense bfloat16 peak of one device, FLOP/s, by `jax.Device.device_kind` (vendors' data sheets).
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H20": 148e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    "TPU7x": 2307e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device in FLOP/s, or None for a kind that is not in the table (a CPU, say)."""
    return PEAK_FLOPS.get(device_kind)


def mfu(flops_per_second: float, device_kind: str, num_devices: int) -> float | None:
    """Model FLOPs utilisation in [0, 1]; None where the peak is unknown."""
    peak = peak_flops(device_kind)
    return None if peak is None else flops_per_second / (peak * num_devices)


def forward_flops(
    config: ModelConfig, length: int, *, chunk: int | None = None, causal: str = "half", logits: bool = True
) -> dict[str, float]:
    """FLOPs per token of a forward pass over sequences of `length` tokens, by component.

    Args:
      config: shapes; dropless routing is assumed, so every token visits `experts_per_token` experts.
      length: tokens of one sequence.
      chunk: C of lightning attention; None: 256.
      causal: "full" counts every query against every key, as the report's Table 1 does; "half" only the
        length * (length + 1) / 2 pairs that a causal kernel needs. It concerns softmax attention. Lightning
        attention is counted as its chunks execute: whole C x C tiles, the last one filled up.
      logits: whether the head is applied to every token (not so in prefill).

    Returns:
      {"attention_projections", "softmax_scores", "lightning_chunks", "router", "experts", "head"}.
    """
    pairs = {"full": float(length), "half": (length + 1) / 2}[causal]  # keys per query
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    num_softmax = config.layer_kinds.count("softmax")
    num_lightning = config.num_layers - num_softmax
    chunk = chunk or _CHUNK
    filled = math.ceil(length / chunk) * chunk / length
    # q, k, v, gate and out of a lightning layer; q, k, v and out of a softmax layer
    projections = 2 * config.hidden_size * (num_lightning * 5 * heads + num_softmax * (2 * heads + 2 * kv_heads))
    # scores and values within the chunk; query times state and the state's update
    chunks = filled * num_lightning * (4 * chunk * heads + 4 * heads * config.head_dim)
    return {
        "attention_projections": projections,
        "softmax_scores": num_softmax * 4 * pairs * heads,
        "lightning_chunks": chunks,
        "router": config.num_layers * 2 * config.hidden_size * config.num_experts,
        "experts": config.num_layers * config.experts_per_token * 6 * config.hidden_size * config.mlp_dim,
        "head": 2 * config.hidden_size * config.vocab_size if logits else 0,
    }


def training_flops_per_token(
    config: ModelConfig, length: int, *, chunk: int | None = None, causal: str = "half"
) -> float:
    """FLOPs per token of forward and backward: three forward passes; what remat repeats is not counted."""
    return 3 * sum(forward_flops(config, length, chunk=chunk, causal=causal).values())


def report_parameters(kind: str, *, layers: int, width: int, heads: int) -> float:
    """Non-embedding parameters by Table 1 of the report; kind: softmax, lightning or hybrid."""
    extra = {"softmax": 0.0, "lightning": 2.0, "hybrid": 7 / 4}[kind]  # the low-rank output gate
    return layers * width**2 * (12 + extra / heads)


def report_training_flops(kind: str, *, layers: int, width: int, heads: int, batch: int, length: int) -> float:
    """Training FLOPs of one step by Table 1 of the report: full causal square, SwiGLU of width 8 d / 3.

    Args:
      kind: "softmax", "lightning" or "hybrid" (one softmax layer in eight).
      width: d; heads: h; batch: b sequences of `length` n tokens.
    """
    mixer = {
        "softmax": length / (6 * width),
        "lightning": 1 / (2 * heads),
        "hybrid": length / (48 * width) + 7 / (16 * heads),
    }[kind]
    return 72 * batch * length * layers * width**2 * (1 + mixer + 5 / (18 * width))
