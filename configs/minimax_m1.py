"""MiniMax-M1: the shapes of Text-01 and its continued pre-training (arXiv 2506.13585, section 2.1).

7.5T tokens: 2.5T at 8e-5, then 5T down to 8e-6; the report does not name the curve, linear is ours. The four
long-context stages from 32K to 1M that follow are left out, because their token counts are not printed: add them
with `--set 'training.stages=[...]'`. The auxiliary loss was lowered by an unnamed amount: ours stays at the
value of the released config.json.
"""

import dataclasses
from pathlib import Path

from mmx_jax.config import Config, LearningRatePhase, load_config

BILLION = 10**9


def get_config() -> Config:
    text_01 = load_config(Path(__file__).with_name("minimax_text_01.py"))
    training = dataclasses.replace(
        text_01.training,
        total_tokens=7_500 * BILLION,
        batch_tokens=text_01.training.batch_ramp[-1].batch_tokens,
        batch_ramp=(),
        stages=(),
        learning_rate=8e-5,
        learning_rate_phases=(
            LearningRatePhase(shape="constant", tokens=2_500 * BILLION),
            LearningRatePhase(shape="linear", tokens=5_000 * BILLION, start=1.0, end=0.1),
        ),
    )
    model = dataclasses.replace(text_01.model, router_aux_loss_coef=0.001)
    return dataclasses.replace(text_01, name="minimax_m1", model=model, training=training)
