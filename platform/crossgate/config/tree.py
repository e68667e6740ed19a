"""The recipe: all sections in one tree, and what must agree between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from crossgate.config.base import Config, Count
from crossgate.config.data import DataConfig
from crossgate.config.model import ModelConfig
from crossgate.config.results import EvaluationConfig, ReleaseConfig
from crossgate.config.search import SearchConfig
from crossgate.config.study import StudyConfig
from crossgate.config.tasks import FinetuneConfig, PretrainConfig
from crossgate.config.training import (
    CHANGEABLE,
    ClusterConfig,
    EngineConfig,
    OptimConfig,
    TrackingConfig,
    TrainingConfig,
)

Kind = Literal["pretrain", "finetune", "evaluate", "search", "study"]


class RunConfig(Config):
    """Name and place of the run."""

    name: Annotated[str, Field(pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]*)?$")] = ""
    """Run name (empty: kind, recipe file and a digest of the settings, so that a resubmitted job resumes)."""
    output: str = "runs"
    """Folder that holds run directories."""
    seed: Count = 0
    """Seed of weights, schedule and augmentation."""


class Recipe(Config):
    """A whole run."""

    kind: Kind
    """What kind of run this is."""
    run: RunConfig = RunConfig()
    """Name and place."""
    data: DataConfig = DataConfig()
    """Clips."""
    model: ModelConfig = ModelConfig()
    """Network."""
    pretrain: PretrainConfig = PretrainConfig()
    """Objective of pretraining."""
    finetune: FinetuneConfig = FinetuneConfig()
    """Objective of fine-tuning."""
    optim: OptimConfig = OptimConfig()
    """Optimiser."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed."""
    training: TrainingConfig = TrainingConfig()
    """Loop."""
    cluster: ClusterConfig = ClusterConfig()
    """Ray."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Measurements."""
    search: SearchConfig = SearchConfig()
    """Ray Tune."""
    study: StudyConfig = StudyConfig()
    """Gates on the same frozen encoders."""
    release: ReleaseConfig = ReleaseConfig()
    """Registry."""

    @model_validator(mode="after")
    def _divides(self) -> Recipe:
        for workers in (self.cluster.workers, self.cluster.fewest_workers):
            self.micro_batch(workers)
        if self.data.mix and self.finetune.features and self.kind != "pretrain":
            raise ValueError("finetune.features keeps clips of data.index alone: leave data.mix empty")
        if self.kind == "pretrain" and len(self.data.clip.modalities) < 2:
            raise ValueError("data.clip.modalities: pretraining contrasts modalities and needs two or more")
        if self.model.exchange.name != "none" and (self.kind in ("pretrain", "study") or self.finetune.freeze):
            raise ValueError(
                "model.exchange: it learns with the encoders from labels (a contrast would be solved by what passes "
                "between them, frozen encoders have none): set its name to none"
            )
        return self

    @model_validator(mode="after")
    def _schedule(self) -> Recipe:
        changes, steps = self.training.schedule, [change.after for change in self.training.schedule]
        if changes and self.kind not in ("finetune", "search"):
            raise ValueError(f"training.schedule: settings change in fine-tuning only, not in kind {self.kind}")
        if steps != sorted(set(steps)):
            raise ValueError("training.schedule: expected each change `after` a later step than the one before it")
        if steps and 0 < self.training.steps <= steps[-1]:
            raise ValueError(f"training.schedule: a change after step {steps[-1]} is none, training.steps ends there")
        for key in (key for change in changes for key in change.settings):
            if key not in CHANGEABLE:
                raise ValueError(
                    f"training.schedule: '{key}' cannot change while training, expected one of {', '.join(CHANGEABLE)}"
                )
        return self

    @model_validator(mode="after")
    def _population(self) -> Recipe:
        if self.kind != "search" or self.search.scheduler != "pbt":
            return self
        training, interval = self.training, self.exchange_interval
        if not training.steps or not training.eval_every:
            raise ValueError(
                "search.scheduler pbt compares trials at the same steps: set training.steps and eval_every"
            )
        if interval % training.eval_every or interval >= training.steps:
            raise ValueError(
                f"search.interval {interval} is not a multiple of training.eval_every {training.eval_every} "
                f"below training.steps {training.steps}"
            )
        if training.schedule:
            raise ValueError("training.schedule: search.scheduler pbt is what finds one, leave it empty")
        if training.checkpoint_url:
            raise ValueError(
                "training.checkpoint_url: trials under pbt exchange checkpoints by run.output, leave it empty"
            )
        return self

    @property
    def exchange_interval(self) -> int:
        """Steps between two exchanges of a population."""
        return self.search.interval or self.training.eval_every

    def micro_batch(self, ranks: int) -> int:
        """Returns the clips of a micro-batch on each of so many ranks.

        Raises:
            ValueError: when they cannot share the global batch evenly.
        """
        share = ranks * self.engine.accumulation
        if self.data.global_batch % share:
            raise ValueError(
                f"data.global_batch {self.data.global_batch} is not divisible by {ranks} ranks x engine.accumulation "
                f"{self.engine.accumulation}, expected a multiple of {share}"
            )
        return self.data.global_batch // share
