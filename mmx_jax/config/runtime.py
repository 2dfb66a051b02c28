"""How a model is computed: what may change between a run and its resumption without changing the function."""

import dataclasses

from mmx_jax.config.base import MAX_SIZE, Section, require, require_choice, require_sizes

REMAT_POLICIES = ("none", "full", "dots", "attention_out")
SEQUENCE_METHODS = ("gather", "ring")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeConfig(Section):
    """How the function of a `ModelConfig` is computed: memory, kernels and communication. Only rounding may differ."""

    scan_blocks: bool = True
    remat: str = "none"  # what the backward pass computes again: see `mmx_jax.models.decoder`
    lightning_implementation: str = "auto"
    lightning_chunk: int | None = None  # None: chosen from shape and device, see pallas_kernels/block_sizes.py
    softmax_implementation: str = "auto"
    softmax_block: int = 512  # query and key tokens of a block of scores
    moe_implementation: str = "auto"
    token_groups: int = 1  # groups of tokens that travel to experts one by one, each while another is multiplied
    # What moves where mesh.seq divides the tokens of a row. Lightning: the states of all devices at once (LASP+), or
    # from neighbour to neighbour (LASP). Softmax: keys and values round a ring, or those of all devices at once.
    sequence_lightning: str = "gather"
    sequence_softmax: str = "ring"
    loss_chunk: int = 1024  # tokens whose logits a device holds at one time

    def check(self) -> None:
        require_sizes(self, "softmax_block", "token_groups", "loss_chunk")
        require(
            self.lightning_chunk is None or 0 < self.lightning_chunk <= MAX_SIZE,
            f"lightning_chunk={self.lightning_chunk} must be positive, or None for one chosen from shape and device",
        )
        require_choice(
            self, remat=REMAT_POLICIES, sequence_lightning=SEQUENCE_METHODS, sequence_softmax=SEQUENCE_METHODS
        )
