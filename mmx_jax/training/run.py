"""A training run: everything between a Config and a folder of checkpoints."""

import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import rich.console

from mmx_jax import distributed, metrics, sharding
from mmx_jax.checkpoints.manager import Checkpointer
from mmx_jax.config import Config
from mmx_jax.config import io as config_io
from mmx_jax.data import device_batch
from mmx_jax.data import pipeline as data_pipeline
from mmx_jax.data.pipeline import Corpus
from mmx_jax.data.tokenizer import Tokenizer
from mmx_jax.models import flops
from mmx_jax.models import params as model_params
from mmx_jax.progress import TrainingProgress
from mmx_jax.storage import filesystem
from mmx_jax.training import initialize, schedule, train_step
from mmx_jax.training import resume as resuming
from mmx_jax.training.batches import TrainBatches, check_batches
from mmx_jax.training.errors import TrainingError
from mmx_jax.training.hooks import CheckpointHook, MetricsHook, ProfileHook
from mmx_jax.training.preemption import StopSignals
from mmx_jax.training.same_run import check_same_run
from mmx_jax.training.tokenizer_of_run import prepare_tokenizer
from mmx_jax.training.trainer import Hook, Position, Trainer
from mmx_jax.training.validate import Validation


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended."""

    step: int
    tokens_seen: int
    loss: float | None  # of the last step, nats per token; None if there was none
    eval_loss: float | None
    unigram_entropy: float
    interrupted: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """How closely a run is watched, besides what its config says."""

    profile_steps: tuple[int, ...] = ()  # (first, last) optimizer steps traced into workdir/profile; empty: none
    wandb: str = ""  # a project of Weights & Biases; empty: none


def train(
    config: Config,
    workdir: str | os.PathLike,
    *,
    steps: int = 0,
    resume: str = "auto",
    init_from: str = "",
    watch: Watch = Watch(),
    console: Any = None,
) -> TrainResult:
    """Trains until the tokens are used up, `steps` is reached, or SIGTERM or SIGINT asks to stop (saves, returns).

    Processes that jax.distributed has joined call it alike, with one `workdir` on storage that they share. Process 0
    writes what is not a checkpoint; a signal to any of them stops all after the same step.

    Args:
      config: everything about the run.
      workdir: receives config.json, tokenizer/, checkpoints/, metrics.jsonl, loss.png and tensorboard/.
      steps: stop after this optimizer step, counted from the start of the run; 0: no such limit. The schedule does
        not know about it.
      resume: "auto" continues the newest checkpoint of `workdir` if there is one; "no" refuses a workdir that
        has one; a number goes back to that step and discards the later ones.
      init_from: a checkpoint of any kind whose weights the run begins with, see `initialize`; empty: new weights. A run
        that has a checkpoint of its own continues that.
      watch: profile, and where metrics go besides the folder.
      console: rich console; None: standard output of process 0.

    Raises:
      TrainingError, CheckpointError, ConfigError, distributed.LostProcessError: with one clear message.
    """
    config.training.check_schedule()
    workdir = filesystem.destination(workdir, arrays=True)
    if console is None:
        console = rich.console.Console(highlight=False, soft_wrap=True, quiet=not distributed.is_first())

    def say(line):
        console.print(line, markup=False)

    remedy = "free some space and start the run again: it continues from its newest checkpoint"
    with filesystem.full_disk(workdir, TrainingError, remedy):
        workdir.mkdir(parents=True, exist_ok=True)
        mesh = sharding.make_mesh(config.mesh)
        model_params.check_sharded(config.model, mesh.shape)
        check_batches(config, mesh)
        with resuming.alone_in(workdir, say) as check_lock:
            checkpointer = _checkpointer(config, workdir)
            with distributed.together(lambda: resuming.how_to_continue(checkpointer)), _closing(checkpointer):
                begin, notes = _find_start(config, workdir, checkpointer, resume)
                notes += initialize.check(config, init_from, workdir, begin.step)
                if not begin.step:
                    begin = dataclasses.replace(begin, init_from=init_from)
                if begin.step == checkpointer.latest_step() and resuming.is_finished(config, begin, steps):
                    say(resuming.finished_line(config, begin, workdir))
                    return _finished(config, workdir, begin)
                with jax.set_mesh(mesh), StopSignals() as signals:
                    run = _Run(config, workdir, mesh, checkpointer, begin)
                    return run.shown(notes, steps, watch, signals, check_lock, console)


def _find_start(config, workdir, checkpointer, resume_from):
    """(where the run begins, notes); raises ConfigError where the configuration does not continue that step."""
    step = resuming.resume_step(checkpointer, resume_from)
    if not step:
        return resuming.Start(), []
    stored, current = checkpointer.read_config(step), json.loads(config_io.config_to_json(config))
    differing = check_same_run(stored, current, branch=resume_from.isdecimal())
    notes = [f"continues from step {step} with another {field}" for field in differing]
    other_order = stored["data"]["seed"] != current["data"]["seed"]
    if other_order:
        notes.append(
            f"data.seed is another: the data of the stage start over in the order of seed {config.data.seed}, and "
            "held-out losses before and after this step are of other documents"
        )
    return resuming.look_at(checkpointer, step, workdir, data_begins_anew=other_order), notes


def _finished(config, workdir, begin):
    """The result of a run that had nothing left to do."""
    entropy = begin.eval_row and begin.eval_row.get("unigram_entropy")
    if entropy is None:
        tokenizer = Tokenizer.load(workdir / "tokenizer")
        corpus = data_pipeline.open_corpus(config.data, tokenizer)
        entropy = data_pipeline.corpus_statistics(corpus, tokenizer).unigram_entropy
    return TrainResult(
        step=begin.step,
        tokens_seen=begin.tokens_seen,
        loss=begin.loss,
        eval_loss=begin.eval_loss,
        unigram_entropy=entropy,
        interrupted=False,
    )


def _checkpointer(config, workdir):
    return Checkpointer(
        workdir / "checkpoints",
        keep=config.checkpoint.keep,
        keep_best=config.checkpoint.keep_best,
        asynchronous=config.checkpoint.asynchronous,
    )


@contextlib.contextmanager
def _closing(checkpointer):
    try:
        yield
    finally:
        # An error on its way out is the one to report: a failed save has been raised by then, or will be below.
        with contextlib.suppress(Exception):
            checkpointer.close()


class _Run:
    """Data, state and writers of a run, from the step at which it begins."""

    def __init__(self, config: Config, workdir: pathlib.Path, mesh, checkpointer: Checkpointer, begin: resuming.Start):
        self.config, self.workdir, self.mesh, self.checkpointer, self.begin = config, workdir, mesh, checkpointer, begin
        with distributed.first_before_others("tokenizer"):
            self.tokenizer, notes = prepare_tokenizer(config, workdir, begin.init_from)
        self.corpus: Corpus = data_pipeline.open_corpus(config.data, self.tokenizer)
        for stage in config.training.resolved_stages:
            data_pipeline.mixture(config.data, stage.source_weights)  # raises at once, not when the stage begins
        self.notes = notes + self.corpus.notes
        self.unigram_entropy = data_pipeline.corpus_statistics(self.corpus, self.tokenizer).unigram_entropy
        self.batches = TrainBatches(config, mesh, self.corpus, self.tokenizer)
        self.validation = Validation(config, mesh, self.corpus, self.tokenizer) if config.data.eval_fraction else None
        self.state = self._first_state()
        self.writer = None
        if distributed.is_first():
            filesystem.write_text(workdir / "config.json", config_io.config_to_json(config))
            self.writer = metrics.MetricsWriter(workdir, resume_step=begin.step)

    def _first_state(self):
        if self.begin.step:
            return self._restored()
        if self.begin.init_from:
            return initialize.load_state(self.config, self.mesh, self.begin.init_from)
        return train_step.init_state(self.config, self.mesh)

    def _restored(self):
        """The state of the step, with its place in the data; only then are later steps given up."""
        begin = self.begin
        abstract = train_step.abstract_state(self.config, self.mesh)
        state, position, data_position = self.checkpointer.restore(begin.step, abstract)
        if position["stage_index"] is not None:
            self.batches.restore(position["stage_index"], None if begin.data_begins_anew else data_position)
        self.notes += self.batches.notes
        if discarded := self.checkpointer.discard_after(begin.step):
            self.notes.append(f"discarded the later steps {', '.join(map(str, discarded))}")
        return state

    def shown(self, notes, steps, watch, signals, check_lock, console) -> TrainResult:
        """Runs to the end with its progress on the console, and closes the run."""
        self._log_to_wandb(watch.wandb)
        training = self.config.training
        end_step, end_tokens = schedule.end_of_run(training, self.begin.step, self.begin.tokens_seen, steps)
        progress = TrainingProgress(
            end_tokens, self.begin.tokens_seen, step=self.begin.step, total_steps=end_step, console=console
        )
        with progress:
            for line in self._introduction() + notes + self.notes:
                progress.message(line)
            try:
                trainer = self._trainer(watch, check_lock, progress)
                return self._run(trainer, steps, signals, progress)
            finally:
                self._close()

    def _trainer(self, watch, check_lock, progress) -> Trainer:
        begin = self.begin
        hooks: list[Hook] = [
            MetricsHook(self.config, self.writer, progress, self.corpus, self.unigram_entropy),
            CheckpointHook(
                self.config, self.checkpointer, self.batches, check_lock, progress.message, saved_step=begin.step
            ),
        ]
        if watch.profile_steps:
            first, last = watch.profile_steps
            hooks.append(ProfileHook(first, last, self.workdir / "profile"))
        return Trainer(
            self.config,
            self.state,
            batches=self.batches,
            validation=self.validation,
            hooks=hooks,
            position=Position(
                step=begin.step,
                tokens_seen=begin.tokens_seen,
                stage_index=self.batches.stage_index or 0,
                loss=begin.loss,
                held_out_loss=begin.eval_loss,
                validated=begin.eval_row is not None,
            ),
        )

    def _run(self, trainer, steps, signals, progress) -> TrainResult:
        self.state = None  # the trainer's from now on: its step donates the buffers
        if self.begin.init_from:
            trainer.validate()  # how good the weights are before they change
        trainer.run(steps, signals.agreed)
        if received := signals.agreed():
            progress.message(f"{received}: saving step {trainer.step}, then stopping")
        trainer.save()
        self.checkpointer.wait()
        if not received:
            trainer.validate()
        for line in self.corpus.skipped:
            progress.message(line)
        self._draw(progress)
        return TrainResult(
            step=trainer.step,
            tokens_seen=trainer.tokens_seen,
            loss=trainer.loss,
            eval_loss=trainer.held_out_loss,
            unigram_entropy=self.unigram_entropy,
            interrupted=bool(received),
        )

    def _introduction(self) -> list[str]:
        """Lines to print before the first step."""
        training, model = self.config.training, self.config.model
        length = training.resolved_stages[0].sequence_length
        per_token = flops.training_flops_per_token(model, length, chunk=self.config.runtime.lightning_chunk)
        devices = self.mesh.devices
        has_tensorboard = self.writer is not None and self.writer.has_tensorboard
        begin = self.begin
        return [
            config_io.format_config(self.config),
            f"parameters {model_params.count_parameters(model):,}; {per_token:.3e} training FLOPs per token at length "
            f"{length}; {devices.size} x {devices.flat[0].device_kind}",
            f"unigram entropy of the training data: {self.unigram_entropy:.4f} nats per token",
            *metrics.missing_lines(),
            f"TensorBoard: {'on' if has_tensorboard else 'off (pip install tensorboardX)'}; run folder: {self.workdir} "
            "(config.json there holds every field)",
            *device_batch.reading_lines(self.config, self.mesh),
            *([f"RESUMED from step {begin.step} ({begin.tokens_seen:,} tokens seen)"] if begin.step else []),
        ]

    def _log_to_wandb(self, project: str):
        """Metrics go to Weights & Biases too, if `project` names one."""
        if project and self.writer is not None:
            config = json.loads(config_io.config_to_json(self.config))
            self.writer.add(metrics.WandbRun(self.workdir, project, name=self.config.name, config=config))

    def _draw(self, progress):
        """Draws loss.png, where that can be done; the run does not depend on it."""
        if not distributed.is_first() or metrics.missing_lines():
            return
        path = self.workdir / "loss.png"
        try:
            rows = metrics.read_rows(self.workdir / "metrics.jsonl")
            metrics.plot_loss(rows, path, unigram_entropy=self.unigram_entropy, title=self.config.name)
        except Exception as error:  # matplotlib has many
            progress.message(f"{path} was not drawn: {type(error).__name__}: {error}")

    def _close(self):
        self.batches.close()
        if self.writer is not None:
            self.writer.close()
