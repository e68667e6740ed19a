"""Workers come and go: the run goes on with those that are there, and its curve is the undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import losses, run_fit, tiny_recipe

from crossgate.errors import UserError
from crossgate.recipe import parse_recipe

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_sigterm_a_lost_node_and_a_new_one_in_one_run(tmp_path):
    command = [sys.executable, str(HERE / "elastic_run.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "result.json").read_text()) == {"step": 12, "ranks": 2, "zero_stage": 3}
    starts = [tuple(json.loads(line)) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    # SIGTERM in step 2: agreed and saved in step 3. A node dies in step 7: on from the last regular save, of step 5,
    # with one worker. It is asked to save in step 9, before a second one joins. A busy machine may add starts.
    assert starts[0] == (2, 1)
    assert starts[1][1] == 4
    assert starts[-2:] == [(1, 6), (2, 10)]
    run_fit(tiny_recipe(tmp_path, "calm", engine={"zero_stage": 2}))
    assert losses(tmp_path, "run") == pytest.approx(losses(tmp_path, "calm"), rel=0, abs=2e-5)


def recipe(**cluster):
    return parse_recipe({"kind": "finetune", "data": {"global_batch": 24}, "cluster": cluster})


def test_a_pair_of_workers_is_fewest_and_most():
    assert recipe(workers=[2, 8]) == recipe(workers=8, min_workers=2)
    assert recipe(workers=4).cluster.fewest_workers == 4


@pytest.mark.parametrize(
    ("cluster", "complaint"),
    [
        ({"workers": [2]}, "a pair"),
        ({"workers": [4, 2]}, "min_workers 4 is more than workers 2"),
        ({"workers": [5, 8]}, "not divisible by 5 ranks"),
    ],
)
def test_workers_that_cannot_be_are_refused(cluster, complaint):
    with pytest.raises(UserError, match=complaint):
        recipe(**cluster)


def test_only_numbers_of_workers_that_share_the_batch_evenly_are_possible():
    from crossgate.cluster.elastic import EvenScaling, possible_workers

    counts = possible_workers(recipe(workers=[2, 8]))
    assert counts == (2, 3, 4, 6, 8)

    from ray.train.v2.api.config import ScalingConfig

    policy = EvenScaling(ScalingConfig(num_workers=(2, 8), resources_per_worker={"CPU": 1}), counts)
    rooms = {1: 0, 2: 2, 5: 4, 7: 6, 100: 8}
    assert {cpus: policy._count_possible_workers({"node": {"CPU": cpus}}) for cpus in rooms} == rooms


def test_requests_are_handed_out_once_and_answered():
    from crossgate.training.requests import SAVE, STOP, Requests

    requests = Requests()
    assert requests.take() == 0
    requests.ask_to_save()
    assert (requests.saved(), requests.take(), requests.take()) == (False, SAVE, 0)
    requests.heeded()
    assert requests.saved()
    requests.ask_to_stop()
    assert (requests.take(), requests.take()) == (STOP, STOP)
