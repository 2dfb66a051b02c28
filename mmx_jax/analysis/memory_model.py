"""What a run takes, from formulas in a second: memory of one device, and bytes over its links. Nothing is compiled.

Sizes of arrays follow from the shapes, the mesh and the rules of `mmx_jax.sharding`. Which of them are alive together
follows from the programs: what the backward pass keeps is what `jax.checkpoint` and the `custom_vjp`s save, listed
below; what is alive beside it is the work of one layer. The latter depends on the order that the compiler finds, and
is fitted to compiled programs, for TPUs and for GPUs apart (BUILD.md, "Plan without compiling").

Letters are those of the house style: T tokens, M hidden size, H heads, K key-value heads, D head_dim, F width of an
expert, E experts, V vocabulary; all numbers are those of one device.
"""

import dataclasses
import itertools
import math
import operator
import os
import re
from collections.abc import Mapping

import jax

from mmx_jax import sharding
from mmx_jax.analysis import aot
from mmx_jax.config import Config, ConfigError, ModelConfig, RuntimeConfig
from mmx_jax.inference import generate, inputs
from mmx_jax.layers.moe import expert_capacity
from mmx_jax.models import params as model_params
from mmx_jax.models.decoder import Decoder
from mmx_jax.parallel.expert_parallel import token_axes
from mmx_jax.parallel.mesh_group import reduce_scatter_factors
from mmx_jax.parallel.token_dispatch import BUFFER_ALIGNMENT
from mmx_jax.training import batches, schedule
from pallas_kernels.platform import cdiv

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
# Machine code of one layer as it stands in a program; nothing but measured (24 to 43 MiB in training, 3 to 11 else).
CODE_OF_LAYER = {"training": 32 << 20, "prefill": 10 << 20, "decoding": 4 << 20}
# Devices of a chip, and the device kind, by the first part of the name of a TPU topology.
_CHIPS = {"v5e": (1, "TPU v5 lite"), "v5p": (1, "TPU v5"), "v6e": (1, "TPU v6 lite"), "tpu7x": (2, "TPU7x")}

# Memory of a card, bytes: `bytes_limit` over the fraction of it that was in force.
_CARDS = {"h100": 85_018_542_080, "h200": 150_109_880_320}
# Of XLA:GPU, which lets the products for gradients of matrices wait and keeps their factors: the part of the factors of
# all layers that is there at the worst moment, and of the gradients in float32. Fitted to benchmarks/gpu_memory.py.
_GPU_POSTPONED = 0.87
_GPU_GRADIENTS = 0.4

