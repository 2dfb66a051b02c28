"""What a compiled program says of itself, on fake devices and for a TPU topology that is not there."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from mmx_jax import compiled, config_io
from mmx_jax.config import ConfigError, MeshConfig
from mmx_jax.sharding import make_mesh
from mmx_jax.training.dry_run import dry_run
from tests import ahead_of_time, fake_devices

REPOSITORY = Path(__file__).parent.parent
SMALL = (
    "model.num_layers=4", "model.layer_pattern=lightning,softmax", "model.hidden_size=256", "model.mlp_dim=256",
    "model.vocab_size=512", "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=64", "model.rotary_dim=32",
    "training.sequence_length=256", "training.batch_tokens=1024", "training.microbatch_rows=4",
    "mesh.data=1", "mesh.fsdp=4",
)  # fmt: skip


def counted_by_hand():
    """A loop of 3 with a sum of [4, 5] over 4 devices, one of 7 in it with a hop of [6] bfloat16, and a gather."""

    def on_device(x, y, z):
        def inner(y, _):
            return lax.ppermute(y, "data", [(0, 1), (1, 0)]) * 2, None

        def outer(carry, _):
            x, y = carry
            return (lax.psum(x, "data") * 0.1, lax.scan(inner, y, length=7)[0]), None

        x, y = lax.scan(outer, (x, y), length=3)[0]
        return x, y, lax.all_gather(z, "data")

    mesh = make_mesh(MeshConfig(data=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        f = jax.shard_map(on_device, in_specs=P(), out_specs=(P(), P(), P()), check_vma=False)
        arrays = jnp.zeros((4, 5)), jnp.zeros(6, jnp.bfloat16), jnp.zeros((2, 2), jnp.int8)
        text = jax.jit(f).lower(*arrays).compile().as_text()
    return compiled.collectives(text)


def test_collectives_in_loops_count_as_often_as_they_go_round():
    found = fake_devices.answer_of("tests.test_compiled", count=4)
    assert found["all-reduce"] == [3, 3 * 4 * 5 * 4]
    hops, size = found["collective-permute"]
    assert hops == 21 and size in (21 * 6 * 2, 21 * 6 * 4)  # the CPU may widen bfloat16
    assert found["all-gather"] == [1, 4 * 2 * 2]


def test_a_step_compiled_for_a_topology_tells_memory_and_collectives():
    lines = ahead_of_time.answer_of("tests.test_compiled", "v5e:2x2")
    assert "of v5e:2x2, TPU v5 lite" in lines
    assert "of 16.000 GiB: fits," in lines
    assert "all-gather: " in lines and "a step and device" in lines


def test_an_unknown_topology_is_one_error():
    with pytest.raises(ConfigError, match=r"--topology=v9z:2x2 cannot be compiled for .* a name such as v5e:4x4"):
        compiled.topology_devices("v9z:2x2")


def test_topology_without_dry_run_is_refused():
    command = [sys.executable, "train.py", "--config=configs/debug.py", "--topology=v5e:2x2"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode and "--topology is for --dry_run" in finished.stderr


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(json.dumps(counted_by_hand()))
    else:
        config = config_io.apply_overrides(config_io.load_config(REPOSITORY / "configs/debug.py"), SMALL)
        print(json.dumps("\n".join(dry_run(config, sys.argv[1]))))
