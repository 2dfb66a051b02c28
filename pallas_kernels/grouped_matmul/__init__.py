"""Grouped matrix products: each group of rows times its own matrix, or through its own SwiGLU expert."""

from pallas_kernels.grouped_matmul.api import (
    IMPLEMENTATIONS,
    default_implementation,
    few_tokens_swiglu,
    grouped_matmul,
    grouped_swiglu,
    norm_and_route,
    serves_few_tokens,
    serves_norm_and_route,
)
from pallas_kernels.grouped_matmul.order import order_by_group

__all__ = [
    "IMPLEMENTATIONS",
    "default_implementation",
    "few_tokens_swiglu",
    "grouped_matmul",
    "grouped_swiglu",
    "norm_and_route",
    "order_by_group",
    "serves_few_tokens",
    "serves_norm_and_route",
]
