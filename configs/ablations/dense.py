"""Ablation: a dense SwiGLU of the width that is active in the base's mixture of experts."""

import dataclasses
from pathlib import Path

from mmx_jax.config import Config, load_config


def get_config() -> Config:
    base = load_config(Path(__file__).with_name("base.py"))
    model = dataclasses.replace(
        base.model, num_experts=1, experts_per_token=1, mlp_dim=base.model.experts_per_token * base.model.mlp_dim
    )
    return dataclasses.replace(base, name="ablation_dense", model=model)
