"""Ablation: pre-norm residuals, without the DeepNorm scales and initialisation gain (Table 5 of the report)."""

import dataclasses
from pathlib import Path

from mmx_jax.config import Config, load_config


def get_config() -> Config:
    base = load_config(Path(__file__).with_name("base.py"))
    model = dataclasses.replace(base.model, postnorm=False, initializer="normal")
    return dataclasses.replace(base, name="ablation_prenorm", model=model)
