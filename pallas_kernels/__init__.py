"""Attention and expert kernels for TPU and GPU; needs jax alone."""
