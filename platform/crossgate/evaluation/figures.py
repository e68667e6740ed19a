"""Figures of a report. Each function returns a matplotlib `Figure` that nothing else holds on to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from sklearn import metrics as sk

from crossgate.evaluation.gates import GateReport
from crossgate.evaluation.intervals import Bootstrap, Interval
from crossgate.evaluation.style import (
    ACCENT,
    INK,
    MUTED,
    REFERENCE,
    SEQUENCE,
    SHADES,
    WIDTH,
    colour,
    new,
    short,
    styled,
)
from crossgate.modality import MODALITIES

Array = NDArray[Any]

# How to read those figures that more than one report shows.
RELIABILITY = (
    "A model whose confidence can be trusted keeps to the dashed line; below it, it is surer than it is right."
)
GATE_BY_CLASS = (
    "Bars that differ between classes show that the gate follows what happens in the clip; equal bars, that it has "
    "learned fixed weights."
)
GATE_BY_SEVERITY = (
    "Each line should fall: the more a modality is degraded (0: not at all, 1: useless), the less weight it should get."
)

PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.0f} %")
_GRID = np.linspace(0, 1, 101)
_PLAIN = SEQUENCE[len(MODALITIES) :]  # colours that mean no modality


@dataclass(frozen=True)
class Point:
    """One line of a forest plot: a name, its interval, and a hue (see `forest`)."""

    name: str
    interval: Interval
    hue: str = ACCENT


@styled
def confusion(labels: Array, predicted: Array, classes: Sequence[str]) -> Figure:
    """Confusion matrix: rows are true classes and sum to 100 %; a class without clips has an empty row."""
    counts = sk.confusion_matrix(labels, predicted, labels=np.arange(len(classes))).astype(np.float64)
    support = counts.sum(axis=1, keepdims=True)
    share = np.where(support > 0, counts / np.maximum(support, 1), np.nan)
    side = min(WIDTH, 2.6 + 0.42 * len(classes))
    figure, (axes,) = new(max(2.6, side * 0.82), width=side)
    image = axes.imshow(share, cmap=SHADES, vmin=0, vmax=1, aspect="auto")
    if len(classes) <= 16:
        for i, j in np.argwhere(counts > 0):
            tint = "#ffffff" if share[i, j] > 0.55 else "#111111"
            text = f"{100 * share[i, j]:.0f}" if len(classes) > 4 else f"{100 * share[i, j]:.0f} %\n{int(counts[i, j])}"
            axes.text(j, i, text, ha="center", va="center", color=tint, fontsize=8.5)
    names = [short(name, 18) for name in classes]
    if len(classes) <= 60:
        size = 9 if len(classes) <= 20 else 5.5
        axes.set_yticks(
            range(len(classes)), [f"{name}  ({int(n)})" for name, n in zip(names, support[:, 0])], fontsize=size
        )
        axes.set_xticks(range(len(classes)), names, rotation=40 if len(classes) > 3 else 0, fontsize=size)
        if len(classes) > 3:
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
    axes.set(xlabel="predicted class", ylabel="true class (clips)")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, format=PERCENT, shrink=0.8, label="share of the true class").outline.set_visible(
        False
    )
    return figure


@styled
def precision_recall(scores: Array, positive: Array, bootstrap: Bootstrap, resamples: int = 200) -> Figure:
    """Precision over recall with a 95 % band by groups, and the positives' rate as the level of chance."""
    figure, (axes,) = new(3.6, width=5.2)
    rate = float(positive.mean()) if len(positive) else math.nan
    axes.axhline(rate, color=REFERENCE, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.text(0.01, rate + 0.015, f"chance: {100 * rate:.0f} % are positive", color=MUTED, fontsize=8.5)
    if positive.any() and not positive.all():
        precision, recall, _ = sk.precision_recall_curve(positive, scores)
        _band(axes, lambda rows: _precision_at(scores[rows], positive[rows]), bootstrap, resamples)
        axes.plot(recall, precision, color=ACCENT, drawstyle="steps-post")
    axes.set(xlabel="recall (share of the positive clips found)", ylabel="precision", xlim=(0, 1), ylim=(0, 1.03))
    _both_percent(axes)
    return figure


@styled
def roc(
    scores: Array, positive: Array, bootstrap: Bootstrap, fixed_fpr: float | None = None, resamples: int = 200
) -> Figure:
    """True over false positive rate with a 95 % band by groups; the dotted line is the fixed false-positive rate."""
    figure, (axes,) = new(3.6, width=5.2)
    axes.plot([0, 1], [0, 1], color=REFERENCE, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.text(0.62, 0.56, "chance", color=MUTED, fontsize=8.5)
    if fixed_fpr is not None:
        axes.axvline(fixed_fpr, color=MUTED, linestyle=":", linewidth=1.2)
    if positive.any() and not positive.all():
        false_rate, true_rate, _ = sk.roc_curve(positive, scores)
        _band(axes, lambda rows: _recall_at(scores[rows], positive[rows]), bootstrap, resamples)
        axes.plot(false_rate, true_rate, color=ACCENT)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.03))
    _both_percent(axes)
    return figure


