"""How a search ends: the test against averaging, and what people see of it in files and in MLflow."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

from crossgate.cluster.exchange import courses_of
from crossgate.cluster.trials import SearchResult, TrialRecord
from crossgate.config import Recipe
from crossgate.errors import writing
from crossgate.evaluation import Section, positive_class, style, write_report, write_results
from crossgate.evaluation.search_figures import importance_figure, importances, parallel_coordinates, schedules
from crossgate.evaluation.selection import Answers, Verdict, judge, unproven
from crossgate.evaluation.tables import Table
from crossgate.recipe import dump_recipe
from crossgate.runs.context import run_directory
from crossgate.runs.fusions import AVERAGES, GATE, average_for, is_gate
from crossgate.tracking import Tracker

BOARD, TABLE = "leaderboard.json", "leaderboard_table.json"


def fusion_of(recipe: Recipe, record: TrialRecord) -> str:
    """Returns the name of a trial's fusion."""
    return str(record.overrides.get(GATE, recipe.model.fusion.name))


def averages(recipe: Recipe, record: TrialRecord) -> bool:
    """Whether a trial weighs its modalities alike."""
    return fusion_of(recipe, record) in AVERAGES


def verdict_on(
    recipe: Recipe, result: SearchResult, records: Sequence[TrialRecord], classes: Sequence[str] = ()
) -> Verdict | None:
    """Tests the best trial against the best one of uniform averaging, seed by seed on validation groups.

    Args:
        recipe: of the search.
        result: its leaderboard.
        records: all trials, repetitions among them.
        classes: names in the order of the logits (none: the task is not binary).

    Returns:
        None where no trial finished, or trials keep no answers.
    """
    finished = [one for one in result.trials if one.status == "finished"]
    if not finished:
        return None
    winner, tried = finished[0], [one for one in finished if averages(recipe, one)]
    fusion = fusion_of(recipe, winner)
    if average_for(fusion) not in {average_for(fusion_of(recipe, one)) for one in tried}:
        return unproven(f"{average_for(fusion)}, which {winner.settings} must be better than, did not finish")
    theirs = _answers(recipe, tried[0], records)
    if not theirs:
        return None
    candidates = {}
    for one in finished:
        if not averages(recipe, one):
            answers, count = _answers(recipe, one, records), result.seeds if one.by_seed else [recipe.run.seed]
            candidates[one.settings] = {seed: answers[seed] for seed in count if seed in answers}
    return judge(
        candidates,
        theirs,
        winner.settings,
        recipe.search.metric.removeprefix("val/"),
        positive_class(classes, recipe.finetune.positive),
        average=f"uniform averaging ({fusion_of(recipe, tried[0])})",
        no_gate=f"the fusion {fusion}" if not is_gate(fusion) else "",
        resamples=recipe.evaluation.bootstrap,
        seed=recipe.run.seed,
        caveats=_caveats(recipe, result),
    )


def _caveats(recipe: Recipe, result: SearchResult) -> list[str]:
    """Returns what makes p too small, as far as the test does not know it."""
    found = []
    if result.trials[0].by_seed and recipe.run.seed in result.seeds:
        found.append(f"seed {recipe.run.seed}, which chose the finalists, counts")
    pruned = sum(one.status == "pruned" and not averages(recipe, one) for one in result.trials)
    if pruned:
        found.append(f"{pruned} trial{'s' if pruned > 1 else ''} pruned early not counted, so that p is somewhat small")
    explored = sum(one.status == "explored" and not averages(recipe, one) for one in result.trials)
    if explored:
        found.append(f"the finalists are the best of {explored} explored, which p does not know")
    return found


def _answers(recipe: Recipe, record: TrialRecord, records: Sequence[TrialRecord]) -> dict[int, Answers]:
    """Returns what a trial and its repetitions said, by seed: of clips, or of videos where those are evaluated."""
    own = [record, *(one for one in records if one.repeats == record.name and one.status == "finished")]
    found = {one.seed(recipe): Answers.read(one.directory) for one in own}
    videos = recipe.evaluation.unit == "video"
    return {seed: one.by_video() if videos else one for seed, one in found.items() if one is not None}


