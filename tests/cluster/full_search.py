"""A whole search by `ray job submit`, killed half-way and submitted again; then everything that it left is checked.

    make demo
    python tests/cluster/full_search.py demo FOLDER [--samples 40]

Ten gates, Optuna and ASHA, on the demo's clips and its pretrained encoders. It takes minutes, so that it is run by
hand; `test_planted` proves the same in small at each `make test-slow`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from ray_head import Submitter, checkout, ray_head
from search_checks import check_nesting, check_values, ended

from crossgate.cluster.trials import TrialRecord, known_trials
from crossgate.evaluation import read_results
from crossgate.runs.fusions import AVERAGES

GATE = "model.fusion.name"
GATES = [
    "mean",
    "concat",
    "sigmoid",
    "softmax",
    "gmu",
    "sparse",
    "attention",
    "film",
    "entropy_logits",
    "softmax_logits",
]
METRIC = "val/accuracy"


def recipe_of(demo: Path, output: Path, samples: int) -> dict[str, Any]:
    """Returns the demo's search of action gates with a larger space."""
    tree: dict[str, Any] = yaml.safe_load((demo / "recipes" / "search-action.yaml").read_text())
    tree["run"] = {"name": "gates", "output": str(output)}
    tree["data"]["index"] = str(demo / "shards")
    tree["finetune"] |= {
        "init": str(demo / "runs" / Path(tree["finetune"]["init"]).name),
        "features": str(output / "kept"),
    }
    tree["tracking"] = {"experiment": "crossgate"}
    tree["training"] |= {"steps": 240, "eval_every": 24, "save_every": 48}
    tree["cluster"] = {"launcher": "local"}
    tree["search"] = {
        "space": {
            GATE: GATES,
            "optim.lr": {"low": 1.0e-3, "high": 1.0e-2, "log": True},
            "model.fusion.temperature": {"low": 0.3, "high": 3.0, "log": True, "when": {GATE: ["softmax"]}},
            "model.fusion.modality_dropout": {"low": 0.0, "high": 0.4},
        },
        "samples": samples,
        "searcher": "optuna",
        "scheduler": "asha",
        "reduction": 2.0,
        "seeds": 4,
        "finalists": 2,
        "concurrent": 2,
        "metric": METRIC,
    }
    return tree


def contents(records: list[TrialRecord]) -> dict[str, str]:
    """Returns trial -> what it measured, to see that nothing was run again."""
    return {record.name: (Path(record.directory) / "metrics.jsonl").read_text() for record in records}


def run(demo: Path, output: Path, samples: int) -> dict[str, float]:
    output.mkdir(parents=True)
    recipe, folder = output / "recipe.yaml", output / "gates"
    recipe.write_text(yaml.safe_dump(recipe_of(demo, output, samples), sort_keys=False))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, ray_head() as head:
        submit = Submitter(head, checkout(Path(scratch)))
        job = submit.start("search", recipe)
        while len(ended(folder)) < samples // 2:
            if job.poll() is not None:
                assert not known_trials(folder), f"the search ended before it was killed:\n{submit.said(job)}"
                job = submit.start("search", recipe)  # the head was not ready to start jobs
            time.sleep(0.2)
        killed = head.kill("jobs/search.py", "_single_trial", "ImplicitFunc")
        job.communicate(timeout=120)
        before, kept_at = (
            ended(folder),
            {path: path.stat().st_mtime for path in (output / "kept").glob("*.safetensors")},
        )
        measured = contents(before)
        half = time.monotonic() - began
        print(f"killed {killed} processes after {half:.0f} s: {len(before)} of {samples} trials had ended", flush=True)
        print(submit("search", recipe), flush=True)
    whole = time.monotonic() - began

    explored = known_trials(folder)
    drawn = [record for record in explored if record.status in ("finished", "pruned", "failed")]
    added = [record.overrides[GATE] for record in explored if record.added]
    assert samples == len(drawn) - len(added) and len(drawn) == len(explored) and set(added) <= set(AVERAGES)
    assert {record.overrides[GATE] for record in explored} == {*GATES, *added}
    again = {record.name: record for record in explored}
    # Averages and a finalist that had been pruned are run to their end.
    same = [record for record in before if again[record.name] == record]
    assert all(record.status == "pruned" for record in before if record not in same), "lost"
    after = contents(same)
    assert after == {record.name: measured[record.name] for record in same}, "run twice"
    assert all(path.stat().st_mtime == then for path, then in kept_at.items()), "features were made twice"
    check_values(explored, METRIC)
    board = json.loads((folder / "leaderboard.json").read_text())
    assert sorted(row["name"] for row in board) == sorted(again)
    for seeds in (3, 0):
        values = [row["value"] for row in board if row["status"] == "finished" and len(row["by_seed"]) == seeds]
        assert values == sorted(values, reverse=True), "not the best first"
    assert len(board[0]["by_seed"]) == 3  # the seed that chose does not count
    check_nesting(f"sqlite:///{output / 'mlflow.db'}", folder)
    numbers, _ = read_results(folder / "results.json")
    return numbers | {
        "trials": float(len(explored)),
        "pruned": float(sum(record.status == "pruned" for record in explored)),
        "failed": float(sum(record.status == "failed" for record in explored)),
        "ended_before_kill": float(len(before)),
        "killed_after_s": round(half, 1),
        "whole_s": round(whole, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the folder that `make demo` made")
    parser.add_argument("output", type=Path, help="a new folder for the search")
    parser.add_argument("--samples", type=int, default=40)
    given = parser.parse_args()
    print(json.dumps(run(given.demo.absolute(), given.output.absolute(), given.samples)))
