"""Pretext tasks: the labels are true of what is shown, a clip's tasks are its own, absence counts for nothing."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from crossgate.batch import ClipBatch
from crossgate.config import PretextConfig
from crossgate.errors import UserError
from crossgate.recipe import parse_recipe
from crossgate.tasks import build_task, moments
from crossgate.tasks.pretext import DRAWS, KINDS, Pretext, _Asked
from crossgate.tasks.pretrain import PretrainTask
from crossgate.tasks.quadrants import CHANNEL_ORDERS, Quadrants

ALL = tuple(KINDS)


def task_of(small: ModuleType, **pretext: object) -> PretrainTask:
    settings = {"tasks": ALL, **pretext}
    recipe = small.recipe("pretrain", clip={"frames": 4}, pretrain={"pretext": settings})
    task = build_task(recipe, small.VOCABULARIES)
    assert isinstance(task, PretrainTask)
    return task


def batch_of(small: ModuleType) -> ClipBatch:
    return small.clips(small.recipe("pretrain", clip={"frames": 4}))


# ---- what is shown ---------------------------------------------------------------------------------------------


def changed_slowly(picture: Tensor, quadrant: int, flip: int, turns: int, order: int, modality: str) -> Tensor:
    """One frame ``(C, S, S)``, changed step by step as the definition says."""
    half, out = picture.shape[-1] // 2, picture.clone()
    top, left = half * (quadrant // 2), half * (quadrant % 2)
    piece = out[:, top : top + half, left : left + half].clone()
    if flip:
        piece = piece.flip(-1)
        if modality == "flow":
            piece[0] = -piece[0]
    for _ in range(turns):
        piece = piece.rot90(1, (-2, -1))
        if modality == "flow":
            piece = torch.stack([piece[1], -piece[0]])
    if modality == "rgb":
        piece = piece[list(CHANNEL_ORDERS[order])]
    out[:, top : top + half, left : left + half] = piece
    return out


@pytest.mark.parametrize(("modality", "channels", "side"), [("rgb", 3, 8), ("flow", 2, 7), ("depth", 1, 6)])
def test_a_quadrant_is_changed_as_its_labels_say(modality: str, channels: int, side: int) -> None:
    codes = torch.cartesian_prod(torch.arange(4), torch.arange(2), torch.arange(4), torch.arange(6))  # every change
    stream = torch.randint(0, 256, (len(codes), 2, channels, side, side), generator=torch.Generator().manual_seed(0))
    stream = stream.to(torch.uint8 if modality == "rgb" else torch.float32)
    out = Quadrants(side)(stream, *codes.unbind(1), modality=modality)
    assert out.dtype == stream.dtype
    for clip, code, changed in zip(stream, codes.tolist(), out):
        expected = torch.stack([changed_slowly(frame, *code, modality) for frame in clip])
        assert torch.equal(changed, expected), code


def test_a_turned_flow_still_points_where_its_pixels_go() -> None:
    """A motion to the right in the left half of a quadrant is, a quarter turn on, one upwards in its lower half."""
    flow = torch.zeros(1, 1, 2, 8, 8)
    flow[..., 0, :4, :2] = 1.0
    one, zero = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    out = Quadrants(8)(flow, zero, zero, one, zero, modality="flow")
    expected = torch.zeros_like(flow)
    expected[..., 1, 2:4, :4] = -1.0
    assert torch.equal(out, expected)


def test_frames_are_shown_in_the_order_that_the_label_names() -> None:
    both = torch.tensor([0, 1])
    assert moments.arrow(4, both).tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert moments.speed(8, both, torch.tensor([1.0, 1.0])).tolist() == [[4, 5, 6, 7], [0, 2, 4, 6]]
    assert moments.speed(5, both, torch.tensor([0.0, 0.0])).tolist() == [[0, 1], [0, 2]]
    places = moments.order(7, torch.arange(6))
    assert places.shape == (6, 6)
    for label, own in enumerate(places.tolist()):
        assert [own[0] // 2, own[2] // 2, own[4] // 2] == list(moments.SEGMENT_ORDERS[label])
        assert sorted(own) == list(range(6))
    assert moments.rolled(4, torch.tensor([1])).tolist() == [[3, 0, 1, 2]]


@pytest.mark.parametrize("frames", [2, 3, 4, 8, 9])
def test_sound_out_of_step_is_never_in_step(frames: int) -> None:
    shares = torch.linspace(0, 1, 101)
    offset = moments.apart(frames, shares)
    assert ((offset % frames) != 0).all()
    assert (torch.minimum(offset, frames - offset) >= max(1, frames // 4)).all()


def test_sound_and_pictures_in_step_are_rolled_alike() -> None:
    draws = torch.rand(200, DRAWS, generator=torch.Generator().manual_seed(0))
    asked = _Asked(draws, ("synchrony",))
    frames = torch.arange(8.0).expand(200, 8).unsqueeze(2)  # a frame's feature is its number
    seen = asked.seen("synchrony", frames, torch.zeros(200, 1))  # (200, 4 + 1): means of two neighbours
    # where the first frame stands among the parts, against how far the sound is rolled
    first = moments.within(asked.roll, 8)
    expected = moments.shown(frames, moments.rolled(8, first))
    alike = (seen[:, :4] == expected).all(1)
    assert torch.equal(alike, asked.labels["synchrony"] == 1)
    assert 0.3 < alike.float().mean() < 0.7


def test_nothing_is_changed_that_nobody_asks_about() -> None:
    draws = torch.rand(50, DRAWS)
    _, flip, turns, order = _Asked(draws, ("flip",)).changes
    assert flip.any()
    assert not turns.any()
    assert not order.any()


def test_labels_are_even_and_follow_the_clip_and_the_step_only(small: ModuleType) -> None:
    asked = _Asked(torch.rand(20_000, DRAWS, generator=torch.Generator().manual_seed(1)), ALL)
    for name, kind in KINDS.items():
        counts = torch.bincount(asked.labels[name], minlength=kind.classes)
        assert len(counts) == kind.classes
        assert (counts / 20_000 - 1 / kind.classes).abs().max() < 0.02, name
    task, batch = task_of(small).eval(), batch_of(small)
    whole = task.encode(batch)
    part = task.encode(batch.select(torch.tensor([5, 2])))
    assert torch.equal(part.facts["pretext"], whole.facts["pretext"][[5, 2]])
    for name, rows in part.rows.items():
        torch.testing.assert_close(rows, whole.rows[name][[5, 2]], rtol=1e-4, atol=1e-5)
    task.forwards += 1
    assert not torch.equal(task.encode(batch).facts["pretext"], whole.facts["pretext"])


# ---- what is learnt --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["gate", "uniform", "random"])
def test_gradient_reaches_everything_that_learns(small: ModuleType, weighting: str) -> None:
    task, batch = task_of(small, weighting=weighting), batch_of(small)
    loss, report = task(batch)
    loss.backward()
    dead = [
        name
        for name, p in task.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ]
    assert not dead
    assert task.pretext is not None
    fixed = {name for name, p in task.pretext.named_parameters() if not p.requires_grad}
    assert fixed == ({"gate.weight", "gate.bias"} if weighting == "random" else set())
    weights = torch.stack([report[f"pretext/weight_{name}"] for name in ALL])
    assert (weights > 0).all()
    assert (weights.std() > 0.01) == (weighting == "random")


def test_pretext_tasks_alone_train_the_encoders_and_leave_the_fusion(small: ModuleType) -> None:
    recipe = small.recipe("pretrain", clip={"frames": 4}, pretrain={"contrast": 0.0, "pretext": {"tasks": ["order"]}})
    task = build_task(recipe, small.VOCABULARIES)
    loss, report = task(batch_of(small))
    torch.testing.assert_close(loss.detach(), 0.5 * report["loss/pretext"])
    loss.backward()
    moved = {name.split(".")[2] for name, p in task.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"rgb", "flow", "depth"}  # encoders; nothing is asked of sound


def test_absent_streams_are_never_seen_and_change_no_loss(small: ModuleType) -> None:
    task, batch = task_of(small).eval(), batch_of(small)
    loss, _ = task(batch)
    spoiled = {name: stream.clone() for name, stream in batch.streams.items()}
    for m, name in enumerate(batch.modalities):
        spoiled[name][~batch.present[:, m]] = 77 if name == "rgb" else torch.nan
    batch.streams = spoiled
    again, _ = task(batch)
    assert torch.equal(loss, again)
    task.train()
    task(batch)[0].backward()
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.grad is not None)


def test_without_sound_no_clip_is_asked_for_synchrony(small: ModuleType) -> None:
    task, batch = task_of(small, tasks=("flip", "synchrony")), batch_of(small)
    batch.present[:, 2] = False
    loss, report = task(batch)
    assert report["pretext/weight_synchrony"].isnan()
    torch.testing.assert_close(report["pretext/weight_flip"], torch.tensor(1.0))
    assert loss.isfinite()


def test_a_gate_learns_and_no_easy_task_takes_all(small: ModuleType) -> None:
    """One task is planted to be trivial (its head is given away), the other cannot be solved."""
    task = task_of(small, tasks=("flip", "rotation"), entropy=0.5)
    pretext, batch = task.pretext, batch_of(small)
    assert pretext is not None
    gate = torch.optim.Adam(pretext.gate.parameters(), lr=0.1)
    labels = torch.zeros(len(batch), 2, dtype=torch.int64)
    features = torch.randn(len(batch), 16, generator=torch.Generator().manual_seed(0))
    easy = torch.tensor([30.0, 0.0]).expand(len(batch), 2)
    rows = {f"pretext/flip_{name}": easy for name in ("rgb", "flow", "depth")}
    rows |= {f"pretext/rotation_{name}": torch.zeros(len(batch), 16) for name in ("rgb", "flow", "depth")}
    before = pretext.gate.weight.detach().clone()
    for _ in range(300):
        gate.zero_grad()
        loss, measured = pretext.score(rows | {"pretext/gate": pretext.gate(features)}, labels, batch.present)
        loss.backward()
        gate.step()
    assert not torch.equal(before, pretext.gate.weight)
    found = [float(torch.div(*measured[f"pretext/weight_{name}"])) for name in ("flip", "rotation")]
    best = torch.tensor([0.0, -1.0 / 0.5]).softmax(0).tolist()  # of the formula: losses of 0 and of 1
    assert found == pytest.approx(best, abs=0.02)


def test_a_pretext_task_can_be_learnt(small: ModuleType) -> None:
    """Quadrants that are bright on the left: mirrored or not is plain to see."""
    recipe = small.recipe(
        "pretrain",
        clip={"frames": 1, "modalities": ("rgb", "flow")},
        pretrain={"contrast": 0.0, "pretext": {"tasks": ["flip"]}},
    )
    task, batch = build_task(recipe, small.VOCABULARIES), small.clips(recipe)
    batch.present[:] = torch.tensor([True, False])
    batch.streams["rgb"] = torch.zeros_like(batch.streams["rgb"])
    batch.streams["rgb"].unflatten(-1, (2, 16))[..., :8] = 255
    optimiser = torch.optim.Adam(task.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        loss, report = task(batch)
        loss.backward()
        optimiser.step()
        losses.append(float(report["loss/pretext"]))
    assert sum(losses[-4:]) / 4 < 0.7 < 0.8 < losses[0]  # new labels at every step: nothing can be learnt by heart


# ---- recipes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "clip", "complaint"),
    [
        (("synchrony",), {"modalities": ("rgb", "flow")}, "synchrony cannot be asked of rgb, flow"),
        (("channels",), {"modalities": ("flow", "depth")}, "channels cannot be asked of flow, depth"),
        (("speed",), {"frames": 3}, "speed cannot be asked of 3 frames"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(
    small: ModuleType, tasks: tuple[str, ...], clip: dict, complaint: str
) -> None:
    config = small.recipe("pretrain", clip={"frames": 4, **clip}).data.clip
    with pytest.raises(UserError, match=complaint) as caught:
        Pretext(PretextConfig(tasks=tasks), config, 16)
    assert "pretrain.pretext.tasks" in str(caught.value)


@pytest.mark.parametrize("settings", [{"contrast": 0.0}, {"pretext": {"tasks": ["flip", "flip"]}}])
def test_recipes_that_make_no_sense_are_refused(settings: dict) -> None:
    with pytest.raises(UserError):
        parse_recipe({"kind": "pretrain", "pretrain": settings})