def log_board(result: SearchResult, tracker: Tracker) -> None:
    """Keeps the leaderboard as a table of the search's MLflow run, in the place of an earlier one."""
    table = result.columns()
    split = {"columns": list(table), "data": [list(row) for row in zip(*table.values())]}
    tracker.log_text(json.dumps(split), TABLE)
    tracker.set_tags({"mlflow.loggedArtifacts": json.dumps([{"path": TABLE, "type": "table"}])})


def publish(recipe: Recipe, result: SearchResult, verdict: Verdict | None, tracker: Tracker) -> None:
    """Writes leaderboard, figures, report and numbers into the search's directory and to MLflow."""
    run_dir = run_directory(recipe)
    figures = _schedules(recipe, result) if recipe.search.scheduler == "pbt" else _figures(result)
    rows = [asdict(record) | {"command": record.command} for record in result.trials]
    with writing("the leaderboard", run_dir):
        (run_dir / BOARD).write_text(json.dumps(rows, indent=1))
        (run_dir / "figures").mkdir(exist_ok=True)
        for name, (figure, _) in figures.items():
            (run_dir / "figures" / f"{name}.png").write_bytes(style.png(figure))
        report = write_report(
            run_dir / "report.html",
            f"Search: {run_dir.name}",
            _sections(result, list(figures.values())),
            summary=result.verdict,
            recipe=dump_recipe(recipe),
            provenance={"run": run_dir.name, "mlflow_run": tracker.run_id or "not tracked", "index": recipe.data.index},
        )
        best = result.winner.value if result.winner else None
        numbers = {"search/trials": float(len(result.trials)), "search/best": math.nan if best is None else best}
        numbers |= verdict.metrics() if verdict else {}
        write_results(run_dir / "results.json", numbers)
    for path in (run_dir / BOARD, report, run_dir / "results.json", run_dir / "figures"):
        tracker.log_artifact(path)
    tracker.log_text(result.table(), "leaderboard.txt")
    log_board(result, tracker)
    tracker.log_metrics({f"search/{one.name}": one.value for one in result.trials if one.value is not None}, 0)
    tracker.log_metrics({name: value for name, value in numbers.items() if not math.isnan(value)}, 0)


def _figures(result: SearchResult) -> dict[str, tuple]:
    """Draws trials of one fidelity: where some were explored cheaply these, and not the finalists in full besides."""
    ended = "explored" if any(one.status == "explored" for one in result.trials) else "finished"
    compared = [one for one in result.trials if one.status == ended and one.value is not None]
    shown = [one for one in result.trials if one.status in (ended, "pruned")]
    if len(compared) < 2:
        return {}
    points = [_legible(one) for one in shown]
    values = [one.value if one.status == ended else None for one in shown]
    cheap = " Values are those of the exploration; finalists in full are not drawn." if ended == "explored" else ""
    lines = f"A line a trial; pale ones were pruned.{cheap}"
    found = {"parallel_coordinates": (parallel_coordinates(points, values, result.metric), lines)}
    shares = importances([_legible(one) for one in compared], [one.value or 0.0 for one in compared])
    if shares:
        bars = f"Of what a random forest explains of the differences between {ended} trials; few trials give a hint."
        found["importances"] = (importance_figure(shares, result.metric), f"{bars}{cheap}")
    return found


def _schedules(recipe: Recipe, result: SearchResult) -> dict[str, tuple]:
    shown = [one for one in result.trials if one.status == "finished"]
    if not shown:
        return {}
    figure = schedules(
        [courses_of(one.overrides) for one in shown],
        [one.value for one in shown],
        recipe.training.steps,
        result.metric,
    )
    return {"schedules": (figure, "A line a trial: what it was trained with, those it went on from included.")}


def _legible(record: TrialRecord) -> dict[str, str | int | float]:
    return {k: v if isinstance(v, str | int | float) else str(v) for k, v in record.overrides.items()}


def _sections(result: SearchResult, figures: list[tuple]) -> list[Section]:
    columns = result.columns()
    shown = [name for name in columns if name not in ("name", "command", "reason")]
    rows = [[_cell(columns[name][row]) for name in shown] for row in range(len(result.trials))]
    reasons = [f"{one.settings}: {one.reason}" for one in result.trials if one.reason]
    again = "\n".join(f"# {one.settings}\n{one.command}" for one in result.trials if one.command)
    return [
        Section("Leaderboard", reasons, [Table(shown, rows, f"{result.metric} on validation groups")], figures),
        Section("Train one of them again", code=again),
    ]


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
