"""A driver on a Ray cluster, to be killed: `test_killed` does so. ``python killed_run.py FOLDER ADDRESS WAIT_AT``"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

TINY = str(Path(__file__).resolve().parents[1] / "training")
sys.path.insert(0, TINY)

from tiny_run import run_fit, tiny_recipe  # noqa: E402

from crossgate.config import Recipe  # noqa: E402


def run(recipe: Recipe, wait_at: int) -> dict[str, Any]:
    """Entry on the workers: says which step it begins with, and in which it waits to be killed."""
    begun: list[int] = []

    def on_step(step: int) -> None:
        if not begun:
            begun.append(step)
            (Path(recipe.run.output) / f"begins-{step}").touch()
        if step == wait_at:
            (Path(recipe.run.output) / f"waits-{step}").touch()
            time.sleep(600)

    result = run_fit(recipe, on_step=on_step)
    return {"step": result.step, "resumed_from": result.resumed_from}


def main() -> None:
    from crossgate.cluster.ray_train import launch

    folder, address, wait_at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), TINY])  # for Ray's workers
    cluster = {"address": address, "workers": 2, "launcher": "ray"}
    recipe = tiny_recipe(folder, "run", engine={"zero_stage": 2}, cluster=cluster)
    print(json.dumps(launch(recipe, "killed_run:run", {"wait_at": wait_at})))


if __name__ == "__main__":
    main()
