"""VICReg against its definition on physically removed clips."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crossgate.objectives.infonce import Views
from crossgate.objectives.vicreg import vicreg

PAIRS = [(0, 1), (0, 2), (1, 2)]


def spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and covariance terms, direction by direction."""
    count, width = x.shape
    variance = [torch.clamp(1 - (x[:, d].var() + 1e-4).sqrt(), min=0) for d in range(width)]
    covariance = torch.zeros((), dtype=x.dtype)
    for d in range(width):
        for e in range(width):
            if d != e:
                shared = ((x[:, d] - x[:, d].mean()) * (x[:, e] - x[:, e].mean())).sum() / (count - 1)
                covariance = covariance + shared**2
    return sum(variance, torch.zeros(())) / width, covariance / width


def slow(views: Views, pairs: list[tuple[int, int]]) -> Tensor:
    losses = []
    for a, b in pairs:
        both = views.present[:, a] & views.present[:, b]
        if both.sum() < 2:
            continue
        x, y = (views.embeddings[both, view] * views.embeddings.shape[-1] ** 0.5 for view in (a, b))
        (var_x, cov_x), (var_y, cov_y) = spread(x), spread(y)
        losses.append(25 * ((x - y) ** 2).mean() + 25 * (var_x + var_y) + cov_x + cov_y)
    return torch.stack(losses).mean()


def batch(seed: int = 0, clips: int = 9) -> Views:
    draw = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(clips, 3, 5, generator=draw, dtype=torch.float64)
    present = torch.rand(clips, 3, generator=draw) > 0.3
    return Views(torch.nn.functional.normalize(embeddings, dim=-1), present, torch.arange(clips))


@pytest.mark.parametrize("seed", range(4))
def test_values_and_gradients_equal_the_definition(seed: int) -> None:
    views = batch(seed)
    views.embeddings.requires_grad_()
    found, expected = vicreg(views, PAIRS).loss, slow(views, PAIRS)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    got, wanted = (torch.autograd.grad(value, views.embeddings) for value in (found, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_what_absent_rows_hold_is_never_seen() -> None:
    views = batch()
    before = vicreg(views, PAIRS).loss
    views.embeddings = torch.where(views.present.unsqueeze(-1), views.embeddings, 1e6).requires_grad_()
    after = vicreg(views, PAIRS).loss
    assert after == before
    (gradient,) = torch.autograd.grad(after, views.embeddings)
    assert gradient[~views.present].abs().sum() == 0


@pytest.mark.parametrize("left", [0, 1])
def test_a_pair_of_too_few_clips_counts_for_nothing(left: int) -> None:
    views = batch()
    views.present[left:, 2] = False
    views.present[:, 0] = True
    found = vicreg(views, [(0, 1), (0, 2)])
    torch.testing.assert_close(found.loss, slow(views, [(0, 1)]))
    assert found.pair_losses.isnan().tolist() == [False, True]
    views.present[:] = False
    assert vicreg(views, PAIRS).loss == 0


def test_collapse_costs_more_than_disagreement() -> None:
    draw = torch.Generator().manual_seed(0)
    everything, group = torch.ones(64, 3, dtype=torch.bool), torch.arange(64)
    free = torch.nn.functional.normalize(torch.randn(64, 3, 16, generator=draw), dim=-1)
    aligned = free[:, :1].expand(-1, 3, -1)
    collapsed = torch.ones(64, 3, 16) / 4
    losses = [vicreg(Views(x, everything, group), PAIRS).loss for x in (aligned, free, collapsed)]
    assert losses[0] < losses[1]
    assert losses[0] < losses[2]


def test_no_gradient_is_infinite_at_collapse() -> None:
    embeddings = (torch.ones(6, 3, 4) / 2).requires_grad_()
    views = Views(embeddings, torch.ones(6, 3, dtype=torch.bool), torch.arange(6))
    vicreg(views, PAIRS).loss.backward()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()
