"""`--plan`: memory and communication of a configuration from formulas, in a second and without compiling."""

import dataclasses
from collections.abc import Mapping

from mmx_jax import sharding
from mmx_jax.analysis import aot, memory_model, targets, traffic_model
from mmx_jax.analysis.device_shapes import DeviceShapes
from mmx_jax.analysis.workload import InferenceWorkload, first_step
from mmx_jax.config import Config
from mmx_jax.inference import generate, inputs
from mmx_jax.models import params as model_params
from mmx_jax.models.decoder import Decoder
from mmx_jax.training import batches


@dataclasses.dataclass(frozen=True)
class Plan:
    """Estimated memory and communication of one device.

    Attributes:
      memory: bytes by purpose; their sum is the peak.
      traffic: bytes of the results of collectives, by kind.
      recomputed: bytes that are not in `memory` because the compiler recomputes them to fit.
    """

    memory: Mapping[str, int]
    traffic: Mapping[str, int]
    recomputed: int = 0

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    def lines(self, unit: str, bytes_limit: int | None) -> list[str]:
        """Lines to print.

        Args:
          unit: what runs once, such as "step".
          bytes_limit: memory of one device in bytes; None if it is not known.
        """
        parts = "; ".join(f"{name} {aot.gib(size)}" for name, size in self.memory.items())
        lines = [f"memory of one device: {parts}"]
        lines.append(f"peak {aot.gib(self.peak)}" if bytes_limit is None else aot.fit_line(self.peak, bytes_limit))
        if self.recomputed:
            lines.append(f"to fit, the compiler has to recompute {aot.gib(self.recomputed)} in the backward pass")
        return lines + [f"{kind}: {aot.gib(size)} per device and {unit}" for kind, size in self.traffic.items() if size]


def training(
    config: Config, mesh_sizes: Mapping[str, int], bytes_limit: int | None = None, *, platform: str = "tpu"
) -> Plan:
    """The plan of a training step of the first stage.

    Args:
      mesh_sizes: number of devices along each mesh axis.
      bytes_limit: memory of one device in bytes; None if it is not known. XLA:TPU fits a larger program by recomputing
        activations that are not products, and by gathering matrices again (`Plan.recomputed`).
      platform: "gpu" for programs of XLA:GPU; any other name counts as a TPU.
    """
    shapes = memory_model.training_shapes(config, mesh_sizes)
    memory = memory_model.training_memory(config, shapes, platform=platform)
    excess = 0 if bytes_limit is None else max(sum(memory.values()) - bytes_limit, 0)
    recomputes = platform != "gpu" and excess <= memory_model.recomputable_bytes(shapes)
    recomputed = excess if recomputes else 0
    memory[memory_model.SAVED_ACTIVATIONS] -= recomputed
    microbatches = first_step(config).microbatches
    return Plan(memory, traffic_model.training_traffic(shapes, microbatches), recomputed)


def inference(
    decoder: Decoder, mesh_sizes: Mapping[str, int], *, batch: int, length: int, cache_len: int, platform: str = "tpu"
) -> Plan:
    """The plan of a piece of a prompt, or of a decoding step: `length` new tokens of each of `batch` sequences.

    Args:
      decoder: of `generate.inference_decoder`.
      mesh_sizes: number of devices along each mesh axis.
      cache_len: tokens that the key-value caches hold.
      platform: "gpu" for programs of XLA:GPU; any other name counts as a TPU.
    """
    shapes = DeviceShapes(decoder.config, mesh_sizes, batch, length, decoder.runtime)
    memory = memory_model.inference_memory(shapes, cache_len, platform=platform)
    return Plan(memory, traffic_model.inference_traffic(shapes))


def training_plan(config: Config, topology: str = "") -> tuple[Plan, Mapping[str, int], targets.Target]:
    """(plan of a training step, number of devices along each mesh axis, target), with the checks of a run.

    Args:
      topology: as `targets.find` takes it.

    Raises:
      ConfigError: the topology is not known; the mesh does not divide the shapes, or leaves a large parameter whole.
    """
    target = targets.find(topology)
    mesh_sizes = sharding.mesh_sizes(config.mesh, target.count)
    mesh = sharding.abstract_mesh(mesh_sizes)
    model_params.check_sharded(config.model, mesh_sizes)
    model_params.param_shardings(config.model, mesh)
    batches.check_batches(config, mesh)
    return training(config, mesh_sizes, target.bytes_limit, platform=target.platform), mesh_sizes, target


def training_lines(config: Config, topology: str = "") -> list[str]:
    """The lines of `train.py --plan`; arguments and errors are those of `training_plan`."""
    made, mesh_sizes, target = training_plan(config, topology)
    step = first_step(config)
    return [
        f"parameters {model_params.count_parameters(config.model):,}; batch {step.rows} rows of "
        f"{step.stage.sequence_length} tokens in {step.microbatches} micro-batches; mesh {dict(mesh_sizes)}"
        + (f" of {topology}" if topology else ""),
        *made.lines("step", target.bytes_limit),
        *target.notes([made.peak]),
    ]


def shortage(config: Config, topology: str) -> str:
    """One line if the plan of the training step does not fit the topology, else ""."""
    made, _, target = training_plan(config, topology)
    if target.bytes_limit is None or made.peak <= target.bytes_limit:
        return ""
    return f"--plan expects that it does not fit: {aot.fit_line(made.peak, target.bytes_limit)}; compiling it anyway"


def inference_lines(config: Config, workload: InferenceWorkload, topology: str = "") -> list[str]:
    """The lines of `infer.py --plan`; arguments and errors are those of `aot_inference.dry_run`."""
    inputs.check_lengths(config.model, workload.prompt_length, workload.context)
    decoder = generate.inference_decoder(config.model, workload.dtype, config.runtime)
    model = decoder.config
    target = targets.find(topology)
    mesh_sizes = sharding.mesh_sizes(config.mesh, target.count)
    model_params.check_sharded(model, mesh_sizes)
    model_params.param_shardings(model, sharding.abstract_mesh(mesh_sizes))
    lines = [
        f"parameters {model_params.count_parameters(model):,} in {workload.dtype}; {workload.describe()}; mesh "
        f"{dict(mesh_sizes)}" + (f" of {topology}" if topology else "")
    ]
    peaks = []
    passes = (
        (workload.prefill_title(), "piece", max(workload.pieces)),
        ("decoding, one step:", "step", 1),
    )
    for title, unit, length in passes:
        made = inference(
            decoder,
            mesh_sizes,
            batch=workload.batch,
            length=length,
            cache_len=workload.cache_len,
            platform=target.platform,
        )
        lines += [title, *made.lines(unit, target.bytes_limit)]
        peaks.append(made.peak)
    return [*lines, *target.notes(peaks)]
