"""Memory and collectives of compiled programs, on fake devices and for TPU topologies, and plans without compiling."""

import dataclasses
import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmx_jax.analysis import aot, aot_inference, aot_training, hlo_collectives, memory_model, plan, targets
from mmx_jax.analysis.workload import InferenceWorkload
from mmx_jax.config import ConfigError, MeshConfig
from mmx_jax.config import io as config_io
from mmx_jax.models import flops
from mmx_jax.models.params import count_parameters
from mmx_jax.sharding import make_mesh
from tests.support import ahead_of_time, fake_devices
from tests.support.paths import REPOSITORY

# Small to compile, and large enough that arrays and not the program fill the memory.
SMALL = (
    "model.num_layers=4", "model.layer_pattern=lightning,softmax", "model.hidden_size=512", "model.mlp_dim=1024",
    "model.vocab_size=4096", "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=128", "model.rotary_dim=64",
    "model.num_experts=8", "model.dtype=bfloat16", "runtime.lightning_chunk=none",
    "model.max_position_embeddings=65536",
    "training.sequence_length=4096", "training.batch_tokens=65536", "training.total_tokens=65536", "mesh.data=1",
)  # fmt: skip
TRAINING = "runtime.remat=full", "mesh.fsdp=2", "mesh.expert=2"
INFERENCE = InferenceWorkload(dtype="bfloat16", batch=16, prompt_length=4096, context=32768, prefill_chunk=4096)


