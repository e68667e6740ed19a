"""The model of fine-tuning: the network, a head on the fused feature, and one head per modality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crossgate.model.fusion import uniform_weights
from crossgate.model.fusion.base import mix
from crossgate.model.heads import ClassHead
from crossgate.model.network import MultimodalNetwork


@dataclass
class ClassifierOutput:
    """Scores of B clips.

    Attributes:
        logits: ``(B, K)``.
        unimodal_logits: ``(B, M, K)``; rows of absent modalities mean nothing.
        weights: ``(B, M)`` or None, as `FusionOutput.weights`.
        fused: ``(B, D)``; for a fusion that mixes logits, the features' mean under its weights.
        features: ``(B, M, D)``.
        present: ``(B, M)`` bool.
        visible: ``(B, M)`` bool, what modality dropout left of it.
        routing: ``(B, M)`` or None, as `FusionOutput.routing`.
    """

    logits: Tensor
    unimodal_logits: Tensor
    weights: Tensor | None
    fused: Tensor
    features: Tensor
    present: Tensor
    visible: Tensor
    routing: Tensor | None


class Classifier(nn.Module):
    """Scores the fused feature, and each modality's own.

    Args:
        network: built with the same number of classes.
        classes: class names in the order of the logits.
    """

    kind = "classifier"

    def __init__(self, network: MultimodalNetwork, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.classes = network, classes
        dim = network.config.dim
        self.unimodal_heads = nn.ModuleDict({name: ClassHead(dim, len(classes)) for name in network.modalities})
        self.head = None if network.fusion.needs_logits else ClassHead(dim, len(classes))

    def forward(self, streams: Mapping[str, Tensor], present: Tensor, draws: Tensor | None = None) -> ClassifierOutput:
        network = self.network
        visible = network.hide(present, draws)
        features = network.encode(streams, present, visible)
        unimodal = torch.stack(
            [self.unimodal_heads[name](features[:, m]) for m, name in enumerate(network.modalities)], dim=1
        )  # (B, M, K)
        output = network.fuse(features, visible, unimodal if network.fusion.needs_logits else None, draws)
        fused = output.embedding
        if fused is None:
            fused = mix(
                features, uniform_weights(visible, features.dtype) if output.weights is None else output.weights
            )
        logits = output.logits if self.head is None else self.head(fused)
        assert logits is not None
        return ClassifierOutput(
            logits=logits,
            unimodal_logits=unimodal,
            weights=output.weights,
            fused=fused,
            features=features,
            present=present,
            visible=visible,
            routing=output.routing,
        )
