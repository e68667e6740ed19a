"""Whether the winner of a search beats uniform averaging, with the luck of having tried many taken off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossgate.evaluation import classification
from crossgate.evaluation.comparison import TITLES, statistic
from crossgate.evaluation.intervals import MINIMUM_GROUPS, Bootstrap, Interval, Statistic, over_runs
from crossgate.evaluation.predictions import Predictions
from crossgate.evaluation.videos import by_video

Array = NDArray[Any]

LEVEL = 0.05
ENOUGH_SEEDS = 3
"""Fewer trainings tell nothing of their own luck: Student's interval of two reaches nine standard deviations."""
ANSWERS = "validation.npz"
_NONE = "no gate beat averaging"
_RANKED = ("average_precision", "roc_auc")


@dataclass(frozen=True)
class Answers:
    """What one trial said about the labelled validation clips.

    Attributes:
        logits: ``(N, K)``.
        labels: ``(N,)`` class.
        group: ``(N,)`` source video or subject.
        keys: ``(N,)`` names of the clips.
    """

    logits: Array
    labels: Array
    group: Array
    keys: Array

    @classmethod
    def of(cls, predictions: Predictions, task: str) -> Answers:
        """Takes them from predictions.

        Raises:
            ValueError: for a model without classes.
        """
        known = predictions.labelled(task)
        if known.logits is None:
            raise ValueError("no logits")
        return cls(known.logits.astype(np.float32), known.labels[task], known.group, np.array(known.keys))

    @classmethod
    def read(cls, run_dir: str | Path) -> Answers | None:
        """Reads what `write` wrote; None where there is nothing."""
        path = Path(run_dir) / ANSWERS
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as kept:
            return cls(*(kept[name] for name in ("logits", "labels", "group", "keys")))

    def by_video(self) -> Answers:
        """Returns one row a video, named by its group as well, as `videos.by_video` makes them for the board."""
        count = len(self.keys)
        nothing = np.zeros((count, 0))
        clips = Predictions(
            modalities=(),
            features=nothing[:, :, None],
            embeddings=None,
            fused=nothing,
            weights=None,
            logits=self.logits,
            unimodal_logits=None,
            present=nothing > 0,
            group=self.group,
            labels={"": self.labels},
            degraded=nothing,
            keys=[str(key) for key in self.keys],
        )
        videos = by_video(clips)
        keys = np.array([f"{group} {key}" for group, key in zip(videos.group, videos.keys, strict=True)])
        assert videos.logits is not None
        return Answers(videos.logits, videos.labels[""], videos.group, keys)

    def write(self, run_dir: str | Path) -> None:
        """Writes them beside and renames."""
        partial = Path(run_dir) / f".{ANSWERS}.partial.npz"
        np.savez_compressed(partial, **vars(self))
        partial.replace(Path(run_dir) / ANSWERS)


@dataclass(frozen=True)
class Verdict:
    """How the winner compares with uniform averaging.

    Attributes:
        beats: whether there is evidence that it is better.
        difference: winner minus average, mean over seeds; NaN where it could not be measured.
        low, high: its 95 % interval over groups and seeds.
        p: one-sided, for the best of all that finished, over groups and seeds.
        said: the sentence.
    """

    beats: bool
    difference: float
    low: float
    high: float
    p: float
    said: str

    def metrics(self) -> dict[str, float]:
        """Returns what could be measured, under flat names."""
        found = {"difference": self.difference, "difference_low": self.low, "difference_high": self.high, "p": self.p}
        known = {f"search/over_averaging/{name}": value for name, value in found.items() if not math.isnan(value)}
        return known | {"search/over_averaging/beats": float(self.beats)}


Seeds = Mapping[int, Answers]


def judge(
    candidates: Mapping[str, Seeds],
    reference: Seeds,
    winner: str,
    metric: str,
    positive: int | None,
    *,
    average: str = "uniform averaging",
    no_gate: str = "",
    resamples: int = 1000,
    seed: int = 0,
    caveats: Sequence[str] = (),
) -> Verdict:
    """Tests the winner against the average on the same validation groups and resamples, seed by seed.

    The winner is the best of many, and the best of many looks good by luck alone. So the difference is compared with
    the largest one that resamples give to *any* candidate when each is centred on its own (White's reality check,
    Econometrica 68, 2000): the p-value is the share of resamples in which luck reaches what the winner has. A resample
    draws groups and seeds, since equal gates differ from training to training as well. A handful of seeds shows less
    than their spread when drawn from, so that Student's interval over them must be above 0 too.

    Args:
        candidates: every finished trial that is not an average -> seed -> its answers.
        reference: seed -> answers of uniform averaging; a pair is of the same seed, other seeds do not count.
        winner: a name among the candidates, or of an average.
        metric: a key of `TITLES`.
        positive: index of the positive class; None for a task without. A binary task is answered by the threshold that
            each run's own answers choose, as on the board.
        average: what the reference is, in words.
        no_gate: what the winner is, in words, where it is no gate; it then beats nothing.
        resamples, seed: of the bootstrap.
        caveats: what p does not know, for the end of the sentence.
    """
    if winner not in candidates:
        return unproven(f"the best is {average} itself")
    if metric not in TITLES:
        return unproven(f"'{metric}' cannot be tested clip by clip")
    first = next(iter(reference.values()))
    reference = _alike(reference, first)
    alike = {name: _alike(own, first) for name, own in candidates.items()}
    if candidates[winner] and not alike[winner]:
        return unproven(f"{winner} was measured on other validation clips")
    if not alike[winner].keys() & reference.keys():
        return unproven(f"{average} finished with no seed of {winner}")
    bootstrap = Bootstrap(first.group, resamples, seed)
    leads = _leads(alike, reference, bootstrap, first, metric, positive, seed)
    lead = leads[winner]
    if not lead.known:
        few = bootstrap.groups < MINIMUM_GROUPS
        reason = f"{bootstrap.groups} validation groups are too few for a test"
        return unproven(reason if few else f"{TITLES[metric]} is undefined on these validation clips")
    p, runs = _p_value(leads, lead.value), over_runs(lead.each)
    beats = len(lead.each) >= ENOUGH_SEEDS and runs.low > 0 and p < LEVEL and not no_gate
    others = sum(bool(candidates[name]) and not own for name, own in alike.items())
    apart = [f"{others} measured on other validation clips not counted"] if others else []
    measured = _in_words(lead, p, bootstrap.groups, len(leads), metric, average)
    evidence = "; ".join([measured, _luck(runs), *apart, *caveats])
    found = f"the best is {no_gate}, which is no gate: {winner}" if no_gate else winner
    said = f"{winner} beats averaging: {evidence}" if beats else f"{_NONE}: {found} has {evidence}"
    return Verdict(beats, lead.value, lead.low, lead.high, p, said)


