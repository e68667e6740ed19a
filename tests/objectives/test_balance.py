"""Modulated gradients: the formula written out clip by clip, and what must leave them alone."""

from __future__ import annotations

import math

import torch

from crossgate.objectives.balance import modulation


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
