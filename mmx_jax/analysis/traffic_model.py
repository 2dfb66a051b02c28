"""Bytes that collectives move on one device in a step or a pass, from formulas, without compiling.

Counted are the bytes of the results of each kind of collective, as `hlo_collectives` counts those of a compiled
program. One function stands for each reason to communicate. Letters are those of `device_shapes`.
"""

import itertools
import math
import operator
from collections import Counter

from mmx_jax.analysis.device_shapes import ITEM_BYTES, DeviceShapes
from mmx_jax.parallel.mesh_group import reduce_scatter_factors

KINDS = "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"

_F32 = ITEM_BYTES["float32"]
_TPU_REGISTER = 128  # elements of a row


def training_traffic(shapes: DeviceShapes, microbatches: int) -> dict[str, int]:
    """Bytes by kind of collective in one training step.

    Args:
      shapes: of one micro-batch.
    """
    # How often the communication of a layer runs: forward, again where the layer is recomputed, and backward.
    passes = 2 if shapes.runtime.remat == "none" else 3
    parts = (
        _weight_gathers(shapes),
        _gradient_sums(shapes),
        _tensor_parallel_training(shapes, passes),
        _expert_dispatch(shapes, shapes.model.num_layers * passes),
        _expert_slices(shapes, shapes.model.num_layers * passes),
        _sequence_parallel(shapes, passes),
    )
    return _by_kind(parts, microbatches)


def inference_traffic(shapes: DeviceShapes) -> dict[str, int]:
    """Bytes by kind of collective in one forward pass."""
    layers = len(shapes.full_length_layers)
    parts = (
        _inference_weight_gathers(shapes),
        _tensor_parallel_inference(shapes, layers),
        _expert_dispatch(shapes, layers),
        _expert_slices(shapes, layers),
    )
    return _by_kind(parts, 1)


def _by_kind(parts, times):
    total = Counter()
    for part in parts:
        total.update(part)
    return {kind: total[kind] * times for kind in KINDS}


# Weights and gradients.


def _attention_weights(shapes):
    return sum(map(shapes.attention_weights, shapes.model.layer_kinds))


def _weight_gathers(shapes: DeviceShapes) -> dict[str, int]:
    """Gathers of matrices whose slices lie on several devices, in the dtype of computation.

    - all-gather: expert matrices in the forward pass, and again where layers are recomputed; attention matrices in
      both passes, and again where attention is recomputed; the head once.
    - all-to-all: rows of the embedding, whose columns are divided, and their gradient.
    """
    if not shapes.gathers_weights:
        return {}
    remat = shapes.runtime.remat
    expert_gathers = 1 if remat == "none" else 2
    attention_gathers = 3 if remat in ("full", "attention_out") else 2
    experts = shapes.expert_weights * shapes.model.num_layers
    matrices = experts * expert_gathers + _attention_weights(shapes) * attention_gathers + shapes.head_weights
    return {
        "all-gather": matrices * shapes.itemsize,
        "all-to-all": shapes.hidden * (shapes.itemsize + _F32) // shapes.mesh_sizes["tensor"],
    }


