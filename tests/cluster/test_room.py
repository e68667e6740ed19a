"""Too small a cluster: waited for while it may grow, refused with one line when it will not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_recipe

from crossgate.cluster import room, session
from crossgate.cluster.ray_tune import search
from crossgate.cluster.room import Need, Share, fits, wait_for_room
from crossgate.errors import UserError
from crossgate.recipe import parse_recipe

NEED = Need("one trial", ((4.0, 1.0),), "search.cpus_per_trial, search.gpus_per_trial")


@pytest.mark.parametrize(
    ("nodes", "shares", "expected"),
    [
        ([(4, 1)], [(4, 1)], True),
        ([(4, 0), (4, 1)], [(4, 1), (4, 0)], True),
        ([(2, 1), (2, 0)], [(4, 1)], False),  # enough in all, but on no node
        ([(8, 2)], [(4, 1), (4, 1)], True),
        ([(8, 2)], [(4, 1), (4, 1), (0.1, 0)], False),
        ([(2, 1), (8, 0)], [(8, 0), (2, 1)], True),
        ([], [(1, 0)], False),
        ([(3, 0)], [(0.6, 0)] * 5, True),  # in floating point, four of them leave less than one
        ([(20, 1)], [(1, 0.05)] * 20, True),
    ],
)
def test_shares_must_fit_on_single_nodes(nodes: list[Share], shares: list[Share], expected: bool) -> None:
    assert fits(nodes, shares) is expected


def test_a_cluster_that_grows_in_time_is_asked_to_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LOOK_S", 0.01)
    looks, asked = [], []

    def nodes() -> list[Share]:
        looks.append(1)
        return [(2.0, 0.0)] + [(4.0, 1.0)] * (len(looks) > 5)

    wait_for_room(NEED, nodes, 60.0, asked.append)
    assert asked == [NEED.shares, ()], "what was asked for must not be asked for ever"
    wait_for_room(NEED, nodes, 60.0, asked.append)
    assert len(asked) == 2


def test_one_that_does_not_grow_is_refused_with_what_is_asked_and_what_there_is(monkeypatch: Any) -> None:
    monkeypatch.setattr(room, "LOOK_S", 0.01)
    asked: list[Any] = []
    with pytest.raises(UserError) as raised:
        wait_for_room(NEED, lambda: [(2.0, 0.0), (2.0, 0.0)], 0.05, asked.append)
    assert str(raised.value).splitlines() == [str(raised.value)]
    for words in (
        "one trial needs 4 CPUs and 1 GPU, and Ray has no room for it after 0.05 s (cluster.wait_s)",
        "search.cpus_per_trial, search.gpus_per_trial",
        "at most what there is: 2 nodes with 2 CPUs",
    ):
        assert words in str(raised.value)
    assert asked == [NEED.shares, ()]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"search": {"cpus_per_trial": 999}}, r"search\.cpus_per_trial.*one trial needs 999 CPUs, .*1 node with \d"),
        ({"search": {"gpus_per_trial": 64}}, r"search\.gpus_per_trial.*needs 1 CPU and 64 GPUs"),
        ({"cluster": {"workers": 8, "cpus_per_worker": 50}}, r"cpus_per_worker.*8 x 50 CPUs and 0\.1 CPUs"),
    ],
)
def test_a_private_cluster_never_grows_and_is_refused_at_once(
    tmp_path: Path, ray_cluster: Any, sections: dict[str, Any], complaint: str
) -> None:
    space = {"search": {"space": {"optim.lr": [0.1]}} | sections.pop("search", {}), "tracking": {"enabled": False}}
    tree = tiny_recipe(tmp_path, "study", **sections, **space).model_dump(mode="json")
    with pytest.raises(UserError, match=complaint):
        search(parse_recipe(tree | {"kind": "search"}), "tiny_run:run_trial")
    assert not list((tmp_path / "study").glob("*.started"))


@pytest.mark.ray
def test_any_other_cluster_is_waited_for(tmp_path: Path, ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_PRIVATE", "a mark that it does not have")
    keys = {"search": {"space": {"optim.lr": [0.1]}, "cpus_per_trial": 99}, "cluster": {"wait_s": 0.2}}
    tree = tiny_recipe(tmp_path, "study", tracking={"enabled": False}, **keys).model_dump(mode="json")
    with pytest.raises(UserError, match=r"no room for it after 0\.2 s"):
        search(parse_recipe(tree | {"kind": "search"}), "tiny_run:run_trial")
