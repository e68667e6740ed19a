"""Cross entropy with missing labels and heads that may not be judged, against torch's own on what is left."""

from __future__ import annotations

import pytest
import torch

from crossgate.objectives.classification import cross_entropy

LABELS = torch.tensor([0, 2, -1, 1, 1, -1])
LOGITS = torch.randn(6, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
VALID = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 1], [1, 0], [0, 0]]).bool()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)])
def test_equals_torch_on_what_is_left(smoothing: float, weights: torch.Tensor | None) -> None:
    found = cross_entropy(LOGITS, LABELS, VALID, class_weights=weights, label_smoothing=smoothing)
    for head in range(2):
        keep = VALID[:, head] & (LABELS >= 0)
        expected = torch.nn.functional.cross_entropy(
            LOGITS[keep, head], LABELS[keep], weight=weights, label_smoothing=smoothing
        )
        torch.testing.assert_close(found[head], expected, rtol=1e-12, atol=1e-12)


def test_invalid_rows_get_no_gradient_even_when_they_hold_nan() -> None:
    logits = LOGITS.clone()
    keep = VALID & (LABELS >= 0).unsqueeze(1)
    logits[~keep] = torch.nan
    logits.requires_grad_()
    clean = cross_entropy(LOGITS, LABELS, VALID)
    loss = cross_entropy(torch.where(keep.unsqueeze(-1), logits, 0), LABELS, VALID)
    torch.testing.assert_close(loss, clean)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient[~keep].abs().sum() == 0
    assert (gradient[keep].abs().sum(-1) > 0).all()


def test_no_label_anywhere_gives_zero() -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = cross_entropy(logits, torch.full((6,), -1), VALID)
    assert loss.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.abs().sum() == 0
