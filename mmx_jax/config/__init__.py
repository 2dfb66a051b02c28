"""Configuration: frozen dataclasses, checked when built; `mmx_jax.config.io` reads, overrides and writes them.

Dtypes, attention kinds and implementations are strings, so that this package imports neither jax nor flax and a config
file costs nothing to load.
"""

from mmx_jax.config.base import ConfigError, Section
from mmx_jax.config.data import ON_BAD_ROW, SOURCE_FORMATS, DataConfig, ReadingConfig, SourceConfig
from mmx_jax.config.io import apply_overrides, config_from_json, config_to_json, format_config, load_config
from mmx_jax.config.model import (
    BRANCHES,
    CAPACITY_SCOPES,
    FLOAT_DTYPES,
    LAYER_KINDS,
    ModelConfig,
    deepnorm_alpha,
    shortest_period,
)
from mmx_jax.config.parallel import MeshConfig
from mmx_jax.config.run import RESUMABLE, CheckpointConfig, Config, MonitoringConfig
from mmx_jax.config.runtime import REMAT_POLICIES, SEQUENCE_METHODS, RuntimeConfig
from mmx_jax.config.training import (
    AUX_LOSS_FORMS,
    AUX_LOSS_POOLING,
    LR_SHAPES,
    PRNG_IMPLEMENTATIONS,
    BatchRampStep,
    LearningRatePhase,
    StageConfig,
    TrainingConfig,
)

__all__ = [
    "AUX_LOSS_FORMS",
    "AUX_LOSS_POOLING",
    "BRANCHES",
    "CAPACITY_SCOPES",
    "FLOAT_DTYPES",
    "LAYER_KINDS",
    "LR_SHAPES",
    "ON_BAD_ROW",
    "PRNG_IMPLEMENTATIONS",
    "REMAT_POLICIES",
    "RESUMABLE",
    "SEQUENCE_METHODS",
    "SOURCE_FORMATS",
    "BatchRampStep",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "LearningRatePhase",
    "MeshConfig",
    "ModelConfig",
    "MonitoringConfig",
    "ReadingConfig",
    "RuntimeConfig",
    "Section",
    "SourceConfig",
    "StageConfig",
    "TrainingConfig",
    "apply_overrides",
    "config_from_json",
    "config_to_json",
    "deepnorm_alpha",
    "format_config",
    "load_config",
    "shortest_period",
]
