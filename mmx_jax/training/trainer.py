"""A training run: everything between a Config and a folder of checkpoints."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal
import threading
import time

import jax
import numpy as np
import rich.console

from mmx_jax import distributed, metrics, sharding
from mmx_jax.checkpoints.manager import Checkpointer, CheckpointError, NotFiniteError
from mmx_jax.config import Config, ConfigError
from mmx_jax.config import io as config_io
from mmx_jax.data import device_batch, identity
from mmx_jax.data import pipeline as data_pipeline
from mmx_jax.data.tokenizer import Tokenizer
from mmx_jax.models import flops
from mmx_jax.models import params as model_params
from mmx_jax.storage import filesystem
from mmx_jax.training import initialize, schedule, train_step
from mmx_jax.training import resume as start
from mmx_jax.training.progress import Progress

# Fields that may differ between a run and its continuation: they change neither the data nor the function nor the
# optimizer, only where, how fast and how closely watched it is computed (rounding included).
HARMLESS_FIELDS = (
    "name",
    "mesh.",
    "checkpoint.",
    "data.prefetch",
    "data.on_bad_row",
    "data.cache_dir",
    "model.remat",
    "model.scan_blocks",
    "model.lightning_implementation",
    "model.lightning_chunk",
    "model.softmax_implementation",
    "model.softmax_block",
    "model.moe_implementation",
    "model.sequence_lightning",
    "model.sequence_softmax",
    "training.microbatch_rows",
    "training.loss_chunk",
    "training.max_nonfinite_steps",
    "training.eval_every_steps",
    "training.eval_batches",
    "training.log_every_steps",
)


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message names the step and the remedy."""


class NonFiniteError(TrainingError):
    """The loss or a gradient was not finite more often than the configuration allows."""


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
    workdir,
    *,
    steps: int = 0,
    resume: str = "auto",
    init_from: str = "",
    watch: Watch = Watch(),
    console=None,
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
      TrainingError, CheckpointError, ConfigError, processes.LostProcessError: with one clear message.
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
        with start.alone_in(workdir, say) as check_lock:
            checkpointer = Checkpointer(
                workdir / "checkpoints",
                keep=config.checkpoint.keep,
                keep_best=config.checkpoint.keep_best,
                asynchronous=config.checkpoint.asynchronous,
            )
            with distributed.together(lambda: how_to_continue(checkpointer)), _closing(checkpointer):
                begin, notes = _find_start(config, workdir, checkpointer, resume)
                notes += initialize.check(config, init_from, workdir, begin.step)
                if not begin.step:
                    begin = dataclasses.replace(begin, init_from=init_from)
                if begin.step == checkpointer.latest_step() and start.is_finished(config, begin, steps):
                    say(start.finished_line(config, begin, workdir))
                    return _finished(config, workdir, begin)
                with jax.set_mesh(mesh), StopSignals() as signals:
                    run = _Run(config, workdir, mesh, checkpointer, begin, check_lock)
                    run.log_to_wandb(watch.wandb)
                    return _run_shown(run, notes, steps, watch, signals, console)


def _run_shown(run, notes, steps, watch, signals, console) -> TrainResult:
    """Runs to the end with its progress on the console, and closes the run."""
    end_step, end_tokens = schedule.end_of_run(run.config.training, run.step, run.tokens_seen, steps)
    with Progress(end_tokens, run.tokens_seen, step=run.step, total_steps=end_step, console=console) as progress:
        for line in run.introduction() + notes + run.notes:
            progress.message(line)
        try:
            return run.loop(steps, watch.profile_steps, signals, progress)
        finally:
            run.close()


