"""One of several processes that jax.distributed joins on the CPU; tests/mmx_jax/test_distributed.py starts them.

python -m tests.support.processes_worker wait --distributed=ADDRESS,COUNT,INDEX: waits for ever, all in collectives;
"fail" in place of "wait": process 1 fails instead.

python -m tests.support.processes_worker FOLDER INDEX COUNT ADDRESS TASK...: runs the tasks in order, in folders of
FOLDER, and prints a line of JSON for each. With COUNT=1 nothing is joined.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import sys
import time
import traceback

import jax
import numpy as np
import rich.console
from jax.sharding import NamedSharding, PartitionSpec

from mmx_jax import distributed, sharding
from mmx_jax.checkpoints import hf_mapping, safetensors
from mmx_jax.checkpoints import load as weights
from mmx_jax.checkpoints.orbax_slices import flatten
from mmx_jax.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MonitoringConfig,
    RuntimeConfig,
    SourceConfig,
    TrainingConfig,
)
from mmx_jax.data import device_batch
from mmx_jax.training import run as training_run
from mmx_jax.training import train_step, trainer
from tests.support.paths import FIXTURES
from tests.support.patience import HANG_SECONDS

TINY = FIXTURES / "text/tiny/hf"
MODEL = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    num_layers=1,
    layer_pattern=("lightning",),
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    rotary_dim=8,
    max_position_embeddings=4096,
    mlp_dim=32,
    num_experts=2,
    experts_per_token=1,
    router_aux_loss_coef=0.01,
    dtype="float32",
)
RUNTIME = RuntimeConfig(lightning_chunk=16, softmax_block=32, loss_chunk=64)
TRAINING = TrainingConfig(
    total_tokens=16 * 256,
    sequence_length=32,
    batch_tokens=256,
    learning_rate=1e-2,
    adam_eps=1e-3,  # so that the rounding of a gradient of about nothing stays what it is
)


def config_of_run(folder, **mesh):
    """A run on the texts of `folder`/text."""
    return Config(
        name="test",
        model=MODEL,
        mesh=MeshConfig(**mesh),
        data=DataConfig(
            sources=(SourceConfig(path=str(folder / "text")),),
            tokenizer_vocab_size=300,
            eval_fraction=0.2,
            packing_bins=4,
        ),
        runtime=RUNTIME,
        training=TRAINING,
        checkpoint=CheckpointConfig(save_every_steps=2, keep=8),
        monitoring=MonitoringConfig(eval_batches=2),
    )


def compile_once():
    """The runs of a worker share compiled functions, which are most of its time: shapes and numbers are the same."""
    made = {}

    def shared(make):
        def get(config, *mesh):
            key = make, config.model, config.mesh
            if key not in made:
                made[key] = make(config, *mesh)
            return made[key]

        return get

    train_step.make_train_step, train_step.make_eval_step = map(
        shared, (train_step.make_train_step, train_step.make_eval_step)
    )


def same(tree):
    return tree


def whole(arrays, mesh):
    """Arrays of all processes as NumPy; one program for all of them."""
    return jax.device_get(jax.jit(same, out_shardings=NamedSharding(mesh, PartitionSpec()))(arrays))


def steps(folder, index, count, *, layers=MODEL.layer_pattern, **mesh_sizes):
    """Three training steps on a global batch of which this process feeds what its devices hold."""
    model = dataclasses.replace(MODEL, num_layers=len(layers), layer_pattern=tuple(layers))
    config = Config(model=model, runtime=RUNTIME, training=TRAINING, mesh=MeshConfig(**mesh_sizes))
    mesh = sharding.make_mesh(config.mesh)
    rng = np.random.default_rng(1)
    losses, norms = [], []
    with jax.set_mesh(mesh):
        state, step = train_step.init_state(config, mesh), train_step.make_train_step(config, mesh)
        for _ in range(3):
            tokens = rng.integers(0, MODEL.vocab_size, size=(8, 32)).astype(np.int32)
            targets = np.where(rng.random(tokens.shape) < 0.8, np.roll(tokens, -1, 1), -1)
            targets[0] = -1  # so that rows, and hence processes, weigh differently
            batch = {
                "tokens": tokens,
                "targets": targets,
                "segment_ids": 1 + (np.arange(32) >= 20) + 0 * tokens,
                "positions": np.arange(32) % 20 + 0 * tokens,
            }
            own = device_batch.own_rows(mesh, len(tokens))
            batch = {key: value[own].astype(np.int32) for key, value in batch.items()}
            batch = device_batch.to_devices(batch, mesh, len(tokens))
            assert batch["tokens"].shape == tokens.shape
            state, row = step(state, batch, np.float32(1e-2))
            losses.append(float(row["loss"]))
            norms.append(float(row["gradient_norm"]))
    leaves = flatten(state["params"])
    sharded = sum(not leaf.is_fully_replicated for leaf in leaves.values())
    path = folder / f"params_{len(layers)}_{'_'.join(mesh_sizes)}_{index}_of_{count}.npz"
    np.savez(path, **whole({"/".join(name): leaf for name, leaf in leaves.items()}, mesh))
    part = batch["tokens"].addressable_data(0).shape
    return {"losses": losses, "norms": norms, "sharded": sharded, "params": str(path), "part": part}


def load(folder, index, count, **mesh_sizes):
    """The import of a safetensors folder onto a mesh; records which bytes of which tensor are looked at."""
    maps, touched = [], {}
    map_whole, copy = safetensors.TensorEntry.map, hf_mapping.copy_strips

    def map_and_note(entry):
        array = map_whole(entry)
        maps.append((array.ctypes.data, entry.name))
        touched.setdefault(entry.name, np.zeros(entry.nbytes, bool))
        return array

    def copy_and_note(destination, source):
        begin, name = maps[-1]  # a tensor is mapped and looked at once
        at = np.full(source.shape, source.ctypes.data - begin)
        for axis, (size, stride) in enumerate(zip(source.shape, source.strides, strict=True)):
            at += (np.arange(size) * stride).reshape([-1 if i == axis else 1 for i in range(source.ndim)])
        for byte in range(source.itemsize):
            touched[name][at.ravel() + byte] = True
        return copy(destination, source)

    safetensors.TensorEntry.map, hf_mapping.copy_strips = map_and_note, copy_and_note
    try:
        mesh = sharding.make_mesh(MeshConfig(**mesh_sizes))
        config, params = weights.load_params(TINY, mesh=mesh)
    finally:
        safetensors.TensorEntry.map, hf_mapping.copy_strips = map_whole, copy
    leaves = flatten(params)
    arrays = whole(leaves, mesh)
    tensors = {m.hf: m.to_hf(arrays[m.leaf][m.index]) for m in hf_mapping.expand(config)}
    stem = folder / f"load_{'_'.join(mesh_sizes)}_{index}"
    np.savez(f"{stem}_values.npz", **tensors)
    np.savez(f"{stem}_touched.npz", **touched)
    sharded = {m.hf: not leaves[m.leaf].is_fully_replicated for m in hf_mapping.expand(config)}
    return {"values": f"{stem}_values.npz", "touched": f"{stem}_touched.npz", "sharded": sharded}


def hang_before_step(number, index):
    """Process `index` waits for ever before the step of that number, in which the others wait for it."""
    take_step = trainer.Trainer._take_step

    def wait_and_step(self, plan):
        while jax.process_index() == index and self.step + 1 == number:
            time.sleep(1)
        return take_step(self, plan)

    trainer.Trainer._take_step = wait_and_step


def train(folder, index, count, *, name, steps=0, mesh, total_tokens=TRAINING.total_tokens, save_every_steps=2):
    """A whole run in `folder`/`name`; its parameters go to `folder`/`name`.npz."""
    config = config_of_run(folder, **mesh)
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, total_tokens=total_tokens),
        checkpoint=dataclasses.replace(config.checkpoint, save_every_steps=save_every_steps),
    )
    out = io.StringIO()
    console = rich.console.Console(file=out, width=200) if index == 0 else None
    batches, read = [], []  # of each, the digests of the rows that lie on all devices, and of those that were read here
    to_devices, run_steps = device_batch.to_devices, trainer.Trainer.run

    def note(batch, mesh, rows):
        arrays = to_devices(batch, mesh, rows)
        batches.append(digests(whole(arrays, mesh)))
        read.append(digests(batch))
        return arrays

    def run_and_keep(self, *arguments):
        run_steps(self, *arguments)
        params = whole({"/".join(path): leaf for path, leaf in flatten(self.state["params"]).items()}, self.mesh)
        if index == 0:
            np.savez(folder / f"{name}.npz", **params)

    device_batch.to_devices, trainer.Trainer.run = note, run_and_keep
    try:
        result = training_run.train(config, folder / name, steps=steps, console=console)
    except (ConfigError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        device_batch.to_devices, trainer.Trainer.run = to_devices, run_steps
    return dataclasses.asdict(result) | {"batches": batches, "read": read, "out": out.getvalue()}


def digests(batch):
    """Of each row of a batch, all arrays together."""
    rows = zip(*(batch[key] for key in sorted(batch)), strict=True)
    return [hashlib.sha256(b"".join(part.tobytes() for part in row)).hexdigest() for row in rows]


def rows(folder, index, count, **mesh_sizes):
    """Of a batch of eight rows, those of each process, and of this one."""
    mesh = sharding.make_mesh(MeshConfig(**mesh_sizes))
    held = {process: own.tolist() for process, own in device_batch.rows_by_process(mesh, 8).items()}
    assert held[index] == device_batch.own_rows(mesh, 8)
    return held


def wait(address, *, fails):
    distributed._LOST_SECONDS = 15
    distributed.join(address)
    with distributed.together(lambda: "do this"):
        distributed.largest(0)
        if fails and jax.process_index() == 1:
            distributed.exit_with_error("my own failure", lost=False)
        print("waits", flush=True)
        while True:
            distributed.largest(0)


TASKS = {"steps": steps, "load": load, "rows": rows, "train": train}


def main():
    folder, index, count, address, *tasks = sys.argv[1:]
    folder, index, count = pathlib.Path(folder), int(index), int(count)
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, count, index, initialization_timeout=HANG_SECONDS)
    compile_once()
    assert (jax.process_count(), jax.process_index(), len(jax.devices())) == (count, index, max(count, 2))
    for task in map(json.loads, tasks):
        print(json.dumps(TASKS[task.pop("task")](folder, index, count, **task)), flush=True)


if __name__ == "__main__":
    try:
        if sys.argv[1] in ("wait", "fail"):
            wait(sys.argv[2].partition("=")[2], fails=sys.argv[1] == "fail")
        main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an orderly exit would wait for the other processes, which wait for this one
