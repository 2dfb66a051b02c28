"""Peak memory of one device from formulas, without compiling.

The sizes of arrays are exact (`device_shapes`). Two groups of arrays make the peak:

- what the forward pass saves for the backward pass: the residuals of `jax.checkpoint` and of each `custom_vjp`;
- the work of one layer, and weight gradients that wait. Both depend on the order that the compiler chooses, and are
  fitted to compiled programs, for TPUs and for GPUs separately (BUILD.md, "Plan without compiling").

Every function returns bytes of one device. Letters are those of `device_shapes`.
"""

from collections.abc import Mapping

from mmx_jax.analysis.device_shapes import ITEM_BYTES, DeviceShapes
from mmx_jax.analysis.workload import first_step
from mmx_jax.config import Config
from mmx_jax.models import params as model_params

SAVED_ACTIVATIONS = "activations saved for the backward pass"

# Machine code of one layer in bytes, measured: 24 to 43 MiB in training, 3 to 11 in inference.
_LAYER_CODE_BYTES = {"training": 32 << 20, "prefill": 10 << 20, "decoding": 4 << 20}

# XLA:GPU postpones the products for weight gradients, and keeps their operands until then. Fitted to
# benchmarks/gpu_memory.py: the fraction of the operands of all layers that is alive at the peak, and the fraction of
# the float32 gradients.
_GPU_ALIVE_OPERANDS = 0.87
_GPU_ALIVE_GRADIENTS = 0.4


# Training.


def training_shapes(config: Config, mesh_sizes: Mapping[str, int]) -> DeviceShapes:
    """The shapes of one micro-batch of the first stage."""
    step = first_step(config)
    return DeviceShapes(
        config.model, mesh_sizes, step.rows // step.microbatches, step.stage.sequence_length, config.runtime
    )