@styled
def reliability(answers: Mapping[str, tuple[str, Array]], labels: Array, bins: int = 10) -> Figure:
    """Accuracy over confidence, in bins of equal width (Guo et al. 2017, figure 1); a dot's area is its share of clips.

    Args:
        answers: name -> colour and ``(N, K)`` probabilities.
        labels: ``(N,)``.
    """
    figure, (axes,) = new(3.8, width=5.2)
    axes.plot([0, 1], [0, 1], color=REFERENCE, linestyle=(0, (4, 3)), linewidth=1.2)
    for name, (hue, probabilities) in answers.items():
        confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
        place = np.minimum((confidence * bins).astype(int), bins - 1)
        clips = np.bincount(place, minlength=bins)
        filled = clips > 0
        across, up = (np.bincount(place, one, bins)[filled] / clips[filled] for one in (confidence, right))
        axes.plot(across, up, color=hue, linewidth=1.2, alpha=0.5)
        axes.scatter(across, up, 4 + 160 * clips[filled] / clips.sum(), color=hue)
        axes.plot([], [], "o", color=hue, label=short(name))
    axes.set(xlabel="mean confidence", ylabel="share that is right", xlim=(0, 1.02), ylim=(-0.02, 1.03))
    _both_percent(axes)
    figure.legend(loc="outside upper right", ncols=len(answers))
    return figure


