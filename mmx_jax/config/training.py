"""The recipe of a run: stages, batches, learning rate, optimizer, losses."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

from mmx_jax.config.base import (
    Section,
    added,
    require,
    require_choice,
    require_not_negative,
    require_positive,
    require_sizes,
)

AUX_LOSS_FORMS = ("switch", "report")
AUX_LOSS_POOLING = ("pooled", "per_layer")
LR_SHAPES = ("constant", "linear", "exponential", "cosine")
PRNG_IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")
_DEFAULT_TOTAL_TOKENS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRatePhase(Section):
    """One piece of the schedule, from `start` to `end`, both times the peak rate.

    Its length is `share` of the tokens of the run, or `tokens`. The last phase may have neither: it is then what is
    left of the run.
    """

    shape: str = "constant"
    tokens: int = 0
    share: float = added(0.0)
    start: float = 1.0
    end: float = 1.0

    @property
    def is_rest(self) -> bool:
        """Whether the phase takes what the others leave of the run."""
        return not (self.tokens or self.share)

    def check(self) -> None:
        require_choice(self, shape=LR_SHAPES)
        require_not_negative(self, "tokens", "start", "end")
        require(0 <= self.share <= 1, f"share={self.share} of a learning-rate phase must lie in [0, 1]")
        require(
            not (self.tokens and self.share),
            f"a learning-rate phase has tokens={self.tokens} and share={self.share}: give one of them",
        )
        require(self.shape != "constant" or self.start == self.end, "a constant phase needs start == end")
        require(
            self.shape != "exponential" or (self.start > 0 and self.end > 0),
            "an exponential phase needs start > 0 and end > 0",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRampStep(Section):
    """From `from_tokens` seen tokens on, one optimizer step takes `batch_tokens` tokens."""

    from_tokens: int
    batch_tokens: int

    def check(self) -> None:
        require_not_negative(self, "from_tokens")
        require_positive(self, "batch_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig(Section):
    """One stage of training: its length, sequence length, RoPE base and mixture (Table 6 of the report)."""

    tokens: int
    sequence_length: int
    rope_theta: float | None = None  # None: the model's
    source_weights: tuple[float, ...] = ()  # one for each data source; empty: their own

    def check(self) -> None:
        require_positive(self, "tokens")
        require_sizes(self, "sequence_length")
        require(self.rope_theta is None or self.rope_theta > 0, f"rope_theta={self.rope_theta} must be positive")
        require(
            all(weight > 0 for weight in self.source_weights), f"source_weights={self.source_weights} must be positive"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """The recipe. Lengths of schedules are tokens, as in section 4.1 of the report, or shares of the run."""

    total_tokens: int = _DEFAULT_TOTAL_TOKENS
    sequence_length: int = 8192
    batch_tokens: int = 131072  # of one optimizer step: sequence_length x rows x accumulation
    # Rows of one forward and backward pass; 0: the whole batch at once. The balancing loss is that of a micro-batch.
    microbatch_rows: int = 0
    batch_ramp: tuple[BatchRampStep, ...] = ()
    stages: tuple[StageConfig, ...] = ()  # empty: one stage of total_tokens at sequence_length

    learning_rate: float = 2e-4  # the peak, which the phases scale
    learning_rate_phases: tuple[LearningRatePhase, ...] = (LearningRatePhase(),)
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    gradient_clip: float = 1.0  # global norm; 0: none

    z_loss_coef: float = 0.0
    aux_loss_form: str = "switch"  # "switch": E sum f P; "report": (1/E) sum f P
    aux_loss_pooling: str = "pooled"  # "pooled": f and P are means over layers; "per_layer": mean of losses

    seed: int = 0
    prng_implementation: str = "unsafe_rbg"

    MOVED: ClassVar[Mapping[str, str]] = {
        "loss_chunk": "runtime.loss_chunk",
        "max_nonfinite_steps": "monitoring.max_nonfinite_steps",
        "eval_every_steps": "monitoring.eval_every_steps",
        "eval_batches": "monitoring.eval_batches",
        "log_every_steps": "monitoring.log_every_steps",
    }

    def check(self) -> None:
        require_positive(self, "total_tokens", "batch_tokens", "learning_rate", "adam_eps")
        require_sizes(self, "sequence_length")
        require_not_negative(self, "microbatch_rows", "weight_decay", "gradient_clip", "z_loss_coef")
        require(0 <= self.adam_b1 < 1 and 0 <= self.adam_b2 < 1, f"{self.adam_b1=}, {self.adam_b2=} must lie in [0, 1)")
        require_choice(
            self,
            aux_loss_form=AUX_LOSS_FORMS,
            aux_loss_pooling=AUX_LOSS_POOLING,
            prng_implementation=PRNG_IMPLEMENTATIONS,
        )
        starts = [step.from_tokens for step in self.batch_ramp]
        require(starts == sorted(set(starts)), f"from_tokens of batch_ramp must grow, got {starts}")
        require(bool(self.learning_rate_phases), "learning_rate_phases is empty")
        for phase in self.learning_rate_phases[:-1]:
            require(
                not phase.is_rest,
                "only the last of learning_rate_phases may have neither tokens nor share (it runs to the end)",
            )
        self._check_batches()

    def _check_batches(self):
        for stage in self.resolved_stages:
            for batch_tokens in [self.batch_tokens] + [step.batch_tokens for step in self.batch_ramp]:
                require(
                    batch_tokens % stage.sequence_length == 0,
                    f"batch_tokens={batch_tokens} is not a multiple of sequence_length={stage.sequence_length}",
                )
                rows = batch_tokens // stage.sequence_length
                require(
                    rows % (self.microbatch_rows or rows) == 0,
                    f"the {rows} rows of a batch of {batch_tokens} tokens are not a multiple of "
                    f"microbatch_rows={self.microbatch_rows}",
                )

    def check_schedule(self) -> None:
        """Raises ConfigError where the phases of the learning rate do not end with the run.

        Such a run would end at a rate that nobody chose. This is no part of `check`: what earlier versions wrote in
        config.json can still be read.
        """
        require(
            self.total_tokens in (self.run_tokens, _DEFAULT_TOTAL_TOKENS),
            f"total_tokens={self.total_tokens:,}, and the stages have {self.run_tokens:,} tokens: change the tokens of "
            "the stages, or leave the stages out",
        )
        remedy = "give lengths as shares of the run, or no length to the last phase, which then is the rest of the run"
        taken, run = self.phase_ends[-1], self.run_tokens
        if self.learning_rate_phases[-1].is_rest:
            taken = (0, *self.phase_ends)[-2]
            require(
                taken < run,
                f"learning_rate_phases take {taken:,} tokens before the last one, and the run has {run:,}: {remedy}",
            )
            return
        require(taken <= run, f"learning_rate_phases take {taken:,} tokens, and the run has {run:,}: {remedy}")
        require(
            taken == run,
            f"learning_rate_phases end after {taken:,} of the {run:,} tokens of the run: {remedy}; or add a constant "
            "phase without a length",
        )

    @property
    def resolved_stages(self) -> tuple[StageConfig, ...]:
        return self.stages or (StageConfig(tokens=self.total_tokens, sequence_length=self.sequence_length),)

    @property
    def run_tokens(self) -> int:
        """Length of the run: the sum of its stages."""
        return sum(stage.tokens for stage in self.resolved_stages)

    def row_unit(self, stage: StageConfig) -> int:
        """Greatest common divisor of the rows of all batches of a stage: the rows that are read at a time.

        The position in the data then does not depend on where the batch ramp stands.
        """
        sizes = [self.batch_tokens, *(step.batch_tokens for step in self.batch_ramp)]
        return math.gcd(*(size // stage.sequence_length for size in sizes))

    @property
    def phase_ends(self) -> tuple[int, ...]:
        """Tokens seen at the end of each of `learning_rate_phases`."""
        tokens, share, ends = 0, 0.0, []
        for phase in self.learning_rate_phases:
            tokens, share = tokens + phase.tokens, share + phase.share
            ends.append(tokens + round(share * self.run_tokens))
        rounding = 1e-9 * self.run_tokens if share else 0  # shares such as 0.1 + 0.2 + 0.7 are not quite 1
        if phase.is_rest or abs(ends[-1] - self.run_tokens) <= rounding:
            ends[-1] = self.run_tokens
        return tuple(ends)
