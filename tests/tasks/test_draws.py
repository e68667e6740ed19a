"""Draws for modality dropout: uniform, and a function of seed, step and clip only."""

from __future__ import annotations

import torch

from crossgate.tasks.draws import clip_draws

STEP = torch.tensor(3)


def test_uniform_and_independent() -> None:
    draws = clip_draws(0, STEP, torch.arange(20000), 4)
    assert draws.shape == (20000, 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    torch.testing.assert_close(draws.mean(0), torch.full((4,), 0.5), rtol=0, atol=0.015)
    torch.testing.assert_close(draws.var(0), torch.full((4,), 1 / 12), rtol=0, atol=0.005)
    correlation = torch.corrcoef(torch.cat([draws[:-1].T, draws[1:].T]))
    assert (correlation - torch.eye(8)).abs().max() < 0.03


def test_a_clip_draws_the_same_whatever_stands_beside_it() -> None:
    clips = torch.arange(50)
    whole = clip_draws(7, STEP, clips, 3)
    assert torch.equal(whole[10:20], clip_draws(7, STEP, clips[10:20], 3))


def test_another_step_or_seed_draws_anew() -> None:
    clips = torch.arange(1000)
    first = clip_draws(7, STEP, clips, 3)
    for other in (clip_draws(8, STEP, clips, 3), clip_draws(7, STEP + 1, clips, 3), clip_draws(2**63, STEP, clips, 3)):
        assert (first == other).float().mean() < 0.01
