"""Prefill and decoding of a configuration, compiled and not run: do they fit, and what do they send?"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mmx_jax import sharding
from mmx_jax.analysis import aot
from mmx_jax.config import Config, ModelConfig
from mmx_jax.inference import generate, inputs, sampling
from mmx_jax.models import params as model_params
from mmx_jax.models.cache import LAYER_AXES, init_state


def dry_run(
    config: Config, *, dtype: str, batch: int, prompt_length: int, context: int, chunk: int, topology: str = ""
) -> list[str]:
    """Lowers and compiles what `mmx_jax.inference.generate` runs, without parameters; returns the lines to print.

    That is the largest piece of a prompt, and the loop over decoding steps, of which one step is counted. Both hold the
    state of a whole context.

    Args:
      config: its model and its mesh.
      dtype: of weights, cache and computation.
      batch: sequences.
      prompt_length: tokens of each prompt.
      context: tokens of prompt and continuation, for which there are slots.
      chunk: most tokens of a prompt in one pass.
      topology: name of a TPU topology, such as v5p:8x8x16; "": the devices at hand.

    Raises:
      ConfigError: no such topology; a mesh that does not divide the shapes, or leaves a large parameter whole.
      GenerationError: lengths that do not go together.
    """
    inputs.check_lengths(config.model, prompt_length, context)
    decoder = generate.inference_decoder(config.model, dtype, config.runtime)
    model = decoder.config
    devices = aot.topology_devices(topology) if topology else jax.devices()
    mesh = sharding.make_mesh(config.mesh, devices)
    model_params.check_sharded(model, mesh.shape)
    shardings = model_params.param_shardings(model, mesh)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model_params.abstract_params(model), shardings
    )
    pieces = list(generate.pieces(prompt_length, chunk))
    slots = generate.slots_for(prompt_length, context, chunk)
    state = abstract_state(model, mesh, batch, slots)
    caches, lightning = cache_bytes(state)
    lines = [
        f"parameters {model_params.count_parameters(model):,} in {dtype}",
        f"{batch} sequences of {slots} slots; mesh {dict(mesh.shape)}"
        + (f" of {topology}, {devices[0].device_kind}" if topology else ""),
        f"state of one device: parameters {aot.gib(aot.bytes_per_device(params))}, "
        f"key-value caches {aot.gib(caches)}, lightning states {aot.gib(lightning)}",
    ]
    bucket = max(bucket for _, _, bucket in pieces)
    prefill = functools.partial(_lower_prefill, decoder, mesh, params, state, bucket)
    decode = functools.partial(_lower_decode, decoder, mesh, params, state)
    lines.append(f"prefill of {prompt_length} tokens in pieces of up to {bucket}, {len(pieces)} of them; one piece:")
    head = aot.bytes_per_device(params["lm_head"])  # a program of its own, behind the last piece
    lines += aot.report(prefill, mesh, topology, of="piece", beside=head)
    lines.append("decoding, one step:")
    return lines + aot.report(decode, mesh, topology, of="step")


def abstract_state(config: ModelConfig, mesh, batch: int, slots: int):
    """The state of decoding as `generate.new_state` places it: jax.ShapeDtypeStruct with shardings."""
    state = jax.eval_shape(functools.partial(init_state, config, batch, slots))
    placed = jax.tree.map(lambda x: _placed(mesh, x), state)
    return placed.replace(layers=jax.tree.map(lambda x: _placed(mesh, x, LAYER_AXES), state.layers))


def cache_bytes(state) -> tuple[int, int]:
    """What one device holds of (key-value caches, lightning states)."""
    lightning = {name: layer for name, layer in state.layers.items() if isinstance(layer, jax.ShapeDtypeStruct)}
    caches = {name: layer for name, layer in state.layers.items() if name not in lightning}
    return aot.bytes_per_device(caches), aot.bytes_per_device(lightning)


def _placed(mesh, x, axes=()):
    """`x` as jit shards it under `constrain`: a dimension that the devices do not divide is whole."""
    parts = []
    for size, axis in zip(x.shape, axes, strict=False):
        names = sharding.mesh_axes(axis)
        parts.append(names if size % math.prod(mesh.shape[name] for name in names) == 0 else None)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*parts)))


def _lower_prefill(decoder, mesh, params, state, bucket):
    batch, config = state.lengths.shape[0], decoder.config
    tokens = jax.ShapeDtypeStruct((batch, bucket), jnp.int32)
    mask = jax.ShapeDtypeStruct((batch, bucket), jnp.bool)
    last = _placed(mesh, jax.ShapeDtypeStruct((batch, config.hidden_size), jnp.dtype(config.dtype)))
    return generate.prefill_piece.lower(decoder, params, tokens, mask, last, state)


def _lower_decode(decoder, mesh, params, state):
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
    stop_ids = jax.ShapeDtypeStruct((generate.power_of_two(0),), jnp.int32)
    inputs = generate.SamplingInputs(keys, sampler, stop_ids)
    return generate.decode.lower(decoder, params, carry, inputs, np.int32(1), vocab_size=config.vocab_size)
