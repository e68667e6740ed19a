"""What every gate and fusion shares: its input and output, the registry, arithmetic that respects absence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from crossgate.config import FusionConfig
from crossgate.errors import UserError, nearest

Kind = Literal["average", "fusion", "gate"]
"""All modalities count alike; none is weighed, or all clips alike; each clip's modalities are weighed."""


@dataclass
class FusionInput:
    """What a fusion may look at. Rows of absent modalities are zeros (the network sees to it).

    Attributes:
        features: ``(B, M, D)``.
        present: ``(B, M)`` bool. A row may be all False (a corrupt clip): the output must be finite then.
        logits: ``(B, M, K)`` of the unimodal heads, for fusions with `needs_logits`.
        draws: ``(B, M)`` uniform in 0..1, for fusions that are random while training; without them they are not.
    """

    features: Tensor
    present: Tensor
    logits: Tensor | None = None
    draws: Tensor | None = None


@dataclass
class FusionOutput:
    """What a fusion gives back: an embedding, or logits where it mixes those.

    Attributes:
        embedding: ``(B, D)`` or None.
        logits: ``(B, K)`` or None.
        weights: ``(B, M)``, how much each modality counts: sums to 1 over the present ones, 0 for absent ones.
            None where the method has no such thing.
        routing: ``(B, M)``, the soft choice behind hard weights, whose load is to be balanced; else None.
    """

    embedding: Tensor | None = None
    logits: Tensor | None = None
    weights: Tensor | None = None
    routing: Tensor | None = None


class Fusion(nn.Module):
    """Base of all fusions. `forward` maps `FusionInput` to `FusionOutput`.

    Args:
        config: the recipe's `model.fusion`.
        modalities: M.
        dim: D.
        classes: K where there are classes, else None.
    """

    kind: ClassVar[Kind]
    needs_logits: ClassVar[bool] = False
    needs_modalities: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: FusionConfig, modalities: int, dim: int, classes: int | None = None) -> None:
        super().__init__()

    def forward(self, clip: FusionInput) -> FusionOutput:
        raise NotImplementedError


FUSIONS: dict[str, type[Fusion]] = {}
F = TypeVar("F", bound=type[Fusion])


def register(name: str, kind: Kind) -> Callable[[F], F]:
    """Makes a fusion known to recipes under this name, and to those that compare as what it is."""

    def remember(fusion: F) -> F:
        if name in FUSIONS:
            raise KeyError(f"fusion '{name}' is registered twice")
        fusion.kind = kind
        FUSIONS[name] = fusion
        return fusion

    return remember


def check_name(name: str, where: str) -> None:
    """Raises `UserError` for a name that is no fusion's, given under the recipe's key `where`."""
    if name not in FUSIONS:
        raise UserError(f"unknown fusion '{name}'", where=where, cure=nearest(name, FUSIONS))


def build_fusion(
    config: FusionConfig, modalities: int, dim: int, classes: int | None = None, names: Sequence[str] | None = None
) -> Fusion:
    """Returns the fusion that the recipe names.

    Args:
        names: of the modalities, in their order, to check that a fusion has those that it is made for.

    Raises:
        UserError: for an unknown name, one that mixes logits where there are no classes, one that is made for other
            modalities, or settings that do not fit.
    """
    where = "model.fusion.name"
    check_name(config.name, where)
    fusion = FUSIONS[config.name]
    if fusion.needs_logits and classes is None:
        usable = ", ".join(sorted(name for name, other in FUSIONS.items() if not other.needs_logits))
        raise UserError(
            f"fusion '{config.name}' mixes class scores, and pretraining has no classes",
            where=where,
            expected=f"one of {usable}",
        )
    lacking = [name for name in fusion.needs_modalities if names is not None and name not in names]
    if lacking:
        raise UserError(
            f"fusion '{config.name}' is made for {' and '.join(fusion.needs_modalities)}, here is no {lacking[0]}",
            where=where,
            cure=f"add {lacking[0]} to data.clip.modalities, or take another fusion",
        )
    return fusion(config, modalities, dim, classes)


class Experts(nn.Module):
    """One linear map per modality, ``(B, M, D) -> (B, M, D)``, identity at the start.

    Every fusion that mixes features by weights mixes these, the uniform mean included, so that they differ in
    nothing but the weights.
    """

    def __init__(self, modalities: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(dim).repeat(modalities, 1, 1))
        self.bias = nn.Parameter(torch.zeros(modalities, dim))

    def forward(self, features: Tensor) -> Tensor:
        return torch.einsum("bmd,mde->bme", features, self.weight) + self.bias


class Scorer(nn.Module):
    """A small perceptron on all features, ``(B, M, D) -> (B, outputs)``; starts near zero, so near uniform."""

    def __init__(self, modalities: int, dim: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(modalities * dim, hidden)
        self.outer = nn.Linear(hidden, outputs)
        small_start(self.outer)

    def forward(self, features: Tensor) -> Tensor:
        return self.outer(nn.functional.gelu(self.inner(features.flatten(1))))


def small_start(layer: nn.Linear) -> None:
    """Weights near, but not at, zero: at zero no gradient would reach the layers below."""
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)


def masked_softmax(scores: Tensor, present: Tensor) -> Tensor:
    """Softmax over the last axis with minus infinity at absent places; all zeros where nothing is present."""
    scores = scores.to(exact(scores.dtype))
    anything = present.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~present & anything, -torch.inf)  # a row of nothing but -inf would give NaN
    return scores.softmax(dim=-1).masked_fill(~present, 0.0)


def exact(dtype: torch.dtype) -> torch.dtype:
    """Returns fp32, or fp64 where that came in: what weights are computed in."""
    return torch.promote_types(dtype, torch.float32)


def uniform_weights(present: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Equal weights over what is present, ``(B, M)``; all zeros where nothing is. Never in less than fp32."""
    weights = present.to(exact(dtype))
    return weights / weights.sum(-1, keepdim=True).clamp(min=1)


def share(amounts: Tensor) -> Tensor:
    """Non-negative amounts ``(B, M)`` as shares that sum to 1; all zeros stay zeros."""
    total = amounts.sum(-1, keepdim=True)
    return amounts / torch.where(total > 0, total, torch.ones_like(total))


def mix(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over modalities, ``(B, M, X), (B, M) -> (B, X)``."""
    return (values * weights.unsqueeze(-1).to(values.dtype)).sum(dim=1)
