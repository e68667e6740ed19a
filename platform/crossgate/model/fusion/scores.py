"""Late fusion: class scores of the modalities, mixed by weights. Mixing logits and mixing probabilities differ."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from crossgate.model.fusion.base import Fusion, FusionInput, FusionOutput, mix


class ScoreFusion(Fusion):
    """Base of the fusions that mix class scores; a subclass says how to weigh.

    Of weights ``g_m``, unimodal logits ``z_m`` and ``p_m = softmax(z_m)``, `mixes` makes

    - logits: ``z = sum_m g_m z_m``, a product of experts: ``p`` is proportional to ``prod_m p_m^g_m``;
    - probabilities: ``z = log sum_m g_m p_m``, whose cross entropy is the likelihood of a mixture of experts
      (Jacobs et al. 1991).
    """

    needs_logits = True
    mixes: ClassVar[Literal["logits", "probabilities"]] = "logits"

    def weigh(self, clip: FusionInput) -> Tensor:
        """Returns ``(B, M)`` weights that sum to 1 over what is present, 0 elsewhere."""
        raise NotImplementedError

    def forward(self, clip: FusionInput) -> FusionOutput:
        logits, weights = unimodal(clip), self.weigh(clip)
        mixed = mix(logits, weights) if self.mixes == "logits" else log_mixture(logits, weights)
        return FusionOutput(logits=mixed, weights=weights)


def unimodal(clip: FusionInput) -> Tensor:
    """Returns the clip's logits ``(B, M, K)``, zeros for absent modalities."""
    assert clip.logits is not None, "a fusion that mixes scores was called without any"
    return clip.logits.masked_fill(~clip.present.unsqueeze(-1), 0)


def log_mixture(logits: Tensor, weights: Tensor) -> Tensor:
    """Returns ``log sum_m w_m softmax(z_m)``, zeros where all weights are zero.

    ``(B, M, K), (B, M) -> (B, K)``; or with weights ``(B, M, K)``, a class's own.
    """
    weights = weights if weights.ndim == 3 else weights.unsqueeze(-1)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)  # (B, M, K)
    counts = weights > 0
    anything = counts.any(1, keepdim=True)
    shares = torch.where(counts, weights.to(exact), 1.0).log()  # log 0 would give NaN gradients
    terms = (exact + shares).masked_fill(~counts & anything, -torch.inf)
    return terms.logsumexp(1).masked_fill(~anything.squeeze(1), 0).to(logits.dtype)


def surprise(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities ``(..., K)`` and their Shannon entropy ``(...)`` in nats, in fp32 or better.

    Detached: a gate may read the scores, yet no head shall be pushed to look surer than it is.
    """
    exact = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return exact, -(exact.exp() * exact).sum(-1)
