"""Hooks of a training run: metrics and progress, checkpoints, profile."""

import json
import pathlib
from collections.abc import Callable, Sequence

import jax

from mmx_jax import distributed, metrics
from mmx_jax.checkpoints.manager import Checkpointer, NotFiniteError
from mmx_jax.config import Config
from mmx_jax.config import io as config_io
from mmx_jax.data.pipeline import Corpus
from mmx_jax.progress import TrainingProgress
from mmx_jax.training.batches import TrainBatches
from mmx_jax.training.errors import NonFiniteError
from mmx_jax.training.trainer import Hook, StepRecord, Trainer
from mmx_jax.training.validate import HeldOut


class MetricsHook(Hook):
    """Rows of metrics to a writer, and the state of the run to the console.

    Args:
      writer: None in processes that write nothing.
      unigram_entropy: of the training data, nats per token, beside the held-out loss.
    """

    def __init__(
        self,
        config: Config,
        writer: metrics.MetricsWriter | None,
        progress: TrainingProgress,
        corpus: Corpus,
        unigram_entropy: float,
    ):
        self._config, self._writer, self._progress = config, writer, progress
        self._corpus, self._unigram_entropy = corpus, unigram_entropy

    def on_record(self, record: StepRecord) -> None:
        router = {f"router_{name}": value.tolist() for name, value in record.metrics["router"].items()}
        scalars = {name: float(value) for name, value in record.metrics.items() if name != "router"}
        skips = self._config.data.reading.on_bad_row == "skip"
        self._write(
            {"step": record.step, "tokens_seen": record.tokens_seen, "learning_rate": record.plan.learning_rate}
            | scalars
            | {"tokens_per_second": record.tokens_per_second, "mfu": record.mfu}
            | ({"bad_rows": self._corpus.bad_rows} if skips else {})
            | router
        )
        if not record.metrics["finite"]:
            self._progress.message(
                f"step {record.step} was skipped: loss {record.metrics['loss']}, gradient norm "
                f"{record.metrics['gradient_norm']} ({record.nonfinite_in_a_row} in a row, "
                f"{self._config.monitoring.max_nonfinite_steps} allowed)"
            )
        self._progress.update(
            step=record.step,
            tokens_seen=record.tokens_seen,
            loss=float(record.metrics["loss"]),
            tokens_per_second=record.tokens_per_second,
            mfu=record.mfu,
        )

    def on_validation(self, trainer: Trainer, held_out: HeldOut) -> None:
        self._write(
            {
                "step": trainer.step,
                "tokens_seen": trainer.tokens_seen,
                "eval_loss": held_out.loss,
                "eval_accuracy": held_out.accuracy,
                "unigram_entropy": self._unigram_entropy,
            }
        )
        self._progress.message(
            f"step {trainer.step}  held-out loss {held_out.loss:.4f} (unigram entropy {self._unigram_entropy:.4f})  "
            f"accuracy {100 * held_out.accuracy:.1f}%"
        )

    def _write(self, row):
        if self._writer is not None:
            self._writer.write(row)


class CheckpointHook(Hook):
    """Saves the state and the position in the data.

    Args:
      check_lock: raises where another run has taken the folder over.
      message: shows one line.
      saved_step: the step that the run continues from.
    """

    def __init__(
        self,
        config: Config,
        checkpointer: Checkpointer,
        batches: TrainBatches,
        check_lock: Callable[[], None],
        message: Callable[[str], None],
        saved_step: int = 0,
    ):
        self._config, self._checkpointer, self._batches = config, checkpointer, batches
        self._check_lock, self._message = check_lock, message
        self._saved_step = saved_step

    def after_step(self, step: int) -> None:
        self._checkpointer.poll()

    def save(self, trainer: Trainer) -> None:
        if trainer.nonfinite_in_a_row:
            # Whatever broke the last step may be in the parameters: it must not push out a good checkpoint.
            count = trainer.nonfinite_in_a_row
            self._message(f"step {trainer.step} is not saved: the last {count} steps were not finite")
            return
        self._check_lock()
        try:
            self._checkpointer.save(
                trainer.step,
                trainer.state,
                position={"tokens_seen": trainer.tokens_seen, "stage_index": self._batches.stage_index},
                data=self._batches.position(),
                config=json.loads(config_io.config_to_json(self._config)),
            )
        except NotFiniteError as error:
            raise NonFiniteError("\n".join([str(error), *self.advice(trainer.step)])) from None
        self._saved_step = trainer.step

    def on_validation(self, trainer: Trainer, held_out: HeldOut) -> None:
        if self._saved_step == trainer.step:
            self._checkpointer.note_loss(trainer.step, held_out.loss)

    def advice(self, failed_on: int) -> Sequence[str]:
        self._checkpointer.wait()
        place, good = self._checkpointer.directory, self._checkpointer.last_good()
        if good is None:
            return [f"no good checkpoint has been saved in {place}: start over with a lower learning rate"]
        lower = f"--set training.learning_rate={self._config.training.learning_rate / 10:g}"
        if good < failed_on:
            return [
                f"last good checkpoint: step {good} in {place}",
                f"continue from there with another data.seed or learning rate, as in --resume={good} {lower}, or skip "
                "such steps with monitoring.max_nonfinite_steps",
            ]
        # No learning rate mends a step whose own values are too large: what comes first is its loss.
        older = self._checkpointer.last_good(before=good)
        lines = [f"the newest checkpoint in {place}, step {good}, is finite, and the very next step failed on it"]
        if older is not None:
            lines.append(
                f"last good checkpoint: step {older}, which finite steps followed; continue from there with a "
                f"lower learning rate, as in --resume={older} {lower}"
            )
        else:
            lines.append("it is the only one: start over in another --workdir with a lower learning rate")
        return [
            *lines,
            f"if one bad batch is to blame: --resume={good} with another data.seed, or skip such steps with "
            "monitoring.max_nonfinite_steps",
        ]


class ProfileHook(Hook):
    """Traces the optimizer steps from `first` to `last` into a folder, in process 0."""

    def __init__(self, first: int, last: int, folder: pathlib.Path):
        self._first, self._last, self._folder = first, last, folder

    def before_step(self, step: int) -> None:
        if step == self._first and distributed.is_first():
            jax.profiler.start_trace(str(self._folder))

    def after_step(self, step: int) -> None:
        if step == self._last and distributed.is_first():
            jax.profiler.stop_trace()
