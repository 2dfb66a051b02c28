"""The parameters of a decoder as a tree: random values, shapes, logical axes, shardings, counts."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmx_jax import sharding
from mmx_jax.config import ModelConfig
from mmx_jax.models.decoder import Decoder
from mmx_jax.sharding import shardings_of


def _init(config, key):
    # The length of the dummy tokens does not matter to the parameters.
    return Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32), logits=False)["params"]


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Random parameters as a plain nested dict. Run it under jit with `out_shardings` for large models."""
    return nn.unbox(_init(config, key))


@functools.cache
def _abstract_boxed(config):
    return jax.eval_shape(functools.partial(_init, config), jax.random.key(0))


def abstract_params(config: ModelConfig) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`; nothing is allocated, whatever the size."""
    return nn.unbox(_abstract_boxed(config))


def count_parameters(config: ModelConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """The parameter tree as tuples of logical axis names (`mmx_jax.sharding.RULES`)."""
    specs = nn.get_partition_spec(_abstract_boxed(config))
    return jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))


def param_shardings(config: ModelConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> dict[str, Any]:
    """The parameter tree as `NamedSharding`s on `mesh`."""
    return shardings_of(logical_axes(config), abstract_params(config), mesh)


def check_sharded(config: ModelConfig, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError for a large parameter that each of several devices would hold whole.

    Args:
      sizes: devices along each mesh axis.
    """
    sharding.check_sharded(logical_axes(config), abstract_params(config), sizes)


def bytes_of_share(config: ModelConfig, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of the parameters on one device: {"blocks", "rest"}.

    Args:
      sizes: devices along each mesh axis.
    """
    total = {"blocks": 0, "rest": 0}

    def add(path, leaf, axes):
        parts = math.prod(sizes[name] for axis in axes for name in sharding.mesh_axes(axis))
        total["blocks" if path[0].key == "blocks" else "rest"] += math.prod(leaf.shape) * leaf.dtype.itemsize // parts

    jax.tree_util.tree_map_with_path(add, abstract_params(config), logical_axes(config))
    return total
