"""What a run computes, as frozen dataclasses that check themselves, and how people set each field.

A command line, a config.json and a checkpoint all describe a run by its `RunConfig`. Each field made by `option`
carries its range, its help text and its name as a flag (see `fastle.options`).
"""

from fastle.options import ConfigError

from .data import DataConfig, DatasetName, Size, plain_size, sides_of
from .model import POOLED_LATENT, ModelConfig
from .objective import (
    HOLE_RATIO,
    MASKED_FIELDS,
    PIXEL_FIELDS,
    SIGREG_WEIGHT,
    JudgeDepth,
    JudgeName,
    JudgeStatistics,
    ObjectiveConfig,
    transform_config,
)
from .own import OwnConfig, OwnNetworks
from .run import OPTIONS, TUNED, RunConfig, setting_as_typed
from .training import Precision, TrainConfig
from .transform import (
    DEFAULT_TRANSFORM,
    TRANSFORM_OPTIONS,
    TRANSFORMS,
    CropResizeConfig,
    DetailConfig,
    IdentityConfig,
    MaskConfig,
    MaskKind,
    NoiseConfig,
    TransformConfig,
)

__all__ = [
    "DEFAULT_TRANSFORM",
    "HOLE_RATIO",
    "MASKED_FIELDS",
    "OPTIONS",
    "PIXEL_FIELDS",
    "POOLED_LATENT",
    "SIGREG_WEIGHT",
    "TRANSFORMS",
    "TRANSFORM_OPTIONS",
    "TUNED",
    "ConfigError",
    "CropResizeConfig",
    "DataConfig",
    "DatasetName",
    "DetailConfig",
    "IdentityConfig",
    "JudgeDepth",
    "JudgeName",
    "JudgeStatistics",
    "MaskConfig",
    "MaskKind",
    "ModelConfig",
    "NoiseConfig",
    "ObjectiveConfig",
    "OwnConfig",
    "OwnNetworks",
    "Precision",
    "RunConfig",
    "Size",
    "TrainConfig",
    "TransformConfig",
    "plain_size",
    "setting_as_typed",
    "sides_of",
    "transform_config",
]
