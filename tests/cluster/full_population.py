"""``python tests/cluster/full_population.py FOLDER``: a population that is killed three times, and one that is not.

Both must end with the same journal, leaderboard and weights, bit for bit. Planted features, real trials under Ray, and
MLflow; minutes, so that it is run by hand.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "training")]

from families import kill_family  # noqa: E402
from planted_run import tree  # noqa: E402
from search_checks import check_nesting  # noqa: E402

SPACE = {
    "optim.lr": {"low": 1e-5, "high": 0.05, "log": True},
    "model.fusion.modality_dropout": [0.0, 0.1, 0.2, 0.3],
}
KILLED_AFTER = (3, 7, 11)
"""Stretches begun, of 16."""


def live(output: Path, kills: tuple[int, ...]) -> dict[str, Any]:
    """Searches in a process of its own, killed with all its trials and started again; returns what is left."""
    settings = tree(output, "noisy", space=SPACE, samples=4, scheduler="pbt", interval=20, seeds=2, finalists=1)
    settings["training"] = {"steps": 80, "eval_every": 10, "log_every": 80, "save_every": 80}
    output.mkdir(parents=True)
    recipe, folder = output / "recipe.json", output / "noisy"
    recipe.write_text(json.dumps(settings))
    for limit in (*kills, sys.maxsize):
        with (output / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("search_process.py"), recipe], stdout=log, stderr=log
            )
        while process.poll() is None and begun(folder) < limit:
            time.sleep(0.05)
        if process.poll() is None:
            kill_family(process.pid)
        assert limit < sys.maxsize or process.returncode == 0, (output / "log").read_text()[-2000:]
    check_nesting(f"sqlite:///{output / 'mlflow.db'}", folder)
    board = json.loads((folder / "leaderboard.json").read_text())
    (journal,) = folder.glob("population-*.jsonl")
    weights = {path.parts[-3]: path.read_bytes() for path in sorted(folder.glob("*/model/model.safetensors"))}
    return {
        "journal": journal.read_text(),
        "leaderboard": [[row[key] for key in ("name", "overrides", "value", "step", "by_seed")] for row in board],
        "weights": {name: hashlib.sha256(content).hexdigest() for name, content in weights.items()},
        "begun": begun(folder),
    }


def begun(folder: Path) -> int:
    """Returns how often any start has begun a stretch of a trial."""
    return sum(len(path.read_text()) for path in folder.glob("*.started"))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    torn, whole = live(root / "torn", KILLED_AFTER), live(root / "whole", ())
    for key in ("journal", "leaderboard", "weights"):
        assert torn[key] == whole[key], f"the {key} of the killed population are others"
    print(json.dumps({"trials": len(whole["leaderboard"]), "begun": whole["begun"], "begun_killed": torn["begun"]}))
