"""Settings of the search: its space, how trials are drawn and stopped, how the best is chosen."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from crossgate.config.base import Config, Count, Fraction, Positive
from crossgate.config.training import CHANGEABLE

Conditions = dict[str, list]


class Choice(Config):
    """Values to choose from, under conditions."""

    values: Annotated[list, Field(min_length=1)]
    """What the key can be."""
    when: Conditions = {}
    """Earlier keys of the space -> values of theirs under which this key is varied at all."""


class Range(Config):
    """Numbers between two bounds."""

    low: float
    """Smallest."""
    high: float
    """Largest."""
    log: bool = False
    """Draw orders of magnitude alike."""
    integer: bool = False
    """Whole numbers only."""
    when: Conditions = {}
    """As of a choice."""

    @model_validator(mode="after")
    def _agree(self) -> Range:
        if not self.low < self.high:
            raise ValueError("low must be smaller than high")
        if self.log and self.low <= 0:
            raise ValueError("a log range must begin above 0")
        if self.integer and (self.low % 1 or self.high % 1):
            raise ValueError("bounds of an integer range must be whole")
        return self


def _kind(value: Any) -> str:
    if isinstance(value, Choice) or (isinstance(value, dict) and "values" in value):
        return "choice"
    return "range" if isinstance(value, Range | dict) else "list"


Dimension = Annotated[
    Annotated[list, Tag("list")] | Annotated[Choice, Tag("choice")] | Annotated[Range, Tag("range")],
    Discriminator(_kind),
]


_OF_TRIALS = ("data", "model", "finetune", "optim", "training", "engine")


class SearchConfig(Config):
    """Ray Tune over gating variants and schedules."""

    space: dict[str, Dimension] = {"model.fusion.name": ["mean", "sigmoid", "softmax"]}
    """Dotted recipe key -> values to try; or `{low: 1e-4, high: 1e-2, log: true}` (`integer: true` for whole numbers);
    or `{values: [...]}`. The latter two may have `when: {KEY: [VALUES]}`: varied only where an earlier key of the space
    has one of these values."""
    samples: Count = 0
    """Trials, as the searcher draws them (0: the whole grid, for lists only)."""
    searcher: Literal["random", "optuna"] = "random"
    """How `samples` trials are drawn: `optuna` learns from those that ended (TPE), after it has tried each value of the
    space's first list once."""
    scheduler: Literal["none", "asha", "pbt"] = "none"
    """`asha` stops a trial that is not among the best at its step (asynchronous successive halving). `pbt` trains
    `samples` trials side by side and, every `interval` steps, lets the worst go on from the best ones' weights with
    changed settings (population based training): it finds schedules, of settings that may change while training."""
    grace: Count = 0
    """Steps that `asha` gives every trial (0: until its first validation)."""
    reduction: Annotated[float, Field(gt=1)] = 3.0
    """`asha` lets one of so many go on, and looks again after so many times the steps."""
    interval: Count = 0
    """Steps after which trials under `pbt` are compared, again and again: a multiple of `training.eval_every`
    (0: that)."""
    exploit: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Share of the trials under `pbt` that go on from another's weights each time, and share that they choose from."""
    resample: Fraction = 0.25
    """Probability that `pbt` then draws a setting anew; else a number of a range is multiplied by 0.8 or 1.2, and a
    value of a list gives way to its neighbour."""
    explore: dict[str, Any] = {}
    """Recipe key -> value for trials while the space is explored, which makes them cheap: fewer labels
    (`{data.train: [train_small]}`), steps or pixels. The best few, and the averages, are then trained without it."""
    seeds: Positive = 1
    """Seeds that each of the best few is run with before the winner is named, its mean counting; from 3 on without the
    first, which chose them. Less than 4 never show that a gate beats averaging."""
    finalists: Positive = 3
    """How many these best few are; uniform averages are run with the same seeds besides."""
    concurrent: Positive = 1
    """Trials side by side."""
    metric: str = "val/accuracy"
    """Validation metric, to be maximised."""
    cpus_per_trial: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that Ray reserves for one trial."""
    gpus_per_trial: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for one trial."""

    @model_validator(mode="after")
    def _conditions(self) -> SearchConfig:
        seen: dict[str, list] = {}
        for key, dimension in self.space.items():
            for other, values in getattr(dimension, "when", {}).items():
                if other not in seen:
                    raise ValueError(f"space: '{key}' depends on '{other}', which is no earlier list of the space")
                unknown = [value for value in values if value not in seen[other]]
                if unknown or not values:
                    raise ValueError(
                        f"space: '{key}' waits for '{other}' to be {unknown or 'nothing'}, which it never is"
                    )
            if not isinstance(dimension, Range):
                seen[key] = dimension.values if isinstance(dimension, Choice) else dimension
        ranged = [key for key, dimension in self.space.items() if isinstance(dimension, Range)]
        if ranged and not self.samples:
            raise ValueError(f"space: the range of '{ranged[0]}' has no grid: set search.samples")
        if self.searcher == "optuna" and not self.samples:
            raise ValueError("searcher optuna draws as many trials as search.samples says: set it")
        return self

    @model_validator(mode="after")
    def _exploring(self) -> SearchConfig:
        both = sorted(self.explore.keys() & self.space.keys())
        if both:
            raise ValueError(f"explore: '{both[0]}' is varied in search.space already: leave one of them out")
        other = [key for key in self.explore if key.partition(".")[0] not in _OF_TRIALS]
        if other:
            raise ValueError(f"explore: '{other[0]}' makes no trial cheaper, expected keys of {', '.join(_OF_TRIALS)}")
        if self.explore and self.scheduler == "pbt":
            raise ValueError("explore: what pbt finds is a schedule of the whole training: leave it empty")
        return self

    @model_validator(mode="after")
    def _population(self) -> SearchConfig:
        if self.scheduler != "pbt":
            return self
        for key, dimension in self.space.items():
            if key not in CHANGEABLE:
                raise ValueError(
                    f"space: '{key}' cannot change while a trial trains, expected one of {', '.join(CHANGEABLE)}; "
                    f"search it with scheduler asha"
                )
            if getattr(dimension, "when", None):
                raise ValueError(f"space: '{key}' has conditions (`when`), which pbt has no use for: leave them out")
        if self.samples < 2:
            raise ValueError("scheduler pbt trains a population: set search.samples to 2 or more")
        if self.searcher != "random":
            raise ValueError("scheduler pbt changes settings by itself: leave search.searcher at random")
        return self
