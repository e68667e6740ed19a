"""``python search_process.py RECIPE.json [TRIAL]``: a search of planted trials, or others, in a process of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from crossgate.cluster.ray_tune import search
from crossgate.recipe import parse_recipe

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    # For Ray's workers, which import the trial's module.
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (HERE, HERE.parent / "training")))
    trial = sys.argv[2] if len(sys.argv) > 2 else "planted_run:run_trial"
    print(search(parse_recipe(json.loads(Path(sys.argv[1]).read_text())), trial).table())
