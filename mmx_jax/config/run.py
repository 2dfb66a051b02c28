"""A whole run: its model, mesh, data, recipe, checkpoints and monitoring; what of it a resumption may change."""

import dataclasses

from mmx_jax.config.base import Section, added, require, require_not_negative, require_positive, require_sizes
from mmx_jax.config.data import DataConfig
from mmx_jax.config.model import ModelConfig
from mmx_jax.config.parallel import MeshConfig
from mmx_jax.config.runtime import RuntimeConfig
from mmx_jax.config.training import TrainingConfig

# What may change between a run and its resumption: fields of these sections change neither the data nor the function
# nor the optimizer, only where, how fast and how closely watched it is computed (rounding included).
RESUMABLE = ("name", "mesh.", "runtime.", "checkpoint.", "monitoring.", "data.reading.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When training saves and what it keeps."""

    save_every_steps: int = 1000
    keep: int = 3  # the newest ones
    keep_best: bool = True  # and the one with the lowest evaluation loss
    asynchronous: bool = True

    def check(self) -> None:
        require_positive(self, "save_every_steps", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitoringConfig(Section):
    """How closely a run is watched, and what ends it."""

    eval_every_steps: int = 0  # 0: only at the end
    eval_batches: int = 8
    log_every_steps: int = 1
    max_nonfinite_steps: int = 0  # steps in a row with a non-finite loss or gradient that are skipped before stopping

    def check(self) -> None:
        require_positive(self, "log_every_steps")
        require_sizes(self, "eval_batches")
        require_not_negative(self, "eval_every_steps", "max_nonfinite_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Section):
    """Everything a run is made of."""

    name: str = "minimax_text_01"
    model: ModelConfig = ModelConfig()
    runtime: RuntimeConfig = added(RuntimeConfig())
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitoring: MonitoringConfig = added(MonitoringConfig())

    def check(self) -> None:
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

    @property
    def resumable(self) -> tuple[str, ...]:
        """Paths and beginnings of paths of the fields that a resumption may change.

        Where rows are dropped by what comes to a device, the layout of the mesh decides which, and so do the groups in
        which tokens travel.
        """
        fields = set(RESUMABLE)
        local_capacity = self.model.capacity_factor is not None and self.model.capacity_scope == "local"
        if local_capacity or self.model.expert_buffer is not None:
            fields.remove("mesh.")
        if self.model.expert_buffer is not None:
            names = {field.name for field in dataclasses.fields(RuntimeConfig)} - {"token_groups"}
            fields = fields - {"runtime."} | {f"runtime.{name}" for name in names}
        return tuple(sorted(fields))
