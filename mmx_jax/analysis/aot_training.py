"""`train.py --dry_run`: compiles the training step of a configuration without running it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmx_jax import sharding
from mmx_jax.analysis import aot
from mmx_jax.analysis.workload import first_step
from mmx_jax.config import Config
from mmx_jax.data import device_batch
from mmx_jax.models import flops
from mmx_jax.models import params as model_params
from mmx_jax.training import batches, train_step


def dry_run(config: Config, topology: str = "") -> list[str]:
    """Compiles the step of the first stage without data or parameters, and returns lines to print.

    The lines hold the number of parameters, the memory of one device, and the number of HLO operations (which must not
    depend on depth or length). With a topology, which needs no TPU, also whether the step fits, and its collectives.

    Args:
      topology: name of a TPU topology, such as v5p:8x8x16; "": the devices at hand.

    Raises:
      ConfigError: the topology is not known; the mesh does not divide the shapes, or leaves a large parameter whole.
    """
    devices = aot.topology_devices(topology) if topology else jax.devices()
    mesh = sharding.make_mesh(config.mesh, devices)
    model_params.check_sharded(config.model, mesh.shape)
    batches.check_batches(config, mesh)
    step = first_step(config)
    state = train_step.abstract_state(config, mesh)
    per_token = flops.training_flops_per_token(
        config.model, step.stage.sequence_length, chunk=config.runtime.lightning_chunk
    )
    lines = [
        f"parameters {model_params.count_parameters(config.model):,}; {per_token:.3e} training FLOPs per token",
        f"batch {step.rows} rows of {step.stage.sequence_length} tokens in {step.microbatches} micro-batches; "
        f"mesh {dict(mesh.shape)}" + (f" of {topology}, {devices[0].device_kind}" if topology else ""),
        f"state of one device: parameters {aot.gib(aot.bytes_per_device(state['params']))}, "
        f"optimizer {aot.gib(aot.bytes_per_device(state['opt_state']))}",
        *device_batch.reading_lines(config, mesh),
    ]
    return lines + aot.report(lambda: lower_step(config, mesh), mesh, topology, unit="step")


def lower_step(config: Config, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The lowered step of the first stage; call it inside `aot.compiling_for(mesh, ...)`."""
    step = first_step(config)
    batch_sharding = device_batch.batch_sharding(mesh)
    shape = (step.rows, step.stage.sequence_length)
    batch = {key: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding) for key in device_batch.BATCH_KEYS}
    step_function: Any = train_step.make_train_step(config.in_stage(step.stage_index), mesh)
    # The learning rate has the type that a run passes, so that both compile the same program.
    return step_function.lower(train_step.abstract_state(config, mesh), batch, np.float32(step.learning_rate))
