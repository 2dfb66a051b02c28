"""Runs a small model on 8 CPU devices under several meshes and prints how far it is from one device, as JSON.

A program of its own, because the number of devices is fixed when jax starts; tests/test_sharding.py runs it.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmx_jax.config import MeshConfig, ModelConfig
from mmx_jax.models.decoder import Decoder, init_params, param_shardings
from mmx_jax.sharding import logical_to_spec, make_mesh

MESHES = {
    "data=8": dict(data=8),
    "fsdp=8": dict(data=1, fsdp=8),
    "data=2 fsdp=2 tensor=2": dict(data=2, fsdp=2, tensor=2),
    "expert_tensor=4 tensor=2": dict(data=1, expert_tensor=4, tensor=2),
    "fsdp=2 seq=4": dict(data=1, fsdp=2, seq=4),
    "data=2 expert=4": dict(data=2, expert=4),
}


def config(num_layers=4, **changes):
    return ModelConfig(
        vocab_size=64, hidden_size=32, num_layers=num_layers, layer_pattern=("lightning", "softmax"), num_heads=4,
        num_kv_heads=2, head_dim=8, rotary_dim=4, rope_theta=1e4, mlp_dim=48, num_experts=4, experts_per_token=2,
        dtype="float32", lightning_chunk=8, softmax_block=8, **changes,
    )  # fmt: skip


def gradient_function(model_config, weights):
    def objective(params, tokens, segment_ids):
        output = Decoder(model_config).apply({"params": params}, tokens, segment_ids)
        router = jnp.sum(output.router.probability * jnp.arange(4.0))
        return jnp.sum(weights * output.logits) + router, (output.logits, output.router)

    return jax.jit(jax.grad(objective, has_aux=True))


def error(got, want):
    """Largest deviation of a leaf, relative to the leaf's largest value."""

    def leaf_error(got, want):
        got, want = np.asarray(got), np.asarray(want)
        return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(leaf_error, got, want)))


def main():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (8, 20)).astype(np.int32)
    segment_ids = np.array([[0] * 3 + [1] * 9 + [2] * 8, [1] * 15 + [0] * 5] * 4, np.int32)
    weights = rng.normal(size=(8, 20, 64)).astype(np.float32) * (segment_ids > 0)[..., None]
    report = {}
    for capacity_factor, names in ((None, list(MESHES)), (0.5, ["data=2 expert=4"])):
        model_config = config(capacity_factor=capacity_factor)
        params = jax.jit(init_params, static_argnums=0)(model_config, jax.random.key(0))
        run = gradient_function(model_config, weights)
        want_gradient, (want_logits, want_router) = run(params, tokens, segment_ids)
        real = segment_ids > 0
        for name in names:
            mesh = make_mesh(MeshConfig(**MESHES[name]))
            shardings = param_shardings(model_config, mesh)
            placed = jax.device_put(params, shardings)
            rows = NamedSharding(mesh, logical_to_spec(("batch", "length")))
            with jax.set_mesh(mesh):
                gradient, (logits, router) = run(placed, *jax.device_put((tokens, segment_ids), rows))
            leaves = jax.tree.leaves(placed)
            report[name if capacity_factor is None else f"{name} with capacity"] = {
                "logits": error(np.asarray(logits)[real], np.asarray(want_logits)[real]),
                "router": error(router, want_router),
                "gradients": error(gradient, want_gradient),
                "sharded": sum(leaf.sharding.spec != P() and not leaf.is_fully_replicated for leaf in leaves),
                "rows_per_device": rows.shard_shape(tokens.shape)[0],
                "dropped": float(np.sum(router.dropped)),
            }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
