"""The load balance of a gate that chooses, against its definition clip by clip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crossgate.objectives.gating import load_balance


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
