"""What keeps gates from collapse, against the definitions clip by clip."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from crossgate.objectives.gating import concentration, load_balance


def slow(weights: Tensor, routing: Tensor, present: Tensor) -> Tensor:
    clips = [b for b in range(len(present)) if present[b].any()]
    total = torch.zeros((), dtype=routing.dtype)
    for m in range(present.shape[1]):
        fair = sum(1 / present[b].sum().item() for b in clips if present[b, m])
        if fair:
            total = total + sum(weights[b, m] for b in clips) * sum(routing[b, m] for b in clips) / fair
    return total / len(clips)


def choices(present: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.randn(present.shape, dtype=torch.float64).masked_fill(~present, -torch.inf)
    soft = scores.softmax(1).nan_to_num()
    return torch.nn.functional.one_hot(soft.argmax(1), present.shape[1]) * present, soft


def test_equals_the_definition_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    present = torch.rand(9, 4) > 0.4
    present[3], present[:, 2] = False, False  # a corrupt clip, and a modality that no clip has
    hard, soft = choices(present)
    soft.requires_grad_()
    found, expected = load_balance(hard, soft, present), slow(hard, soft, present)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    got, wanted = torch.autograd.grad(found, soft)[0], torch.autograd.grad(expected, soft)[0]
    chooses = present.any(1)  # the others have nothing to choose
    torch.testing.assert_close(got[chooses], wanted[chooses], rtol=1e-12, atol=1e-12)


def test_is_one_when_even_and_m_when_all_choose_the_same() -> None:
    present = torch.ones(8, 4, dtype=torch.bool)
    even = torch.eye(4).repeat(2, 1)
    assert load_balance(even, even, present).item() == pytest.approx(1)
    one = torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(8, 4)
    assert load_balance(one, one, present).item() == pytest.approx(4)


def test_clips_that_have_one_modality_are_not_blamed_for_it() -> None:
    present = torch.tensor([[True, False], [True, False], [True, True], [True, True]])
    chosen = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert load_balance(chosen, chosen, present).item() == pytest.approx(1)


def test_it_pushes_away_from_the_favourite() -> None:
    present = torch.ones(6, 3, dtype=torch.bool)
    scores = torch.tensor([2.0, 0.0, 0.0]).repeat(6, 1).requires_grad_()
    soft = scores.softmax(1)
    load_balance(torch.nn.functional.one_hot(soft.argmax(1), 3), soft, present).backward()
    assert scores.grad is not None
    assert (scores.grad[:, 0] > 0).all() and (scores.grad[:, 1:] < 0).all()


def test_no_clip_at_all_gives_zero() -> None:
    present = torch.zeros(4, 3, dtype=torch.bool)
    assert load_balance(torch.zeros(4, 3), torch.zeros(4, 3), present) == 0


def test_concentration_equals_its_definition_in_value_and_gradient() -> None:
    torch.manual_seed(1)
    present = torch.rand(12, 4) > 0.4
    present[0], present[1], present[2] = False, torch.tensor([True, False, False, False]), True
    scores = torch.randn(12, 4, dtype=torch.float64).masked_fill(~present, -torch.inf).requires_grad_()
    weights = scores.softmax(1).masked_fill(~present, 0)
    terms = []
    for b in range(12):
        own = [weights[b, m] for m in range(4) if present[b, m]]
        if len(own) > 1:
            terms.append(1 + sum(w * w.log() for w in own) / math.log(len(own)))
    expected, found = torch.stack(terms).mean(), concentration(weights, present)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (wanted,) = torch.autograd.grad(expected, weights, retain_graph=True)
    (got,) = torch.autograd.grad(found, weights)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_concentration_is_zero_when_even_and_one_when_collapsed_with_finite_gradients() -> None:
    present = torch.tensor([[True, True, True], [True, True, False]])
    assert concentration(present / present.sum(1, keepdim=True), present).item() == pytest.approx(0, abs=1e-6)
    collapsed = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).requires_grad_()
    found = concentration(collapsed, present)
    assert found.item() == pytest.approx(1)
    found.backward()
    assert collapsed.grad is not None
    assert collapsed.grad.isfinite().all()
    assert concentration(collapsed, torch.zeros_like(present)) == 0
