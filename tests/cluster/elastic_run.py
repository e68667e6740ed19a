"""A run on a Ray cluster of two nodes, of which one dies and another comes: `test_elastic` looks at what is left.

``python elastic_run.py FOLDER`` starts everything itself, its cluster included, and ends it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

TINY = str(Path(__file__).resolve().parents[1] / "training")
sys.path.insert(0, TINY)

from tiny_run import run_fit, tiny_recipe  # noqa: E402

from crossgate.config import Recipe  # noqa: E402
from crossgate.recipe import with_overrides  # noqa: E402
from crossgate.training.requests import REQUESTS  # noqa: E402
from crossgate.training.world import current_world  # noqa: E402

TERM_AT, LOSE_AT, GROW_AT = 2, 7, 9


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.1)


def run(recipe: Recipe) -> dict[str, Any]:
    """Entry on the workers: a SIGTERM, then waits to lose a node, then to be grown; the grown ones are at stage 3."""
    world, folder = current_world(), Path(recipe.run.output)
    if (folder / "grow").exists():
        recipe = with_overrides(recipe, {"engine.zero_stage": 3})

    def on_step(step: int) -> None:
        if world.leads:
            with (folder / "steps.jsonl").open("a") as file:
                file.write(json.dumps([os.getpid(), world.ranks, (folder / "lost").exists(), step]) + "\n")
        if step == TERM_AT and not world.leads and not (folder / "termed").exists():
            (folder / "termed").touch()
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: REQUESTS._stop.is_set())
        if step == LOSE_AT and world.ranks == 2 and not (folder / "lost").exists():
            (folder / "lose").touch()
            time.sleep(120)
        if world.ranks == 1 and (step >= GROW_AT or not (folder / "lost").exists()):
            if (folder / "lost").exists():
                (folder / "grow").touch()  # else both nodes are there, and Ray counted before the first start let go
            if REQUESTS.saved():
                time.sleep(120)  # it is about to grow
            wait_for(lambda: REQUESTS._save.is_set() or REQUESTS.saved())

    result = run_fit(recipe, on_step=on_step, validated=False)
    return {"step": result.step, "ranks": world.ranks, "zero_stage": recipe.engine.zero_stage}


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster

    from crossgate import environment
    from crossgate.cluster.ray_train import launch
    from crossgate.cluster.session import prepare_worker

    folder = Path(sys.argv[1])
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, TINY])
    environment.expect_nodes_to_go(10)
    environment.calm_ray()
    environment.expect_no_preemption()
    # A dead node is noticed sooner than by default.
    health = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second = cluster.add_node(num_cpus=1)
    root = Path(environment.__file__).parents[1]
    runtime = {"env_vars": environment.worker_environment(root), "worker_process_setup_hook": prepare_worker}
    ray.init(address=cluster.address, runtime_env=runtime, log_to_driver=False)

    recipe = tiny_recipe(
        folder,
        "run",
        engine={"zero_stage": 2},
        training={"save_every": 5, "keep": 9},
        cluster={"workers": [1, 2], "regrow_s": 2, "launcher": "ray", "max_failures": 3},
    )
    results: list[dict[str, Any]] = []
    running = threading.Thread(target=lambda: results.append(launch(recipe, "elastic_run:run")), daemon=True)
    running.start()
    try:  # nodes can be added by the main thread only
        wait_for((folder / "lose").exists, 240)
        (folder / "lost").touch()
        cluster.remove_node(second, allow_graceful=False)
        wait_for((folder / "grow").exists, 240)
        cluster.add_node(num_cpus=1)
        running.join(240)
        (folder / "result.json").write_text(json.dumps(results[0]))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
