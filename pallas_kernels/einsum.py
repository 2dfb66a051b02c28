"""The product that everything in plain XLA is made of."""

import jax
import jax.numpy as jnp
from jax import lax


def product(equation: str, a: jax.Array, b: jax.Array, out_dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """An einsum with float32 accumulation; float32 operands get full float32 products on every platform."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=out_dtype)
