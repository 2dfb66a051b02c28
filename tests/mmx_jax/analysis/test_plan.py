"""Plans without compiling, against compiled programs, and their targets."""

import dataclasses
import importlib.util
import itertools
import json
import re
import shlex

import jax
import pytest

from mmx_jax.analysis import memory_model, plan, targets
from mmx_jax.analysis.workload import InferenceWorkload
from mmx_jax.config import ConfigError
from mmx_jax.config import io as config_io
from mmx_jax.models import flops
from mmx_jax.models.params import count_parameters
from tests.support.paths import REPOSITORY


def _page():
    spec = importlib.util.spec_from_file_location("topologies", REPOSITORY / "benchmarks/topologies.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


topologies = _page()


def peaks(lines):
    """GiB, of each program that is compiled or planned."""
    return [float(line.split()[1]) for line in lines if line.startswith("peak ")]


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


def test_a_plan_reports_what_the_compiler_has_to_recompute_to_fit():
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


def test_a_plan_for_a_gpu_reports_the_memory_fraction(monkeypatch):
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


def test_small_1b_is_described_by_its_true_size():
    model = small_1b().model
    parts = flops.forward_flops(model, 1)
    active = sum(parts[name] for name in ("attention_projections", "router", "experts")) / 2
    first = (REPOSITORY / "configs/small_1b.py").read_text().splitlines()[0]
    for number, count in zip(re.findall(r"([\d.]+) billion", first), (count_parameters(model), active), strict=True):
        assert round(count / 1e9, 2) == float(number)
    title, _ = topologies.CONFIGURATIONS["small_1b"]
    assert f"{count_parameters(model) / 1e9:.2f}B parameters, {active / 1e9:.2f}B active" in title
