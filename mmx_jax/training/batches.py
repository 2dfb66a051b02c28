"""Batches of a run on the devices: the stages' data, dealt out to processes, and the position in it."""

from typing import Any

import jax

from mmx_jax import distributed, sharding
from mmx_jax.config import Config, ConfigError
from mmx_jax.data import device_batch
from mmx_jax.data import pipeline as data_pipeline
from mmx_jax.data.pipeline import Corpus
from mmx_jax.data.tokenizer import Tokenizer
from mmx_jax.training.schedule import StepPlan


class TrainBatches:
    """The training batches of all stages, one stage open at a time.

    Attributes:
      stage_index: of the open stage; None before the first one.
      notes: lines about the data to show, added as stages open.
    """

    def __init__(self, config: Config, mesh, corpus: Corpus, tokenizer: Tokenizer):
        self._config, self._mesh, self._corpus, self._tokenizer = config, mesh, corpus, tokenizer
        self._iterator: Any = None  # of the open stage
        self.stage_index: int | None = None
        self.notes: list[str] = []

    def next(self, plan: StepPlan) -> dict:
        """The batch of one optimizer step, int32 [rows, T] by name over all devices."""
        if self.stage_index != plan.stage_index:
            self._open(plan.stage_index)
        unit = self._config.training.row_unit(plan.stage)
        parts = [next(self._iterator) for _ in range(plan.rows // unit)]
        batch = {key: device_batch.join_parts([part[key] for part in parts]) for key in device_batch.BATCH_KEYS}
        return device_batch.to_devices(batch, self._mesh, plan.rows)

    def position(self) -> dict | None:
        """The position of all shards of the data, from the processes that read them; None before the first stage."""
        states = distributed.gather(None if self._iterator is None else self._iterator.get_state())
        return None if self._iterator is None else data_pipeline.merge_states(states)

    def restore(self, stage_index: int, position: dict | None) -> None:
        """Opens a stage at a position; None: at its beginning."""
        self._open(stage_index)
        if position is not None:
            self._iterator.set_state(position)
            self.notes += self._iterator.notes

    def close(self) -> None:
        """Stops the thread of the data pipeline."""
        if self._iterator is not None:
            self._iterator.close()

    def _open(self, index):
        # Each stage shuffles anew: its sequence length and mixture make it another stream of batches.
        stage = self._config.training.resolved_stages[index]
        unit = self._config.training.row_unit(stage)
        self.close()
        self._iterator = data_pipeline.make_train_iterator(
            self._corpus,
            self._tokenizer,
            sequence_length=stage.sequence_length,
            rows=unit,
            own_rows=device_batch.own_rows(self._mesh, unit),
            source_weights=stage.source_weights,
            seed=self._config.data.seed + index,
        )
        self.stage_index = index
        self.position()  # raises at once where processes do not see the same data


def check_batches(config: Config, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> None:
    """Raises ConfigError where a micro-batch does not divide over the devices that share the batch axis, or tokens not
    over all devices."""
    shards = device_batch.batch_shards(mesh)
    for stage in config.training.resolved_stages:
        unit = config.training.row_unit(stage)
        rows = config.training.microbatch_rows or unit
        if rows % shards:
            possible = [n for n in range(1, rows + 1) if rows % n == 0]
            raise ConfigError(
                f"training.microbatch_rows: {rows} rows of {stage.sequence_length} tokens do not divide over {shards} "
                f"batch shards; {' x '.join(f'mesh.{axis}' for axis in sharding.mesh_axes('batch'))} may be "
                f"{', '.join(map(str, possible))}, other devices go to mesh.seq or mesh.tensor; or change batch_tokens "
                "or microbatch_rows"
            )
        check_tokens(config.runtime.token_groups, mesh, rows // shards, stage.sequence_length)


def check_tokens(
    token_groups: int, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, rows: int, length: int
) -> None:
    """Raises ConfigError where the experts could not be given the same number of tokens by every device.

    Args:
      token_groups: groups of tokens that travel to experts one by one.
      rows: of each batch shard, `length` tokens long.
    """
    pieces = sharding.axes_size(mesh, ("seq", "tensor"), dividing=length, of="training.sequence_length: a row")
    tokens = rows * length // pieces
    if mesh.size > 1 and tokens % token_groups:
        raise ConfigError(
            f"runtime.token_groups={token_groups} does not divide the {tokens} tokens of a device; change it, "
            "sequence_length, microbatch_rows or mesh"
        )