def _gradient_sums(shapes: DeviceShapes) -> dict[str, int]:
    """Sums of weight gradients over devices, in float32.

    - reduce-scatter: gradients of attention and expert matrices, and the output of the first of two steps.
    - all-reduce: gradients of embedding and head, whole. Gradients of the experts' last matrix, where a slice is
      narrower than a TPU register. Gradients of slices of which several devices hold copies.
    """
    model, slices, data = shapes.model, shapes.shards("embed"), shapes.mesh_sizes["data"]
    token_shards = shapes.shards("tokens")
    attention = _attention_weights(shapes)
    experts = shapes.expert_weights * model.num_layers
    summed = Counter()
    if slices > 1:
        # XLA sums a matrix as a whole where a slice of it is narrower than a register.
        whole = experts // 3 if model.hidden_size // slices % _TPU_REGISTER else 0
        factors = reduce_scatter_factors(slices, math.prod(shapes.mesh_sizes.values()))
        step_factors = itertools.accumulate(factors, operator.mul)
        summed["all-reduce"] += whole * _F32
        summed["reduce-scatter"] += sum((experts - whole) * _F32 // factor for factor in step_factors)
        summed["reduce-scatter"] += attention * _F32 // slices
    if token_shards > slices:
        summed["all-reduce"] += attention * _F32 // slices
    if token_shards > 1:
        summed["all-reduce"] += (1 + (token_shards > slices)) * shapes.head_weights * _F32
    if data > 1:
        summed["all-reduce"] += (experts + shapes.head_weights) * _F32 // slices
    return summed


def _inference_weight_gathers(shapes: DeviceShapes) -> dict[str, int]:
    """Gathers of all matrices once, and rows of the embedding."""
    if not shapes.gathers_weights:
        return {}
    matrices = shapes.expert_weights * shapes.model.num_layers + _attention_weights(shapes)
    matrices += shapes.head_weights if shapes.length == 1 else 0
    return {"all-gather": matrices * shapes.itemsize, "all-to-all": shapes.hidden * shapes.itemsize}


# Activations.


def _tensor_parallel_training(shapes: DeviceShapes, passes: int) -> dict[str, int]:
    """Sums over divided heads and vocabulary, and gathers of tokens that the experts had in parts.

    A layer sums the output of attention in each forward pass, and the gradient of its input. The embedding is summed
    once, and so is the gradient of the head's input.
    """
    if shapes.mesh_sizes["tensor"] == 1:
        return {}
    layers, hidden = shapes.model.num_layers, shapes.hidden
    return {
        "all-reduce": hidden * (layers * (passes + 1) + 1) * shapes.itemsize + hidden * _F32,
        "all-gather": layers * passes * hidden * shapes.itemsize,
    }


def _tensor_parallel_inference(shapes: DeviceShapes, layers: int) -> dict[str, int]:
    """Sums over divided heads and vocabulary, and gathers of tokens that the experts had in parts."""
    tensor, hidden = shapes.mesh_sizes["tensor"], shapes.hidden
    if tensor == 1:
        return {}
    traffic = {"all-gather": layers * hidden * shapes.itemsize}
    if shapes.length % tensor:
        return traffic | {"all-reduce": (layers + 1) * hidden * shapes.itemsize}
    # Each device takes a part of a row to the experts, and needs only that part of the sum over heads.
    return traffic | {
        "all-reduce": hidden * shapes.itemsize,
        "reduce-scatter": layers * hidden // tensor * shapes.itemsize,
    }


def _expert_dispatch(shapes: DeviceShapes, times: int) -> dict[str, int]:
    """Rows to their experts and back."""
    if shapes.expert_shards == 1:
        return {}
    elements = shapes.received_rows // shapes.mlp_shards * shapes.model.hidden_size + shapes.sent_elements
    return {"ragged-all-to-all": times * elements * shapes.itemsize}


def _expert_slices(shapes: DeviceShapes, times: int) -> dict[str, int]:
    """Rows to all devices that hold slices of an expert, and the sums of their outputs."""
    if shapes.mlp_shards == 1:
        return {}
    rows = shapes.received_rows * shapes.model.hidden_size * shapes.itemsize
    return {"all-gather": times * rows, "reduce-scatter": times * rows // shapes.mlp_shards}


def _sequence_parallel(shapes: DeviceShapes, passes: int) -> dict[str, int]:
    """Communication of rows that are divided over devices.

    - all-gather: lightning states.
    - collective-permute: keys and values around the ring, and in the backward pass their gradients in float32; half of
      the queries and of the outputs, and their gradients.
    """
    parts = shapes.mesh_sizes["seq"]
    if parts == 1:
        return {}
    model = shapes.model
    heads, dim = model.num_heads // shapes.shards("heads"), model.head_dim
    states = shapes.rows * heads * dim * dim * _F32 * model.layer_kinds.count("lightning")
    ring = 2 * shapes.keys * ((parts - 1) * shapes.itemsize * passes + parts * _F32)
    halves = shapes.queries * shapes.itemsize * (passes + 1)
    return {
        "all-gather": states * parts * passes,
        "collective-permute": model.layer_kinds.count("softmax") * (ring + halves),
    }
