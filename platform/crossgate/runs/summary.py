"""What a person reads when a run has ended: where it is, its headline numbers, what comes next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from crossgate import environment
from crossgate.config import OptimConfig, Recipe
from crossgate.evaluation.results import chance_of
from crossgate.model.store import model_directory, read_card
from crossgate.runs.context import run_directory

_CLASSIFIER = {
    "test/accuracy": "accuracy on test",
    "test/mean_class_accuracy": "mean-class accuracy on test",
    "test/average_precision": "average precision on test",
    "test/fnr_at_fixed_fpr": "positives missed at the fixed alarm rate",
}
_VALIDATION = {"val/accuracy": "accuracy on validation", "val/average_precision": "average precision on validation"}
_PRETRAINED = {
    "test/retrieval/mean/r_at_1": "retrieval between modalities, R@1",
    "test/retrieval/mean/r_at_10": "retrieval between modalities, R@10",
}
_NO_FEATURES = "finetune.features='\"\"'"  # YAML's empty text, through the shell
_PROBE, _PROBED = "test/linear_probe/", "/all/accuracy"


def describe(recipe: Recipe, metrics: Mapping[str, float]) -> str:
    """Returns the last lines of a run, nothing on ranks above 0.

    Args:
        recipe: of the run, as it was started.
        metrics: what the run returned.
    """
    world = environment.torchrun_world()
    if world is not None and world[0] != 0:
        return ""
    directory = run_directory(recipe)
    lines = [f"run      {directory}", f"report   {directory / 'report.html'}"]
    study = recipe.kind == "study"
    headlines, steps = _of_study(recipe, metrics) if study else (_headlines(metrics), _next(recipe, metrics))
    lines += [f"{_number(metrics, name):<27}{title}{_beside(metrics, name)}" for name, title in headlines.items()]
    lines += _verdict(metrics)
    return "\n".join([*lines, *(f"next: {step}" for step in steps)])


def describe_search(recipe: Recipe, best: Path) -> str:
    """Returns the last lines of a search: where it is, and how to fine-tune on from its best trial.

    Args:
        recipe: of the search.
        best: run directory of the best trial.
    """
    directory = run_directory(recipe)
    place = f"run.name={recipe.finetune.task}-{directory.name} run.output={recipe.run.output}"
    settings = f"{place} finetune.init={best}"
    if recipe.finetune.freeze:  # its encoders have not learnt the task yet, and its rates were made for a gate alone
        usual = OptimConfig()
        settings += f" finetune.freeze=false optim.lr={usual.lr} optim.weight_decay={usual.weight_decay}"
    if recipe.finetune.features:
        settings += f" {_NO_FEATURES}"
    step = f"next: crossgate finetune --config {best / 'recipe.yaml'} {settings}"
    lines = [f"run      {directory}", f"best     {best}", step]
    if recipe.finetune.features:
        lines.append(
            "      (trials took features that were kept; with encoders a step takes longer: set training.epochs)"
        )
    return "\n".join(lines)


def _headlines(metrics: Mapping[str, float]) -> dict[str, str]:
    """The two to four numbers that matter, as metric name -> what it is; missing ones are left out."""
    probes = {f"{_PROBE}{task}{_PROBED}": f"linear probe names the {task}" for task in _probed(metrics)[:2]}
    chosen = {**_CLASSIFIER, **_PRETRAINED, **probes}
    found = {name: title for name, title in chosen.items() if name in metrics}
    return found or {name: title for name, title in _VALIDATION.items() if name in metrics}


def _of_study(recipe: Recipe, metrics: Mapping[str, float]) -> tuple[dict[str, str], list[str]]:
    """Uniform averaging beside the fusion that validation chose; how to train all of its model."""
    directory = run_directory(recipe)
    fusion = read_card(model_directory(directory)).model.fusion.name
    titles = {"uniform_mean": "uniform mean of single modalities", fusion: "the fusion that validation chose"}
    measures = {"accuracy": "accuracy on test", "average_precision": "average precision on test"}
    headlines = {
        f"test/study/{model}/{measure}": f"{how}, {title} ({model})"
        for model, title in titles.items()
        for measure, how in measures.items()
        if f"test/study/{model}/{measure}" in metrics
    }
    settings = f"kind=finetune run.name={recipe.finetune.task}-{directory.name} finetune.init={directory}"
    settings += f" model.fusion.name={fusion} finetune.freeze=false {_NO_FEATURES}"
    return headlines, [f"crossgate finetune --config {directory / 'recipe.yaml'} {settings}"]


def _verdict(metrics: Mapping[str, float]) -> list[str]:
    """Of a study, whether its choice is shown to differ from uniform averaging."""
    name = "test/study/over_uniform"
    low, high = metrics.get(f"{name}_low", math.nan), metrics.get(f"{name}_high", math.nan)
    if math.isnan(low) or math.isnan(high):
        return []
    shown = "it beats averaging" if low > 0 else "it is worse than averaging" if high < 0 else "not shown to differ"
    return [f"{100 * metrics[name]:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}) over averaging: {shown}"]


def _number(metrics: Mapping[str, float], name: str) -> str:
    low, high = metrics.get(f"{name}_low", math.nan), metrics.get(f"{name}_high", math.nan)
    interval = "" if math.isnan(low) or math.isnan(high) else f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{100 * metrics[name]:.1f} %{interval}"


def _beside(metrics: Mapping[str, float], name: str) -> str:
    """What knowing nothing would reach, in the words of the line's end."""
    level = chance_of(metrics, name)
    return "" if math.isnan(level) else f" (chance {100 * level:.1f} %)"


def _probed(metrics: Mapping[str, float]) -> Sequence[str]:
    """Label tasks that a pretrained network was probed on."""
    return [
        name.removeprefix(_PROBE).removesuffix(_PROBED)
        for name in metrics
        if name.startswith(_PROBE) and name.endswith(_PROBED)
    ]


def _next(recipe: Recipe, metrics: Mapping[str, float]) -> list[str]:
    directory = run_directory(recipe)
    if recipe.kind == "finetune":
        return [f"crossgate predict {directory} VIDEO", f"crossgate release {directory}"]
    if recipe.kind == "pretrain":
        task = (*_probed(metrics), recipe.finetune.task)[0]
        settings = f"kind=finetune run.name={task}-{directory.name} finetune.task={task} finetune.init={directory}"
        return [f"crossgate finetune --config {directory / 'recipe.yaml'} {settings}"]
    return []
