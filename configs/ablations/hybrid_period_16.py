"""Ablation: one softmax layer in sixteen, the last."""

import dataclasses
from pathlib import Path

from mmx_jax.config import Config, load_config


def get_config() -> Config:
    base = load_config(Path(__file__).with_name("base.py"))
    model = dataclasses.replace(base.model, layer_pattern=("lightning",) * 15 + ("softmax",))
    return dataclasses.replace(base, name="ablation_hybrid_period_16", model=model)
