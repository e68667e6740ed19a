"""Modulated gradients: the formula written out clip by clip, and what must leave them alone."""

from __future__ import annotations

import math

import pytest
import torch

from crossgate.objectives.balance import gradient_noise, modulation
from crossgate.tasks.draws import clip_draws


def slow(logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, strength: float) -> list[float]:
    """The obvious version."""
    means = []
    for m in range(logits.shape[1]):
        rows = [i for i in range(len(labels)) if valid[i, m] and labels[i] >= 0]
        true = [math.exp(logits[i, m, labels[i]]) / sum(math.exp(x) for x in logits[i, m]) for i in rows]
        means.append(sum(true) / len(true) if true else None)
    known = [one for one in means if one is not None]
    factors = []
    for own in means:
        others = (sum(known) - own) / (len(known) - 1) if own is not None and len(known) > 1 else 0
        ahead = own / others if own is not None and others > 0 else 0
        factors.append(1 - math.tanh(strength * ahead) if ahead > 1 else 1.0)
    return factors


def test_it_is_the_formula() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 3, 4, generator=rng, dtype=torch.float64)
    labels = torch.randint(-1, 4, (12,), generator=rng)
    valid = torch.rand(12, 3, generator=rng) > 0.3
    for strength in (0.1, 0.8):
        found = modulation(logits, labels, valid, strength)
        torch.testing.assert_close(found, torch.tensor(slow(logits, labels, valid, strength), dtype=torch.float64))


def test_the_one_ahead_is_slowed_and_no_other() -> None:
    labels = torch.zeros(5, dtype=torch.int64)
    logits = torch.zeros(5, 3, 2)
    logits[:, 1, 0] = 3.0
    present = torch.ones(5, 3, dtype=torch.bool)
    factors = modulation(logits, labels, present, 0.5)
    assert factors[0] == factors[2] == 1 and 0 < factors[1] < 0.5
    assert modulation(logits, labels, present, 0.9)[1] < factors[1]
    assert modulation(logits, labels, present, 0.0).tolist() == [1, 1, 1]


def test_absence_and_ignorance_slow_nobody() -> None:
    labels = torch.zeros(5, dtype=torch.int64)
    logits = torch.randn(5, 2, 2)
    alone = torch.tensor([[True, False]]).expand(5, 2)
    for valid, truth in ((alone, labels), (torch.ones(5, 2, dtype=torch.bool), labels - 1)):
        assert modulation(logits, truth, valid, 0.5).tolist() == [1, 1]


def test_noise_is_as_strong_as_each_gradient_and_spares_the_absent() -> None:
    rng = torch.Generator().manual_seed(0)
    slope = torch.randn(400, 3, 50, generator=rng) * torch.tensor([0.1, 2.0, 0.0]).view(1, 3, 1) + 5.0
    present = torch.rand(400, 3, generator=rng) > 0.3
    noise = gradient_noise(slope, present, clip_draws(1, torch.tensor(2), torch.arange(400), 150))
    assert noise[~present].abs().sum() == 0
    for m, deviation in enumerate((0.1, 2.0, 0.0)):
        own = noise[:, m][present[:, m]]
        assert own.std().item() == pytest.approx(deviation, rel=0.03, abs=0.005)
        assert own.mean().item() == pytest.approx(0, abs=0.03 * deviation + 0.005)
        assert ((own.abs() > 2 * deviation).float().mean().item() == pytest.approx(0.0455, rel=0.15)) or not deviation


def test_noise_is_finite_at_the_ends_of_the_draws() -> None:
    draws = torch.tensor([[0.0, 1 - 2**-24]])
    slope = torch.tensor([[[1.0, -1.0]]])
    noise = gradient_noise(slope, torch.ones(1, 1, dtype=torch.bool), draws)
    assert noise.isfinite().all() and noise[0, 0, 0] < -5 and noise[0, 0, 1] > 5
