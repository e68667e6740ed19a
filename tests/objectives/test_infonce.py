"""InfoNCE against a slow version that reads like its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from crossgate.objectives.infonce import Views, anchor_losses, infonce

PAIRS = [(0, 1), (0, 2), (1, 2)]
TILES = [0, 4]  # in one piece, and in tiles with a ragged tail


def slow_infonce(embeddings: Tensor, present: Tensor, group: Tensor, pairs: list, scale: Tensor) -> Tensor:
    """The definition, clip by clip."""
    clips = range(len(group))
    pair_losses = []
    for a, b in pairs:
        terms = []
        for i in clips:
            if not (present[i, a] and present[i, b]):
                continue
            for x, y in ((a, b), (b, a)):
                positive = scale * embeddings[i, x].dot(embeddings[i, y])
                total = positive.exp()
                for j in clips:
                    if j != i and present[j, y] and group[j] != group[i]:
                        total = total + (scale * embeddings[i, x].dot(embeddings[j, y])).exp()
                terms.append((total.log() - positive) / 2)
        if terms:
            pair_losses.append(torch.stack(terms).sum() / (len(terms) / 2))
    return torch.stack(pair_losses).mean() if pair_losses else torch.zeros((), dtype=embeddings.dtype)


def batch(clips: int = 9, views: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Views:
    draw = torch.Generator().manual_seed(seed)
    embeddings = torch.nn.functional.normalize(torch.randn(clips, views, 5, generator=draw, dtype=dtype), dim=-1)
    present = torch.rand(clips, views, generator=draw) > 0.3
    group = torch.randint(0, 5, (clips,), generator=draw)
    return Views(embeddings, present, group)


def ours(views: Views, scale: Tensor, tile: int = 0) -> Tensor:
    return infonce(views, views.gathered(), PAIRS, scale, tile=tile).loss


@pytest.mark.parametrize("tile", [0, 1, 2, 4, 8])  # 9 clips: every side leaves another ragged tail
@pytest.mark.parametrize("seed", range(5))
def test_values_and_gradients_equal_the_definition(seed: int, tile: int) -> None:
    views, scale = batch(seed=seed), torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    views.embeddings.requires_grad_()
    expected = slow_infonce(views.embeddings, views.present, views.group, PAIRS, scale)
    wanted = torch.autograd.grad(expected, [views.embeddings, scale])
    found = ours(views, scale, tile)
    got = torch.autograd.grad(found, [views.embeddings, scale])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tile", TILES)
def test_absent_views_equal_removed_ones(tile: int) -> None:
    views, scale = batch(), torch.tensor(7.0, dtype=torch.float64)
    views.present[:, 2] = False
    without = Views(views.embeddings[:, :2], views.present[:, :2], views.group)
    torch.testing.assert_close(
        ours(views, scale, tile), infonce(without, without, [(0, 1)], scale, tile=tile).loss, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("tile", TILES)
def test_a_clip_with_nothing_equals_no_clip(tile: int) -> None:
    views, scale = batch(), torch.tensor(7.0, dtype=torch.float64)
    views.present[4] = False
    rest = torch.arange(9) != 4
    without = Views(views.embeddings[rest], views.present[rest], views.group[rest])
    torch.testing.assert_close(ours(views, scale, tile), ours(without, scale, tile), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", TILES)
def test_what_absent_rows_hold_is_never_seen(tile: int) -> None:
    views, scale = batch(), torch.tensor(7.0, dtype=torch.float64)
    before = ours(views, scale, tile)
    views.embeddings = torch.where(views.present.unsqueeze(-1), views.embeddings, 1e6).requires_grad_()
    after = ours(views, scale, tile)
    assert after == before
    (gradient,) = torch.autograd.grad(after, views.embeddings)
    assert gradient.isfinite().all()
    assert gradient[~views.present].abs().sum() == 0


@pytest.mark.parametrize("tile", TILES)
def test_order_of_clips_does_not_matter(tile: int) -> None:
    views, scale = batch(), torch.tensor(7.0, dtype=torch.float64)
    order = torch.randperm(9)
    shuffled = Views(views.embeddings[order], views.present[order], views.group[order])
    torch.testing.assert_close(ours(views, scale, tile), ours(shuffled, scale, tile), rtol=1e-12, atol=1e-12)


def test_same_group_is_no_negative() -> None:
    embeddings = torch.nn.functional.normalize(torch.ones(2, 3, 5), dim=-1)
    present = torch.ones(2, 3, dtype=torch.bool)
    scale = torch.tensor(10.0)
    assert ours(Views(embeddings, present, torch.tensor([7, 7])), scale) == 0
    assert ours(Views(embeddings, present, torch.tensor([7, 8])), scale).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("tile", TILES)
def test_nothing_present_at_all_gives_zero_and_no_gradient(tile: int) -> None:
    views = batch()
    views.present[:] = False
    views.embeddings.requires_grad_()
    outcome = infonce(views, views, PAIRS, torch.tensor(7.0, dtype=torch.float64), tile=tile)
    assert outcome.loss == 0
    assert outcome.pair_losses.isnan().all()
    assert outcome.top1.isnan()
    (gradient,) = torch.autograd.grad(outcome.loss, views.embeddings)
    assert gradient.abs().sum() == 0


def test_the_largest_scale_does_not_overflow_and_bf16_is_computed_in_fp32() -> None:
    views = batch(dtype=torch.float32)
    views.embeddings = (views.embeddings.bfloat16()).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = anchor_losses(views, views, 0, 1, torch.tensor(100.0))
    assert losses.dtype == torch.float32
    exact = Views(views.embeddings.detach().double(), views.present, views.group)
    expected, _ = anchor_losses(exact, exact, 0, 1, torch.tensor(100.0, dtype=torch.float64))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-4)
    losses.sum().backward()
    assert views.embeddings.grad is not None
    assert views.embeddings.grad.isfinite().all()


def test_top1_is_chance_for_collapsed_embeddings_and_one_for_aligned_ones() -> None:
    present, group = torch.ones(8, 3, dtype=torch.bool), torch.arange(8)
    scale = torch.tensor(10.0)
    collapsed = Views(torch.ones(8, 3, 8) / 8**0.5, present, group)
    aligned = Views(torch.eye(8).unsqueeze(1).expand(-1, 3, -1), present, group)
    assert infonce(collapsed, collapsed, PAIRS, scale).top1.item() == pytest.approx(1 / 8)
    assert infonce(aligned, aligned, PAIRS, scale).top1 == 1


@pytest.mark.parametrize("tile", [1, 5, 16, 22, 23])
def test_tiles_equal_the_whole_in_every_part_of_the_outcome(tile: int) -> None:
    """At the largest scale, where a row's terms differ by hundreds of powers, and with a pair that nothing has."""
    views, scale = batch(23, 4, seed=9), torch.tensor(100.0, dtype=torch.float64, requires_grad=True)
    views.present[:, 3] = False
    views.present[:20, 2] = False  # whole tiles without view 2
    views.group[:7] = 1  # whole tiles of one group
    views.embeddings.requires_grad_()
    pairs = [*PAIRS, (0, 3)]
    whole, tiled = (infonce(views, views, pairs, scale, tile=side) for side in (0, tile))
    torch.testing.assert_close(tiled.pair_losses, whole.pair_losses, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert tiled.top1 == whole.top1
    inputs = [views.embeddings, scale]
    wanted, got = torch.autograd.grad(whole.loss, inputs), torch.autograd.grad(tiled.loss, inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_tiles_in_bf16_are_computed_in_fp32() -> None:
    views = batch(dtype=torch.float32)
    views.embeddings = views.embeddings.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ours(views, torch.tensor(100.0), 4)
    assert loss.dtype == torch.float32
    exact = Views(views.embeddings.detach().double(), views.present, views.group)
    torch.testing.assert_close(
        loss.double(), ours(exact, torch.tensor(100.0, dtype=torch.float64)), rtol=1e-5, atol=1e-4
    )
    loss.backward()
    assert views.embeddings.grad is not None
    assert views.embeddings.grad.isfinite().all()


def test_ties_go_to_the_first_clip_in_tiles_too() -> None:
    collapsed = Views(torch.ones(8, 3, 8) / 8**0.5, torch.ones(8, 3, dtype=torch.bool), torch.arange(8))
    assert infonce(collapsed, collapsed, PAIRS, torch.tensor(10.0), tile=3).top1.item() == pytest.approx(1 / 8)
