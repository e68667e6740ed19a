"""The mixed losses of pretext tasks equal their definition, in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from crossgate.objectives.pretext import task_losses, weigh

B, K = 7, 3


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    losses = torch.rand(B, K, dtype=torch.float64, generator=draw)
    asked = torch.rand(B, K, generator=draw) > 0.4
    asked[0], asked[1] = True, False
    return losses, asked, torch.randn(B, K, dtype=torch.float64, generator=draw)


def defined(losses: Tensor, asked: Tensor, scores: Tensor, evenness: float) -> Tensor:
    """Clip by clip, over the tasks that it can be asked."""
    clips = []
    for row in range(B):
        own = asked[row]
        if own.any():
            weights = scores[row][own].softmax(0)
            uneven = math.log(int(own.sum())) + (weights * weights.log()).sum()
            clips.append((weights * losses[row][own]).sum() + evenness * uneven)
    return torch.stack(clips).mean()


@pytest.mark.parametrize("evenness", [0.0, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_definition(seed: int, evenness: float) -> None:
    losses, asked, scores = problem(seed)
    found = []
    for one in (lambda *x: weigh(*x, evenness)[0], lambda *x: defined(*x, evenness)):
        leaves = losses.clone().requires_grad_(), scores.clone().requires_grad_()
        value = one(leaves[0], asked, leaves[1])
        found.append((value, *torch.autograd.grad(value, leaves)))
    for own, expected in zip(*found):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)


def test_without_a_gate_tasks_count_alike() -> None:
    losses, asked, _ = problem(0)
    _, weights = weigh(losses, asked, None, 0.0)
    expected = asked / asked.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(weights, expected.double())


def test_nobody_to_ask_gives_zero_and_a_gradient_of_zeros() -> None:
    losses, scores = torch.rand(B, K, requires_grad=True), torch.randn(B, K, requires_grad=True)
    loss, weights = weigh(losses, torch.zeros(B, K, dtype=torch.bool), scores, 0.5)
    assert loss == 0
    assert not weights.any()
    loss.backward()
    assert losses.grad is not None
    assert scores.grad is not None
    assert not losses.grad.any()
    assert not scores.grad.any()


def test_guessing_costs_one_and_absent_modalities_nothing() -> None:
    labels, valid = torch.tensor([0, 3]), torch.tensor([[True, False], [False, False]])
    sure = torch.tensor([[9.0, 0, 0, 0], [0, 0, 0, 9.0]])
    loss, asked = task_losses([torch.zeros(2, 4), sure * torch.nan], labels, valid)
    torch.testing.assert_close(loss, torch.tensor([1.0, 0.0]))
    assert asked.tolist() == [True, False]
    both, _ = task_losses([torch.zeros(2, 4), sure], labels, torch.ones(2, 2, dtype=torch.bool))
    assert (both < 0.51).all()
