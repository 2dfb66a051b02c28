"""Trains a small model on 8 CPU devices under several meshes and prints how far it is from one device, as JSON.

A program of its own, because the number of devices is fixed when jax starts; tests/mmx_jax/test_sharding.py runs it.
`python -m tests.support.sharded_model here` does so on the devices at hand, such as the GPUs of a host, for each axis
alone.
"""

import dataclasses
import gc
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from mmx_jax.analysis.aot import bytes_per_device
from mmx_jax.config import Config, MeshConfig, ModelConfig, RuntimeConfig, TrainingConfig
from mmx_jax.data.device_batch import batch_sharding
from mmx_jax.models.decoder import Decoder
from mmx_jax.models.params import init_params
from mmx_jax.sharding import MESH_AXES, make_mesh
from mmx_jax.training.optimizer import init_optimizer
from mmx_jax.training.train_step import abstract_state, make_train_step, state_shardings
from tests.support import sharded_experts

ROWS, LENGTH, STEPS = 8, 16, 10
# With a small epsilon the first updates would be the signs of gradients, and of rounding errors where these are 0.
EPSILON, LEARNING_RATE = 1e-2, 3e-2
ALONE = {f"{axis}=8": {axis: 8} for axis in MESH_AXES}
# 12 of the 15 pairs of axes; tests of experts and of sequences alone have fsdp with expert and tensor with seq.
TOGETHER = {
    "data=2 fsdp=2 tensor=2": dict(data=2, fsdp=2, tensor=2),
    "fsdp=2 expert_tensor=2 seq=2": dict(fsdp=2, expert_tensor=2, seq=2),
    "expert=2 expert_tensor=2 tensor=2": dict(expert=2, expert_tensor=2, tensor=2),
    "data=2 expert=2 seq=2": dict(data=2, expert=2, seq=2),
}
CAPACITY_FACTORS = {"dropless": None, "capacity": 0.5}
# A program takes long to compile, so not every mesh is in both modes; every axis is.
MESHES = {
    "dropless": ALONE | {name: TOGETHER[name] for name in ["expert=2 expert_tensor=2 tensor=2"]},
    "capacity": TOGETHER,
}
CASES = [(mode, mesh) for mode, meshes in MESHES.items() for mesh in meshes]
# The axes of a large run together, under a scan over blocks whose layers are computed again, as there.
SCANNED = {"fsdp=2 expert=2 seq=2": dict(fsdp=2, expert=2, seq=2)}
# Documents cross the borders of parts of 2, 4 and 8 tokens, and end at some; padding in front, inside and behind.
PACKED = np.array(
    [[0] * 1 + [1] * 7 + [2] * 8, [1] * 5 + [2] * 1 + [0] * 2 + [3] * 5 + [0] * 3] * (ROWS // 2), np.int32
)
SEGMENTS = {"packed": PACKED, "unpacked": np.ones_like(PACKED)}


RUNTIME = RuntimeConfig(lightning_chunk=4, softmax_block=8)


def config(num_layers=2, **changes):
    return ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=num_layers,
        layer_pattern=("lightning", "softmax"),
        num_heads=16,
        num_kv_heads=8,
        head_dim=4,
        rotary_dim=2,
        rope_theta=1e4,
        mlp_dim=48,
        num_experts=8,
        experts_per_token=2,
        dtype="float32",
        **changes,
    )


def batch_of(segment_ids):
    """A batch of the training step; the target of a token is the next one of its document."""
    tokens = np.random.default_rng(0).integers(0, 64, segment_ids.shape).astype(np.int32)
    following = np.pad(tokens, ((0, 0), (0, 1)))[:, 1:]
    goes_on = (np.pad(segment_ids, ((0, 0), (0, 1)))[:, 1:] == segment_ids) & (segment_ids > 0)
    starts = np.argmax(segment_ids[:, None] == segment_ids[..., None], axis=-1)
    return {
        "tokens": tokens,
        "targets": np.where(goes_on, following, -1).astype(np.int32),
        "segment_ids": segment_ids,
        "positions": (np.arange(LENGTH) - starts).astype(np.int32),
    }


