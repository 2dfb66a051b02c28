"""Learning rate, batch size and stage as exact functions of the tokens seen.

Host-side Python numbers: trillions of tokens do not fit float32, and a function of the token count alone
needs no state, so that a resumed run cannot drift. "Tokens seen" counts the slots of the batches taken
so far, padding included.
"""

import dataclasses
import math

from mmx_jax.config import LearningRatePhase, StageConfig, TrainingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The optimizer step that starts after `tokens_seen` tokens."""

    tokens_seen: int
    stage_index: int
    stage: StageConfig
    rows: int  # of the batch, over all processes
    microbatches: int  # into which the rows are split for gradient accumulation
    learning_rate: float

    @property
    def tokens(self) -> int:
        return self.rows * self.stage.sequence_length


def total_tokens(training: TrainingConfig) -> int:
    """Length of the run: the sum of its stages."""
    return training.run_tokens


def phase_value(phase: LearningRatePhase, progress: float) -> float:
    """Multiple of the peak rate at `progress` in [0, 1] of a phase."""
    if phase.shape == "constant":
        return phase.start
    if phase.shape == "linear":
        return phase.start + (phase.end - phase.start) * progress
    if phase.shape == "exponential":
        return phase.start * (phase.end / phase.start) ** progress
    return phase.end + (phase.start - phase.end) * 0.5 * (1.0 + math.cos(math.pi * progress))  # cosine


def learning_rate(training: TrainingConfig, tokens_seen: int) -> float:
    """Rate of the step that starts after `tokens_seen` tokens.

    A phase holds from its first token to the one before the next phase. After the last phase, which ends with the run
    (`TrainingConfig.check_schedule`), its end value stays.
    """
    start = 0
    for phase, end in zip(training.learning_rate_phases, training.phase_ends, strict=True):
        if tokens_seen < end:
            return training.learning_rate * phase_value(phase, (tokens_seen - start) / (end - start))
        start = end
    return training.learning_rate * phase_value(training.learning_rate_phases[-1], 1.0)


def batch_tokens(training: TrainingConfig, tokens_seen: int) -> int:
    """Tokens of the step that starts after `tokens_seen` tokens."""
    tokens = training.batch_tokens
    for step in training.batch_ramp:
        if tokens_seen >= step.from_tokens:
            tokens = step.batch_tokens
    return tokens


def stage_index(training: TrainingConfig, tokens_seen: int) -> int:
    """Index into `training.resolved_stages`; the last one stays when all tokens are seen."""
    end = 0
    for index, stage in enumerate(training.resolved_stages):
        end += stage.tokens
        if tokens_seen < end:
            return index
    return len(training.resolved_stages) - 1


def plan_step(training: TrainingConfig, tokens_seen: int) -> StepPlan | None:
    """The step that starts after `tokens_seen` tokens, None when training is over.

    A step that starts before the end of a stage is taken whole, so a stage may end up to one batch late.
    """
    if tokens_seen >= total_tokens(training):
        return None
    index = stage_index(training, tokens_seen)
    stage = training.resolved_stages[index]
    rows = batch_tokens(training, tokens_seen) // stage.sequence_length
    return StepPlan(
        tokens_seen=tokens_seen,
        stage_index=index,
        stage=stage,
        rows=rows,
        microbatches=rows // (training.microbatch_rows or rows),
        learning_rate=learning_rate(training, tokens_seen),
    )


def end_of_run(training: TrainingConfig, step: int, tokens_seen: int, last_step: int = 0) -> tuple[int, int]:
    """(step, tokens seen) where a run that is at `step` will end: when its tokens are used up, or at `last_step`."""
    end = total_tokens(training)
    while tokens_seen < end and not (last_step and step >= last_step):
        step, tokens_seen = step + 1, tokens_seen + batch_tokens(training, tokens_seen)
    return step, tokens_seen
