"""Grouped matrix product: each group of rows times its own matrix."""

from pallas_kernels.grouped_matmul.api import IMPLEMENTATIONS, default_implementation, grouped_matmul

__all__ = ["IMPLEMENTATIONS", "default_implementation", "grouped_matmul"]