@styled
def gate_by_class(by_class: Array, classes: Sequence[str], modalities: Sequence[str]) -> Figure:
    """Mean gate weight per class, bars ``(K, M)``; classes and modalities without clips have no bar."""
    shown = np.flatnonzero(np.isfinite(by_class).any(axis=1))[:40]
    figure, (axes,) = new(max(2.2, 0.9 + (0.13 * len(modalities) + 0.16) * len(shown)))
    thick = 0.8 / len(modalities)
    for m, modality in enumerate(modalities):
        place = np.arange(len(shown)) + (m - (len(modalities) - 1) / 2) * thick
        axes.barh(place, by_class[shown, m], height=thick * 0.9, color=colour(modality), label=modality)
    axes.set_yticks(range(len(shown)), [short(classes[k]) for k in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, max(1e-6, float(np.nanmax(by_class[shown], initial=0))) * 1.08)
    axes.set_xlabel("mean gate weight of the clips that have the modality")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper right", ncols=len(modalities))
    return figure


@styled
def gate_by_severity(report: GateReport) -> Figure:
    """Mean gate weight against the known severity of degradation of the same modality, with 95 % intervals."""
    drawn = [name for name, bins in report.by_severity.items() if bins]
    figure, axes = new(2.7, columns=max(1, len(drawn)), width=WIDTH if len(drawn) > 2 else 5.2, sharey=True)
    for one, name in zip(axes, drawn):
        bins = report.by_severity[name]
        middle = [(low + high) / 2 for low, high, _ in bins]
        whiskers(one, middle, [interval for *_, interval in bins], colour(name))
        one.plot(middle, [interval.value for *_, interval in bins], color=colour(name))
        one.set_title(name)
        one.set(xlim=(-0.08, 1.0), xticks=[0, 0.5, 1], xlabel="severity")
        one.grid(axis="y")
    axes[0].set_ylabel("mean gate weight")
    axes[0].set_ylim(bottom=-0.05 * axes[0].get_ylim()[1])  # dots at 0 are shown whole
    return figure


@styled
def retrieval(
    table: Mapping[str, Mapping[str, Interval]],
    modalities: Sequence[str],
    metrics: Sequence[str] = ("r_at_1", "r_at_10"),
) -> Figure:
    """Heat maps of retrieval recall, query modality by target modality."""
    size = len(modalities)
    figure, axes = new(1.2 + 0.62 * size, columns=len(metrics))
    for one, metric in zip(axes, metrics):
        grid = np.full((size, size), np.nan)
        for i, j in np.ndindex(size, size):
            pair = table.get(f"{modalities[i]}_to_{modalities[j]}")
            if pair is not None:
                grid[i, j] = pair[metric].value
        top = max(0.01, float(np.nanmax(grid, initial=0)))
        one.imshow(grid, cmap=SHADES, vmin=0, vmax=top, aspect="auto")
        for i, j in np.argwhere(np.isfinite(grid)):
            tint = "#ffffff" if grid[i, j] > 0.55 * top else "#111111"
            one.text(j, i, f"{100 * grid[i, j]:.1f}", ha="center", va="center", color=tint)
        one.set_xticks(range(size), modalities)
        one.set_yticks(range(size), modalities)
        one.tick_params(length=0)
        one.spines[:].set_visible(False)
        one.set_title(metric.replace("r_at_", "R@") + ", %")
        one.set_xlabel("gallery")
    axes[0].set_ylabel("query")
    return figure


@styled
def training_curves(rows: Sequence[Mapping[str, Any]], panels: Mapping[str, Sequence[str]] | None = None) -> Figure:
    """Curves of the rows of metrics.jsonl.

    Args:
        rows: dicts with ``step`` and metrics; ``train/`` before a name is left away, None is a gap.
        panels: title -> metric names; by default the losses, validation scores and gate weights that occur.
    """
    flat = [{name.removeprefix("train/"): x for name, x in row.items()} for row in rows]
    names = sorted({name for row in flat for name, x in row.items() if isinstance(x, (int, float))} - {"step"})
    chosen = dict(panels) if panels is not None else _default_panels(names)
    figure, axes = new(3.3, columns=max(1, len(chosen)), width=WIDTH if len(chosen) > 1 else 5.2)
    for one, (title, metrics) in zip(axes, chosen.items()):
        for i, name in enumerate(metrics):
            pairs = [(row["step"], row[name]) for row in flat if row.get(name) is not None and "step" in row]
            stem = name.rsplit("/", 1)[-1].removeprefix("weight_")
            tint = colour(stem) if stem in MODALITIES else INK if name == "loss" else _PLAIN[i % len(_PLAIN)]
            steps, values = zip(*sorted(pairs)) if pairs else ((), ())
            mark = "o" if len(pairs) < 12 else None
            one.plot(steps, values, color=tint, label=short(stem, 20), marker=mark, markersize=3.5)
        one.set_title(title)
        one.set_xlabel("step")
        one.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        one.grid(axis="y")
        if len(metrics) > 1:
            one.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return figure


@styled
def forest(
    points: Sequence[Point],
    xlabel: str,
    levels: Mapping[str, float] | None = None,
    reference: Interval | None = None,
) -> Figure:
    """Points with 95 % intervals, one a line; dashed lines are levels of chance, the band a reference's interval."""
    figure, (axes,) = new(0.95 + 0.27 * max(2, len(points)))
    if reference is not None and math.isfinite(reference.low):
        axes.axvspan(reference.low, reference.high, color=REFERENCE, alpha=0.16, linewidth=0)
    for name, level in (levels or {}).items():
        axes.axvline(level, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.annotate(
            f"{name} {100 * level:.0f} %",
            (level, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, 2),
            textcoords="offset points",
            color=MUTED,
            fontsize=8,
        )
    for i, point in enumerate(points):
        whiskers(axes, [i], [point.interval], point.hue, across=False)
    axes.set_yticks(range(len(points)), [short(point.name, 34) for point in points])
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


@styled
def compared(rows: Mapping[str, Mapping[str, Interval]], hues: Mapping[str, str], xlabel: str) -> Figure:
    """Points with 95 % intervals of several competitors beside each other, a row for each thing that is asked."""
    figure, (axes,) = new(1.2 + (0.16 + 0.13 * len(hues)) * max(2, len(rows)))
    for number, found in enumerate(rows.values()):
        for place, (name, one) in enumerate(found.items()):
            at = number + 0.7 * ((place + 0.5) / len(found) - 0.5)
            whiskers(axes, [at], [one], hues[name], across=False)
    for name, hue in hues.items():
        axes.plot([], [], "o", color=hue, label=name)
    axes.set_yticks(range(len(rows)), [short(name, 34) for name in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper right", ncols=len(hues))
    return figure


def whiskers(axes: Axes, place: Sequence[float], found: Sequence[Interval], tint: str, across: bool = True) -> None:
    """Dots with intervals, upright (`across`: places lie on the x axis) or lying."""
    for at, one in zip(place, found):
        span = [one.low, one.high] if math.isfinite(one.low) else [one.value, one.value]
        line, dot = ([at, at], span), ([at], [one.value])
        if not across:
            line, dot = line[::-1], dot[::-1]
        axes.plot(*line, color=tint, linewidth=2.2, solid_capstyle="round", alpha=0.55)
        axes.plot(*dot, "o", color=tint, markersize=6)


def _band(axes: Axes, curve: Any, bootstrap: Bootstrap, resamples: int) -> None:
    curves: list[Array] = []
    for weights in bootstrap.weights():
        for weight in weights[: resamples - len(curves)]:
            drawn = curve(np.repeat(np.arange(len(weight)), weight.astype(np.int64)))
            if drawn is not None:
                curves.append(drawn)
        if len(curves) >= resamples:
            break
    if bootstrap.groups > 1 and len(curves) > 20:
        low, high = np.percentile(curves, [2.5, 97.5], axis=0)
        axes.fill_between(_GRID, low, high, color=ACCENT, alpha=0.16, linewidth=0)


def _precision_at(scores: Array, positive: Array) -> Array | None:
    if not positive.any() or positive.all():
        return None
    precision, recall, _ = sk.precision_recall_curve(positive, scores)
    return np.interp(_GRID, recall[::-1], precision[::-1])


def _recall_at(scores: Array, positive: Array) -> Array | None:
    if not positive.any() or positive.all():
        return None
    false_rate, true_rate, _ = sk.roc_curve(positive, scores)
    return np.interp(_GRID, false_rate, true_rate)


def _both_percent(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(PERCENT)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.grid()


def _default_panels(names: Sequence[str]) -> dict[str, list[str]]:
    """The whole loss and its parts, a few validation scores on the same scale, the gate's weights."""
    scores = [f"val/retrieval/mean/r_at_{k}" for k in (1, 5, 10)]
    scores += [f"val/{name}" for name in ("average_precision", "roc_auc", "accuracy", "mean_class_accuracy")]
    parts = [name for name in names if name.startswith("loss/") and "pair_" not in name and name != "loss/total"]
    panels = {
        "loss": [name for name in ("loss", *parts) if name in names and not name.startswith("loss/fused_")],
        "validation": [name for name in scores if name in names],
        "gate weights": [name for name in names if name.startswith("gate/weight_")],
    }
    return {title: found for title, found in panels.items() if found}