def training_memory(config: Config, shapes: DeviceShapes, *, platform: str) -> dict[str, int]:
    """Bytes by purpose at the peak of a training step of the first stage.

    Args:
      shapes: of `training_shapes`.
      platform: "gpu" for programs of XLA:GPU; any other name counts as a TPU.
    """
    model, step = config.model, first_step(config)
    parameters = model_params.bytes_of_share(model, shapes.mesh_sizes)
    gradients = {name: size * 4 // ITEM_BYTES[model.param_dtype] for name, size in parameters.items()}
    if platform == "gpu":
        saved, temporaries = _backward_peak_gpu(shapes, gradients, accumulates=step.microbatches > 1)
    else:
        saved, temporaries = _backward_peak_tpu(shapes, gradients)
    if step.microbatches > 1:  # the sum over micro-batches
        temporaries += sum(gradients.values())
    memory = {
        "parameters": sum(parameters.values()),
        "optimizer": 2 * sum(gradients.values()),
        SAVED_ACTIVATIONS: int(saved),
        "temporaries": int(temporaries),
    }
    if platform != "gpu":
        memory["code"] = _LAYER_CODE_BYTES["training"] * len(model.layer_pattern)
    return memory


def saved_activation_bytes(shapes: DeviceShapes, kind: str, remat: str) -> int:
    """Bytes that the forward pass of one layer saves for its backward pass.

    - "full": the layer's input.
    - "attention_out": the layer's input and the output of attention.
    - "dots": also every product. Lightning: q, k, v before the activation, the gate, the kernel's output. Softmax:
      q, k, v before the rotation. Experts: gate and up of every row, and the output rows.
    - "none": the input and both normalized inputs. Lightning: q, k, v before and after SiLU, output, gate, gated
      output. Softmax: q, k, v, and the output twice. Experts: received rows, gate, up, the gathered matrices, and in
      float32 the router's input and the returned rows.
    """
    model, itemsize = shapes.model, shapes.itemsize
    hidden, queries, keys = shapes.hidden * itemsize, shapes.queries * itemsize, shapes.keys * itemsize
    expert_hidden = shapes.received_rows * model.mlp_dim // shapes.mlp_shards * itemsize  # rows x F
    expert_rows = shapes.received_rows * model.hidden_size // shapes.mlp_shards * itemsize  # rows x M
    if remat == "full":
        return hidden
    if remat == "attention_out":
        return 2 * hidden
    if remat == "dots":
        attention = 5 * queries if kind == "lightning" else queries + 2 * keys
        return 2 * hidden + attention + 2 * expert_hidden + expert_rows
    attention = 9 * queries if kind == "lightning" else 3 * queries + 2 * keys
    routing = (shapes.routed_tokens * model.hidden_size + shapes.sent_elements) * ITEM_BYTES["float32"]
    if model.num_experts == 1:  # nothing is routed
        routing = 0
    return 3 * hidden + attention + 2 * expert_hidden + expert_rows + shapes.expert_weights * itemsize + routing


def recomputable_bytes(shapes: DeviceShapes) -> int:
    """Bytes of saved activations that XLA:TPU can recompute by itself: with remat="none", all but products."""
    if shapes.runtime.remat != "none":
        return 0
    return sum(
        saved_activation_bytes(shapes, kind, "none") - saved_activation_bytes(shapes, kind, "dots")
        for kind in shapes.model.layer_kinds
    )


def layer_backward_bytes(shapes: DeviceShapes, kind: str, *, in_loop: bool) -> int:
    """Bytes of the temporaries in the backward pass of one layer: recomputed activations and gradients.

    The experts hold the gradient of the received rows, and the larger of two sets: four arrays of width F (the hidden
    rows, their gradient, the gradients of gate and up), or one such array and the gradients of the matrices before
    they are summed over devices. In a loop over single layers no other layer overlaps, and compiled programs hold
    three of the four arrays.

    Args:
      in_loop: whether the layer is in a loop over blocks.
    """
    model, itemsize = shapes.model, shapes.itemsize
    saved = saved_activation_bytes(shapes, kind, shapes.runtime.remat)
    recomputed = saved_activation_bytes(shapes, kind, "none") - saved
    expert_hidden = shapes.received_rows * model.mlp_dim // shapes.mlp_shards * itemsize
    expert_rows = shapes.received_rows * model.hidden_size * itemsize
    arrays = 3 if in_loop and len(model.layer_pattern) == 1 else 4
    expert_gradients = max(arrays * expert_hidden, shapes.expert_weights * itemsize + expert_hidden)
    return recomputed + expert_gradients + expert_rows


def _expert_wgrad_operands(shapes):
    """Elements of the operands of one layer's weight gradients of experts.

    They are the hidden rows, the gradients of gate and up, the received rows, and the gradient of the output rows.
    """
    model = shapes.model
    return shapes.received_rows * (3 * model.mlp_dim // shapes.mlp_shards + 2 * model.hidden_size)


def wgrad_operand_bytes(shapes: DeviceShapes) -> int:
    """Bytes of the operands of one layer's weight gradients, which XLA:GPU keeps for later.

    Those of attention are the gradients of q, k, v, of the output, and of the gate.
    """
    return (_expert_wgrad_operands(shapes) + 6 * shapes.queries) * shapes.itemsize


def deferred_wgrad_bytes(shapes: DeviceShapes) -> int:
    """Bytes kept alive by weight gradients that XLA:TPU postpones in a scanned block.

    Where rows travel to their experts, XLA postpones these products until there is traffic to hide (seen with blocks
    of 4 and 8 layers). In attention all layers but the last two of the backward pass wait, and keep the gradients of
    q, k, v, of the output, and of the gate. In the experts one layer waits: `parallel.expert_parallel` ties the weight
    gradients to the gradient of the rows.
    """
    model = shapes.model
    waiting_layers = len(model.layer_pattern) - 2
    if shapes.expert_shards == 1 or waiting_layers <= 0:
        return 0
    return (_expert_wgrad_operands(shapes) + waiting_layers * 6 * shapes.queries) * shapes.itemsize


def _backward_peak_tpu(shapes: DeviceShapes, gradients: Mapping[str, float]) -> tuple[float, float]:
    """(bytes of saved activations, bytes of temporaries) at the peak of the backward pass.

    A single block goes through its layers from the last one: each leaves its gradients and frees what it saved. In a
    loop over blocks both are stacks that live from beginning to end, and the gradients of one block come on top.

    Args:
      gradients: bytes in float32 of "blocks" and "rest".
    """
    model = shapes.model
    in_loop = model.num_blocks > 1
    saved = [saved_activation_bytes(shapes, kind, shapes.runtime.remat) for kind in model.layer_pattern]
    work = [layer_backward_bytes(shapes, kind, in_loop=in_loop) for kind in model.layer_pattern]
    # The last hidden state and its gradient, and the gradient of the whole head in float32.
    loss = 2 * shapes.hidden * shapes.itemsize + shapes.head_weights * ITEM_BYTES["float32"]
    if in_loop:
        block_gradients = gradients["blocks"] * (1 + 1 / model.num_blocks)
        temporaries = block_gradients + loss + max(work) + deferred_wgrad_bytes(shapes)
        return model.num_blocks * sum(saved), temporaries
    per_layer, last = gradients["blocks"] / model.num_layers, model.num_layers - 1
    moments = []
    for layer in range(last + 1):
        # The gradient of the head is whole only at the last layer; then a slice of it remains.
        outside = loss if layer == last else gradients["rest"]
        moments.append((sum(saved[: layer + 1]), per_layer * (last - layer) + outside + work[layer]))
    return max(moments, key=sum)


def _backward_peak_gpu(
    shapes: DeviceShapes, gradients: Mapping[str, float], *, accumulates: bool
) -> tuple[float, float]:
    """(bytes of saved activations, bytes of temporaries) at the end of the backward pass, its peak on XLA:GPU.

    The operands of most weight gradients wait for their products. In a loop over blocks they wait within one block;
    the gradients are a stack then, and those of one block and all matrices in the dtype of computation come on top.
    Without a loop a gradient goes into its update at once, unless it is summed over micro-batches. Matrices that are
    not gathered are not saved: XLA rounds them again.

    Args:
      gradients: bytes in float32 of "blocks" and "rest".
      accumulates: whether gradients are summed over micro-batches.
    """
    model = shapes.model
    saved = model.num_blocks * sum(
        saved_activation_bytes(shapes, kind, shapes.runtime.remat) for kind in model.layer_pattern
    )
    if shapes.runtime.remat == "none" and not shapes.gathers_weights:
        saved -= model.num_layers * shapes.expert_weights * shapes.itemsize
    waiting = _GPU_ALIVE_OPERANDS * len(model.layer_pattern) * wgrad_operand_bytes(shapes)
    all_gradients = sum(gradients.values())
    if model.num_blocks > 1:
        matrices = all_gradients * shapes.itemsize / ITEM_BYTES["float32"]
        return saved, waiting + all_gradients + gradients["blocks"] / model.num_blocks + matrices
    return saved, waiting + all_gradients * (1 if accumulates else _GPU_ALIVE_GRADIENTS)


# Inference.


def inference_memory(shapes: DeviceShapes, cache_len: int, *, platform: str) -> dict[str, int]:
    """Bytes by purpose at the peak of a pass over `shapes.length` new tokens: a piece of a prompt, or a decoding step.

    Nothing is saved. The temporaries are those of one layer, in its attention or in its experts, or those of the head
    after a decoding step.

    Args:
      cache_len: tokens that the key-value caches hold.
      platform: "gpu" for programs of XLA:GPU; any other name counts as a TPU.
    """
    model, decoding = shapes.model, shapes.length == 1
    kv_caches, lightning_states = cache_bytes(shapes, cache_len)
    attention = max(attention_bytes(shapes, kind, cache_len) for kind in shapes.full_length_layers)
    if decoding:  # a step is short: the expert matrices are gathered while attention computes
        head = shapes.gathers_weights * shapes.head_weights * shapes.itemsize + 2 * shapes.logits_bytes
        temporaries = max(attention + expert_bytes(shapes), head) + relayout_bytes(shapes)
    else:
        temporaries = max(attention, expert_bytes(shapes) + cache_slice_bytes(shapes, cache_len))
    memory = {
        "parameters": sum(model_params.bytes_of_share(model, shapes.mesh_sizes).values()),
        "key-value caches": kv_caches,
        "lightning states": lightning_states,
        "temporaries": temporaries,
    }
    if platform != "gpu":
        memory["code"] = _LAYER_CODE_BYTES["decoding" if decoding else "prefill"] * len(model.layer_pattern)
    return memory


def cache_bytes(shapes: DeviceShapes, cache_len: int) -> tuple[int, int]:
    """(bytes of key-value caches, bytes of lightning states) of all layers."""
    model, shards = shapes.model, shapes.shards("heads_act")
    softmax_layers = model.layer_kinds.count("softmax")
    keys = shapes.rows * model.num_kv_heads * model.head_dim // shards
    states = shapes.rows * model.num_heads * model.head_dim**2 // shards
    lightning_states = (model.num_layers - softmax_layers) * states * ITEM_BYTES["float32"]
    return 2 * softmax_layers * keys * cache_len * shapes.itemsize, lightning_states


def attention_bytes(shapes: DeviceShapes, kind: str, cache_len: int) -> int:
    """Bytes of the temporaries of one attention layer.

    Both kinds: the tokens twice, and gathered matrices. Lightning: q, k, v before and after the activation, and the
    output. Softmax: queries, keys, values, output, two blocks of float32 scores, and `cache_slice_bytes`.
    """
    model, runtime = shapes.model, shapes.runtime
    elements = 2 * shapes.hidden + shapes.gathers_weights * shapes.attention_weights(kind)
    if kind == "lightning":
        return (elements + 7 * shapes.queries) * shapes.itemsize
    heads = model.num_heads // shapes.shards("heads_act")
    # The blocks of `softmax_attention.cached_attention`; a single token attends to the whole cache at once.
    query_block = min(shapes.length, 16 * runtime.softmax_block)
    key_block = cache_len if shapes.length == 1 else min(cache_len, runtime.softmax_block)
    scores = shapes.rows * heads * query_block * key_block
    elements += 2 * shapes.queries + 2 * shapes.keys
    score_bytes = 2 * scores * ITEM_BYTES["float32"]
    return elements * shapes.itemsize + score_bytes + cache_slice_bytes(shapes, cache_len)


def cache_slice_bytes(shapes: DeviceShapes, cache_len: int) -> int:
    """Bytes of the keys and values that a loop over blocks slices out of the stacked caches.

    Compiled programs slice the keys or values of one layer, or both; this is the mean.
    """
    softmax_layers = shapes.model.layer_kinds.count("softmax")
    if shapes.model.num_blocks == 1 or not softmax_layers:
        return 0
    return cache_bytes(shapes, cache_len)[0] * 3 // (4 * softmax_layers)


def relayout_bytes(shapes: DeviceShapes) -> int:
    """Bytes of the matrices that decoding copies to another layout before its loop over blocks.

    Products of one token want another layout. Copied are the matrices of q, k, v (lightning) and of q (softmax), if
    they are not gathered inside the loop.
    """
    model = shapes.model
    if shapes.gathers_weights or model.num_blocks == 1:
        return 0
    matrix = model.hidden_size * model.num_heads * model.head_dim // shapes.shards("heads")
    return sum(matrix * (3 if kind == "lightning" else 1) for kind in model.layer_kinds) * shapes.itemsize


def expert_bytes(shapes: DeviceShapes) -> int:
    """Bytes of the temporaries in the experts of one layer.

    They are the tokens, the matrices of gate and up if they are gathered, the received rows, and both products. Where
    several devices hold slices of an expert, each also gathers the rows of all of them, before and after sorting.
    """
    model, shards = shapes.model, shapes.mlp_shards
    matrices = shapes.gathers_weights * shapes.expert_weights * 2 // 3
    rows = shapes.received_rows * (model.hidden_size + 2 * model.mlp_dim // shards)
    if shards > 1:
        gathered = 2 * (shapes.received_rows + shapes.received_rows // shards) * model.hidden_size
        rows = max(rows, gathered)
    return (shapes.hidden + matrices + rows) * shapes.itemsize
