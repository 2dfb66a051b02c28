"""The activation between the products of an expert, silu(gate) * up, in float32."""

import jax
import jax.numpy as jnp


def activate(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, in the dtype of `gate`."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def activate_backward(gate: jax.Array, up: jax.Array, d_hidden: jax.Array) -> tuple[jax.Array, ...]:
    """(activate(gate, up), gradient to gate, gradient to up), in the dtype of `gate`."""
    dtype = gate.dtype
    gate, up, d_hidden = (x.astype(jnp.float32) for x in (gate, up, d_hidden))
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = d_hidden * up * (sigmoid + silu * (1 - sigmoid))
    return tuple(x.astype(dtype) for x in (silu * up, d_gate, d_hidden * silu))
