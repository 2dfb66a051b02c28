"""Held-out loss of a run."""

from typing import NamedTuple

import jax

from mmx_jax.config import Config
from mmx_jax.data import device_batch
from mmx_jax.data import pipeline as data_pipeline
from mmx_jax.data.pipeline import Corpus
from mmx_jax.data.tokenizer import Tokenizer
from mmx_jax.training import train_step


class HeldOut(NamedTuple):
    """Means over the held-out tokens that have a target."""

    loss: float  # nats per token
    accuracy: float


class Validation:
    """Held-out loss over the same batches through the whole run, of the first stage's length, so that losses compare.

    The batches are read when it is built: a run must not end over them.
    """

    def __init__(self, config: Config, mesh, corpus: Corpus, tokenizer: Tokenizer):
        stage = config.training.resolved_stages[0]
        self._mesh = mesh
        self._rows = config.training.microbatch_rows or config.training.row_unit(stage)
        self._batches = data_pipeline.make_eval_batches(
            corpus,
            tokenizer,
            sequence_length=stage.sequence_length,
            rows=self._rows,
            batches=config.monitoring.eval_batches,
            own_rows=device_batch.own_rows(mesh, self._rows),
            source_weights=stage.source_weights,
        )
        self._eval_steps = {}  # by RoPE base

    def __call__(self, params, config: Config) -> HeldOut:
        """Evaluates `params`; `config` is that of the present stage, whose RoPE base counts."""
        eval_step = self._eval_step(config)
        batches = (device_batch.to_devices(batch, self._mesh, self._rows) for batch in self._batches)
        sums = [jax.device_get(eval_step(params, batch)) for batch in batches]
        count = sum(float(part["count"]) for part in sums)
        return HeldOut(
            loss=sum(float(part["nll"]) for part in sums) / count,
            accuracy=sum(float(part["correct"]) for part in sums) / count,
        )

    def _eval_step(self, config):
        if (base := config.model.rope_theta) not in self._eval_steps:
            self._eval_steps[base] = train_step.make_eval_step(config)
        return self._eval_steps[base]
