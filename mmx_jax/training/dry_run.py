"""The training step of a configuration, compiled and not run: does it fit, and what does it send?"""

import contextlib
import re
import time

import jax
import jax.numpy as jnp
import numpy as np

from mmx_jax import compiled as programs
from mmx_jax import sharding
from mmx_jax.config import Config
from mmx_jax.training import flops, loop, schedule
from mmx_jax.training import step as train_step
from mmx_jax.training.progress import format_seconds
from pallas_kernels import platform


def dry_run(config: Config, topology: str = "") -> list[str]:
    """Lowers and compiles the step of the first stage without data or parameters; returns the lines to print.

    Parameters, memory of one device and the number of HLO operations (which must not depend on depth or length). With
    a topology, which needs no TPU, also whether it fits and what goes over the links.

    Args:
      topology: name of a TPU topology, such as v5p:8x8x16; "": the devices at hand.

    Raises:
      ConfigError: no such topology; a mesh that does not divide the shapes.
    """
    devices = programs.topology_devices(topology) if topology else jax.devices()
    mesh = sharding.make_mesh(config.mesh, devices)
    loop.check_rows(config, mesh)
    plan = schedule.plan_step(config.training, 0)
    batch_sharding = train_step.batch_sharding(mesh)
    shape = (plan.rows, plan.stage.sequence_length)
    batch = {key: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding) for key in train_step.BATCH_KEYS}
    state = train_step.abstract_state(config, mesh)
    per_token = flops.training_flops_per_token(config.model, plan.stage.sequence_length)
    lines = [
        f"parameters {loop.count_parameters(config.model):,}; {per_token:.3e} training FLOPs per token",
        f"batch {plan.rows} rows of {plan.stage.sequence_length} tokens in {plan.microbatches} micro-batches; "
        f"mesh {dict(mesh.shape)}" + (f" of {topology}, {devices[0].device_kind}" if topology else ""),
        f"state of one device: parameters {_gib(programs.bytes_per_device(state['params']))}, "
        f"optimizer {_gib(programs.bytes_per_device(state['opt_state']))}",
    ]
    began = time.monotonic()
    with _compiling_for(mesh, topology):
        step_function = train_step.make_train_step(loop.stage_config(config, plan.stage.rope_theta), mesh)
        rate = np.float32(plan.learning_rate)  # as in a run, so that both compile the same program
        lowered = step_function.lower(state, batch, rate)
        lowered_at = time.monotonic()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not topology or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found = re.search(r"Used [^.]*\..*? hbm\. Exceeded hbm capacity by [\d.]+\w", str(error))
            return [*lines, f"does not fit: {found[0] if found else str(error).splitlines()[0]}"]
    operations = sum(" = " in line for line in lowered.as_text().splitlines())
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    lines += [
        f"lowered in {format_seconds(lowered_at - began)} to {operations:,} HLO operations, "
        f"compiled in {format_seconds(time.monotonic() - lowered_at)}",
        f"memory of one device: arguments {_gib(memory.argument_size_in_bytes)}, of which "
        f"{_gib(memory.alias_size_in_bytes)} are updated in place; temporaries {_gib(memory.temp_size_in_bytes)}; "
        f"outputs {_gib(memory.output_size_in_bytes)}; code {_gib(memory.generated_code_size_in_bytes)}",
    ]
    if topology:
        room = programs.device_bytes(devices[0])
        if room is not None:
            lines.append(f"peak {_gib(peak)} of {_gib(room)}: fits, {_gib(room - peak)} to spare")
        for kind, found in programs.collectives(compiled.as_text()).items():
            lines.append(f"{kind}: {found.count:,} a step and device, {_gib(found.bytes)}")
    return lines


@contextlib.contextmanager
def _compiling_for(mesh, topology):
    if not topology:
        with jax.set_mesh(mesh):
            yield
    else:
        # The devices are not there to be set: their mesh is known by its shape.
        with platform.target("tpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield


def _gib(size) -> str:
    return f"{size / 2**30:.3f} GiB"
