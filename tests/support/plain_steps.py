"""What stands in for a compiled step where a run is tested and its model is not: the state, and the metrics."""

import jax
import numpy as np

from mmx_jax.training import train_step


def zeros(config, mesh):
    """In the place of `init_state`."""
    abstract = train_step.abstract_state(config, mesh)
    return jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), abstract)


def metrics_of(params, *, loss=1.0, finite=True):
    """Metrics of a step, of the names and the nesting that `make_train_step` describes."""
    scalars = dict.fromkeys(("z_loss", "aux_loss", "accuracy", "gradient_norm", "parameter_norm"), np.float32(0))
    return scalars | {
        "loss": np.float32(loss),
        "finite": finite,
        "tokens": np.float32(1),
        "router": {"max_load": np.ones(1)},
        "gradient_norms": jax.tree.map(lambda leaf: np.zeros(()), params),
    }
