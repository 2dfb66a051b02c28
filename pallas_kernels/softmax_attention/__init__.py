"""Causal grouped-query softmax attention, of whole rows and of new tokens over a key-value cache."""

from pallas_kernels.softmax_attention.api import (
    IMPLEMENTATIONS,
    cached_attention,
    default_implementation,
    softmax_attention,
)

__all__ = ["IMPLEMENTATIONS", "cached_attention", "default_implementation", "softmax_attention"]
