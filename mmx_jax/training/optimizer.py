"""AdamW: moments by optax, decoupled weight decay by logical name, clipping by the global norm.

The learning rate is an argument of `apply_gradients`: the schedule counts tokens and lives on the host.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmx_jax.config import TrainingConfig

# Norm gains keep their scale; every other leaf is a matrix and decays. By name, because the leaves of the
# blocks carry a stacking axis and their number of dimensions says nothing.
UNDECAYED_NAMES = ("scale", "norm")


def make_adam(training: TrainingConfig) -> optax.GradientTransformation:
    """Adam's moments in float32, whatever the parameters' dtype."""
    return optax.scale_by_adam(b1=training.adam_b1, b2=training.adam_b2, eps=training.adam_eps, mu_dtype=jnp.float32)


def init_optimizer(training: TrainingConfig, params: Any) -> Any:
    """Zero moments: ScaleByAdamState(count, mu, nu), mu and nu shaped as `params`, float32."""
    return make_adam(training).init(jax.tree.map(lambda p: p.astype(jnp.float32), params))


def decay_mask(params: Any) -> Any:
    """Tree of bools: whether weight decay applies, decided by the leaf's name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in UNDECAYED_NAMES, params)


def squared_norms(tree: Any) -> Any:
    """Tree of float32 squared norms: [N] for leaves stacked over blocks (under "blocks"), scalars elsewhere."""

    def squared_norm(path, x):
        axes = tuple(range(1, x.ndim)) if path[0].key == "blocks" else None
        return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes)

    return jax.tree_util.tree_map_with_path(squared_norm, tree)


def total_norm(squared: Any) -> jax.Array:
    """Global norm from the tree that `squared_norms` gives."""
    return jnp.sqrt(sum(jnp.sum(x) for x in jax.tree.leaves(squared)))


def apply_gradients(
    training: TrainingConfig,
    params: Any,
    opt_state: Any,
    gradients: Any,
    gradient_norm: jax.Array,
    learning_rate: jax.Array,
) -> tuple[Any, Any]:
    """One AdamW step.

    Args:
      gradients: float32 tree; `gradient_norm` its global norm, to which clipping compares.
      learning_rate: float32 scalar.

    Returns:
      (params, opt_state), the parameters in their own dtype.
    """
    if training.gradient_clip:
        factor = jnp.minimum(1.0, training.gradient_clip / jnp.maximum(gradient_norm, 1e-30))
        gradients = jax.tree.map(lambda g: g * factor, gradients)
    updates, opt_state = make_adam(training).update(gradients, opt_state)

    def updated(p, update, decays):
        p32 = p.astype(jnp.float32)
        decay = training.weight_decay * p32 if decays else 0.0
        return (p32 - learning_rate * (update + decay)).astype(p.dtype)

    return jax.tree.map(updated, params, updates, decay_mask(params)), opt_state
