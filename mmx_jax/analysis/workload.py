"""The training step or the inference that a plan or a dry run is made for."""

import dataclasses

from mmx_jax.config import Config
from mmx_jax.inference import generate
from mmx_jax.training import schedule


def first_step(config: Config) -> schedule.StepPlan:
    """The first step of the first stage."""
    step = schedule.plan_step(config.training, 0)
    assert step is not None, "a config trains on at least one token"
    return step


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferenceWorkload:
    """A batch of prompts of one length, and their continuations.

    Attributes:
      dtype: of weights, caches and computation.
      batch: number of sequences.
      prompt_length: tokens of each prompt.
      context: tokens of prompt and continuation.
      prefill_chunk: maximum number of tokens of a prompt in one pass.
    """

    dtype: str
    batch: int
    prompt_length: int
    context: int
    prefill_chunk: int

    @property
    def cache_len(self) -> int:
        """Tokens that the key-value caches hold."""
        return generate.slots_for(self.prompt_length, self.context, self.prefill_chunk)

    @property
    def pieces(self) -> list[int]:
        """Padded length of each piece of a prompt, in tokens."""
        return [bucket for _, _, bucket in generate.pieces(self.prompt_length, self.prefill_chunk)]

    def describe(self) -> str:
        return f"{self.batch} sequences with caches of {self.cache_len} tokens"

    def prefill_title(self) -> str:
        pieces = self.pieces
        size, number = max(pieces), len(pieces)
        return f"prefill of {self.prompt_length} tokens in pieces of up to {size}, {number} of them; one piece:"
