"""A whole run: its model, mesh, data, recipe and checkpoints."""

import dataclasses

from mmx_jax.config.base import (
    Section,
    require,
    require_positive,
)
from mmx_jax.config.data import DataConfig
from mmx_jax.config.model import ModelConfig
from mmx_jax.config.parallel import MeshConfig
from mmx_jax.config.training import TrainingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When training saves and what it keeps."""

    save_every_steps: int = 1000
    keep: int = 3  # the newest ones
    keep_best: bool = True  # and the one with the lowest evaluation loss
    asynchronous: bool = True

    def check(self):
        require_positive(self, "save_every_steps", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Section):
    """Everything a run is made of."""

    name: str = "minimax_text_01"
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def check(self):
        for stage in self.training.resolved_stages:
            require(
                not stage.source_weights or len(stage.source_weights) == max(1, len(self.data.sources)),
                f"source_weights of a stage has {len(stage.source_weights)} entries for "
                f"{max(1, len(self.data.sources))} data sources",
            )
            require(
                self.mesh.seq == -1 or stage.sequence_length % self.mesh.seq == 0,
                f"training.sequence_length={stage.sequence_length} does not divide over mesh.seq={self.mesh.seq} "
                "devices; make it a multiple",
            )
            require(
                stage.sequence_length <= self.model.max_position_embeddings,
                f"sequence_length={stage.sequence_length} exceeds max_position_embeddings="
                f"{self.model.max_position_embeddings}",
            )

    def in_stage(self, index: int) -> "Config":
        """With the model as stage `index` of the run trains it: the RoPE base of a stage replaces the model's."""
        base = self.training.resolved_stages[index].rope_theta
        if base is None:
            return self
        return dataclasses.replace(self, model=dataclasses.replace(self.model, rope_theta=base))
