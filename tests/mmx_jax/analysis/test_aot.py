"""Programs compiled for TPU topologies: memory, collectives, errors, and the plans that are held against them."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmx_jax.analysis import aot, aot_inference, aot_training, plan, targets
from mmx_jax.analysis.workload import InferenceWorkload
from mmx_jax.config import ConfigError, MeshConfig
from mmx_jax.config import io as config_io
from mmx_jax.sharding import make_mesh
from tests.support import ahead_of_time
from tests.support.paths import REPOSITORY

# Small to compile, and large enough that arrays and not the program fill the memory.
SMALL = (
    "model.num_layers=4",
    "model.layer_pattern=lightning,softmax",
    "model.hidden_size=512",
    "model.mlp_dim=1024",
    "model.vocab_size=4096",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=128",
    "model.rotary_dim=64",
    "model.num_experts=8",
    "model.dtype=bfloat16",
    "runtime.lightning_chunk=none",
    "model.max_position_embeddings=65536",
    "training.sequence_length=4096",
    "training.batch_tokens=65536",
    "training.total_tokens=65536",
    "mesh.data=1",
)

TRAINING = "runtime.remat=full", "mesh.fsdp=2", "mesh.expert=2"

INFERENCE = InferenceWorkload(dtype="bfloat16", batch=16, prompt_length=4096, context=32768, prefill_chunk=4096)


@pytest.fixture(scope="module")
def answers():
    """{program: [lines of the plan, lines of the dry run]} for four devices, and errors of meshes without a torus."""
    return ahead_of_time.answer_of(__name__, "v5e:2x2")


def peaks(lines):
    """GiB, of each program that is compiled or planned."""
    return [float(line.split()[1]) for line in lines if line.startswith("peak ")]


@pytest.mark.topology_subset
def test_a_step_compiled_for_a_topology_reports_memory_and_collectives(answers):
    text = "\n".join(answers["training"][1])
    assert "of v5e:2x2, TPU v5 lite" in text
    assert "of 15.750 GiB: fits," in text
    assert re.search(r"^(all-gather: .* per device and step|collectives unknown)", text, re.M)


@pytest.mark.topology_subset
def test_prefill_and_decoding_compiled_for_a_topology_report_memory(answers):
    lines = answers["inference"][1]
    # 2 x 2 layers x 16 rows x 2 heads x 32768 tokens x 128 in bfloat16, 2 x 16 x 4 x 128 x 128 in float32, on 4 devices
    assert "key-value caches 0.250 GiB, lightning states 0.002 GiB" in "\n".join(lines)
    assert len(peaks(lines)) == 2
    for title in ("prefill of 4096 tokens in pieces of up to 4096, 1 of them; one piece:", "decoding, one step:"):
        assert lines[lines.index(title) + 1].startswith("lowered in ")


@pytest.mark.topology_subset
@pytest.mark.parametrize("program", ["training", "inference"])
def test_the_plan_agrees_with_what_is_compiled(answers, program):
    planned, compiled_peaks = map(peaks, answers[program])
    assert len(compiled_peaks) == (2 if program == "inference" else 1)
    assert planned == pytest.approx(compiled_peaks, rel=0.15)


@pytest.mark.topology_subset
def test_a_program_that_does_not_fit_reports_its_need_and_the_limit(answers):
    (line,) = answers["too large"]
    assert line.startswith("does not fit: ") and "512.00G" in line and "15.75G" in line, line


@pytest.mark.topology_subset
def test_slices_are_joined_along_data_alone(answers):
    assert answers["slices"] == [[0, 0], [1, 1]]
    assert "mesh.data=1 does not divide over 2 slices" in answers["data"]


@pytest.mark.topology_subset
def test_a_mesh_that_no_torus_holds_is_an_error_with_the_possible_sizes(answers):
    assert "fsdp=8, expert=1, expert_tensor=1, tensor=8" in answers["torus"]
    assert "torus of 4 x 4 x 4 devices" in answers["torus"] and "sizes of 1, 4, 16, 64" in answers["torus"]


def test_a_gpu_is_not_a_topology_to_compile_for():
    with pytest.raises(ConfigError, match=r"--topology=h100 cannot be compiled for \(a GPU: .* estimate with --plan"):
        aot.topology_devices("h100")


def test_slices_of_a_topology_are_counted():
    assert aot.split_slices("v5p:8x8x16") == ("v5p:8x8x16", 1)
    assert aot.split_slices("v5p:8x8x16:2") == ("v5p:8x8x16", 2)
    assert targets.tpu_topology("v5p:8x8x16:2")[0] == 2048


def test_an_unknown_topology_is_one_error():
    with pytest.raises(ConfigError, match=r"--topology=v9z:2x2 cannot be compiled for .* a name such as v5e:4x4"):
        aot.topology_devices("v9z:2x2")


def compiled_and_planned(topology):
    base = config_io.load_config(REPOSITORY / "configs/debug.py")
    answers = {}
    config = config_io.apply_overrides(base, SMALL + TRAINING)
    answers["training"] = plan.training_lines(config, topology), aot_training.dry_run(config, topology)
    config = config_io.apply_overrides(base, (*SMALL, "mesh.fsdp=2", "mesh.tensor=2"))
    answers["inference"] = [
        lines(config, INFERENCE, topology) for lines in (plan.inference_lines, aot_inference.dry_run)
    ]
    mesh = make_mesh(MeshConfig(), aot.topology_devices(topology))
    too_large = jax.ShapeDtypeStruct((4, 2**36), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    answers["too large"] = aot.report(lambda: jax.jit(lambda x: x + 1).lower(too_large), mesh, topology, unit="sum")
    try:
        make_mesh(MeshConfig(data=1, fsdp=8, tensor=8), aot.topology_devices("v5p:4x4x4"))
    except ConfigError as error:
        answers["torus"] = str(error)
    two = aot.topology_devices("v5e:1x2:2")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), two)
    answers["slices"] = [[device.slice_index for device in part.flat] for part in mesh.devices]
    try:
        make_mesh(MeshConfig(data=1, fsdp=4), two)
    except ConfigError as error:
        answers["data"] = str(error)
    return answers


if __name__ == "__main__":
    print(json.dumps(compiled_and_planned(sys.argv[1])))
