"""One rank of the parity test: computes losses and averaged gradients for its slice of a fixed global batch.

Run as ``python ranks_worker.py FOLDER``; also imported for the single-process answer.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from crossgate.objectives.agreement import agreement
from crossgate.objectives.classification import cross_entropy
from crossgate.objectives.gating import concentration, load_balance
from crossgate.objectives.infonce import Views, infonce
from crossgate.objectives.siglip import siglip
from crossgate.objectives.vicreg import vicreg

CLIPS, VIEWS, INPUTS, WIDTH, CLASSES = 8, 4, 5, 6, 3
PAIRS = [(0, 1), (0, 2), (1, 2), (0, 3)]  # view 3 is nowhere: that pair has no positive


def solve(rank: int, ranks: int) -> dict[str, Tensor]:
    """Returns losses and gradients of all parameters, averaged over ranks as a trainer does."""
    draw = torch.Generator().manual_seed(3)
    inputs = torch.randn(CLIPS, VIEWS, INPUTS, dtype=torch.float64, generator=draw)
    present = torch.rand(CLIPS, VIEWS, generator=draw) > 0.25
    present[:, 3] = False
    present[CLIPS // 2 :, 2] = False  # with two ranks, one has no view 2 at all
    present[1] = False  # a corrupt clip
    group = torch.tensor([0, 1, 0, 2, 3, 0, 4, 4])  # groups cross the borders between ranks
    labels = torch.tensor([0, 1, -1, 2, 0, 1, -1, -1])
    weights = torch.randn(VIEWS, INPUTS, WIDTH, dtype=torch.float64, generator=draw).requires_grad_()
    classifier = torch.randn(WIDTH, CLASSES, dtype=torch.float64, generator=draw).requires_grad_()
    log_scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    mine = slice(rank * CLIPS // ranks, (rank + 1) * CLIPS // ranks)
    hidden = torch.einsum("bvi,viw->bvw", inputs[mine], weights)
    views = Views(torch.nn.functional.normalize(hidden, dim=-1), present[mine], group[mine])
    contrast = infonce(views, views.gathered(), PAIRS, log_scale.exp())
    tiled = infonce(views, views.gathered(), PAIRS, log_scale.exp(), tile=3)
    questions = siglip(views, views.gathered(), PAIRS, log_scale.exp(), -log_scale, tile=3)
    unlike = vicreg(views.gathered(), PAIRS)
    alike = agreement(views, views.gathered(), PAIRS, log_scale.exp(), positives=2, tile=3)
    losses = cross_entropy(
        hidden @ classifier,
        labels[mine],
        present[mine],
        class_weights=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64),
        label_smoothing=0.1,
    )
    soft = hidden.square().mean(-1).masked_fill(~present[mine], -torch.inf).softmax(-1).nan_to_num()  # (B, V)
    hard = torch.nn.functional.one_hot(soft.argmax(1), VIEWS) * present[mine]
    uneven = load_balance(hard, soft, present[mine]) + concentration(soft, present[mine])
    total = contrast.loss + 2 * tiled.loss + questions.loss + 0.1 * unlike.loss + alike
    (total + losses.sum() + uneven).backward()
    gradients = {"weights": weights.grad, "classifier": classifier.grad, "log_scale": log_scale.grad}
    for gradient in gradients.values():
        assert gradient is not None
        if ranks > 1:
            dist.all_reduce(gradient)
            gradient /= ranks
    return {
        "loss": contrast.loss.detach(),
        "tiled": tiled.loss.detach(),
        "tiled_top1": tiled.top1,
        "tiled_pairs": tiled.pair_losses,
        "pairs": contrast.pair_losses,
        "top1": contrast.top1,
        "classes": losses.detach(),
        "siglip": questions.loss.detach(),
        "siglip_top1": questions.top1,
        "vicreg": unlike.loss.detach(),
        "agreement": alike.detach(),
        "uneven": uneven.detach(),
        **{name: gradient for name, gradient in gradients.items() if gradient is not None},
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from gloo_ranks import start

    start(solve, Path(sys.argv[1]))