_NOT_FORESEEN = (
    "Not foreseen: the order of the compiler's work, the size of the code (a constant for a layer), a collective that "
    "is replaced by another kind or runs in pieces, what a ring of keys and values holds on its way"
)
_FITTED = {
    "tpu": "from formulas, fitted to --dry_run on TPU topologies: peak memory within 15 % of it in the programs tried "
    f"(BUILD.md). {_NOT_FORESEEN}",
    "gpu": "from formulas, fitted to 18 programs of configs/small_1b.py and its variants, compiled on one H100 and one "
    "H200 (benchmarks/gpu_memory.py): peak memory within 6 % in training and 8 % in inference. No other GPU was "
    "measured, nor several together. Not foreseen: what XLA computes again by itself to stay within the memory, which "
    "is not always enough",
    "cpu": "no accelerator is at hand, and the formulas are not fitted to a CPU: these are those of a TPU; name what "
    "is meant with --topology=h100, h200:2, v5p:2x2x1 and the like",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one device holds and sends.

    Attributes:
      memory: bytes by what they are for; together they are the peak.
      traffic: bytes of the results of collectives, by kind.
      spared: bytes that are not in `memory` because the compiler computes them again to fit.
    """

    memory: Mapping[str, int]
    traffic: Mapping[str, int]
    spared: int = 0

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    def lines(self, of: str, room: int | None) -> list[str]:
        """To print. of: what is done once, such as "step"; room: bytes of one device, None if they are not known."""
        parts = "; ".join(f"{name} {aot.gib(size)}" for name, size in self.memory.items())
        lines = [f"memory of one device: {parts}"]
        lines.append(f"peak {aot.gib(self.peak)}" if room is None else aot.fits(self.peak, room))
        if self.spared:
            lines.append(f"to fit, the compiler has to compute {aot.gib(self.spared)} again in the backward pass")
        return lines + [f"{kind}: {aot.gib(size)} a {of} and device" for kind, size in self.traffic.items() if size]


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that a plan is for.

    Attributes:
      platform: "tpu", "gpu" or "cpu".
      name: for messages.
      count: devices.
      room: bytes of one that a program may use; None if they are not known.
      card: bytes of one GPU, of which a process takes a part; None elsewhere.
    """

    platform: str
    name: str
    count: int
    room: int | None
    card: int | None = None

    def remarks(self, peaks: list[int]) -> list[str]:
        """What the user can do about the room of a GPU, and what the formulas are fitted to."""
        lines = []
        if self.card is not None:
            fraction, wanted = self.room / self.card, math.ceil(100 * max(peaks) / self.card)
            lines.append(
                f"a process takes {fraction:.0%} of the {aot.gib(self.card)} of {self.name}, see "
                "XLA_PYTHON_CLIENT_MEM_FRACTION"
            )
            if wanted > 95:
                lines[-1] += "; no part of one card is enough: see runtime.remat, training.microbatch_rows and mesh"
            elif max(peaks) > self.room:
                lines[-1] += f"; {wanted / 100:.2f} of it is enough"
        return [*lines, _FITTED[self.platform]]


def gpu_fraction() -> float:
    """The part of a GPU's memory that jax takes for itself."""
    names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    return float(next((os.environ[name] for name in names if name in os.environ), 0.75))


def target_of(topology: str) -> Target:
    """The devices of a TPU topology or a number of GPUs by name, or, of "", those at hand.

    Args:
      topology: such as v5p:8x8x16, h100, or h200:2 for two of them in one host.
    """
    if match := re.fullmatch(rf"({'|'.join(_CARDS)})(?::([1-9]\d*))?", topology):
        card = _CARDS[match[1]]
        return Target("gpu", match[1].upper(), int(match[2] or 1), int(card * gpu_fraction()), card)
    if topology:
        return Target("tpu", topology, *topology_devices(topology))
    devices = jax.devices()
    room = (devices[0].memory_stats() or {}).get("bytes_limit")
    card = int(room / gpu_fraction()) if devices[0].platform == "gpu" and room else None
    return Target(devices[0].platform, devices[0].device_kind, len(devices), room, card)


def topology_devices(name: str) -> tuple[int, int]:
    """(number of devices, bytes of each) of a TPU topology, by its name alone; raises ConfigError for another name."""
    one, slices = aot.slices_of(name)
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", one)
    if match is None or match[1] not in _CHIPS:
        raise ConfigError(
            f"--topology={name} is not planned for: give a name such as {aot.NAMES}, or {', '.join(_CARDS)}, with "
            "a number behind it for several GPUs (h100:2)"
        )
    devices, kind = _CHIPS[match[1]]
    return slices * devices * math.prod(map(int, match[2].split("x"))), aot.kind_bytes(kind)


@dataclasses.dataclass(frozen=True)
class Share:
    """What one device has of a pass of B rows of `length` tokens, in elements.

    The dense part divides the batch and heads; the experts divide rows and their tokens among all devices. A batch of
    fewer rows than devices along it is filled up for them (`parallel.expert_parallel`).
    """

    model: ModelConfig
    sizes: Mapping[str, int]
    batch: int
    length: int
    runtime: RuntimeConfig = RuntimeConfig()

    def along(self, axis: str) -> int:
        """Devices that divide a logical axis."""
        return math.prod(self.sizes[name] for name in sharding.mesh_axes(axis))

    @property
    def item(self) -> int:
        return ITEM_BYTES[self.model.dtype]

    @property
    def rows(self) -> int:
        """Of the batch; one that the devices do not divide is whole on each."""
        shards = self.along("batch")
        return self.batch if self.batch % shards else self.batch // shards

    @property
    def tokens(self) -> int:
        shards = self.along("length")
        return self.rows * (self.length if self.length < shards else self.length // shards)

    @property
    def stream(self) -> int:
        """[T, M]"""
        return self.tokens * self.model.hidden_size

    @property
    def inner(self) -> int:
        """[T, H*D]"""
        return self.tokens * self.model.num_heads * self.model.head_dim // self.along("heads")

    @property
    def keys(self) -> int:
        """[T, K*D]"""
        return self.tokens * self.model.num_kv_heads * self.model.head_dim // self.along("kv_heads")

    @property
    def owners(self) -> int:
        """Devices that hold different experts."""
        return self.along("experts") if self.model.num_experts > 1 else 1

    @property
    def width(self) -> int:
        """Devices that hold slices of the same experts."""
        return self.along("mlp" if self.model.num_experts > 1 else "dense_mlp")

    @property
    def routed(self) -> int:
        """Tokens that this device routes: every token is routed once, and so are those that fill up the batch."""
        axes = token_axes(self.sizes, self.length)
        rows, parts = (math.prod(self.sizes[name] for name in names) for names in axes)
        return cdiv(self.batch, rows) * (self.length // parts)

    @property
    def chosen(self) -> int:
        """[k R, M], the rows that this device sends."""
        return self.routed * self.model.experts_per_token * self.model.hidden_size

    @property
    def received(self) -> int:
        """Rows that come to a device, or the buffer that is kept for them, the slices of experts taken together."""
        model, group = self.model, cdiv(self.routed, self.runtime.token_groups)
        if model.capacity_factor is not None and math.prod(self.sizes.values()) == 1:
            return model.num_experts * expert_capacity(model, self.routed)
        rows = self.owners * group * min(model.experts_per_token, model.num_experts // self.owners)
        if model.expert_buffer is not None:
            bound = math.ceil(model.expert_buffer * group * model.experts_per_token)
            rows = min(rows, cdiv(bound, BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT)
        return rows * self.runtime.token_groups * self.width

    @property
    def expert_weights(self) -> int:
        """The matrices of one layer's experts, gathered."""
        model = self.model
        return 3 * model.num_experts * model.hidden_size * model.mlp_dim // (self.owners * self.width)

    def dense_weights(self, kind: str) -> int:
        """The matrices of one layer's attention, gathered."""
        model = self.model
        query, key = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        whole = model.hidden_size * (5 * query if kind == "lightning" else 2 * query + 2 * key)
        return whole // self.along("heads")

    @property
    def gathered(self) -> bool:
        """Whether matrices lie in slices that are gathered where they are used."""
        return self.along("embed") > 1

    @property
    def logits(self) -> int:
        """[B, V] in float32, bytes."""
        return self.rows * self.model.vocab_size // self.along("vocab") * ITEM_BYTES["float32"]

    @property
    def vocabulary(self) -> int:
        """[V, M], the head, gathered."""
        return self.model.vocab_size * self.model.hidden_size // self.along("vocab")


def kept_bytes(share: Share, kind: str, remat: str) -> int:
    """What the forward pass of one layer keeps for its backward pass.

    - "full": the layer's input.
    - "attention_out": that and the output of attention.
    - "dots": that and every product: q, k, v before their activation (lightning) or rotation (softmax); of lightning
      the gate and the kernel's output; of the experts gate and up of every row, and the rows that come out.
    - "none": the input, both normed inputs; of lightning q, k, v before and behind SiLU, output, gate, and the gated
      output; of softmax q, k, v, and the output twice; of the experts the rows that came, gate, up, the gathered
      matrices, and in float32 the router's input and the rows that came back.
    """
    item, rows = share.item, share.received
    stream, inner, keys = share.stream * item, share.inner * item, share.keys * item
    wide = rows * share.model.mlp_dim // share.width * item
    narrow = rows * share.model.hidden_size // share.width * item
    if remat == "full":
        return stream
    if remat == "attention_out":
        return 2 * stream
    if remat == "dots":
        return 2 * stream + (5 * inner if kind == "lightning" else inner + 2 * keys) + 2 * wide + narrow
    attention = 9 * inner if kind == "lightning" else 3 * inner + 2 * keys
    routing = (share.routed * share.model.hidden_size + share.chosen) * ITEM_BYTES["float32"]
    if share.model.num_experts == 1:  # nothing is routed
        routing = 0
    return 3 * stream + attention + 2 * wide + narrow + share.expert_weights * item + routing


def layer_work(share: Share, kind: str, *, looped: bool) -> int:
    """What the backward pass of one layer holds besides what was kept: what is computed again, and gradients.

    In the experts that is either four arrays of the width of an expert (its hidden rows, their gradient, those of gate
    and up), or one of them and the gradients of the matrices, whole and not yet summed over devices; beside it the
    gradient of the rows that came. In a loop over single layers, where nothing of another layer is under way, three of
    the four were seen.

    Args:
      looped: the layer is in a loop over blocks.
    """
    again = kept_bytes(share, kind, "none") - kept_bytes(share, kind, share.runtime.remat)
    matrices = share.expert_weights * share.item
    wide = share.received * share.model.mlp_dim // share.width * share.item
    narrow = share.received * share.model.hidden_size * share.item
    arrays = 3 if looped and len(share.model.layer_pattern) == 1 else 4
    return again + max(arrays * wide, matrices + wide) + narrow


def put_off(share: Share) -> int:
    """What the layers of a block in a loop hold for gradients of matrices that are not computed yet.

    Where rows travel to their experts, the compiler puts off the products for these gradients until there is traffic to
    hide (seen with blocks of 4 and 8 layers). In attention all layers but the last two of the backward pass do so, and
    keep the gradients of q, k, v, and of output and gate. Those of the experts are tied to the gradient of their rows
    (`parallel.expert_parallel`): one layer keeps the hidden rows and the gradients of gate and up, the rows that came
    and the gradient of those that went out.
    """
    model = share.model
    layers = len(model.layer_pattern) - 2
    if share.owners == 1 or layers <= 0:
        return 0
    rows = share.received * (3 * model.mlp_dim // share.width + 2 * model.hidden_size)
    return (rows + layers * 6 * share.inner) * share.item


def postponed(share: Share) -> int:
    """Bytes of the factors of products for gradients of one layer's matrices, which XLA:GPU keeps for later.

    Of the experts the hidden rows and the gradients of gate and up, the rows that came and the gradient of those that
    went out; of attention the gradients of q, k, v, and of output and gate.
    """
    rows = share.received * (3 * share.model.mlp_dim // share.width + 2 * share.model.hidden_size)
    return (rows + 6 * share.inner) * share.item


def _worst_moment_tpu(share: Share, gradients: Mapping[str, float]) -> tuple[float, float]:
    """(bytes kept for the backward pass, bytes beside them) at the worst moment of the backward pass.

    Where there is one block it goes through the layers from the last one, each of which leaves its gradients and frees
    what it kept. In a loop over blocks both are stacks that are there from beginning to end, with the gradients of one
    block beside them.

    Args:
      gradients: in float32, of "blocks" and "rest".
    """
    model = share.model
    looped = model.num_blocks > 1
    kept = [kept_bytes(share, kind, share.runtime.remat) for kind in model.layer_pattern]
    work = [layer_work(share, kind, looped=looped) for kind in model.layer_pattern]
    # The last hidden state and its gradient, and the gradient of the head, whole and in float32.
    loss = 2 * share.stream * share.item + share.vocabulary * ITEM_BYTES["float32"]
    if looped:
        summed = gradients["blocks"] * (1 + 1 / model.num_blocks)
        return model.num_blocks * sum(kept), summed + loss + max(work) + put_off(share)
    own, last = gradients["blocks"] / model.num_layers, model.num_layers - 1
    ends = [loss if i == last else gradients["rest"] for i in range(last + 1)]  # the head's is soon a slice
    return max(((sum(kept[: i + 1]), own * (last - i) + ends[i] + work[i]) for i in range(last + 1)), key=sum)


def _worst_moment_gpu(share: Share, gradients: Mapping[str, float], *, accumulated: bool) -> tuple[float, float]:
    """The same of XLA:GPU, where it is the end of the backward pass: factors of most layers wait for their products.

    In a loop over blocks they wait within one block; the gradients are then a stack, with those of a block and all
    matrices in the dtype of computation beside them. Elsewhere a gradient goes into its update at once, unless it is
    summed over micro-batches. Matrices that are not gathered are rounded again rather than kept.
    """
    model = share.model
    kept = model.num_blocks * sum(kept_bytes(share, kind, share.runtime.remat) for kind in model.layer_pattern)
    if share.runtime.remat == "none" and not share.gathered:
        kept -= model.num_layers * share.expert_weights * share.item
    waiting = _GPU_POSTPONED * len(model.layer_pattern) * postponed(share)
    every = sum(gradients.values())
    if model.num_blocks > 1:
        matrices = every * share.item / ITEM_BYTES["float32"]
        return kept, waiting + every + gradients["blocks"] / model.num_blocks + matrices
    return kept, waiting + every * (1 if accumulated else _GPU_GRADIENTS)


def training(config: Config, sizes: Mapping[str, int], room: int | None = None, *, platform: str = "tpu") -> Plan:
    """The training step of the first stage.

    Args:
      sizes: devices along each mesh axis.
      room: bytes of a device, if they are known. In a program that needs more, the compiler for a TPU by itself
        computes again what is no product, and gathers matrices again, until it fits (`spared`).
      platform: "gpu" for what XLA:GPU makes of it; anything else is taken as a TPU.
    """
    model, step = config.model, schedule.plan_step(config.training, 0)
    share = Share(model, sizes, step.rows // step.microbatches, step.stage.sequence_length, config.runtime)
    parameters = model_params.bytes_of_share(model, sizes)
    gradients = {name: size * 4 // ITEM_BYTES[model.param_dtype] for name, size in parameters.items()}
    if platform == "gpu":
        activations, temporaries = _worst_moment_gpu(share, gradients, accumulated=step.microbatches > 1)
    else:
        activations, temporaries = _worst_moment_tpu(share, gradients)
    if step.microbatches > 1:  # the sum over micro-batches
        temporaries += sum(gradients.values())
    memory = {
        "parameters": sum(parameters.values()),
        "optimizer": 2 * sum(gradients.values()),
        "activations kept for the backward": int(activations),
        "temporaries": int(temporaries),
    }
    computed_again = 0
    if platform != "gpu":
        memory["code"] = CODE_OF_LAYER["training"] * len(model.layer_pattern)
        short = 0 if room is None else max(sum(memory.values()) - room, 0)
        computed_again = short if short <= spared(share) else 0
    memory["activations kept for the backward"] -= computed_again
    return Plan(memory, _training_traffic(share, step.microbatches), computed_again)


def spared(share: Share) -> int:
    """What the compiler need not keep for the backward pass in a program that keeps everything: all but products."""
    model = share.model
    if share.runtime.remat != "none":
        return 0
    return sum(kept_bytes(share, kind, "none") - kept_bytes(share, kind, "dots") for kind in model.layer_kinds)


def _training_traffic(share: Share, microbatches: int) -> dict[str, int]:
    """Bytes of the results of collectives in one step.

    - all-gather: slices of matrices in the dtype of computation. Those of experts in the forward pass, and
      again where layers are computed again; those of attention again in the backward pass; the head once.
    - reduce-scatter: gradients of the matrices of attention and of the experts, in float32, and what the first of two
      steps leaves of the latter.
    - all-reduce: gradients of embedding and head, in float32 and whole, and those of the last matrix of the experts
      where its slices are narrower than a register of 128; those of all others where there are copies of them, the
      slices of attention among them; sums over divided heads and vocabulary.
    - all-to-all: rows of the embedding and their gradient, where its columns are divided.
    - ragged-all-to-all: tokens to their experts and back, in the forward pass, where layers are computed again, and in
      the backward pass.
    - collective-permute: keys and values round the ring, and in the backward pass their gradients in float32; half of
      the queries and of the outputs, and their gradients.
    """
    model, sizes = share.model, share.sizes
    f32, slices, again = ITEM_BYTES["float32"], share.along("embed"), share.runtime.remat in ("full", "attention_out")
    dense = sum(map(share.dense_weights, model.layer_kinds))
    experts = share.expert_weights * model.num_layers
    copies = sizes["data"]
    traffic = dict.fromkeys(
        ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute"), 0
    )
    if slices > 1:
        traffic["all-gather"] += experts * share.item * (1 if share.runtime.remat == "none" else 2)
        traffic["all-gather"] += (dense * (3 if again else 2) + share.vocabulary) * share.item
        # The compiler sums a matrix as a whole where a slice of it is narrower than a register.
        whole = experts // 3 if model.hidden_size // slices % 128 else 0
        steps = itertools.accumulate(reduce_scatter_factors(slices, math.prod(sizes.values())), operator.mul)
        traffic["all-reduce"] += whole * f32
        traffic["reduce-scatter"] += sum((experts - whole) * f32 // divided for divided in steps)
        traffic["reduce-scatter"] += dense * f32 // slices
        traffic["all-to-all"] += share.stream * (share.item + f32) // sizes["tensor"]
    if share.along("tokens") > slices:
        traffic["all-reduce"] += dense * f32 // slices
    if share.along("tokens") > 1:
        traffic["all-reduce"] += (1 + (share.along("tokens") > slices)) * share.vocabulary * f32
    if copies > 1:
        traffic["all-reduce"] += (experts + share.vocabulary) * f32 // slices
    passes = 2 if share.runtime.remat == "none" else 3
    if sizes["tensor"] > 1:
        # A layer: the output of attention and the gradient of its input, and tokens that the experts had in parts. The
        # embedding, and the gradient of the head's input.
        traffic["all-reduce"] += share.stream * (model.num_layers * (passes + 1) + 1) * share.item + share.stream * f32
        traffic["all-gather"] += model.num_layers * passes * share.stream * share.item
    if share.owners > 1:
        rows = share.received // share.width * model.hidden_size + share.chosen
        traffic["ragged-all-to-all"] += model.num_layers * passes * rows * share.item
    if share.width > 1:
        rows = share.received * model.hidden_size * share.item
        traffic["all-gather"] += model.num_layers * passes * rows
        traffic["reduce-scatter"] += model.num_layers * passes * rows // share.width
    if (parts := sizes["seq"]) > 1:
        heads, dim = model.num_heads // share.along("heads"), model.head_dim
        states = share.rows * heads * dim * dim * f32 * model.layer_kinds.count("lightning")
        traffic["all-gather"] += states * parts * passes
        ring = 2 * share.keys * ((parts - 1) * share.item * passes + parts * f32)
        halves = share.inner * share.item * (passes + 1)
        traffic["collective-permute"] += model.layer_kinds.count("softmax") * (ring + halves)
    return {kind: size * microbatches for kind, size in traffic.items()}


def inference(
    decoder: Decoder, sizes: Mapping[str, int], *, batch: int, length: int, slots: int, platform: str = "tpu"
) -> Plan:
    """A pass over `length` new tokens of each of `batch` sequences: a piece of a prompt, or a step of decoding.

    Nothing is kept. What is alive together is the work of one layer, in its attention or in its experts, or that of the
    head behind a step; and in decoding what lies there in another layout from beginning to end.

    Args:
      decoder: of `generate.inference_decoder`.
      sizes: devices along each mesh axis.
      slots: of the key-value caches.
    """
    model = decoder.config
    share = Share(model, sizes, batch, length, decoder.runtime)
    caches, lightning = state_bytes(share, slots)
    attention = max(attention_work(share, kind, slots) for kind in _whole_layers(share))
    if length == 1:  # a step is short: the matrices of the experts are on their way while attention works
        head = share.gathered * share.vocabulary * share.item + 2 * share.logits
        work = max(attention + expert_work(share), head) + turned(share)
    else:
        work = max(attention, expert_work(share) + cache_taken_out(share, slots))
    memory = {
        "parameters": sum(model_params.bytes_of_share(model, sizes).values()),
        "key-value caches": caches,
        "lightning states": lightning,
        "temporaries": work,
    }
    if platform != "gpu":
        memory["code"] = CODE_OF_LAYER["decoding" if length == 1 else "prefill"] * len(model.layer_pattern)
    return Plan(memory, _inference_traffic(share))


def _whole_layers(share: Share) -> tuple[str, ...]:
    """The layers that work on all tokens: of a piece of a prompt the last one, if it is not in a loop, does not."""
    model = share.model
    last_token = share.length > 1 and model.num_blocks == 1 and model.num_layers > 1
    return model.layer_kinds[:-1] if last_token else model.layer_kinds


def state_bytes(share: Share, slots: int) -> tuple[int, int]:
    """(key-value caches, lightning states) of all layers."""
    model = share.model
    softmax = model.layer_kinds.count("softmax")
    keys = share.rows * model.num_kv_heads * model.head_dim // share.along("heads_act")
    states = share.rows * model.num_heads * model.head_dim**2 // share.along("heads_act")
    return 2 * softmax * keys * slots * share.item, (model.num_layers - softmax) * states * ITEM_BYTES["float32"]


def attention_work(share: Share, kind: str, slots: int) -> int:
    """What the attention of one layer holds when nothing is kept.

    Tokens twice; gathered matrices; q, k, v before and behind the activation and the output (lightning); or
    queries, keys, output, and two blocks of scores in float32, with `cache_taken_out` (softmax).
    """
    model, f32 = share.model, ITEM_BYTES["float32"]
    elements = 2 * share.stream + share.gathered * share.dense_weights(kind)
    if kind == "lightning":
        return (elements + 7 * share.inner) * share.item
    heads = model.num_heads // share.along("heads_act")
    # As `softmax_attention.cached_attention` cuts them; one token meets all slots at once.
    queries = min(share.length, 16 * share.runtime.softmax_block)
    scores = share.rows * heads * queries * (slots if share.length == 1 else min(slots, share.runtime.softmax_block))
    elements += 2 * share.inner + 2 * share.keys
    return elements * share.item + 2 * scores * f32 + cache_taken_out(share, slots)


def cache_taken_out(share: Share, slots: int) -> int:
    """What a loop over blocks takes out of the stack of all caches: keys or values of a layer, or both.

    Seen were one and two of them, and this is the mean.
    """
    softmax = share.model.layer_kinds.count("softmax")
    if share.model.num_blocks == 1 or not softmax:
        return 0
    return state_bytes(share, slots)[0] * 3 // (4 * softmax)


def turned(share: Share) -> int:
    """Matrices that decoding copies to another layout before its loop over blocks: the products of one token want it.

    Those of q, k, v of lightning and of q of softmax, where they are not gathered in the loop.
    """
    model = share.model
    if share.gathered or model.num_blocks == 1:
        return 0
    inner = model.hidden_size * model.num_heads * model.head_dim // share.along("heads")
    return sum(inner * (3 if kind == "lightning" else 1) for kind in model.layer_kinds) * share.item


def expert_work(share: Share) -> int:
    """What the experts of one layer hold when nothing is kept.

    Tokens; the matrices of gate and up, if they are gathered; the rows that came, and both products. Where slices of an
    expert lie on several devices, the rows of all of them twice, before and after they are sorted, and beside them
    those that came and those that go back.
    """
    model, width = share.model, share.width
    matrices = share.gathered * share.expert_weights * 2 // 3
    rows = share.received * (model.hidden_size + 2 * model.mlp_dim // width)
    if width > 1:
        rows = max(rows, 2 * (share.received + share.received // width) * model.hidden_size)
    return (share.stream + matrices + rows) * share.item


def _inference_traffic(share: Share) -> dict[str, int]:
    """Bytes of the results of collectives in one pass, as in `_training_traffic` and forward alone."""
    model, traffic, layers = share.model, {}, len(_whole_layers(share))
    if share.gathered:
        matrices = share.expert_weights * model.num_layers + sum(map(share.dense_weights, model.layer_kinds))
        matrices += share.vocabulary if share.length == 1 else 0
        traffic["all-gather"] = matrices * share.item
        traffic["all-to-all"] = share.stream * share.item
    if (tensor := share.sizes["tensor"]) > 1:
        traffic["all-gather"] = traffic.get("all-gather", 0) + layers * share.stream * share.item
        if share.length % tensor:
            traffic["all-reduce"] = (layers + 1) * share.stream * share.item
        else:  # each takes a piece of a row to the experts, and of the sum over heads no more than that
            traffic["all-reduce"] = share.stream * share.item
            traffic["reduce-scatter"] = layers * share.stream // tensor * share.item
    if share.width > 1:
        rows = share.received * model.hidden_size * share.item
        traffic["all-gather"] = traffic.get("all-gather", 0) + layers * rows
        traffic["reduce-scatter"] = traffic.get("reduce-scatter", 0) + layers * rows // share.width
    if share.owners > 1:
        rows = share.received // share.width * model.hidden_size + share.chosen
        traffic["ragged-all-to-all"] = layers * rows * share.item
    return traffic


def training_plan(config: Config, topology: str = "") -> tuple[Plan, Mapping[str, int], int | None]:
    """(plan of a training step, devices along each mesh axis, bytes of one), checked as a run checks it.

    Args:
      topology: as `target_of` takes it.

    Raises:
      ConfigError: no such topology; a mesh that does not divide the shapes, or leaves a large parameter whole.
    """
    target = target_of(topology)
    sizes = sharding.mesh_sizes(config.mesh, target.count)
    mesh = sharding.abstract_mesh(sizes)
    model_params.check_sharded(config.model, sizes)
    model_params.param_shardings(config.model, mesh)
    batches.check_batches(config, mesh)
    return training(config, sizes, target.room, platform=target.platform), sizes, target.room


def training_lines(config: Config, topology: str = "") -> list[str]:
    """What `train.py --plan` prints; arguments and errors are those of `training_plan`."""
    plan, sizes, room = training_plan(config, topology)
    step = schedule.plan_step(config.training, 0)
    return [
        f"parameters {model_params.count_parameters(config.model):,}; batch {step.rows} rows of "
        f"{step.stage.sequence_length} tokens in {step.microbatches} micro-batches; mesh {dict(sizes)}"
        + (f" of {topology}" if topology else ""),
        *plan.lines("step", room),
        *target_of(topology).remarks([plan.peak]),
    ]


def shortage(config: Config, topology: str) -> str:
    """One line if the training step will not fit the topology, else ""."""
    plan, _, room = training_plan(config, topology)
    if room is None or plan.peak <= room:
        return ""
    return f"--plan expects it not to fit: {aot.fits(plan.peak, room)}; compiling all the same"


def inference_lines(
    config: Config, *, dtype: str, batch: int, prompt_length: int, context: int, chunk: int, topology: str = ""
) -> list[str]:
    """What `infer.py --plan` prints; arguments and errors are those of `mmx_jax.analysis.aot_inference.dry_run`."""
    inputs.check_lengths(config.model, prompt_length, context)
    decoder = generate.inference_decoder(config.model, dtype, config.runtime)
    model = decoder.config
    target = target_of(topology)
    sizes = sharding.mesh_sizes(config.mesh, target.count)
    model_params.check_sharded(model, sizes)
    model_params.param_shardings(model, sharding.abstract_mesh(sizes))
    slots = generate.slots_for(prompt_length, context, chunk)
    pieces = [bucket for _, _, bucket in generate.pieces(prompt_length, chunk)]
    lines = [
        f"parameters {model_params.count_parameters(model):,} in {dtype}; {batch} sequences of {slots} slots; mesh "
        f"{dict(sizes)}" + (f" of {topology}" if topology else "")
    ]
    peaks = []
    passes = (
        (f"prefill of {prompt_length} tokens in pieces of up to {max(pieces)}, {len(pieces)} of them; one piece:",
         "piece", max(pieces)),
        ("decoding, one step:", "step", 1),
    )  # fmt: skip
    for title, name, length in passes:
        plan = inference(decoder, sizes, batch=batch, length=length, slots=slots, platform=target.platform)
        lines += [title, *plan.lines(name, target.room)]
        peaks.append(plan.peak)
    return [*lines, *target.remarks(peaks)]
