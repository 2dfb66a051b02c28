"""The training loop: optimizer steps over batches that it is handed, with validation and hooks."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import numpy as np

from mmx_jax.config import Config
from mmx_jax.models import flops
from mmx_jax.training import schedule, train_step
from mmx_jax.training.errors import NonFiniteError
from mmx_jax.training.schedule import StepPlan
from mmx_jax.training.validate import HeldOut


class Batches(Protocol):
    """Where the batches of a `Trainer` come from."""

    def next(self, plan: StepPlan) -> dict[str, jax.Array]:
        """The batch of the step `plan`: int32 [rows, T] for each of `device_batch.BATCH_KEYS`."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, as hooks see it."""

    step: int
    tokens_seen: int
    plan: StepPlan
    metrics: dict  # on the host, see `train_step.make_train_step`
    nonfinite_in_a_row: int
    tokens_per_second: float | None  # since the record before; None where the time went into compilation
    mfu: float | None


class Hook:
    """Callbacks around the steps of a `Trainer`; a subclass overrides those it needs."""

    def before_step(self, step: int) -> None:
        """Called before the optimizer step number `step`."""

    def after_step(self, step: int) -> None:
        """Called after it."""

    def on_record(self, record: StepRecord) -> None:
        """Called after every `monitoring.log_every_steps` steps."""

    def on_validation(self, trainer: "Trainer", held_out: HeldOut) -> None:
        """Called after a validation."""

    def save(self, trainer: "Trainer") -> None:
        """Called every `checkpoint.save_every_steps` steps and after the last one."""

    def advice(self, failed_on: int) -> Sequence[str]:
        """Lines about what to do when the state after step `failed_on` led to numbers that are not finite."""
        return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Where a `Trainer` begins; counts are those of the whole run."""

    step: int = 0
    tokens_seen: int = 0
    stage_index: int = 0
    loss: float | None = None  # of the last step
    held_out_loss: float | None = None
    validated: bool = False  # at this step


class Trainer:
    """Optimizer steps from a position on.

    Attributes:
      state: the training state, see `train_step`.
      step, tokens_seen: of the steps taken so far.
      loss: of the last step, nats per token; None before there is one.
      held_out_loss: of the last validation.
    """

    def __init__(
        self,
        config: Config,
        state,
        *,
        batches: Batches,
        validation: Callable[..., HeldOut] | None = None,
        hooks: Sequence[Hook] = (),
        position: Position = Position(),
        make_step: Callable[..., Callable] | None = None,
    ):
        """
        Args:
          config: of the run; its schedule decides how many steps there are.
          state: the training state on a mesh, which must be the ambient one (`jax.set_mesh`) when `run` is called.
          validation: (params, config of the stage) -> HeldOut; None: there is none.
          make_step: (config of a stage, mesh) -> step, for another loss, say; None: `train_step.make_train_step`.
        """
        self.config, self.state, self._make_step = config, state, make_step or train_step.make_train_step
        self.mesh = jax.tree.leaves(state["params"])[0].sharding.mesh
        self._batches, self._validation, self._hooks = batches, validation, tuple(hooks)
        self.step, self.tokens_seen, self.loss = position.step, position.tokens_seen, position.loss
        self.held_out_loss = position.held_out_loss
        self.nonfinite_in_a_row = 0
        self.stage_config = config.in_stage(position.stage_index)  # of the stage that is open, or will be
        self._validated_at = position.step if position.validated else None
        self._saved_at = position.step
        self._train_steps = {}  # by RoPE base
        self._compiled = set()  # (RoPE base, rows, length) of the steps taken so far

    def run(self, last_step: int = 0, should_stop: Callable[[], object] = lambda: False) -> None:
        """Trains until the tokens of the schedule are used up, `last_step` is reached (0: no limit), or a stop.

        Args:
          should_stop: asked before every step.

        Raises:
          NonFiniteError: more steps in a row than `monitoring.max_nonfinite_steps` were not finite.
        """
        clock = _Clock(self.tokens_seen)
        plan = schedule.plan_step(self.config.training, self.tokens_seen)
        if self.step and self._validation_is_due() and plan is not None:
            self.validate()  # a run that ended between the two
        while plan is not None and not (last_step and self.step >= last_step) and not should_stop():
            self._call("before_step", self.step + 1)
            metrics, compiled = self._take_step(plan)
            self._call("after_step", self.step)
            if self.step % self.config.monitoring.log_every_steps == 0:
                self._call("on_record", self._record(plan, metrics, None if compiled else clock.lap(self.tokens_seen)))
                if compiled:
                    clock.lap(self.tokens_seen)
            plan = schedule.plan_step(self.config.training, self.tokens_seen)
            # A step is safe before anything else is tried.
            if self.step % self.config.checkpoint.save_every_steps == 0:
                with clock.paused():
                    self.save()
            if self._validation_is_due():
                with clock.paused():
                    self.validate()

    def save(self) -> None:
        """Lets the hooks save this step, once."""
        if self._saved_at != self.step:
            self._saved_at = self.step
            self._call("save", self)

    def validate(self) -> None:
        """Held-out loss of the parameters as they are, once a step."""
        if self._validation is None or self._validated_at == self.step:
            return
        held_out = self._validation(self.state["params"], self.stage_config)
        self._validated_at, self.held_out_loss = self.step, held_out.loss
        self._call("on_validation", self, held_out)

    def _validation_is_due(self):
        every = self.config.monitoring.eval_every_steps
        return every and self.step % every == 0

    def _call(self, method, *args):
        for hook in self._hooks:
            getattr(hook, method)(*args)

    def _take_step(self, plan):
        """One optimizer step: (metrics on the host, whether it was compiled)."""
        self.stage_config = self.config.in_stage(plan.stage_index)
        batch = self._batches.next(plan)
        step_function = self._step_function()
        key = (self.stage_config.model.rope_theta, *batch["tokens"].shape)
        compiled = key not in self._compiled
        self._compiled.add(key)
        with np.errstate(over="ignore"):  # a rate that float32 does not hold is infinite, which the step notices
            rate = np.float32(plan.learning_rate)
        self.state, metrics = step_function(self.state, batch, rate)
        self.step += 1
        self.tokens_seen += plan.tokens
        gradient_norms = metrics.pop("gradient_norms")
        metrics = jax.device_get(metrics)
        self.loss = float(metrics["loss"])
        self.nonfinite_in_a_row = 0 if metrics["finite"] else self.nonfinite_in_a_row + 1
        if self.nonfinite_in_a_row > self.config.monitoring.max_nonfinite_steps:
            raise NonFiniteError(self._nonfinite_message(metrics, jax.device_get(gradient_norms)))
        return metrics, compiled

    def _step_function(self):
        if (base := self.stage_config.model.rope_theta) not in self._train_steps:
            self._train_steps[base] = self._make_step(self.stage_config, self.mesh)
        return self._train_steps[base]

    def _record(self, plan, metrics, lap) -> StepRecord:
        per_second = mfu = None
        if lap is not None:
            seconds, tokens = lap
            per_second = tokens / seconds
            per_token = flops.training_flops_per_token(
                self.config.model, plan.stage.sequence_length, chunk=self.config.runtime.lightning_chunk
            )
            devices = self.mesh.devices
            mfu = flops.mfu(per_second * per_token, devices.flat[0].device_kind, devices.size)
        return StepRecord(
            step=self.step,
            tokens_seen=self.tokens_seen,
            plan=plan,
            metrics=metrics,
            nonfinite_in_a_row=self.nonfinite_in_a_row,
            tokens_per_second=per_second,
            mfu=mfu,
        )

    def _nonfinite_message(self, metrics, gradient_norms):
        names = train_step.nonfinite_names(gradient_norms, len(self.config.model.layer_pattern))
        allowed = self.config.monitoring.max_nonfinite_steps
        lines = [
            f"step {self.step} is not finite: loss {metrics['loss']}, z-loss {metrics['z_loss']}, "
            f"aux loss {metrics['aux_loss']}, gradient norm {metrics['gradient_norm']} "
            f"({self.nonfinite_in_a_row} such steps in a row, {allowed} allowed)",
            f"gradients that are not finite: {', '.join(names[:12]) or 'none'}"
            + (f" and {len(names) - 12} more" if len(names) > 12 else ""),
            "router by layer: "
            + "; ".join(f"{name} {np.array2string(x, precision=3)}" for name, x in metrics["router"].items()),
            f"parameters: norm {metrics['parameter_norm']} before this step",
        ]
        for hook in self._hooks:
            lines += hook.advice(self.step - self.nonfinite_in_a_row)
        return "\n".join(lines)


class _Clock:
    """Seconds and tokens between two records, validation and saving left out."""

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
