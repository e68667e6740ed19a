"""Workers come and go: the run goes on with those that are there, and its curve is the undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import groupby, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

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
    # SIGTERM in step 2; a node dies in step 7; the worker that is left is asked to save before a second one joins.
    starts = starts_of(tmp_path)
    assert starts[0].ranks == 2
    assert [ranks for ranks, _ in groupby(start.ranks for start in starts if start.after_the_loss)] == [1, 2]
    saved = {int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert {start.steps[0] - 1 for start in starts} <= saved | {0}, "a start went on from a step that nobody saved"
    lost = [before.steps[-1] + 1 - after.steps[0] for before, after in pairwise(starts)]
    assert lost[0] == 0, "SIGTERM costs no step"
    assert lost[-1] <= 1, "growing costs the step in flight at most"
    assert min(lost) >= 0 and max(lost) <= 5, "more than was done since the last regular save"
    run_fit(tiny_recipe(tmp_path, "calm", engine={"zero_stage": 2}))
    assert losses(tmp_path, "run") == pytest.approx(losses(tmp_path, "calm"), rel=0, abs=2e-5)


class Start(NamedTuple):
    """One start of the run: how many ranks, whether a node had been lost, and the steps that it began."""

    ranks: int
    after_the_loss: bool
    steps: list[int]


def starts_of(folder: Path) -> list[Start]:
    """Returns the starts in order. A busy machine may add some."""
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    starts: dict[int, Start] = {}
    for process, ranks, lost, step in rows:
        starts.setdefault(process, Start(ranks, lost, [])).steps.append(step)
    return list(starts.values())


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


class Ray:
    """What the policy sees of a running Ray: its rooms, and one worker that saves when it is asked to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from ray.train.v2.api.config import ScalingConfig

        from crossgate.cluster import elastic

        self.asked, self.saved, self.now, self.room = 0, False, 1000.0, 1
        scaling = ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 1})
        self._policy = elastic.EvenScaling(scaling, (1, 2, 4))
        monkeypatch.setattr(self._policy, "_maybe_send_resource_request", lambda: None)
        monkeypatch.setattr(self._policy, "_get_reserved_resources", lambda: {"node": {"CPU": self.room}})
        monkeypatch.setattr("ray.train.v2._internal.execution.scaling_policy.elastic.time_monotonic", lambda: self.now)
        monkeypatch.setattr(elastic.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(elastic, "_all", lambda workers, question: self._answer(question is elastic._ask_to_save))

    def _answer(self, asked: bool) -> bool:
        self.asked += asked
        return self.saved

    def decide(self, after_s: float, workers: int = 1) -> int | None:
        """Returns the number of workers that the policy decides on that much later, or None where it leaves them."""
        self.now += after_s
        group = SimpleNamespace(workers=[None] * workers, num_workers=workers, start_time=0.0)
        return getattr(self._policy.make_decision_for_running_worker_group(group, None), "num_workers", None)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    return Ray(monkeypatch)


def test_workers_change_when_they_have_saved_and_not_before(ray):
    assert (ray.decide(100), ray.asked) == (None, 0)
    ray.room = 2
    assert (ray.decide(100), ray.asked) == (None, 1)
    assert (ray.decide(1), ray.asked) == (None, 1), "they have not saved"
    ray.saved = True
    assert (ray.decide(1), ray.asked) == (2, 1)


def test_workers_that_never_save_are_changed_at_last(ray):
    ray.room = 2
    assert (ray.decide(100), ray.decide(119), ray.decide(2)) == (None, None, 2)


def test_room_that_went_while_they_saved_is_not_taken(ray):
    ray.room = 2
    assert ray.decide(100) is None
    ray.room, ray.saved = 1, True
    assert ray.decide(1) is None
    ray.room = 2
    assert (ray.decide(1), ray.asked) == (None, 1), "it is soon enough in an interval"
    assert (ray.decide(100), ray.asked) == (None, 2), "what they saved then is old: they are asked again"
    assert ray.decide(1) == 2


def test_room_that_grew_while_they_saved_is_taken(ray):
    ray.room = 2
    assert ray.decide(100) is None
    ray.room, ray.saved = 5, True
    assert ray.decide(1) == 4


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