def train(run_config, mesh, state):
    """({packing: what `STEPS` steps from `state` on give, on the host}, the program of both)."""
    shardings = state_shardings(run_config, mesh)
    step = make_train_step(run_config, mesh).__wrapped__  # jitted, it would not go into a larger program

    def logits_and_step(state, batch):
        inputs = (batch[name] for name in ("tokens", "segment_ids", "positions"))
        logits = Decoder(run_config.model, run_config.runtime).apply({"params": state["params"]}, *inputs).logits
        return logits, *step(state, batch, LEARNING_RATE)

    state = jax.device_put(state, shardings)
    batches = {name: batch_of(segment_ids) for name, segment_ids in SEGMENTS.items()}
    batches = jax.device_put(batches, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        run = jax.jit(logits_and_step, out_shardings=(None, shardings, None))
        run = run.lower(state, batches["packed"]).compile()

    def outcome(batch):
        logits, now, metrics = run(state, batch)
        first, losses = now["opt_state"].mu, [metrics["loss"]]
        for _ in range(STEPS - 1):
            _, now, later = run(now, batch)
            losses.append(later["loss"])
        losses.append(run(now, batch)[2]["loss"])
        token_mask = np.asarray(batch["segment_ids"]) > 0
        return jax.device_get(
            {
                "logits": np.asarray(logits)[token_mask],
                "metrics": metrics,
                "gradients": first,  # Adam's first moment behind one step
                "losses": jnp.stack(losses),
                "parameters": now["params"],
            }
        )

    return {name: outcome(batch) for name, batch in batches.items()}, run


def error(got, want):
    """Largest deviation of a leaf, relative to the leaf's largest value."""

    def leaf_error(got, want):
        got, want = np.asarray(got), np.asarray(want)
        return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(leaf_error, got, want)))


def report_of(model_config, meshes, runtime=RUNTIME):
    """What one device makes of a model, and how far each mesh is from it."""
    run_config = Config(
        model=model_config,
        runtime=runtime,
        training=TrainingConfig(sequence_length=LENGTH, batch_tokens=ROWS * LENGTH, adam_eps=EPSILON),
    )
    params = jax.jit(init_params, static_argnums=0)(run_config.model, jax.random.key(0))
    state = {"step": jnp.int32(0), "params": params, "opt_state": init_optimizer(run_config.training, params)}
    want, _ = train(run_config, make_mesh(MeshConfig(), jax.devices()[:1]), state)
    report = {
        "losses": {packing: outcome["losses"].tolist() for packing, outcome in want.items()},
        "drop_rates": {
            packing: outcome["metrics"]["router"]["drop_rate"].tolist() for packing, outcome in want.items()
        },
        "meshes": {},
    }
    for name, sizes in meshes.items():
        mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
        got, program = train(run_config, mesh, state)
        own = bytes_per_device(abstract_state(run_config, mesh)["params"])
        report["meshes"][name] = {
            "errors": {
                packing: {part: error(got[packing][part], outcome[part]) for part in outcome}
                for packing, outcome in want.items()
            },
            "tokens": batch_sharding(mesh).shard_shape((ROWS, LENGTH)),
            "parameters": own / sum(x.nbytes for x in jax.tree.leaves(params)),
            "gathered": sharded_experts.collectives(program.as_text()).get("all-gather", []),
        }
    return report


def main():
    gc.disable()  # tracing makes many objects that stay: looking for garbage among them is a third of its time
    report = {
        mode: report_of(config(capacity_factor=factor), MESHES[mode]) for mode, factor in CAPACITY_FACTORS.items()
    }
    report["scanned"] = report_of(config(num_layers=4), SCANNED, dataclasses.replace(RUNTIME, remat="full"))
    print(json.dumps(report))


def here():
    jax.config.update("jax_default_matmul_precision", "highest")
    count = jax.device_count()
    for mode, factor in CAPACITY_FACTORS.items():
        for axis in MESH_AXES:
            report = report_of(config(capacity_factor=factor), {axis: {axis: count}})
            print(f"{mode}, {axis}={count}: {report['meshes'][axis]['errors']}", flush=True)


if __name__ == "__main__":
    here() if sys.argv[1:] == ["here"] else main()
