"""Evaluation of a pretrained network: retrieval between modalities, kNN and linear probe, random baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossgate.config import EvaluationConfig
from crossgate.evaluation import classification, figures, retrieval
from crossgate.evaluation.evaluation import Evaluation
from crossgate.evaluation.intervals import Bootstrap, Difference, Interval, mean
from crossgate.evaluation.predictions import Predictions
from crossgate.evaluation.probes import Samples, knn, linear_probe
from crossgate.evaluation.report import Section
from crossgate.evaluation.results import metric_name
from crossgate.evaluation.style import ACCENT, MUTED, colour
from crossgate.evaluation.tables import Table, bounds, p_value, percent, points, verdict

Array = NDArray[Any]
Splits = tuple[Predictions, Predictions, Predictions]

FUSED, ALL = "fused", "all"
_PROBES = {"linear_probe": "linear", "knn": "kNN"}


@dataclass(frozen=True)
class _Probed:
    """One probe of one kind of feature: what it got right, trained and random."""

    probe: str
    features: str
    accuracy: Interval
    mean_class: Interval
    random: Interval | None
    gain: Difference | None


def retrieval_scores(val: Predictions, config: EvaluationConfig, seed: int = 0) -> dict[str, float]:
    """Validation scores without intervals (``val/retrieval/mean/r_at_1`` ...), for the loop and for selection."""
    if val.embeddings is None or not len(val):
        return {}
    found = retrieval.retrieve(val.embeddings, val.present, val.group, val.modalities, config.gallery, seed)
    table = retrieval.intervals(found, Bootstrap(np.zeros(len(val)), resamples=1))
    return {f"val/retrieval/{pair}/{name}": one.value for pair, row in table.items() for name, one in row.items()}


def evaluate_pretrain(
    train: Predictions,
    val: Predictions,
    test: Predictions,
    tasks: Mapping[str, Sequence[str]],
    config: EvaluationConfig,
    random: Splits | None = None,
    *,
    seed: int = 0,
) -> Evaluation:
    """Measures a pretrained network on frozen features; probes learn from `train`, choose on `val`.

    Args:
        train, val, test: predictions with embeddings.
        tasks: label vocabularies, task -> class names.
        config: gallery, neighbours, resamples, and whether to probe.
        random: (train, val, test) of the same clips through the same network with random weights.
        seed: of draws.

    Raises:
        ValueError: when there are no test clips, or `random` holds other clips.
    """
    if not len(test):
        raise ValueError("no test clips")
    if random is not None:
        random = tuple(own.aligned(split.keys) for own, split in zip(random, (train, val, test)))  # type: ignore
    done = Evaluation(retrieval_scores(val, config, seed))
    if test.embeddings is not None:
        _retrieval(done, test, random[2] if random else None, config, seed)
    if config.probe:
        for task, classes in tasks.items():
            _probes(done, task, classes, (train, val, test), random, config, seed)
    return done


def _retrieval(
    done: Evaluation, test: Predictions, random: Predictions | None, config: EvaluationConfig, seed: int
) -> None:
    assert test.embeddings is not None
    bootstrap = Bootstrap(test.group, config.bootstrap, seed)
    found = retrieval.retrieve(test.embeddings, test.present, test.group, test.modalities, config.gallery, seed)
    if not found:
        return
    table = retrieval.intervals(found, bootstrap)
    chance = {k: float(np.mean([one.chance_recall(k) for one in found])) for k in retrieval.RECALLS}
    for pair, row in table.items():
        for name, one in row.items():
            done.put(f"test/retrieval/{pair}/{name}", one)
    done.metrics |= {f"test/retrieval/mean/r_at_{k}_chance": level for k, level in chance.items()}
    done.metrics |= {f"test/retrieval/{one.name}/gallery": float(one.gallery.mean()) for one in found}
    at_random = ""
    if random is not None and random.embeddings is not None:
        other = retrieval.retrieve(
            random.embeddings, random.present, random.group, random.modalities, config.gallery, seed
        )
        level = retrieval.intervals(other, bootstrap)["mean"]["r_at_10"]
        done.put("test/retrieval_random/mean/r_at_10", level)
        at_random = f" Random weights reach {percent(level.value)} ({bounds(level)})."
    top = table["mean"]["r_at_10"]
    sizes = [round(float(one.gallery.mean())) for one in found]
    span = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    done.summary = _joined(
        done.summary,
        f"Across modalities, the right clip out of {span} is among the first ten for {percent(top.value)} of the "
        f"queries (95 % interval {bounds(top)}, mean over {len(found)} ordered pairs); chance is "
        f"{percent(chance[10])}: {verdict(top, chance[10])}.{at_random}",
    )
    done.add(
        Section(
            "Retrieval between modalities",
            [
                "A clip's embedding in one modality looks for the same clip in another by cosine similarity. Only "
                "clips that have both take part; other clips of the same group are left out of the gallery; a rank "
                "is 1 plus the clips that are strictly more similar, plus half of those equally similar."
            ],
            [_retrieval_table(found, table, chance)],
        ),
        (
            "retrieval",
            figures.retrieval(table, test.modalities),
            "Row: the modality that asks; column: the one that is searched; darker is better. Chance is "
            f"{percent(chance[1])} at R@1 and {percent(chance[10])} at R@10.",
        ),
    )


def _retrieval_table(
    found: list[retrieval.Retrieval], table: Mapping[str, Mapping[str, Interval]], chance: Mapping[int, float]
) -> Table:
    names = [f"r_at_{k}" for k in retrieval.RECALLS]
    rows = []
    for one in found:
        row = table[one.name]
        cells = [f"{percent(row[name].value)} ({bounds(row[name])})" for name in names]
        middle = f"{row['median_rank'].value:.0f} ({bounds(row['median_rank'], False, 0)})"
        rows.append([f"{one.query} to {one.target}", *cells, middle, f"{one.gallery.mean():.0f}"])
    cells = [f"{percent(table['mean'][name].value)} ({bounds(table['mean'][name])})" for name in names]
    rows.append(["mean", *cells, f"{table['mean']['median_rank'].value:.0f}", ""])
    middle = f"{np.mean([one.chance_median for one in found]):.0f}"
    rows.append(["chance", *[percent(chance[k]) for k in retrieval.RECALLS], middle, ""])
    columns = ["from, to", "R@1", "R@5", "R@10", "median rank", "gallery"]
    return Table(columns, rows, "In brackets: 95 % intervals; queries are resampled by group, the gallery is fixed.")


def _probes(
    done: Evaluation,
    task: str,
    classes: Sequence[str],
    splits: Splits,
    random: Splits | None,
    config: EvaluationConfig,
    seed: int,
) -> None:
    train, val, test = (split.labelled(task) for split in splits)
    if not len(train) or not len(test) or len(np.unique(train.labels[task])) < 2:
        return
    shuffled = tuple(split.labelled(task) for split in random) if random is not None else None
    bootstrap = Bootstrap(test.group, config.bootstrap, seed)
    labels = test.labels[task]
    chance = classification.chance(labels, len(classes), train.labels[task])
    done.metrics |= {metric_name("test", f"chance_{task}_{name}"): value for name, value in chance.items()}
    rows = []
    for features in (FUSED, ALL, *test.modalities):
        if not _samples(train, task, features).known.any():
            continue
        trained = _answers((train, val, test), task, len(classes), features, config, seed)
        untrained = _answers(shuffled, task, len(classes), features, config, seed) if shuffled else {}  # type: ignore
        for probe in _PROBES:
            rows.append(_probed(probe, features, labels, trained[probe], untrained.get(probe), bootstrap))
    for row in rows:
        name = metric_name("test", row.probe, task, row.features)
        done.put(f"{name}/accuracy", row.accuracy)
        done.put(f"{name}/mean_class_accuracy", row.mean_class)
        if row.random is not None and row.gain is not None:
            done.put(metric_name("test", f"{row.probe}_random", task, row.features, "accuracy"), row.random)
            done.put(f"{name}/accuracy_gain", row.gain)
            done.metrics[f"{name}/accuracy_gain_p"] = row.gain.p
    _probe_section(done, task, classes, rows, chance, test, bootstrap)


def _answers(
    splits: Splits, task: str, classes: int, features: str, config: EvaluationConfig, seed: int
) -> dict[str, Array]:
    """Predicted classes ``(N,)`` of the test clips, by probe."""
    train, val, test = (_samples(split, task, features) for split in splits)
    linear = linear_probe(train, test, classes, val, seed).probabilities
    near = knn(train, test, classes, config.knn)
    return {"linear_probe": linear.argmax(axis=1), "knn": near.argmax(axis=1)}


def _samples(split: Predictions, task: str, features: str) -> Samples:
    labels = split.labels.get(task, np.zeros(0, dtype=np.int64))
    everyone = np.ones(len(split), dtype=bool)
    if features == FUSED:
        return Samples(split.fused, labels, split.group, everyone)
    if features == ALL:
        held = np.where(split.present[:, :, None], split.features, 0.0)
        return Samples(held.reshape(len(split), held.shape[1] * held.shape[2]), labels, split.group, everyone)
    m = split.modalities.index(features)
    return Samples(split.features[:, m], labels, split.group, split.present[:, m])


def _probed(
    probe: str, features: str, labels: Array, trained: Array, untrained: Array | None, bootstrap: Bootstrap
) -> _Probed:
    right = mean(trained == labels)
    by_class = classification.mean_class_accuracy(trained, labels)
    random = gain = None
    if untrained is not None:
        random = bootstrap.interval(mean(untrained == labels))
        gain = bootstrap.difference(right, mean(untrained == labels))
    return _Probed(probe, features, bootstrap.interval(right), bootstrap.interval(by_class), random, gain)


def _probe_section(
    done: Evaluation,
    task: str,
    classes: Sequence[str],
    rows: list[_Probed],
    chance: Mapping[str, float],
    test: Predictions,
    bootstrap: Bootstrap,
) -> None:
    head = next(row for row in rows if row.features == ALL and row.probe == "linear_probe")
    sentence = (
        f"A linear probe on the frozen features of all modalities side by side names the {task} of "
        f"{percent(head.accuracy.value)} of {len(test)} test clips from {bootstrap.groups} groups "
        f"(95 % interval {bounds(head.accuracy)}); the commonest class gives "
        f"{percent(chance['majority'])}, guessing {percent(chance['uniform'])}: "
        f"{verdict(head.accuracy, max(chance.values()))}."
    )
    if head.random is not None and head.gain is not None:
        sentence += (
            f" The same probe on random weights gets {percent(head.random.value)}; the paired difference is "
            f"{points(head.gain)} points."
        )
    done.summary = _joined(done.summary, sentence)
    columns = ["features", "probe", "accuracy", "95 % interval", "mean-class"]
    compared = any(row.random is not None for row in rows)
    columns += ["random weights", "points over random", "p"] if compared else []
    cells = []
    for row in rows:
        line = [row.features, _PROBES[row.probe], percent(row.accuracy.value), bounds(row.accuracy)]
        line.append(percent(row.mean_class.value))
        if row.random is not None and row.gain is not None:
            line += [percent(row.random.value), points(row.gain), p_value(row.gain.p)]
        cells.append(line)
    caption = (
        f"{len(classes)} classes, {len(test)} test clips, {bootstrap.groups} groups. {ALL!r}: the modalities' features "
        "side by side; a clip without the modality is answered with the training frequencies. The probe's "
        "regularisation was chosen on validation."
    )
    done.add(
        Section(f"What the frozen features know: {task}", tables=[Table(columns, cells, caption)]),
        (
            f"probe_{task}",
            figures.forest(_points(rows), f"{task} accuracy of the linear probe", _levels(chance)),
            "Dots are test accuracies of the linear probe with 95 % intervals; grey: the same probe on random weights; "
            "dashed: knowing nothing.",
        ),
    )


def _points(rows: list[_Probed]) -> list[figures.Point]:
    found = []
    for row in rows:
        if row.probe != "linear_probe":
            continue
        hue = ACCENT if row.features in (FUSED, ALL) else colour(row.features)
        found.append(figures.Point(row.features, row.accuracy, hue))
        if row.random is not None:
            found.append(figures.Point(f"{row.features}, random weights", row.random, MUTED))
    return found


def _levels(chance: Mapping[str, float]) -> dict[str, float]:
    name, level = max(chance.items(), key=lambda item: item[1])
    return {{"majority": "commonest class", "uniform": "guessing"}[name]: level}


def _joined(before: str, sentence: str) -> str:
    return f"{before}\n\n{sentence}" if before else sentence
