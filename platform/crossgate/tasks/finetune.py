"""Supervised training of a classifier, from random weights or from a pretrained run, whole or on frozen encoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossgate.batch import ClipBatch
from crossgate.config import FinetuneConfig, Recipe
from crossgate.errors import UserError
from crossgate.model.classifier import Classifier, ClassifierOutput
from crossgate.model.network import MultimodalNetwork
from crossgate.model.store import WarmStart, load_encoders, load_heads
from crossgate.objectives.balance import gradient_noise, modulation
from crossgate.objectives.classification import cross_entropy
from crossgate.tasks.draws import clip_draws
from crossgate.tasks.task import Prediction, Report, Task, gate_measures, global_means

SALT = 0x06E0  # on the seed: other numbers than those of modality dropout


class FinetuneTask(Task):
    """Cross entropy on the fused feature, and on each modality's own as an auxiliary.

    Args:
        recipe: `model`, `data.clip`, `finetune`, `run.seed`.
        classes: names in the order of the labels.
        class_weights: ``(K,)``, how much a clip of each class counts.

    Attributes:
        warm_start: what was taken from `finetune.init`, or None.

    Raises:
        UserError: for a backbone or fusion that cannot be used, an `init` that cannot be read or does not fit, or a
            modulation by heads that do not learn.
    """

    model: Classifier
    class_weights: Tensor | None

    def __init__(self, recipe: Recipe, classes: Sequence[str], class_weights: Tensor | None = None) -> None:
        config = recipe.finetune
        network = MultimodalNetwork(recipe.model, recipe.data.clip, classes=len(classes))
        super().__init__(recipe, Classifier(network, tuple(classes)))
        self.warm_start: WarmStart | None = None
        if config.init:
            self.warm_start = load_encoders(network, config.init, raw_fusion=not config.features)
            self.warm_start.loaded += load_heads(self.model, config.init).loaded
            self.encoder_lr_scale = config.encoder_lr_scale
        if config.freeze:
            network.freeze_encoders()
        self.task = config.task
        self.label_smoothing = config.label_smoothing
        self.modulation, self.modulation_noise = config.modulation, config.modulation_noise
        self.blend = _blend(config, self.modalities)
        self._refuse_idle_heads(config)
        self.register_buffer("class_weights", class_weights, persistent=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the logits."""
        return self.model.classes

    def forward(self, batch: ClipBatch) -> tuple[Tensor, Report]:
        step = self.step  # of this forward pass, which `draws` counts
        output = self.model(batch.streams, batch.present, self.draws(batch))
        labels = batch.labels[self.task]
        anything = batch.present.any(1, keepdim=True)
        losses = cross_entropy(
            torch.cat([output.logits.unsqueeze(1), output.unimodal_logits], dim=1),  # (B, 1 + M, K)
            labels,
            torch.cat([anything, batch.present], dim=1),
            class_weights=self.class_weights,
            label_smoothing=self.label_smoothing,
        )  # (1 + M,)
        loss = torch.stack([weight * one for weight, one in zip(self.blend, losses)]).sum()
        loss, gate = self.regularised(loss, output.weights, output.routing, output.visible)
        slowed = self._slowed(output, labels, batch.clip, step)
        return loss, self._report(loss, losses.detach(), output, labels) | gate | slowed

    def _refuse_idle_heads(self, config: FinetuneConfig) -> None:
        """A head learns by its own loss, or by the fused one where the fusion mixes what the heads say."""
        fused, *own = self.blend
        idle = [name for name, weight in zip(self.modalities, own) if not weight]
        if not config.modulation or not idle or (fused and self.model.network.fusion.needs_logits):
            return
        key = "finetune.blend" if config.blend else "finetune.unimodal_weight"
        raise UserError(
            f"it goes by what the heads of {', '.join(idle)} say, which do not learn: their weight in {key} is 0",
            where="finetune.modulation",
            cure=f"give them a weight above 0 in {key}, or set finetune.modulation to 0",
        )

    def _slowed(self, output: ClassifierOutput, labels: Tensor, clip: Tensor, step: Tensor) -> Report:
        """Scales the gradient that each encoder will get, and adds noise to it, where the recipe asks for it."""
        if not self.modulation or not output.features.requires_grad:
            return {}
        factors = modulation(output.unimodal_logits, labels, output.present, self.modulation)  # (M,)

        def change(slope: Tensor) -> Tensor:
            changed = slope * factors.to(slope.dtype).view(1, -1, 1)  # (B, M, D)
            if not self.modulation_noise:
                return changed
            draws = clip_draws(self.seed + SALT, step, clip, slope[0].numel())
            return changed + self.modulation_noise * gradient_noise(slope, output.present, draws)

        output.features.register_hook(change)
        return {f"gradient/factor_{name}": factor for name, factor in zip(self.modalities, factors)}

    def _report(self, loss: Tensor, losses: Tensor, output: ClassifierOutput, labels: Tensor) -> Report:
        names = self.modalities
        report = {"loss/total": loss.detach(), "loss/fused": losses[0]}
        report |= {f"loss/{name}": value for name, value in zip(names, losses[1:])}
        measured = gate_measures(names, output.weights, output.visible)
        labelled = (labels >= 0) & output.present.any(1)
        measured["accuracy"] = _hits(output.logits, labels, labelled)
        for m, name in enumerate(names):
            valid = labelled & output.present[:, m]
            measured[f"accuracy_{name}"] = _hits(output.unimodal_logits[:, m], labels, valid)
        return report | global_means(measured)

    def _predict(self, batch: ClipBatch) -> Prediction:
        output = self.model(batch.streams, batch.present)
        return Prediction(
            features=output.features,
            present=output.present,
            fused=output.fused,
            weights=output.weights,
            logits=output.logits,
            unimodal_logits=output.unimodal_logits,
        )


def _blend(config: FinetuneConfig, modalities: Sequence[str]) -> tuple[float, ...]:
    """Weights of the 1 + M losses: of the fused head, of each modality's own."""
    if not config.blend:
        return (1.0, *[config.unimodal_weight / len(modalities)] * len(modalities))
    if len(config.blend) != 1 + len(modalities):
        raise UserError(
            f"{len(config.blend)} weights of losses",
            where="finetune.blend",
            expected=f"{1 + len(modalities)}: of the fused head, {', '.join(modalities)}",
        )
    return config.blend


def _hits(logits: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    return ((logits.argmax(-1) == labels) & valid).sum(), valid.sum()