def _page():
    spec = importlib.util.spec_from_file_location("topologies", REPOSITORY / "benchmarks/topologies.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


topologies = _page()


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
    return hlo_collectives.collectives(text)


def test_collectives_in_loops_count_as_often_as_they_go_round():
    found = fake_devices.answer_of(__name__, count=4)
    assert found["all-reduce"] == [3, 3 * 4 * 5 * 4]
    hops, size = found["collective-permute"]
    assert hops == 21 and size in (21 * 6 * 2, 21 * 6 * 4)  # the CPU may widen bfloat16
    assert found["all-gather"] == [1, 4 * 2 * 2]


# As XLA:TPU writes them, shortened: a loop whose first round was taken out of it, a sum of which a slice is kept, and a
# sum over the network between slices.
TPU_PROGRAM = """\
%all-reduce-scatter.1 (input: f32[64,8]) -> f32[16,8] {
  %input = f32[64,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,8]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,2},{1,3}}, to_apply=%add
  ROOT %slice = f32[16,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %at, %zero), dynamic_slice_sizes={16,8}
}

%condition (carry: (s32[], f32[64,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %carry = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%carry), index=0
  ROOT %less = pred[]{:T(512)} compare(%count, %limit), direction=LT
}

%body (carry: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %fusion = f32[16,8]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %gather = f32[64,8]{1,0:T(8,128)} all-gather(%fusion), replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}
}

ENTRY %main (x: f32[64,8]) -> f32[64,8] {
  %one = s32[]{:T(128)} constant(1)
  %begin = s32[]{:T(128)} copy(%one)
  %carry = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) tuple(%begin, %x)
  %loop = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) while(%carry), condition=%condition, body=%body
  %send = (f32[4,8]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%y, %z), _xla_megascale_transfer_type="ALL_REDUCE"}
}
"""


def test_the_collectives_of_a_tpu_are_what_they_do():
    scatter, gather, between = hlo_collectives.operations(TPU_PROGRAM)
    assert scatter == ("reduce-scatter", 4, 16 * 8 * 4, 64 * 8 * 4, "f32", "{{0,2},{1,3}}")
    assert gather == ("all-gather", 4, 64 * 8 * 4, 16 * 8 * 4, "f32", "mesh['a'=2,'b'=2] {'a'}")
    assert between == ("slices-all-reduce", 1, 4 * 8 * 4, 4 * 8 * 4, "f32", "")
    assert hlo_collectives.collectives(TPU_PROGRAM)["reduce-scatter"] == (4, 4 * 16 * 8 * 4)


@pytest.fixture(scope="module")
def answers():
    """{program: [lines of the plan, lines of the dry run]} for four devices, and errors of meshes without a torus."""
    return ahead_of_time.answer_of(__name__, "v5e:2x2")


def peaks(lines):
    """GiB, of each program that is compiled or planned."""
    return [float(line.split()[1]) for line in lines if line.startswith("peak ")]


@pytest.mark.topology_subset
def test_a_step_compiled_for_a_topology_tells_memory_and_collectives(answers):
    text = "\n".join(answers["training"][1])
    assert "of v5e:2x2, TPU v5 lite" in text
    assert "of 15.750 GiB: fits," in text
    assert re.search(r"^(all-gather: .* per device and step|collectives unknown)", text, re.M)


@pytest.mark.topology_subset
def test_prefill_and_decoding_compiled_for_a_topology_tell_memory(answers):
    lines = answers["inference"][1]
    # 2 x 2 layers x 16 rows x 2 heads x 32768 slots x 128 in bfloat16, 2 x 16 x 4 x 128 x 128 in float32, on 4 devices
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
def test_a_program_that_does_not_fit_says_what_it_needs_and_what_there_is(answers):
    (line,) = answers["too large"]
    assert line.startswith("does not fit: ") and "512.00G" in line and "15.75G" in line, line


@pytest.mark.topology_subset
def test_slices_are_joined_along_data_alone(answers):
    assert answers["slices"] == [[0, 0], [1, 1]]
    assert "mesh.data=1 does not divide over 2 slices" in answers["data"]


@pytest.mark.topology_subset
def test_a_mesh_that_no_torus_holds_is_an_error_that_says_which_do(answers):
    assert "fsdp=8, expert=1, expert_tensor=1, tensor=8" in answers["torus"]
    assert "torus of 4 x 4 x 4 devices" in answers["torus"] and "sizes of 1, 4, 16, 64" in answers["torus"]


def small_1b(*overrides):
    return config_io.apply_overrides(config_io.load_config(REPOSITORY / "configs/small_1b.py"), overrides)


def planned(arguments):
    """The lines of `--plan` for the arguments of a dry run."""
    program, *words = shlex.split(arguments)
    flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
    overrides = [word for flag, word in itertools.pairwise(words) if flag == "--set"]
    config = config_io.apply_overrides(config_io.load_config(REPOSITORY / flags["config"]), overrides)
    if program == "train.py":
        return plan.training_lines(config, flags["topology"])
    lengths = {name: int(flags[name]) for name in ("batch", "prompt_length", "context", "prefill_chunk")}
    return plan.inference_lines(config, InferenceWorkload(dtype=flags["dtype"], **lengths), flags["topology"])


@pytest.mark.parametrize("name", topologies.CONFIGURATIONS)
def test_the_plan_agrees_with_the_page_of_what_fits(name):
    compiled_lines = json.loads(topologies.RESULTS.read_text())[name]["lines"]
    assert peaks(planned(topologies.CONFIGURATIONS[name][1])) == pytest.approx(peaks(compiled_lines), rel=0.15)


def test_the_plan_counts_collectives_as_the_program_for_1024_chips_has_them():
    loads = json.loads((REPOSITORY / "benchmarks/results/scaling.json").read_text())["8k"]["loads"]
    found = {load["kind"]: 0.0 for load in loads}
    for load in loads:
        found[load["kind"]] += load["bytes"] / 2**30
    lines = planned(topologies.CONFIGURATIONS["train_8k"][1])
    estimated = {kind: float(size) for line in lines for kind, size in re.findall(r"^(\S+): ([\d.]+) GiB", line)}
    assert estimated.keys() - found.keys() <= {"all-to-all"}
    assert {kind: estimated[kind] for kind in found} == pytest.approx(found, rel=0.02)


def test_a_plan_that_does_not_fit_says_by_how_much():
    overrides = "mesh.data=1", "mesh.fsdp=8", "training.batch_tokens=131072"
    assert re.search(
        r"peak .* of 15.750 GiB: does not fit, .* too much", plan.shortage(small_1b(*overrides), "v5e:2x4")
    )
    assert plan.shortage(small_1b(*overrides), "v5p:2x2x2") == ""
    assert "does not fit" in "\n".join(plan.training_lines(small_1b(*overrides), "v5e:2x4"))


def test_a_plan_tells_what_the_compiler_has_to_compute_again_to_fit():
    """The program for v5e:4x4 has 110 instructions that libtpu put in again (".remat"), and fills 14.4 of 15.75 GiB."""
    config = small_1b("mesh.data=1", "mesh.fsdp=16", "training.batch_tokens=131072")
    made, _, target = plan.training_plan(config, "v5e:4x4")
    assert made.peak == target.bytes_limit and made.recomputed > 0
    roomy, _, _ = plan.training_plan(config, "v5p:4x2x2")
    assert roomy.recomputed == 0 and roomy.peak == made.peak + made.recomputed
    assert "to fit, the compiler has to recompute" in "\n".join(plan.training_lines(config, "v5e:4x4"))


def test_a_plan_of_text_01_follows_the_shapes():
    """456,089,655,296 parameters, all of them divided over 1024 devices, but for norms and slopes."""
    config = config_io.load_config(REPOSITORY / "configs/minimax_text_01.py")
    training = dataclasses.replace(config.training, stages=())
    made, sizes, target = plan.training_plan(dataclasses.replace(config, training=training), "v5p:8x8x16")
    assert sizes["fsdp"] == 1024 and target.bytes_limit == int(95.73 * 2**30)
    assert made.memory["parameters"] == pytest.approx(456_089_655_296 * 4 / 1024, rel=0.01)
    assert made.memory["optimizer"] == pytest.approx(2 * made.memory["parameters"], rel=1e-6)
    # every layer's input: two rows of 8192 tokens in bfloat16
    assert made.memory[memory_model.SAVED_ACTIVATIONS] == 80 * 2 * 8192 * 6144 * 2


@pytest.mark.parametrize("name", ["v9z:2x2", "v5e", "v5e:4xx4"])
def test_an_unknown_topology_is_not_planned_for(name):
    with pytest.raises(ConfigError, match=rf"--topology={name} .* a name such as v5e:4x4"):
        targets.tpu_topology(name)


def test_a_large_parameter_that_no_axis_divides_is_refused():
    with pytest.raises(
        ConfigError, match=r"embed/embedding of 268 MB .* make mesh.fsdp or mesh.tensor or mesh.seq larger than 1"
    ):
        plan.training_plan(small_1b("mesh.expert=4", "mesh.data=1", "training.batch_tokens=32768"), "v5p:2x2x1")
    with pytest.raises(
        ConfigError, match=r"blocks/layer_0/mlp/down of 185 MB would lie whole on each of the 8 devices"
    ):
        plan.training_plan(small_1b("mesh.data=8", "training.batch_tokens=65536"), "v5p:2x2x2")


# Peaks that XLA compiled on one H100 with nothing recomputed by itself, GiB (jax 0.11.2); the first also on an H200.
# Some of those of benchmarks/RESULTS.md: to count the parameters of 16 layers in one block takes seconds.
BLOCK_OF_8 = "model.layer_pattern=" + ",".join(["lightning"] * 7 + ["softmax"])
MEASURED_ON_H100 = {
    (): (73.11, 78.23),
    ("runtime.remat=full", "training.batch_tokens=65536"): (102.14,),
    ("model.num_experts=1", "model.experts_per_token=1", "model.mlp_dim=8448"): (54.37,),
    ("runtime.remat=full", BLOCK_OF_8): (58.79,),
}


@pytest.mark.parametrize("overrides", MEASURED_ON_H100)
def test_the_plan_of_a_gpu_agrees_with_what_was_measured_there(overrides):
    made, sizes, _ = plan.training_plan(small_1b(*overrides), "h100")
    assert dict(sizes)["data"] == 1 and made.recomputed == 0
    for peak in MEASURED_ON_H100[overrides]:
        assert made.peak / 2**30 == pytest.approx(peak, rel=0.055)


def test_the_plan_of_a_prompt_agrees_with_a_gpu():
    workload = InferenceWorkload(dtype="bfloat16", batch=32, prompt_length=8192, context=8192, prefill_chunk=1024)
    lines = plan.inference_lines(small_1b(), workload, "h200")
    assert peaks(lines) == pytest.approx([8.33, 6.43], rel=0.08)


def test_a_plan_for_a_gpu_tells_of_the_part_of_the_card(monkeypatch):
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    remat = small_1b("runtime.remat=dots")
    text = "\n".join(plan.training_lines(remat, "h100"))
    assert "of 59.385 GiB: does not fit" in text and "a process takes 75% of the 79.180 GiB of H100" in text
    assert re.search(r"MEM_FRACTION; a fraction of 0\.8\d is enough", text) and "compiled on one H100" in text
    text = "\n".join(plan.training_lines(remat, "h200"))
    assert "of 104.851 GiB: fits" in text and "is enough" not in text
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    assert plan.shortage(remat, "h100") == ""
    large = small_1b("runtime.remat=dots", "training.batch_tokens=32768")
    assert "no fraction of one GPU is enough" in "\n".join(plan.training_lines(large, "h100"))
    sharded = plan.training_plan(small_1b("mesh.data=1", "mesh.fsdp=2", "training.batch_tokens=32768"), "h100:2")
    assert sharded[1]["fsdp"] == 2 and sharded[0].traffic["all-gather"] > 0


def test_the_device_at_hand_says_whether_the_plan_is_fitted_to_it(monkeypatch):
    assert "not fitted to a CPU" in targets.find("").notes([1])[-1]

    class Gpu:
        platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

        def memory_stats(self):
            return {"bytes_limit": 63_763_906_560}

    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()] * 2)
    target = targets.find("")
    assert (target.platform, target.count, target.bytes_limit) == ("gpu", 2, 63_763_906_560)
    assert target.gpu_bytes == pytest.approx(targets.find("h100").gpu_bytes, rel=0.001)


