"""The network: one encoder per modality, then the fusion. Absent modalities end here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crossgate.config import ClipConfig, ModelConfig
from crossgate.model.encoders import Encoder
from crossgate.model.exchange import Exchange
from crossgate.model.fusion import FusionInput, FusionOutput, build_fusion

SMALLEST_DEVIATION = 1e-3  # a feature that never varies is not blown up


@dataclass
class NetworkOutput:
    """What the network says about B clips.

    Attributes:
        features: ``(B, M, D)``, zeros for absent modalities.
        present: ``(B, M)`` bool, the clip's own.
        fused: ``(B, D)``, or None for a fusion that mixes logits.
        weights: ``(B, M)`` or None, as `FusionOutput.weights`.
    """

    features: Tensor
    present: Tensor
    fused: Tensor | None
    weights: Tensor | None


class MultimodalNetwork(nn.Module):
    """Encoders and fusion.

    Args:
        config: encoders, D and the fusion.
        clip: modalities and tensor shapes.
        classes: number of classes where there are some, for fusions that mix logits.

    Raises:
        UserError: see `backbones.build_backbone` and `fusion.build_fusion`.
    """

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, config: ModelConfig, clip: ClipConfig, classes: int | None = None) -> None:
        super().__init__()
        self.config, self.clip, self.modalities = config, clip, clip.modalities
        self.encoders = nn.ModuleDict(
            {name: Encoder(name, config.encoder(name), clip.shape(name), config.dim) for name in clip.modalities}
        )
        self.fusion = build_fusion(config.fusion, len(clip.modalities), config.dim, classes, names=clip.modalities)
        self.exchange: Exchange | None = None
        if config.exchange.name == "mmtm":
            widths = [encoder.split(clip.shape(name)[1:]) for name, encoder in self._named_encoders()]
            self.exchange = Exchange(config.exchange, widths)
        self.register_buffer("feature_mean", torch.zeros(len(clip.modalities), config.dim))
        self.register_buffer("feature_scale", torch.ones(len(clip.modalities), config.dim))
        self.frozen = False

    def freeze_encoders(self) -> None:
        """Stops the encoders' training for good: no gradient, evaluation mode. Fusion and heads still train."""
        self.encoders.requires_grad_(False)
        self.frozen = True
        self.encoders.eval()

    def checkpoint_activations(self) -> None:
        """Makes every encoder compute its activations again backward instead of keeping them."""
        for _, encoder in self._named_encoders():
            encoder.checkpoint_activations()

    def train(self, mode: bool = True) -> MultimodalNetwork:
        super().train(mode)
        if self.frozen:
            self.encoders.eval()
        return self

    def _named_encoders(self) -> Iterator[tuple[str, Encoder]]:
        for name, encoder in self.encoders.items():
            assert isinstance(encoder, Encoder)
            yield name, encoder

    def raw_features(self, streams: Mapping[str, Tensor], present: Tensor, visible: Tensor | None = None) -> Tensor:
        """Returns the encoders' features ``(B, M, D)``: zeros, and no gradient, where a modality is absent.

        Every encoder runs, whatever is present, so that all ranks take part in the same collectives. What the
        streams hold in absent rows is never looked at. A stream ``(B, D)`` is a raw feature that the frozen encoder
        gave before, and is taken as it is. `visible` ``(B, M)``: which modalities the others' encoders may learn of,
        where there is an exchange between them (None: all present).
        """
        absent = ~present
        clean = {
            name: streams[name].masked_fill(absent[:, m].view(-1, *[1] * (streams[name].ndim - 1)), 0)
            for m, name in enumerate(self.modalities)
        }
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if self.exchange is not None:
                features = self._exchanged(clean, present if visible is None else visible)
            else:
                features = [one if one.ndim == 2 else self.encoders[name](one) for name, one in clean.items()]
            return torch.stack(features, dim=1).masked_fill(absent.unsqueeze(-1), 0)  # (B, M, D)

    def _exchanged(self, streams: Mapping[str, Tensor], seen: Tensor) -> list[Tensor]:
        assert self.exchange is not None
        encoders = dict(self._named_encoders())
        maps = {name: encoders[name].maps(stream) for name, stream in streams.items()}
        changed = self.exchange([encoders[name].places(one) for name, one in maps.items()], seen)
        return [encoders[name].from_maps(one, places) for (name, one), places in zip(maps.items(), changed)]

    def frame_features(self, name: str, stream: Tensor, here: Tensor) -> Tensor:
        """Returns the features ``(B, T, D)`` of the frames of one modality, zeros where `here` ``(B,)`` says absent."""
        absent = ~here
        stream = stream.masked_fill(absent.view(-1, *[1] * (stream.ndim - 1)), 0)
        encoder = self.encoders[name]
        assert isinstance(encoder, Encoder)
        return encoder.frames(stream).masked_fill(absent.view(-1, 1, 1), 0)

    def encode(self, streams: Mapping[str, Tensor], present: Tensor, visible: Tensor | None = None) -> Tensor:
        """Returns `raw_features`, standardised where `standardise` was called: what gate, fusion and heads see."""
        raw = self.raw_features(streams, present, visible)
        features = (raw - self.feature_mean.to(raw.dtype)) * self.feature_scale.to(raw.dtype)
        return features.masked_fill(~present.unsqueeze(-1), 0)

    def standardise(self, raw: Tensor, present: Tensor) -> None:
        """Makes `encode` give these features, and others like them, mean 0 and deviation 1 from now on.

        For frozen encoders, whose features may vary little around large means: gate and heads learn several times
        faster on standardised ones (as He et al. 2022, MAE, do before a linear probe). Done once: heads that were
        trained on standardised features keep seeing the same ones.

        Args:
            raw: ``(N, M, D)`` of training clips.
            present: ``(N, M)`` bool.
        """
        if self.standardised:
            return
        for m in range(len(self.modalities)):
            own = raw[present[:, m], m].double()  # (n, D)
            if len(own) > 1:
                self.feature_mean[m] = own.mean(0)
                self.feature_scale[m] = 1 / (own.std(0) + SMALLEST_DEVIATION)

    @property
    def standardised(self) -> bool:
        """Whether `encode` changes the encoders' features."""
        return bool((self.feature_mean != 0).any() or (self.feature_scale != 1).any())

    def hide(self, present: Tensor, draws: Tensor | None = None) -> Tensor:
        """Returns `present` after modality dropout: while training, each present modality is hidden with the
        recipe's probability, but one is always kept.

        Args:
            present: ``(B, M)`` bool.
            draws: ``(B, M)`` uniform in 0..1; random if None.
        """
        rate = self.config.fusion.modality_dropout
        return hidden_by_chance(present, rate, draws) if self.training and rate else present

    def fuse(
        self, features: Tensor, present: Tensor, logits: Tensor | None = None, draws: Tensor | None = None
    ) -> FusionOutput:
        """Fuses ``(B, M, D)`` features, and ``(B, M, K)`` logits where the fusion needs them; draws as `hide`."""
        absent = ~present.unsqueeze(-1)
        if logits is not None:
            logits = logits.masked_fill(absent, 0)
        return self.fusion(FusionInput(features.masked_fill(absent, 0), present, logits, draws))

    def forward(self, streams: Mapping[str, Tensor], present: Tensor, draws: Tensor | None = None) -> NetworkOutput:
        """Encodes and fuses (fusions that mix logits need `fuse` with logits instead)."""
        visible = self.hide(present, draws)
        features = self.encode(streams, present, visible)
        output = self.fuse(features, visible, draws=draws)
        return NetworkOutput(features, present, output.embedding, output.weights)


def hidden_by_chance(present: Tensor, rate: float, draws: Tensor | None = None) -> Tensor:
    """Returns `present` ``(B, M)`` with each modality hidden with probability `rate`, one of each clip always kept.

    Args:
        draws: ``(B, M)`` uniform in 0..1; random if None.
    """
    if draws is None:
        draws = torch.rand(present.shape, device=present.device)
    draws = draws.masked_fill(~present, -1.0)
    best = nn.functional.one_hot(draws.argmax(dim=1), present.shape[1]).bool()
    return present & ((draws >= rate) | best)
