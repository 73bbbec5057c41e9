"""The configuration of a run: its schema, read from YAML, overridden from the command line.

A YAML file holds only what differs from the defaults, or from the file its `extends:` names.
"""

from distrain.config.files import (
    changeable_settings,
    check_ranks,
    fixed_settings,
    flatten,
    load,
    map_text,
    to_dict,
    to_yaml,
)
from distrain.config.recipe import AugmentConfig, DistillConfig, EmaConfig, LossConfig, OptimizerConfig, ScheduleConfig
from distrain.config.renamed import STATE_FORMAT
from distrain.config.schema import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DownloadConfig,
    EvaluateConfig,
    ModelConfig,
    ParallelConfig,
    ResilienceConfig,
    RunConfig,
    TrainConfig,
)
from distrain.config.tracking import NO_MLFLOW

__all__ = [
    "NO_MLFLOW",
    "STATE_FORMAT",
    "AugmentConfig",
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "DownloadConfig",
    "EmaConfig",
    "EvaluateConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ResilienceConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
    "changeable_settings",
    "check_ranks",
    "fixed_settings",
    "flatten",
    "load",
    "map_text",
    "to_dict",
    "to_yaml",
]
