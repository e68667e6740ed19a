"""The model of pretraining: the network and projection heads onto one sphere shared by all modalities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crossgate.model.heads import ProjectionHead
from crossgate.model.network import MultimodalNetwork

LARGEST_SCALE = 100.0  # CLIP's bound: a temperature of 0.01


class Scale(nn.Module):
    """The inverse temperature of a contrast, bounded by `LARGEST_SCALE`.

    The bound is approached smoothly, ``log scale = log 100 - softplus(raw)``: past a hard clamp no gradient would
    ever lower the scale again.

    Args:
        temperature: start value; at least 0.0101.
        learn: train it.
    """

    def __init__(self, temperature: float, learn: bool) -> None:
        super().__init__()
        room = math.log(LARGEST_SCALE * max(temperature, 0.0101))
        start = room + math.log(-math.expm1(-room))
        self.raw = nn.Parameter(torch.tensor([start]), requires_grad=learn)  # DeepSpeed takes no 0-d parameters

    def forward(self) -> Tensor:
        raw = self.raw.to(torch.promote_types(self.raw.dtype, torch.float32))
        return LARGEST_SCALE * (-nn.functional.softplus(raw)).exp().squeeze(0)


@dataclass
class ContrastiveOutput:
    """What pretraining contrasts, for B clips.

    Attributes:
        features, present, fused, weights: as `network.NetworkOutput`.
        embeddings: ``(B, M, E)``, unit length.
        fused_embedding: ``(B, E)``, of everything the clip has.
        targets: ``(B, M, E)``; ``targets[:, m]`` is the fused embedding that modality m is contrasted with.
        target_present: ``(B, M)`` bool, where there is such a target.
        scale: 0-d, the inverse temperature.
        visible: ``(B, M)`` bool, what modality dropout left of `present`.
        routing: ``(B, M)`` or None, as `FusionOutput.routing`.
    """

    features: Tensor
    present: Tensor
    fused: Tensor
    weights: Tensor | None
    embeddings: Tensor
    fused_embedding: Tensor
    targets: Tensor
    target_present: Tensor
    scale: Tensor
    visible: Tensor
    routing: Tensor | None


class ContrastiveModel(nn.Module):
    """Projects every modality, and the fusion of them, to unit vectors.

    Args:
        network: encoders and a fusion that gives an embedding.
        temperature: start value of the softmax temperature.
        learn_temperature: train it.
    """

    kind = "contrastive"

    def __init__(self, network: MultimodalNetwork, temperature: float = 0.07, learn_temperature: bool = True) -> None:
        super().__init__()
        dim, embedding = network.config.dim, network.config.embedding
        self.network = network
        self.heads = nn.ModuleDict({name: ProjectionHead(dim, embedding) for name in network.modalities})
        self.fused_head = ProjectionHead(dim, embedding)
        self.scale = Scale(temperature, learn_temperature)

    def forward(self, streams: Mapping[str, Tensor], present: Tensor, draws: Tensor | None = None) -> ContrastiveOutput:
        network = self.network
        features = network.encode(streams, present)
        visible = network.hide(present, draws)
        output = network.fuse(features, visible, draws=draws)
        assert output.embedding is not None  # the registry lets no fusion of logits come here
        embeddings = torch.stack(
            [self.heads[name](features[:, m]) for m, name in enumerate(network.modalities)], dim=1
        )  # (B, M, E)
        fused_embedding = self.fused_head(output.embedding)
        targets, target_present = self._targets(features, visible, fused_embedding, draws)
        return ContrastiveOutput(
            features=features,
            present=present,
            fused=output.embedding,
            weights=output.weights,
            embeddings=embeddings,
            fused_embedding=fused_embedding,
            targets=targets,
            target_present=target_present & present,
            scale=self.scale(),
            visible=visible,
            routing=output.routing,
        )

    def _targets(
        self, features: Tensor, visible: Tensor, fused_embedding: Tensor, draws: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What each modality is contrasted with: the fusion of all the others.

        The fusion must not see the modality that it has to match, or the gate learns to copy that one through.
        With two modalities the rest is a single one and a gate has nothing to weigh; there the full fusion is used,
        which has to match both at once.
        """
        batch, count, dim = features.shape
        if count <= 2:
            return fused_embedding.unsqueeze(1).expand(-1, count, -1), visible.any(1, keepdim=True).expand(-1, count)
        others = ~torch.eye(count, dtype=torch.bool, device=visible.device)
        rest = visible.unsqueeze(1) & others  # (B, M, M): the row of m hides m
        repeated = features.unsqueeze(1).expand(-1, count, -1, -1)  # (B, M, M, D)
        noise = None if draws is None else draws.repeat_interleave(count, dim=0)  # (B * M, M)
        output = self.network.fuse(repeated.reshape(-1, count, dim), rest.reshape(-1, count), draws=noise)
        assert output.embedding is not None
        return self.fused_head(output.embedding).view(batch, count, -1), rest.any(-1)
