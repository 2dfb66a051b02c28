"""`infer.py --dry_run`: compiles prefill and decoding of a configuration without running them."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmx_jax import sharding
from mmx_jax.analysis import aot
from mmx_jax.analysis.workload import InferenceWorkload
from mmx_jax.config import Config, ModelConfig
from mmx_jax.inference import generate, inputs, sampling
from mmx_jax.models import params as model_params
from mmx_jax.models.cache import LAYER_AXES, DecodeState, init_state
from mmx_jax.models.decoder import Decoder


def dry_run(config: Config, workload: InferenceWorkload, topology: str = "") -> list[str]:
    """Compiles the programs of `mmx_jax.inference.generate` without parameters, and returns lines to print.

    They are the largest piece of a prompt, and the loop over decoding steps, of which one step is counted. Both hold
    the caches of a whole context.

    Args:
      config: its model, mesh and runtime sections count.
      topology: name of a TPU topology, such as v5p:8x8x16; "": the devices at hand.

    Raises:
      ConfigError: the topology is not known; the mesh does not divide the shapes, or leaves a large parameter whole.
      GenerationError: the lengths contradict each other.
    """
    inputs.check_lengths(config.model, workload.prompt_length, workload.context)
    decoder = generate.inference_decoder(config.model, workload.dtype, config.runtime)
    model = decoder.config
    devices = aot.topology_devices(topology) if topology else jax.devices()
    mesh = sharding.make_mesh(config.mesh, devices)
    model_params.check_sharded(model, mesh.shape)
    params = abstract_params(model, mesh)
    state = abstract_state(model, mesh, workload.batch, workload.cache_len)
    kv_caches, lightning_states = cache_bytes(state)
    lines = [
        f"parameters {model_params.count_parameters(model):,} in {workload.dtype}",
        f"{workload.describe()}; mesh {dict(mesh.shape)}"
        + (f" of {topology}, {devices[0].device_kind}" if topology else ""),
        f"state of one device: parameters {aot.gib(aot.bytes_per_device(params))}, "
        f"key-value caches {aot.gib(kv_caches)}, lightning states {aot.gib(lightning_states)}",
    ]
    prefill = functools.partial(lower_prefill, decoder, mesh, params, state, max(workload.pieces))
    decode = functools.partial(lower_decode, decoder, mesh, params, state)
    lines.append(workload.prefill_title())
    head = aot.bytes_per_device(params["lm_head"])  # used by a separate program, after the last piece
    lines += aot.report(prefill, mesh, topology, unit="piece", other_bytes=head)
    lines.append("decoding, one step:")
    return lines + aot.report(decode, mesh, topology, unit="step")


def abstract_params(config: ModelConfig, mesh: Mesh) -> Any:
    """The parameters as `jax.ShapeDtypeStruct` with shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        model_params.abstract_params(config),
        model_params.param_shardings(config, mesh),
    )


def abstract_state(config: ModelConfig, mesh: Mesh, batch: int, cache_len: int) -> DecodeState:
    """The state of decoding as `generate.new_state` places it, as `jax.ShapeDtypeStruct` with shardings."""
    state = jax.eval_shape(functools.partial(init_state, config, batch, cache_len))
    placed = jax.tree.map(lambda x: _placed(mesh, x), state)
    return placed.replace(layers=jax.tree.map(lambda x: _placed(mesh, x, LAYER_AXES), state.layers))


def cache_bytes(state: DecodeState) -> tuple[int, int]:
    """(bytes of key-value caches, bytes of lightning states) that one device holds."""
    lightning = {name: layer for name, layer in state.layers.items() if isinstance(layer, jax.ShapeDtypeStruct)}
    caches = {name: layer for name, layer in state.layers.items() if name not in lightning}
    return aot.bytes_per_device(caches), aot.bytes_per_device(lightning)


def lower_prefill(decoder: Decoder, mesh: Mesh, params: Any, state: DecodeState, bucket: int) -> jax.stages.Lowered:
    """A piece of a prompt, lowered.

    Args:
      params: of `abstract_params`.
      state: of `abstract_state`.
      bucket: padded length of the piece in tokens.
    """
    batch, config = state.lengths.shape[0], decoder.config
    tokens = jax.ShapeDtypeStruct((batch, bucket), jnp.int32)
    mask = jax.ShapeDtypeStruct((batch, bucket), jnp.bool)
    last = _placed(mesh, jax.ShapeDtypeStruct((batch, config.hidden_size), jnp.dtype(config.dtype)))
    return generate.prefill_piece.lower(decoder, params, tokens, mask, last, state)


def lower_decode(decoder: Decoder, mesh: Mesh, params: Any, state: DecodeState) -> jax.stages.Lowered:
    """The loop over decoding steps, lowered; arguments are those of `lower_prefill`."""
    config = decoder.config
    batch = state.lengths.shape[0]
    logits = jax.ShapeDtypeStruct((batch, config.vocab_size), jnp.float32)
    carry = generate.DecodeCarry(
        state=state,
        logits=_placed(mesh, logits, ("batch", "vocab")),
        count=_placed(mesh, jax.ShapeDtypeStruct((), jnp.int32)),
        done=_placed(mesh, jax.ShapeDtypeStruct((batch,), jnp.bool)),
        seen=None,
    )
    keys = jax.eval_shape(lambda: sampling.row_keys(0, batch))
    sampler = sampling.SamplingParams().sampler()
    stop_ids: Any = jax.ShapeDtypeStruct((generate.power_of_two(0),), jnp.int32)
    sampling_inputs = generate.SamplingInputs(keys, sampler, stop_ids)
    return generate.decode.lower(decoder, params, carry, sampling_inputs, np.int32(1), vocab_size=config.vocab_size)


def _placed(mesh, x, axes=()) -> Any:
    """`x` as jit shards it under `constrain`: a dimension that the devices do not divide stays whole."""
    parts = []
    for size, axis in zip(x.shape, axes, strict=False):
        names = sharding.mesh_axes(axis)
        parts.append(names if size % math.prod(mesh.shape[name] for name in names) == 0 else None)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*parts)))
