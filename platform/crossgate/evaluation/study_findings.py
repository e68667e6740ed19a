"""What a study found out about one corpus and task, and what follows from it at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from crossgate.evaluation import gates
from crossgate.evaluation.comparison import REFERENCE, main_metric
from crossgate.evaluation.gates import GateReport
from crossgate.evaluation.intervals import Bootstrap, Interval
from crossgate.evaluation.study import Answer, StudyRow, Subset, accuracy, rows

Array = NDArray[Any]


@dataclass(frozen=True)
class Sweep:
    """One modality spoiled by one kind of noise.

    Attributes:
        modality, kind: what is spoiled, and how.
        severities: L levels, the first 0.
        right: competitor -> L arrays ``(N,)``, share of seeds that are right.
        gate: whose weights these are.
        weight: L arrays ``(N,)``, its mean weight of the spoiled modality, NaN where a clip lacks it.
    """

    modality: str
    kind: str
    severities: tuple[float, ...]
    right: dict[str, list[Array]]
    gate: str
    weight: list[Array]


@dataclass(frozen=True)
class LowLabels:
    """Uniform averaging of heads trained on a share of the labels: one array of probabilities a seed."""

    encoders: str
    share: float
    clips: int
    test: list[Array]


@dataclass
class Findings:
    """All that a study found out about one corpus and task.

    Attributes:
        unimodal: ``(N, M, K)`` scores of the heads, one a seed.
        clips, groups: part of the data -> how many labelled ones.
        chosen: the fusion that validation prefers. weighted: of those that weigh probabilities clip by clip.
        subsets: competitor -> subset -> ``(N,)`` share of seeds that are right.
        encoders: where they came from, empty for random ones.
    """

    task: str
    names: tuple[str, ...]
    classes: Sequence[str]
    positive: int | None
    labels: Array
    present: Array
    degraded: Array
    unimodal: list[Array]
    clips: dict[Any, int]
    groups: dict[Any, int]
    bootstrap: Bootstrap
    answers: list[Answer]
    chosen: str
    weighted: str
    subsets: Mapping[str, Mapping[Subset, Array]]
    sweeps: list[Sweep]
    low_labels: list[LowLabels]
    seeds: int
    encoders: str

    @property
    def metric(self) -> str:
        """What the table is about."""
        return main_metric(self.positive)

    @cached_property
    def lines(self) -> dict[str, StudyRow]:
        """Every competitor against the uniform mean, by name."""
        found = rows(self.answers, self.labels, self.bootstrap, REFERENCE, self.metric, self.positive)
        return {line.name: line for line in found}

    @cached_property
    def reports(self) -> dict[str, GateReport]:
        """What the weights of each gate do that tells clips apart, by name."""
        return {
            one.name: self._diagnosed(one)
            for one in self.answers
            if one.kind == "gate" and any(gates.varies(weights, self.present) for weights in one.weights)
        }

    @property
    def strongest(self) -> StudyRow:
        """The line of the best single modality."""
        return max((one for one in self.lines.values() if one.kind == "modality"), key=lambda one: one.score.value)

    def answer(self, name: str) -> Answer | None:
        """The answers of a competitor, None where there is none of that name."""
        return next((one for one in self.answers if one.name == name), None)

    def accuracy(self, answer: Answer) -> Interval:
        """A competitor's accuracy, whatever the table is about."""
        return self.bootstrap.interval(accuracy(answer, self.labels))

    def _diagnosed(self, gate: Answer) -> GateReport:
        return gates.diagnose(
            gate.weights,
            self.present,
            self.labels,
            len(self.classes),
            self.degraded,
            self.names,
            self.bootstrap,
            self.unimodal,
        )
