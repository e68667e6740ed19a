"""Settings of the network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from crossgate.config.base import Config, Fraction, Positive
from crossgate.errors import nearest
from crossgate.modality import MODALITIES


class EncoderConfig(Config):
    """A timm backbone for one modality, and how its frames become one feature."""

    backbone: str = ""
    """Any timm name that accepts `in_chans` (empty: the modality's default)."""
    pretrained: bool = False
    """Start from timm's weights (downloads them)."""
    temporal: Literal["mean", "attention", "gru"] = "attention"
    """How T frame features become one."""
    norm: Literal["keep", "group"] = "keep"
    """`group` turns batch normalisation into group normalisation: batch statistics would mix absent clips in and
    depend on the number of ranks, so a backbone with batch norm is refused under `keep`."""
    drop_path: Fraction = 0.0
    """Stochastic depth rate, where the backbone has it."""


class FusionConfig(Config):
    """How the modalities' features become one."""

    name: str = "softmax"
    """A registered fusion: `crossgate explain fusion` lists them."""
    hidden: Positive = 64
    """Width of the gate's hidden layer."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Softmax temperature of gates that have one."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Weights of the modalities for the `fixed_*` fusions, in the order of the modalities (empty: equal)."""
    rank: Positive = 4
    """Rank of `lowrank`."""
    tokens: Positive = 4
    """Bottleneck tokens of `bottleneck`."""
    layers: Positive = 2
    """Layers of `bottleneck`."""
    top: Positive = 1
    """Modalities that `sparse` keeps for a clip."""
    balance: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the load balance of `sparse`, without which it may fall for one modality."""
    entropy: Annotated[float, Field(ge=0)] = 0.0
    """Weight of a penalty on weights that are uneven (1 minus their relative entropy), against collapse."""
    modality_dropout: Fraction = 0.0
    """Probability of hiding a present modality while training; one is always kept."""


class ExchangeConfig(Config):
    """What encoders learn of one another before their features are fused."""

    name: Literal["none", "mmtm"] = "none"
    """`mmtm`: what all present modalities show decides which channels of each one's last feature maps count. For
    fine-tuning with encoders that learn."""
    ratio: Positive = 4
    """By how much `mmtm` narrows what it has squeezed."""


class ModelConfig(Config):
    """The network."""

    dim: Positive = 256
    """Width D of each modality's feature and of the fused one."""
    embedding: Positive = 128
    """Width E of the contrastive embedding."""
    encoders: dict[str, EncoderConfig] = {}
    """Per modality; a modality that is not named gets its defaults."""
    exchange: ExchangeConfig = ExchangeConfig()
    """Between the encoders."""
    fusion: FusionConfig = FusionConfig()
    """Gate and fusion."""

    @field_validator("encoders")
    @classmethod
    def _known(cls, encoders: dict[str, EncoderConfig]) -> dict[str, EncoderConfig]:
        unknown = encoders.keys() - MODALITIES.keys()
        if unknown:
            name = min(unknown)
            raise ValueError(f"unknown modality '{name}'; {nearest(name, MODALITIES)}")
        return encoders

    def encoder(self, modality: str) -> EncoderConfig:
        """Returns the modality's encoder settings with the default backbone filled in."""
        config = self.encoders.get(modality, EncoderConfig())
        return config if config.backbone else config.model_copy(update={"backbone": MODALITIES[modality].backbone})

    def from_scratch(self) -> ModelConfig:
        """Returns the same network without downloaded weights: random, or about to be loaded from elsewhere."""
        encoders = {name: one.model_copy(update={"pretrained": False}) for name, one in self.encoders.items()}
        return self.model_copy(update={"encoders": encoders})