def _in_words(lead: _Lead, p: float, groups: int, finished: int, metric: str, average: str) -> str:
    count = len(lead.each)
    return (
        f"{_points(lead.value)} points of {TITLES[metric]} ({_points(lead.low)} to {_points(lead.high)}) over "
        f"{average}, {count} seed{'s' if count > 1 else ''}, {groups} validation groups, p = {p:.3f} as the best of "
        f"{finished} that finished"
    )


def _luck(runs: Interval) -> str:
    """Returns what other seeds would give, in words, as far as these seeds tell."""
    if runs.groups < ENOUGH_SEEDS:
        return f"luck between trainings is not excluded, which takes {ENOUGH_SEEDS} seeds that count"
    return f"other seeds would give {_points(runs.low)} to {_points(runs.high)}"


def unproven(why: str) -> Verdict:
    """Returns the verdict where nothing could be measured."""
    return Verdict(False, math.nan, math.nan, math.nan, math.nan, f"{_NONE}: {why}")


# ---- leads over the reference ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lead:
    """What a candidate has more than the reference.

    Attributes:
        each: ``(S,)``, seed by seed, on all clips.
        drawn: ``(R,)``, the mean over drawn seeds on drawn groups.
    """

    each: Array
    drawn: Array

    @property
    def value(self) -> float:
        return float(self.each.mean())

    @property
    def known(self) -> bool:
        """Whether the metric is defined on enough resamples for an interval; never where the clips have it not."""
        return len(self._usable) > 1

    @property
    def low(self) -> float:
        return float(np.percentile(self._usable, 2.5))

    @property
    def high(self) -> float:
        return float(np.percentile(self._usable, 97.5))

    @property
    def _usable(self) -> Array:
        return self.drawn[np.isfinite(self.drawn)]


def _leads(
    candidates: Mapping[str, Seeds],
    reference: Seeds,
    bootstrap: Bootstrap,
    first: Answers,
    metric: str,
    positive: int | None,
    seed: int,
) -> dict[str, _Lead]:
    """Returns the lead of every candidate that has a seed of the reference's; all of them see the same resamples."""

    def spread(answers: Answers) -> tuple[float, Array]:
        measured = _statistic(answers, first, metric, positive)
        return bootstrap.value(measured), bootstrap.distribution(measured)

    theirs = {number: spread(one) for number, one in reference.items()}
    found = {}
    for name, own in candidates.items():
        seeds = sorted(own.keys() & theirs.keys())
        if not seeds:
            continue
        pairs = [(spread(own[one]), theirs[one]) for one in seeds]
        each = np.array([mine[0] - average[0] for mine, average in pairs])  # (S,)
        resampled = np.array([mine[1] - average[1] for mine, average in pairs])  # (S, R)
        picked = np.random.default_rng((seed, len(seeds))).integers(len(seeds), size=resampled.shape)
        found[name] = _Lead(each, np.take_along_axis(resampled, picked, axis=0).mean(axis=0))
    return found


def _p_value(leads: Mapping[str, _Lead], value: float) -> float:
    """Returns the share of resamples in which the luckiest candidate is as far above its own lead."""
    luck: Array = np.fmax.reduce([one.drawn - one.value for one in leads.values()])  # (R,)
    reached = luck[np.isfinite(luck)] >= value
    return (1 + int(reached.sum())) / (1 + len(reached))


def _statistic(answers: Answers, first: Answers, metric: str, positive: int | None) -> Statistic:
    """Returns the metric over resamples of the clips of `first`, in their order."""
    rows = np.argsort(answers.keys)[np.searchsorted(np.sort(answers.keys), first.keys)]
    probabilities = classification.softmax(answers.logits[rows])
    if positive is not None and metric not in _RANKED:
        is_positive = first.labels == positive
        threshold = classification.choose_thresholds(probabilities[:, positive], is_positive, fixed_fpr=0).decision
        said = classification.answers(probabilities, positive, threshold)
        probabilities = np.eye(probabilities.shape[1])[said]
    return statistic(metric, probabilities, first.labels, positive)


def _alike(seeds: Seeds, first: Answers) -> dict[int, Answers]:
    """Returns those that answered the same clips."""
    clips = np.sort(first.keys)
    return {seed: one for seed, one in seeds.items() if np.array_equal(np.sort(one.keys), clips)}


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"
