"""Cross-modal agreement against a slow version that reads like its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crossgate.objectives.agreement import agreeing, agreement
from crossgate.objectives.infonce import Views

PAIRS = [(0, 1), (0, 2), (1, 2)]


def slow_agreement(views: Views, pairs: list, scale: Tensor, positives: int) -> Tensor:
    """The definition, clip by clip."""
    x, present, group = views.embeddings, views.present, views.group
    clips, pair_losses = range(len(group)), []
    for a, b in pairs:
        terms = []
        for i in clips:
            others = [j for j in clips if group[j] != group[i] and present[j, a] and present[j, b]]
            if not (present[i, a] and present[i, b] and others):
                continue
            agree = {j: min(x[i, view].dot(x[j, view]).item() for view in (a, b)) for j in others}
            chosen = sorted(others, key=lambda j: -agree[j])[:positives]
            for view in (a, b):
                total = sum(
                    (scale * x[i, view].dot(x[j, view])).exp()
                    for j in clips
                    if group[j] != group[i] and present[j, view]
                )
                near = torch.stack([scale * x[i, view].dot(x[j, view]) for j in chosen]).mean()
                terms.append((total.log() - near) / 2)
        if terms:
            pair_losses.append(torch.stack(terms).sum() / (len(terms) / 2))
    return torch.stack(pair_losses).mean() if pair_losses else torch.zeros((), dtype=x.dtype)


def batch(clips: int = 9, seed: int = 0, dtype: torch.dtype = torch.float64) -> Views:
    draw = torch.Generator().manual_seed(seed)
    embeddings = torch.nn.functional.normalize(torch.randn(clips, 3, 5, generator=draw, dtype=dtype), dim=-1)
    present = torch.rand(clips, 3, generator=draw) > 0.3
    return Views(embeddings, present, torch.randint(0, 5, (clips,), generator=draw))


@pytest.mark.parametrize("tile", [0, 1, 2, 4])  # 9 clips: every side leaves another ragged tail
@pytest.mark.parametrize("positives", [1, 3, 20])
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_equal_the_definition(seed: int, positives: int, tile: int) -> None:
    views, scale = batch(seed=seed), torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    views.embeddings.requires_grad_()
    expected = slow_agreement(views, PAIRS, scale, positives)
    found = agreement(views, views, PAIRS, scale, positives=positives, tile=tile)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    inputs = [views.embeddings, scale]
    wanted, got = torch.autograd.grad(expected, inputs), torch.autograd.grad(found, inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_both_modalities_have_to_agree() -> None:
    """Clip 1 is clip 0's double in one view alone, clip 2 is near it in both: clip 2 is the positive."""
    east, north, near = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.8, 0.6])
    embeddings = torch.stack([torch.stack([east, east]), torch.stack([east, north]), torch.stack([near, near])])
    views = Views(embeddings, torch.ones(3, 2, dtype=torch.bool), torch.arange(3))
    chosen, found = agreeing(views, views, (0, 1), 1, 3)
    assert found.all()
    assert chosen[0].item() == 2


@pytest.mark.parametrize("tile", [0, 4])
def test_absent_rows_are_never_seen_and_get_no_gradient(tile: int) -> None:
    views, scale = batch(), torch.tensor(7.0, dtype=torch.float64)
    before = agreement(views, views, PAIRS, scale, positives=3, tile=tile)
    views.embeddings = torch.where(views.present.unsqueeze(-1), views.embeddings, 1e6).requires_grad_()
    after = agreement(views, views, PAIRS, scale, positives=3, tile=tile)
    assert after == before
    (gradient,) = torch.autograd.grad(after, views.embeddings)
    assert gradient.isfinite().all()
    assert gradient[~views.present].abs().sum() == 0


@pytest.mark.parametrize("tile", [0, 4])
def test_clips_of_one_group_agree_with_nobody(tile: int) -> None:
    views = batch()
    views.group[:] = 1
    views.embeddings.requires_grad_()
    loss = agreement(views, views, PAIRS, torch.tensor(7.0, dtype=torch.float64), positives=3, tile=tile)
    assert loss == 0
    (gradient,) = torch.autograd.grad(loss, views.embeddings)
    assert gradient.abs().sum() == 0


def test_bf16_is_computed_in_fp32() -> None:
    views = batch(dtype=torch.float32)
    views.embeddings = views.embeddings.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = agreement(views, views, PAIRS, torch.tensor(100.0), positives=2, tile=4)
    exact = Views(views.embeddings.detach().double(), views.present, views.group)
    expected = agreement(exact, exact, PAIRS, torch.tensor(100.0, dtype=torch.float64), positives=2)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
    loss.backward()
    assert views.embeddings.grad is not None
    assert views.embeddings.grad.isfinite().all()


def test_the_loss_of_three_clips_worked_out_by_hand() -> None:
    """Scale 2, one positive each: 0 and 1 take 2, 2 takes 0. Of each view two similarities enter the log-sum."""
    east, north, near = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.8, 0.6])
    embeddings = torch.stack(
        [torch.stack([east, east]), torch.stack([east, north]), torch.stack([near, near])]
    ).double()
    views = Views(embeddings, torch.ones(3, 2, dtype=torch.bool), torch.arange(3))
    found = agreement(views, views, [(0, 1)], torch.tensor(2.0, dtype=torch.float64), positives=1)
    # (l_aa, l_bb): clip 0: ln(e^2 + e^1.6) - 1.6, ln(1 + e^1.6) - 1.6; clip 1: as clip 0 in view a,
    # ln(1 + e^1.2) - 1.2 in view b; clip 2: ln(2 e^1.6) - 1.6, ln(e^1.6 + e^1.2) - 1.6
    by_hand = (0.913015 + 0.183901 + 0.913015 + 0.263282 + 0.693147 + 0.513015) / 6
    assert found.item() == pytest.approx(by_hand, abs=1e-6)
