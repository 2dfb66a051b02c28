"""Sizes of the arrays that one device holds in a pass over a batch.

They follow from the shapes of the model, the mesh, and the rules of `mmx_jax.sharding`. Letters are those of the house
style, and all of them count what one device has: T tokens, M hidden size, H heads, K key-value heads, D head_dim,
F width of an expert, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Mapping

from mmx_jax import sharding
from mmx_jax.config import ModelConfig, RuntimeConfig
from mmx_jax.layers.moe import expert_capacity
from mmx_jax.parallel.expert_parallel import token_axes
from mmx_jax.parallel.token_dispatch import BUFFER_ALIGNMENT
from pallas_kernels.platform import cdiv

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class DeviceShapes:
    """Sizes of the arrays of one device, in elements where no other unit is named.

    The dense layers divide the batch and the heads over devices. The experts divide rows and their tokens over all
    devices: a batch with fewer rows than devices is padded for them (`parallel.expert_parallel`).

    Attributes:
      mesh_sizes: number of devices along each mesh axis.
      batch: rows, over all devices.
      length: tokens of a row, over all devices.
    """

    model: ModelConfig
    mesh_sizes: Mapping[str, int]
    batch: int
    length: int
    runtime: RuntimeConfig = RuntimeConfig()

    def shards(self, axis: str) -> int:
        """Number of devices that divide a logical axis."""
        return math.prod(self.mesh_sizes[name] for name in sharding.mesh_axes(axis))

    @property
    def itemsize(self) -> int:
        """Bytes of an element in the dtype of computation."""
        return ITEM_BYTES[self.model.dtype]

    # Tokens.

    @property
    def rows(self) -> int:
        """Number of rows of the batch; a batch that the devices do not divide is whole on each."""
        shards = self.shards("batch")
        return self.batch if self.batch % shards else self.batch // shards

    @property
    def tokens(self) -> int:
        """Number of tokens, T."""
        shards = self.shards("length")
        return self.rows * (self.length if self.length < shards else self.length // shards)

    @property
    def hidden(self) -> int:
        """[T, M]"""
        return self.tokens * self.model.hidden_size

    @property
    def queries(self) -> int:
        """[T, H*D]"""
        return self.tokens * self.model.num_heads * self.model.head_dim // self.shards("heads")

    @property
    def keys(self) -> int:
        """[T, K*D]"""
        return self.tokens * self.model.num_kv_heads * self.model.head_dim // self.shards("kv_heads")

    @property
    def logits_bytes(self) -> int:
        """Bytes of [rows, V] in float32: the logits of one token of each row."""
        return self.rows * self.model.vocab_size // self.shards("vocab") * ITEM_BYTES["float32"]

    @property
    def full_length_layers(self) -> tuple[str, ...]:
        """Kinds of the layers that compute all tokens.

        In a piece of a prompt the last layer computes only the last token, unless it is in a loop over blocks.
        """
        model = self.model
        last_token_only = self.length > 1 and model.num_blocks == 1 and model.num_layers > 1
        return model.layer_kinds[:-1] if last_token_only else model.layer_kinds

    # Experts.

    @property
    def expert_shards(self) -> int:
        """Number of devices that hold different experts."""
        return self.shards("experts") if self.model.num_experts > 1 else 1

    @property
    def mlp_shards(self) -> int:
        """Number of devices that hold slices of the same experts."""
        return self.shards("mlp" if self.model.num_experts > 1 else "dense_mlp")

    @property
    def routed_tokens(self) -> int:
        """Number of tokens that this device routes; every token is routed once, padding rows included."""
        axes = token_axes(self.mesh_sizes, self.length)
        row_shards, length_shards = (math.prod(self.mesh_sizes[name] for name in names) for names in axes)
        return cdiv(self.batch, row_shards) * (self.length // length_shards)

    @property
    def sent_elements(self) -> int:
        """[routed tokens * experts per token, M]: the rows that this device sends to experts."""
        return self.routed_tokens * self.model.experts_per_token * self.model.hidden_size

    @property
    def received_rows(self) -> int:
        """Number of rows that the experts of this device receive, or that their buffer holds.

        Devices that hold slices of the same experts count together.
        """
        model, group = self.model, cdiv(self.routed_tokens, self.runtime.token_groups)
        if model.capacity_factor is not None and math.prod(self.mesh_sizes.values()) == 1:
            return model.num_experts * expert_capacity(model, self.routed_tokens)
        rows = self.expert_shards * group * min(model.experts_per_token, model.num_experts // self.expert_shards)
        if model.expert_buffer is not None:
            bound = math.ceil(model.expert_buffer * group * model.experts_per_token)
            rows = min(rows, cdiv(bound, BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT)
        return rows * self.runtime.token_groups * self.mlp_shards

    # Weights.

    @property
    def gathers_weights(self) -> bool:
        """Whether weights are stored in slices that are gathered where they are used."""
        return self.shards("embed") > 1

    @property
    def expert_weights(self) -> int:
        """The expert matrices of one layer, gathered."""
        model = self.model
        return 3 * model.num_experts * model.hidden_size * model.mlp_dim // (self.expert_shards * self.mlp_shards)

    def attention_weights(self, kind: str) -> int:
        """The attention matrices of one layer, gathered."""
        model = self.model
        queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        columns = 5 * queries if kind == "lightning" else 2 * queries + 2 * keys
        return model.hidden_size * columns // self.shards("heads")

    @property
    def head_weights(self) -> int:
        """[V, M]: the output head, gathered."""
        return self.model.vocab_size * self.model.hidden_size // self.shards("vocab")
