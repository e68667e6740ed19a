"""Every setting of every run, typed, documented and validated. `recipe.py` reads YAML into these classes.

Field docstrings are the documentation: ``crossgate explain`` prints them.
"""

from crossgate.config.base import Config, Count, Fraction, Positive
from crossgate.config.data import AugmentConfig, CacheConfig, ClipConfig, CorpusConfig, DataConfig
from crossgate.config.model import EncoderConfig, ExchangeConfig, FusionConfig, ModelConfig
from crossgate.config.pretext import PretextConfig
from crossgate.config.results import EvaluationConfig, ReleaseConfig
from crossgate.config.search import Choice, Range, SearchConfig
from crossgate.config.study import StudyConfig
from crossgate.config.tasks import FinetuneConfig, PretrainConfig
from crossgate.config.training import (
    CHANGEABLE,
    ChangeConfig,
    ClusterConfig,
    EngineConfig,
    OptimConfig,
    TrackingConfig,
    TrainingConfig,
)
from crossgate.config.tree import Kind, Recipe, RunConfig

__all__ = [
    "CHANGEABLE",
    "AugmentConfig",
    "CacheConfig",
    "ChangeConfig",
    "Choice",
    "ClipConfig",
    "ClusterConfig",
    "Config",
    "CorpusConfig",
    "Count",
    "DataConfig",
    "EncoderConfig",
    "EngineConfig",
    "EvaluationConfig",
    "ExchangeConfig",
    "FinetuneConfig",
    "Fraction",
    "FusionConfig",
    "Kind",
    "ModelConfig",
    "OptimConfig",
    "Positive",
    "PretextConfig",
    "PretrainConfig",
    "Range",
    "Recipe",
    "ReleaseConfig",
    "RunConfig",
    "SearchConfig",
    "StudyConfig",
    "TrackingConfig",
    "TrainingConfig",
]
