"""Grouped matrix products: each group of rows times its own matrix, or through its own SwiGLU expert."""

from pallas_kernels.grouped_matmul.api import (
    IMPLEMENTATIONS,
    default_implementation,
    grouped_matmul,
    grouped_swiglu,
)
from pallas_kernels.grouped_matmul.order import order_by_group

__all__ = ["IMPLEMENTATIONS", "default_implementation", "grouped_matmul", "grouped_swiglu", "order_by_group"]