def _find_start(config, workdir, checkpointer, resume):
    """(where the run begins, notes); raises ConfigError where the configuration does not continue that step."""
    step = _resume_step(checkpointer, resume)
    if not step:
        return start.Start(), []
    stored, current = checkpointer.read_config(step), json.loads(config_io.config_to_json(config))
    differing = check_same_run(stored, current, branch=resume.isdecimal())
    notes = [f"continues from step {step} with another {field}" for field in differing]
    other_order = stored["data"]["seed"] != current["data"]["seed"]
    if other_order:
        notes.append(
            f"data.seed is another: the data of the stage begin anew in the order of seed {config.data.seed}, and "
            "held-out losses before and after this step are of other documents"
        )
    return start.look_at(checkpointer, step, workdir, data_begins_anew=other_order), notes


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


@contextlib.contextmanager
def _closing(checkpointer):
    try:
        yield
    finally:
        # An error on its way out is the one to report: a failed save has been raised by then, or will be below.
        with contextlib.suppress(Exception):
            checkpointer.close()


class _Run:
    """The mutable half of a run: device state, position, data iterators, writers."""

    def __init__(self, config, workdir, mesh, checkpointer, begin, check_lock):
        self.config, self.workdir, self.mesh, self.checkpointer = config, workdir, mesh, checkpointer
        self.check_lock = check_lock  # raises where another run has taken the folder over
        with distributed.first_before_others("tokenizer"):
            self.tokenizer, tokenizer_notes = prepare_tokenizer(config, workdir, begin.init_from)
        self.corpus = data_pipeline.open_corpus(config.data, self.tokenizer)
        for stage in config.training.resolved_stages:
            data_pipeline.mixture(config.data, stage.source_weights)  # raises at once, not when the stage begins
        self.notes = tokenizer_notes + self.corpus.notes
        self.unigram_entropy = data_pipeline.corpus_statistics(self.corpus, self.tokenizer).unigram_entropy
        self.step, self.tokens_seen, self.nonfinite_in_a_row = begin.step, begin.tokens_seen, 0
        self.iterator, self.iterator_stage = None, None
        self.stage_config = config.in_stage(0)  # of the stage that is open, or will be
        # (rows of a batch, what this process holds of each): read now, for a run must not end over them
        self.eval_batches = self._open_eval_batches() if config.data.eval_fraction else None
        self.train_steps, self.eval_steps = {}, {}  # by RoPE base
        self.compiled = set()  # (RoPE base, rows, length) of the steps taken so far
        self.last_loss, self.eval_loss, self.saved_at = begin.loss, begin.eval_loss, begin.step
        self.eval_at = None if begin.eval_row is None else begin.step
        if begin.step:
            self._restore(begin)
        elif begin.init_from:
            self.state = initialize.load_state(config, mesh, begin.init_from)
        else:
            self.state = train_step.init_state(config, mesh)
        self.begins_from_weights = bool(begin.init_from)
        self.writer = None
        if distributed.is_first():
            filesystem.write_text(workdir / "config.json", config_io.config_to_json(config))
            self.writer = metrics.MetricsWriter(workdir, resume_step=begin.step)

    def _restore(self, begin):
        """Reads the step and its place in the data; only then are later steps given up."""
        abstract = train_step.abstract_state(self.config, self.mesh)
        self.state, position, data_state = self.checkpointer.restore(begin.step, abstract)
        if position["stage_index"] is not None:
            self._open_stage(position["stage_index"])
            if not begin.data_begins_anew:
                self.iterator.set_state(data_state)
                self.notes += self.iterator.notes
        if discarded := self.checkpointer.discard_after(begin.step):
            self.notes.append(f"discarded the later steps {', '.join(map(str, discarded))}")

    def log_to_wandb(self, project: str):
        """Metrics go to Weights & Biases too, if `project` names one."""
        if project and self.writer is not None:
            config = json.loads(config_io.config_to_json(self.config))
            self.writer.add(metrics.WandbRun(self.workdir, project, name=self.config.name, config=config))

    def close(self):
        """Stops the thread of the data pipeline and closes the files."""
        if self.iterator is not None:
            self.iterator.close()
        if self.writer is not None:
            self.writer.close()

    def introduction(self) -> list[str]:
        """What is printed before the first step."""
        training, model = self.config.training, self.config.model
        length = training.resolved_stages[0].sequence_length
        per_token = flops.training_flops_per_token(model, length)
        devices = self.mesh.devices
        has_tensorboard = self.writer is not None and self.writer.has_tensorboard
        return [
            config_io.format_config(self.config),
            f"parameters {model_params.count_parameters(model):,}; {per_token:.3e} training FLOPs per token at length "
            f"{length}; {devices.size} x {devices.flat[0].device_kind}",
            f"unigram entropy of the training data: {self.unigram_entropy:.4f} nats per token",
            *metrics.missing_lines(),
            f"TensorBoard: {'on' if has_tensorboard else 'off (pip install tensorboardX)'}; run folder: {self.workdir} "
            "(config.json there holds every field)",
            *device_batch.reading_lines(self.config, self.mesh),
            *([f"RESUMED from step {self.step} ({self.tokens_seen:,} tokens seen)"] if self.step else []),
        ]

    def loop(self, steps, profile_steps, signals, progress) -> TrainResult:
        clock = _Clock(self.tokens_seen)
        plan = schedule.plan_step(self.config.training, self.tokens_seen)
        if self.step and self._evaluation_is_due() and plan is not None:
            self._evaluate(progress)  # a run that ended between the two
        profiled = profile_steps and distributed.is_first()
        if self.begins_from_weights:
            self._evaluate(progress)  # how good the weights are before they change
        while plan is not None and not (steps and self.step >= steps) and not signals.agreed():
            if profiled and self.step + 1 == profile_steps[0]:
                jax.profiler.start_trace(str(self.workdir / "profile"))
            row = self._train_one(plan)
            if profiled and self.step == profile_steps[1]:
                jax.profiler.stop_trace()
            if self.step % self.config.training.log_every_steps == 0:
                self._log(row, clock, plan, progress)
            plan = schedule.plan_step(self.config.training, self.tokens_seen)
            # A step is safe before anything else is tried.
            if self.step % self.config.checkpoint.save_every_steps == 0:
                with clock.paused():
                    self._save(progress)
            if self._evaluation_is_due():
                with clock.paused():
                    self._evaluate(progress)
            self.checkpointer.poll()
        if received := signals.agreed():
            progress.message(f"{received}: saving step {self.step}, then stopping")
        if self.saved_at != self.step:
            self._save(progress)
        self.checkpointer.wait()
        if not received and self.eval_at != self.step:
            self._evaluate(progress)
        for line in self.corpus.left_out:
            progress.message(line)
        self._draw(progress)
        return TrainResult(
            step=self.step,
            tokens_seen=self.tokens_seen,
            loss=self.last_loss,
            eval_loss=self.eval_loss,
            unigram_entropy=self.unigram_entropy,
            interrupted=bool(received),
        )

    def _evaluation_is_due(self):
        every = self.config.training.eval_every_steps
        return every and self.step % every == 0 and self.eval_at != self.step

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

    def _train_one(self, plan):
        """One optimizer step; returns its metrics on the host. Raises NonFiniteError beyond the allowed number."""
        if self.iterator_stage != plan.stage_index:
            self._open_stage(plan.stage_index)
        batch = self._global_batch(plan)
        step_function = self._step_function()
        self.compiles = (key := (self.stage_config.model.rope_theta, *batch["tokens"].shape)) not in self.compiled
        self.compiled.add(key)
        with np.errstate(over="ignore"):  # a rate that float32 does not hold is infinite, which the step notices
            rate = np.float32(plan.learning_rate)
        self.state, row = step_function(self.state, batch, rate)
        self.step += 1
        self.tokens_seen += plan.tokens
        gradient_norms = row.pop("gradient_norms")
        row = jax.device_get(row)
        self.last_loss = float(row["loss"])
        if row["finite"]:
            self.nonfinite_in_a_row = 0
        else:
            self.nonfinite_in_a_row += 1
            if self.nonfinite_in_a_row > self.config.training.max_nonfinite_steps:
                raise NonFiniteError(self._nonfinite_message(row, jax.device_get(gradient_norms)))
        return row

    def _open_stage(self, index):
        # Each stage shuffles anew: its sequence length and mixture make it another stream of batches.
        stage = self.config.training.resolved_stages[index]
        unit = self.config.training.row_unit(stage)
        if self.iterator is not None:
            self.iterator.close()
        self.iterator = data_pipeline.make_train_iterator(
            self.corpus,
            self.tokenizer,
            sequence_length=stage.sequence_length,
            rows=unit,
            own_rows=device_batch.own_rows(self.mesh, unit),
            source_weights=stage.source_weights,
            seed=self.config.data.seed + index,
        )
        self.iterator_stage, self.stage_config = index, self.config.in_stage(index)
        self._data_state()  # raises at once where processes do not see the same data

    def _data_state(self):
        """The position of all shards of the data, from the processes that read them; None before the first stage."""
        states = distributed.gather(None if self.iterator is None else self.iterator.get_state())
        return None if self.iterator is None else data_pipeline.merge_states(states)

    def _global_batch(self, plan):
        unit = self.config.training.row_unit(plan.stage)
        parts = [next(self.iterator) for _ in range(plan.rows // unit)]
        batch = {key: device_batch.join_parts([part[key] for part in parts]) for key in device_batch.BATCH_KEYS}
        return device_batch.to_devices(batch, self.mesh, plan.rows)

    def _step_function(self):
        if (base := self.stage_config.model.rope_theta) not in self.train_steps:
            self.train_steps[base] = train_step.make_train_step(self.stage_config, self.mesh)
        return self.train_steps[base]

    def _eval_step(self):
        if (base := self.stage_config.model.rope_theta) not in self.eval_steps:
            self.eval_steps[base] = train_step.make_eval_step(self.stage_config)
        return self.eval_steps[base]

    def _open_eval_batches(self):
        """The same batches through the whole run, of the first stage's length, so that their losses compare."""
        training = self.config.training
        stage = training.resolved_stages[0]
        rows = training.microbatch_rows or training.row_unit(stage)
        batches = data_pipeline.make_eval_batches(
            self.corpus,
            self.tokenizer,
            sequence_length=stage.sequence_length,
            rows=rows,
            batches=training.eval_batches,
            own_rows=device_batch.own_rows(self.mesh, rows),
            source_weights=stage.source_weights,
        )
        return rows, batches

    def _evaluate(self, progress):
        """Held-out loss over a fixed set of batches, with the RoPE base of the present stage."""
        if self.eval_batches is None:
            return
        rows, batches = self.eval_batches
        eval_step = self._eval_step()
        batches = (device_batch.to_devices(batch, self.mesh, rows) for batch in batches)
        sums = [jax.device_get(eval_step(self.state["params"], batch)) for batch in batches]
        self.eval_at = self.step
        count = sum(float(part["count"]) for part in sums)
        self.eval_loss = sum(float(part["nll"]) for part in sums) / count
        if self.saved_at == self.step:
            self.checkpointer.note_loss(self.step, self.eval_loss)
        accuracy = sum(float(part["correct"]) for part in sums) / count
        self._write_row(
            {
                "step": self.step,
                "tokens_seen": self.tokens_seen,
                "eval_loss": self.eval_loss,
                "eval_accuracy": accuracy,
                "unigram_entropy": self.unigram_entropy,
            }
        )
        progress.message(
            f"step {self.step}  held-out loss {self.eval_loss:.4f} (unigram entropy {self.unigram_entropy:.4f})  "
            f"accuracy {100 * accuracy:.1f}%"
        )

    def _log(self, row, clock, plan, progress):
        seconds, tokens = clock.lap(self.tokens_seen)
        per_second, utilisation = None, None  # where the time went into compilation
        if not self.compiles:
            per_second = tokens / seconds
            per_token = flops.training_flops_per_token(self.config.model, plan.stage.sequence_length)
            devices = self.mesh.devices
            utilisation = flops.mfu(per_second * per_token, devices.flat[0].device_kind, devices.size)
        router = {f"router_{name}": value.tolist() for name, value in row["router"].items()}
        scalars = {name: float(value) for name, value in row.items() if name != "router"}
        self._write_row(
            {"step": self.step, "tokens_seen": self.tokens_seen, "learning_rate": plan.learning_rate}
            | scalars
            | {"tokens_per_second": per_second, "mfu": utilisation}
            | ({"bad_rows": self.corpus.bad_rows} if self.config.data.on_bad_row == "skip" else {})
            | router
        )
        if not row["finite"]:
            progress.message(
                f"step {self.step} was skipped: loss {row['loss']}, gradient norm {row['gradient_norm']} "
                f"({self.nonfinite_in_a_row} in a row, {self.config.training.max_nonfinite_steps} allowed)"
            )
        progress.update(
            step=self.step,
            tokens_seen=self.tokens_seen,
            loss=self.last_loss,
            tokens_per_second=per_second,
            mfu=utilisation,
        )

    def _write_row(self, row):
        if self.writer is not None:
            self.writer.write(row)

    def _save(self, progress):
        self.saved_at = self.step
        if self.nonfinite_in_a_row:
            # Whatever broke the last step may be in the parameters: it must not push out a good checkpoint.
            progress.message(f"step {self.step} is not saved: the last {self.nonfinite_in_a_row} steps were not finite")
            return
        self.check_lock()
        try:
            self.checkpointer.save(
                self.step,
                self.state,
                position={
                    "tokens_seen": self.tokens_seen,
                    "stage_index": self.iterator_stage,
                },
                data=self._data_state(),
                config=json.loads(config_io.config_to_json(self.config)),
            )
        except NotFiniteError as error:
            raise NonFiniteError("\n".join([str(error), *self._ways_on(self.step)])) from None

    def _nonfinite_message(self, row, gradient_norms):
        names = train_step.nonfinite_names(gradient_norms, len(self.config.model.layer_pattern))
        router = row["router"]
        return "\n".join(
            [
                f"step {self.step} is not finite: loss {row['loss']}, z-loss {row['z_loss']}, "
                f"aux loss {row['aux_loss']}, gradient norm {row['gradient_norm']} "
                f"({self.nonfinite_in_a_row} such steps in a row, {self.config.training.max_nonfinite_steps} allowed)",
                f"gradients that are not finite: {', '.join(names[:12]) or 'none'}"
                + (f" and {len(names) - 12} more" if len(names) > 12 else ""),
                "router by layer: "
                + "; ".join(f"{name} {np.array2string(values, precision=3)}" for name, values in router.items()),
                f"parameters: norm {row['parameter_norm']} before this step",
                *self._ways_on(self.step - self.nonfinite_in_a_row),
            ]
        )

    def _ways_on(self, failed_on):
        """What to do about numbers that are not finite, which the state of step `failed_on` led to."""
        self.checkpointer.wait()
        good = self.checkpointer.last_good()
        if good is None:
            return [
                f"no good checkpoint has been saved in {self.checkpointer.directory}: begin anew with a lower "
                "learning rate"
            ]
        place = self.checkpointer.directory
        lower = f"--set training.learning_rate={self.config.training.learning_rate / 10:g}"
        if good < failed_on:
            return [
                f"last good checkpoint: step {good} in {place}",
                f"continue from there with another data.seed or learning rate, as in --resume={good} {lower}, or skip "
                "such steps with training.max_nonfinite_steps",
            ]
        # No learning rate mends a step whose own values are too large: what comes first is its loss.
        older = self.checkpointer.last_good(before=good)
        lines = [f"the newest checkpoint in {place}, step {good}, is finite, and the very next step failed on it"]
        if older is not None:
            lines.append(
                f"last good checkpoint: step {older}, which finite steps followed; continue from there with a "
                f"lower learning rate, as in --resume={older} {lower}"
            )
        else:
            lines.append("it is the only one: begin anew in another --workdir with a lower learning rate")
        return [
            *lines,
            f"if one bad batch is to blame: --resume={good} with another data.seed, or skip such steps with "
            "training.max_nonfinite_steps",
        ]


class StopSignals:
    """Context manager: SIGTERM and SIGINT ask for a stop after the running step; a second SIGINT interrupts."""

    def __init__(self):
        self.received = ""
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> str:
        """The name of a signal that some process received, or ""; every process gets the same answer."""
        number = distributed.largest(signal.Signals[self.received] if self.received else 0)
        return signal.Signals(number).name if number else ""

    def _handle(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


class _Clock:
    """Seconds and tokens between log lines, evaluation and saving left out."""

    def __init__(self, tokens_seen):
        self._start, self._tokens = time.monotonic(), tokens_seen

    @contextlib.contextmanager
    def paused(self):
        began = time.monotonic()
        yield
        self._start += time.monotonic() - began

    def lap(self, tokens_seen):
        now = time.monotonic()
        lap = max(now - self._start, 1e-9), tokens_seen - self._tokens
        self._start, self._tokens = now, tokens_seen
        return lap


def check_batches(config: Config, mesh):
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
        check_tokens(config.model, mesh, rows // shards, stage.sequence_length)


def check_tokens(model, mesh, rows: int, length: int):
    """Raises ConfigError where the experts could not be given the same number of tokens by every device.

    Args:
      rows: of each batch shard, `length` tokens long.
    """
    pieces = sharding.axes_size(mesh, ("seq", "tensor"), dividing=length, of="training.sequence_length: a row")
    tokens = rows * length // pieces
    if mesh.size > 1 and tokens % model.token_groups:
        raise ConfigError(
            f"model.token_groups={model.token_groups} does not divide the {tokens} tokens of a device; change it, "
            "sequence_length, microbatch_rows or mesh"
        )


def check_same_run(stored: dict, current: dict, *, branch: bool = False) -> list[str]:
    """The harmless fields that differ, as "field: old -> new"; raises ConfigError on any other difference.

    Args:
      branch: the step was named, with --resume=N: `start.BRANCH_FIELDS` may differ too.

    Raises TrainingError where the run was saved before there were shards.
    """
    if "shards" not in stored.get("data", {}):
        raise TrainingError(
            "the run in this folder was saved by a version whose data position belongs to its processes, and "
            "which this one does not read: continue with that version, or start in a new --workdir"
        )
    old, new = (_flatten(identity.with_numbered_sources(config_io.resolved(plain))) for plain in (stored, current))
    allowed = HARMLESS_FIELDS
    if _same_rates_so_far(old, new):
        allowed += ("training.total_tokens", "training.learning_rate_phases")
        for flat in (old, new):  # where they end says no more than the length of the run does
            flat["training.learning_rate_phases"] = [
                {name: phase[name] for name in ("shape", "start", "end")}
                for phase in flat["training.learning_rate_phases"]
            ]
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    allowed += start.BRANCH_FIELDS if branch else ()
    lines = {key: f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in differing}
    harmful = [line for key, line in lines.items() if not (key.startswith(allowed) or identity.is_place(key))]
    if harmful:
        could_branch = any(line.startswith(start.BRANCH_FIELDS) for line in harmful) and not branch
        fields = ", ".join(field.rstrip("_") for field in start.BRANCH_FIELDS)
        raise ConfigError(
            "the run in this folder was made with another configuration and would not continue as itself:\n  "
            + "\n  ".join(harmful)
            + "\nundo these changes, or start in a new --workdir"
            + (f"; from a step that is named, with --resume=N, these may change: {fields}" if could_branch else "")
        )
    return [line for key, line in lines.items() if key in old]  # the others did not exist when it was saved


def prepare_tokenizer(config: Config, workdir: pathlib.Path, init_from: str = "") -> tuple[Tokenizer, list[str]]:
    """The run's tokenizer, from workdir/tokenizer, and what to tell the user about it.

    On the first start it is loaded or trained, and saved there. Raises ConfigError where `data.tokenizer` names another
    one than that of the run, or the model has too few embeddings.

    Args:
      init_from: the checkpoint that the run begins from now, whose tokenizer it is then; empty: none.
    """
    folder, notes = workdir / "tokenizer", []
    if init_from:
        loaded = initialize.tokenizer_of(config, init_from)
        if folder.exists():
            initialize.check_vocabulary(Tokenizer.load(folder), loaded, str(folder), "choose another --workdir")
    elif folder.exists():
        loaded = Tokenizer.load(folder)
        notes = identity.check_named_tokenizer(config.data.tokenizer, loaded, folder)
    elif config.data.tokenizer:
        loaded = Tokenizer.load(config.data.tokenizer)
    else:
        size = config.data.tokenizer_vocab_size or config.model.vocab_size
        loaded = Tokenizer.train(data_pipeline.iterate_texts(config.data), size)
    if loaded.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {loaded.vocab_size} entries of the "
            "tokenizer"
        )
    if not folder.exists():
        temporary = workdir / "tokenizer.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        _save_tokenizer(loaded, temporary)
        os.replace(temporary, folder)
        loaded = Tokenizer.load(folder)  # as every later start and every other process reads it
    return loaded, notes


def _save_tokenizer(tokenizer, folder):
    try:
        tokenizer.save(folder)
    except Exception as error:  # the library raises bare Exceptions
        if not filesystem.is_disk_full(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def how_to_continue(checkpointer) -> str:
    """What to do about a run whose processes have ended."""
    steps = checkpointer.steps_on_disk()
    where = f"continues from step {steps[-1]} in" if steps else "begins anew: there is no checkpoint in"
    return f"start all processes again with the same --workdir, and the run {where} {checkpointer.directory}"


def _resume_step(checkpointer, resume) -> int:
    steps = checkpointer.steps()
    if resume == "auto":
        return steps[-1] if steps else 0
    if resume == "no":
        if steps:
            raise TrainingError(
                f"{checkpointer.directory} holds steps {', '.join(map(str, steps))} and --resume=no was given: "
                "choose another --workdir, or --resume=auto"
            )
        return 0
    if not resume.isdigit() or int(resume) not in steps:
        raise CheckpointError(
            f"--resume={resume}: give auto, no or one of the steps of {checkpointer.directory}: "
            f"{', '.join(map(str, steps)) or 'none'}"
        )
    return int(resume)


def _same_rates_so_far(old: dict, new: dict) -> bool:
    """Whether two runs, resolved and flattened, have the same learning rates up to the end of the shorter one."""
    if old["training.stages"] or new["training.stages"]:
        return False
    end = min(flat["training.total_tokens"] for flat in (old, new))
    return _rates_until(old, end) == _rates_until(new, end)


def _rates_until(flat: dict, end: int) -> list[dict]:
    """The phases of the learning rate that begin before `end` tokens, constant ones cut there."""
    phases, begin = [], 0
    for phase in flat["training.learning_rate_phases"]:
        if begin < end:
            cut = phase["shape"] == "constant" and phase["end_tokens"] > end
            phases.append(phase | {"end_tokens": end} if cut else phase)
        begin = phase["end_tokens"]
    if begin < end:  # the value at the end of the last phase stays
        phases.append(phase | {"shape": "constant", "end_tokens": end, "start": phase["end"]})
    return phases


def _flatten(tree, prefix=""):
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flatten(value, f"{prefix}.{key}".strip(".")).items()}
    return {prefix: tree}
