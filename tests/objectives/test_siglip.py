"""SigLIP against its definition, question by question; in one piece and in tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crossgate.objectives.infonce import Views
from crossgate.objectives.siglip import siglip

PAIRS = [(0, 1), (0, 2), (1, 2)]
SCALE, BIAS = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)


def slow(views: Views, pairs: list[tuple[int, int]], scale: Tensor, bias: Tensor) -> Tensor:
    losses, clips = [], range(len(views.group))
    for a, b in pairs:
        total, positives = torch.zeros((), dtype=torch.float64), 0
        for i in clips:
            for j in clips:
                if not (views.present[i, a] and views.present[j, b]):
                    continue
                similarity = scale * views.embeddings[i, a].dot(views.embeddings[j, b]) + bias
                if i == j:
                    total, positives = total - torch.sigmoid(similarity).log(), positives + 1
                elif views.group[i] != views.group[j]:
                    total = total - torch.sigmoid(-similarity).log()
        if positives:
            losses.append(total / positives)
    return torch.stack(losses).mean() if losses else torch.zeros((), dtype=torch.float64)


def batch(seed: int = 0, clips: int = 9) -> Views:
    draw = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(clips, 3, 5, generator=draw, dtype=torch.float64)
    present = torch.rand(clips, 3, generator=draw) > 0.3
    group = torch.randint(0, 5, (clips,), generator=draw)
    return Views(torch.nn.functional.normalize(embeddings, dim=-1), present, group)


@pytest.mark.parametrize("tile", [0, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradients_equal_the_definition(seed: int, tile: int) -> None:
    views = batch(seed)
    inputs = [views.embeddings.requires_grad_(), SCALE.clone().requires_grad_(), BIAS.clone().requires_grad_()]
    expected = slow(views, PAIRS, inputs[1], inputs[2])
    wanted = torch.autograd.grad(expected, inputs)
    found = siglip(views, views, PAIRS, inputs[1], inputs[2], tile=tile).loss
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tile", [0, 4])
def test_what_absent_rows_hold_is_never_seen(tile: int) -> None:
    views = batch()
    before = siglip(views, views, PAIRS, SCALE, BIAS, tile=tile).loss
    views.embeddings = torch.where(views.present.unsqueeze(-1), views.embeddings, 1e6).requires_grad_()
    after = siglip(views, views, PAIRS, SCALE, BIAS, tile=tile).loss
    assert after == before
    (gradient,) = torch.autograd.grad(after, views.embeddings)
    assert gradient[~views.present].abs().sum() == 0


def test_a_view_that_no_clip_has_counts_for_nothing() -> None:
    views = batch()
    views.present[:, 2] = False
    found = siglip(views, views, PAIRS, SCALE, BIAS)
    torch.testing.assert_close(found.loss, slow(views, [(0, 1)], SCALE, BIAS))
    assert found.pair_losses.isnan().tolist() == [False, True, True]
    views.present[:] = False
    assert siglip(views, views, PAIRS, SCALE, BIAS).loss == 0


@pytest.mark.parametrize("tile", [0, 3])
def test_top1(tile: int) -> None:
    present, group = torch.ones(8, 3, dtype=torch.bool), torch.arange(8)
    aligned = Views(torch.eye(8).unsqueeze(1).expand(-1, 3, -1), present, group)
    collapsed = Views(torch.ones(8, 3, 8) / 8**0.5, present, group)
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    assert siglip(aligned, aligned, PAIRS, scale, bias, tile=tile).top1 == 1
    assert siglip(collapsed, collapsed, PAIRS, scale, bias, tile=tile).top1.item() == pytest.approx(1 / 8)


def test_bf16_is_computed_in_fp32() -> None:
    views = batch()
    low = Views(views.embeddings.bfloat16(), views.present, views.group)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = siglip(low, low, PAIRS, SCALE.float(), BIAS.float()).loss
    exact = Views(low.embeddings.double(), views.present, views.group)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), siglip(exact, exact, PAIRS, SCALE, BIAS).loss, rtol=1e-5, atol=1e-5)
