"""What the training loop knows of a task: a loss with a report, predictions, parameter groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crossgate.batch import ClipBatch
from crossgate.config import OptimConfig, Recipe
from crossgate.model.encoders import Encoder
from crossgate.model.network import MultimodalNetwork
from crossgate.objectives.gather import sum_over_ranks
from crossgate.objectives.gating import concentration, load_balance
from crossgate.tasks.draws import clip_draws

Report = dict[str, Tensor]


@dataclass
class Prediction:
    """What a model says about B clips.

    Attributes:
        features: ``(B, M, D)``, zeros for absent modalities.
        present: ``(B, M)`` bool.
        fused: ``(B, D)``.
        weights: ``(B, M)`` gate weights, or None for a fusion without.
        embeddings: ``(B, M, E)`` unit vectors (pretraining).
        fused_embedding: ``(B, E)`` unit vectors (pretraining).
        logits: ``(B, K)`` (fine-tuning).
        unimodal_logits: ``(B, M, K)`` (fine-tuning); rows of absent modalities mean nothing.
    """

    features: Tensor
    present: Tensor
    fused: Tensor
    weights: Tensor | None = None
    embeddings: Tensor | None = None
    fused_embedding: Tensor | None = None
    logits: Tensor | None = None
    unimodal_logits: Tensor | None = None


class Task(nn.Module):
    """A model and its objective. ``task(batch) -> (loss, report)``.

    The loss is the global batch's on every rank; its gradient averaged over ranks is the global batch's gradient.
    Reports hold detached 0-d tensors of the global batch; NaN where a batch had nothing to measure. Nothing here
    waits for the device.

    Attributes:
        model: what is saved.
        forwards: number of training forwards so far (saved with the trainer's state, not with the model).
    """

    forwards: Tensor

    def __init__(self, recipe: Recipe, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.modalities = recipe.data.clip.modalities
        self.seed, self.accumulation = recipe.run.seed, recipe.engine.accumulation
        self.fusion = recipe.model.fusion
        self.encoder_lr_scale = 1.0
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: ClipBatch) -> tuple[Tensor, Report]:
        raise NotImplementedError

    def predict(self, batch: ClipBatch) -> Prediction:
        """Returns the model's output in evaluation mode without gradient; the mode is restored."""
        mode = self.training
        self.eval()
        try:
            with torch.no_grad():
                return self._predict(batch)
        finally:
            self.train(mode)

    def _predict(self, batch: ClipBatch) -> Prediction:
        raise NotImplementedError

    def checkpoint_activations(self) -> None:
        """Makes the encoders compute their activations again backward instead of keeping them."""
        for module in self.modules():
            if isinstance(module, MultimodalNetwork):
                module.checkpoint_activations()

    def compile_encoders(self) -> None:
        """Compiles the encoders' backbones in place, at their next use."""
        for module in self.modules():
            if isinstance(module, Encoder):
                module.backbone.compile()

    @property
    def step(self) -> Tensor:
        """0-d, the optimiser steps done before the one that the next forward pass belongs to."""
        return self.forwards // self.accumulation

    def draws(self, batch: ClipBatch) -> Tensor:
        """Returns ``(B, M)`` numbers for modality dropout that depend on clip and step only, and counts the call."""
        step = self.step
        if self.training:
            self.forwards += 1
        return clip_draws(self.seed, step, batch.clip, len(self.modalities))

    def regularised(
        self, loss: Tensor, weights: Tensor | None, routing: Tensor | None, visible: Tensor
    ) -> tuple[Tensor, Report]:
        """Adds what keeps a gate from collapse: the load balance of one that chooses, and the recipe's entropy.

        Args:
            loss: 0-d.
            weights, routing: of a `FusionOutput`.
            visible: ``(B, M)`` bool, what the gate could choose from.

        Returns:
            The loss and what to report of it.
        """
        report: Report = {}
        if weights is not None and routing is not None:
            uneven = load_balance(weights, routing, visible)
            loss, report["loss/balance"] = loss + self.fusion.balance * uneven, uneven.detach()
        if weights is not None and self.fusion.entropy > 0:
            sharp = concentration(weights, visible)
            loss, report["loss/concentration"] = loss + self.fusion.entropy * sharp, sharp.detach()
        return loss, report

    def parameter_groups(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """Returns AdamW's groups ``{name, params, lr, weight_decay}`` over the parameters that train.

        Biases, norms, scalars and learned tokens do not decay; encoders learn at `encoder_lr_scale` times `optim.lr`.
        """
        decaying = decaying_parameters(self)
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            encoder = ".encoders." in name
            decays = name in decaying
            label = f"{'encoders' if encoder else 'rest'}/{'decay' if decays else 'no_decay'}"
            group = groups.setdefault(
                label,
                {
                    "name": label,
                    "params": [],
                    "lr": optim.lr * (self.encoder_lr_scale if encoder else 1.0),
                    "weight_decay": optim.weight_decay if decays else 0.0,
                },
            )
            group["params"].append(parameter)
        return list(groups.values())


def decaying_parameters(model: nn.Module) -> set[str]:
    """Returns the names of a model's parameters that weight decay is for.

    Not for biases, norms and scalars, nor for what a module (ours or timm's) declares as not to decay: learned tokens.
    """
    exempt: set[str] = set()
    for prefix, module in model.named_modules():
        declared = getattr(module, "no_weight_decay", None)
        if callable(declared):
            exempt.update(f"{prefix}.{name}" if prefix else name for name in declared())
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name not in exempt and not name.endswith("bias")
    }


def global_means(measured: dict[str, tuple[Tensor, Tensor]]) -> Report:
    """Returns name -> sum / count over all ranks by one collective; NaN where the count is 0."""
    if not measured:
        return {}
    sums = torch.stack([total.detach().float() for total, _ in measured.values()])
    counts = torch.stack([count.detach().float() for _, count in measured.values()])
    sums, counts = sum_over_ranks(torch.stack([sums, counts]))
    return dict(zip(measured, (sums / counts).unbind()))


def gate_measures(
    modalities: tuple[str, ...], weights: Tensor | None, present: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns sums and counts of each modality's mean weight, and of the weights' entropy.

    A modality's weight is averaged over the clips that have it. The entropy is a share of the largest possible one
    (1: uniform over what the clip has, 0: all on one modality), over clips that have two modalities or more.
    """
    if weights is None:
        return {}
    weights = weights.detach().float()
    measured = {
        f"gate/weight_{name}": (weights[:, m].masked_fill(~present[:, m], 0).sum(), present[:, m].sum())
        for m, name in enumerate(modalities)
    }
    count = present.sum(1)
    several = count > 1
    entropy = torch.special.entr(weights).sum(1) / count.clamp(min=2).float().log()
    measured["gate/entropy"] = (entropy.masked_fill(~several, 0).sum(), several.sum())
    return measured
