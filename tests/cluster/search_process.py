"""``python search_process.py RECIPE.json``: a search of planted trials in a process of its own, to be killed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from crossgate.cluster.ray_tune import search
from crossgate.recipe import parse_recipe

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # for Ray's workers, which import `planted_run`
    print(search(parse_recipe(json.loads(Path(sys.argv[1]).read_text())), "planted_run:run_trial").table())
