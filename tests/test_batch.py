"""Clips of a batch chosen and joined: every field, in order."""

from __future__ import annotations

import pytest
import torch

from crossgate.batch import ClipBatch


def batch(clips: int) -> ClipBatch:
    number = torch.arange(clips)
    return ClipBatch(
        modalities=("rgb", "audio"),
        streams={"rgb": number.view(-1, 1, 1, 1, 1).to(torch.uint8), "audio": number.view(-1, 1, 1, 1, 1).float()},
        present=torch.stack([number % 2 == 0, number % 3 == 0], dim=1),
        group=number * 10,
        labels={"action": number % 4},
        degraded=number.float().unsqueeze(1).repeat(1, 2),
        clip=number + 100,
        keys=[f"clip{i}" for i in range(clips)],
    )


def same(a: ClipBatch, b: ClipBatch) -> bool:
    tensors = [
        *((a.streams[name], b.streams[name]) for name in a.streams),
        *((getattr(a, name), getattr(b, name)) for name in ("present", "group", "degraded", "clip")),
        (a.labels["action"], b.labels["action"]),
    ]
    return a.keys == b.keys and all(torch.equal(x, y) for x, y in tensors)


@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([2, 3, 4])], ids=["slice", "positions"])
def test_what_is_chosen_is_whole(rows: slice | torch.Tensor) -> None:
    chosen = batch(7).select(rows)
    assert chosen.keys == ["clip2", "clip3", "clip4"]
    assert chosen.clip.tolist() == [102, 103, 104]
    assert chosen.labels["action"].tolist() == [2, 3, 0]
    assert chosen.streams["audio"].flatten().tolist() == [2.0, 3.0, 4.0]


def test_parts_joined_are_the_whole() -> None:
    whole = batch(7)
    parts = [whole.select(slice(0, 3)), whole.select(slice(3, 4)), whole.select(torch.tensor([4, 5, 6]))]
    assert same(ClipBatch.concatenate(parts), whole)
    assert not same(ClipBatch.concatenate(parts[::-1]), whole)


def test_every_tensor_travels() -> None:
    moved = batch(3).to("meta")
    assert all(x.device.type == "meta" for x in [*moved.streams.values(), *moved.labels.values()])
    assert {moved.present.device.type, moved.group.device.type, moved.degraded.device.type, moved.clip.device.type} == {
        "meta"
    }
    assert moved.keys == batch(3).keys
    assert same(batch(3).to("cpu"), batch(3))
