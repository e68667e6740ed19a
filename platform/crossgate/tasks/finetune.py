"""Supervised training of a classifier, from random weights or from a pretrained run, whole or on frozen encoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crossgate.batch import ClipBatch
from crossgate.config import Recipe
from crossgate.model.classifier import Classifier, ClassifierOutput
from crossgate.model.network import MultimodalNetwork
from crossgate.model.store import WarmStart, load_encoders, load_heads
from crossgate.objectives.classification import cross_entropy
from crossgate.tasks.task import Prediction, Report, Task, gate_measures, global_means


class FinetuneTask(Task):
    """Cross entropy on the fused feature, and on each modality's own as an auxiliary.

    Args:
        recipe: `model`, `data.clip`, `finetune`, `run.seed`.
        classes: names in the order of the labels.
        class_weights: ``(K,)``, how much a clip of each class counts.

    Attributes:
        warm_start: what was taken from `finetune.init`, or None.

    Raises:
        UserError: for a backbone or fusion that cannot be used, or an `init` that cannot be read or does not fit.
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
        self.unimodal_weight, self.label_smoothing = config.unimodal_weight, config.label_smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, batch: ClipBatch) -> tuple[Tensor, Report]:
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
        fused, unimodal = losses[0], losses[1:]
        loss = fused + self.unimodal_weight * unimodal.mean()
        loss, gate = self.regularised(loss, output.weights, output.routing, output.visible)
        return loss, self._report(loss, losses.detach(), output, labels) | gate

    def _report(self, loss: Tensor, losses: Tensor, output: ClassifierOutput, labels: Tensor) -> Report:
        names = self.modalities
        report = {"loss/total": loss.detach(), "loss/fused": losses[0]}
        report |= {f"loss/{name}": value for name, value in zip(names, losses[1:])}
        measured = gate_measures(names, output.weights, output.present)
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


def _hits(logits: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    return ((logits.argmax(-1) == labels) & valid).sum(), valid.sum()
