"""Ablation: lightning attention in every layer."""

import dataclasses
from pathlib import Path

from mmx_jax.config import Config, load_config


def get_config() -> Config:
    base = load_config(Path(__file__).with_name("base.py"))
    model = dataclasses.replace(base.model, layer_pattern=("lightning",))
    return dataclasses.replace(base, name="ablation_pure_lightning", model=model)
