"""The activation between the products of an expert, silu(gate) * up, in float32."""

import jax
import jax.numpy as jnp


def activate(gate, up):
    """silu(gate) * up, in the dtype of `gate`."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def activate_backward(gate, up, d_hidden):
    """(activate(gate, up), gradient to gate, gradient to up)."""
    hidden, vjp = jax.vjp(activate, gate, up)
    return hidden, *vjp(d_hidden)
