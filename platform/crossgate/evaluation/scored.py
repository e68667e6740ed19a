"""A classifier's answers on one split, scored: what the metrics and the report's sections start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossgate.evaluation import classification
from crossgate.evaluation.classification import Thresholds
from crossgate.evaluation.comparison import positive_class
from crossgate.evaluation.intervals import Bootstrap, Interval
from crossgate.evaluation.predictions import Predictions

Array = NDArray[Any]


@dataclass(frozen=True)
class Question:
    """What a classifier is asked.

    Attributes:
        task: label name.
        classes: names in the order of the logits.
        positive: name of the positive class of a binary task.
        index: its place in `classes`; None for a task of more classes, or without a class so called.
    """

    task: str
    classes: Sequence[str]
    positive: str
    index: int | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", positive_class(self.classes, self.positive))

    def thresholds(self, val: Predictions, fixed_fpr: float) -> Thresholds:
        """Chosen on validation clips; 0.5 where the task is not binary or nothing is there to choose on."""
        if self.index is None or val.logits is None or not len(val):
            return Thresholds(0.5, 0.5)
        scores = classification.softmax(val.logits)[:, self.index]
        return classification.choose_thresholds(scores, val.labels[self.task] == self.index, fixed_fpr)


@dataclass(frozen=True)
class Scored:
    """Labelled clips of a split with their scores.

    Attributes:
        question: what was asked.
        clips: N predictions with logits, all labelled.
        thresholds: chosen on validation, whatever this split is.
        bootstrap: over the groups of `clips`.
        labels: (N,) class indices.
        probabilities: (N, K).
        scores: name of the metric -> value with interval.
    """

    question: Question
    clips: Predictions
    thresholds: Thresholds
    bootstrap: Bootstrap
    labels: Array = field(init=False)
    probabilities: Array = field(init=False)
    scores: dict[str, Interval] = field(init=False)

    def __post_init__(self) -> None:
        assert self.clips.logits is not None
        index, labels = self.question.index, self.clips.labels[self.question.task]
        probabilities = classification.softmax(self.clips.logits)
        if index is None:
            scores = classification.multiclass(probabilities, labels, self.bootstrap)
        else:
            scores = classification.binary(probabilities[:, index], labels == index, self.thresholds, self.bootstrap)
        for name, value in (("labels", labels), ("probabilities", probabilities), ("scores", scores)):
            object.__setattr__(self, name, value)

    @property
    def truth(self) -> Array:
        """(N,) bool: the clip is of the positive class. Only for binary tasks."""
        return np.asarray(self.labels == self.question.index)

    @property
    def positive_scores(self) -> Array:
        """(N,) probability of the positive class. Only for binary tasks."""
        return np.asarray(self.probabilities[:, self.question.index])

    @property
    def predicted(self) -> Array:
        """(N,) class indices: by the decision threshold where the task is binary, else the likeliest class."""
        return classification.answers(self.probabilities, self.question.index, self.thresholds.decision)