@pytest.mark.parametrize("name", ["h100:0", "h100:x", "a100", "h100:"])
def test_an_unknown_gpu_is_not_planned_for(name):
    with pytest.raises(ConfigError, match=rf"--topology={name} cannot be planned for: .* or h100, h200"):
        targets.find(name)


def test_a_gpu_that_is_not_there_is_not_compiled_for():
    with pytest.raises(ConfigError, match=r"--topology=h100 cannot be compiled for \(a GPU: .* estimate with --plan"):
        aot.topology_devices("h100")


def test_the_name_of_small_1b_is_not_its_size():
    model = small_1b().model
    parts = flops.forward_flops(model, 1)
    active = sum(parts[name] for name in ("attention_projections", "router", "experts")) / 2
    first = (REPOSITORY / "configs/small_1b.py").read_text().splitlines()[0]
    for number, count in zip(re.findall(r"([\d.]+) billion", first), (count_parameters(model), active), strict=True):
        assert round(count / 1e9, 2) == float(number)
    title, _ = topologies.CONFIGURATIONS["small_1b"]
    assert f"{count_parameters(model) / 1e9:.2f}B parameters, {active / 1e9:.2f}B active" in title


def test_slices_of_a_topology_are_counted():
    assert aot.split_slices("v5p:8x8x16") == ("v5p:8x8x16", 1)
    assert aot.split_slices("v5p:8x8x16:2") == ("v5p:8x8x16", 2)
    assert targets.tpu_topology("v5p:8x8x16:2")[0] == 2048


def test_an_unknown_topology_is_one_error():
    with pytest.raises(ConfigError, match=r"--topology=v9z:2x2 cannot be compiled for .* a name such as v5e:4x4"):
        aot.topology_devices("v9z:2x2")


def test_topology_without_dry_run_is_refused():
    command = [sys.executable, "train.py", "--config=configs/debug.py", "--topology=v5e:2x2"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode and "--topology needs --dry_run or --plan" in finished.stderr


def test_plans_are_printed_by_the_command_line():
    flags = ["--config=configs/small_1b.py", "--plan", "--topology=v5e:4x4", "--set=mesh.data=1", "--set=mesh.fsdp=16"]
    for program in ("train.py", "infer.py"):
        batch = ["--set=training.batch_tokens=131072"] if program == "train.py" else ["--batch=16", "--dtype=bfloat16"]
        finished = subprocess.run(
            [sys.executable, program, *flags, *batch], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stderr
        assert "memory of one device: parameters " in finished.stdout and "of 15.750 GiB: " in finished.stdout


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
    if len(sys.argv) == 1:
        print(json.dumps(counted_by_hand()))
    else:
        print(json.dumps(compiled_and_planned(sys.argv[1])))
