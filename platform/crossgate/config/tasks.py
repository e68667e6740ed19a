"""Settings of what is learnt: pretraining and fine-tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from crossgate.config.base import Config, Count, Fraction
from crossgate.config.pretext import PretextConfig


class PretrainConfig(Config):
    """Cross-modal contrast, and pretext tasks beside it."""

    objective: Literal["infonce", "siglip", "vicreg"] = "infonce"
    """`infonce` finds each clip among the global batch; `siglip` asks of each pair of clips whether they are one (start
    its temperature at 0.1); `vicreg` has no negatives."""
    core: str = ""
    """Pair all other modalities with this one only (empty: all pairs)."""
    tile: Annotated[int, Field(ge=0)] = 2048
    """A larger global batch is contrasted in tiles of that many clips: the same loss, without the square in memory
    (0: never)."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """Start value of the softmax temperature."""
    learn_temperature: bool = True
    """Train the temperature (bounded below by 0.01, as CLIP)."""
    fused_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the contrast between the fused embedding and each modality, which trains gate and fusion."""
    agreement: Count = 0
    """Other clips of the global batch that count as positives of a clip within each modality: those most like it in
    both modalities of a pair (cross-modal agreement, AVID-CMA; the paper: 32 of all clips; 0: none)."""
    agreement_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of that loss beside the contrast."""
    exclude_group: bool = True
    """Clips of the same group are no negatives of one another."""
    contrast: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the contrast, the fused one included (0: pretext tasks only; gate and fusion do not learn, and the last
    weights are kept)."""
    pretext: PretextConfig = PretextConfig()
    """Tasks that need no labels, beside the contrast."""

    @model_validator(mode="after")
    def _learns(self) -> PretrainConfig:
        if not self.contrast and not (self.pretext.tasks and self.pretext.weight):
            raise ValueError("nothing is left to learn: contrast is 0 and there are no pretext tasks")
        return self


class FinetuneConfig(Config):
    """Supervised training from a pretrained run."""

    task: str = "action"
    """Label to learn: a name in the index's label vocabularies."""
    positive: str = "fight"
    """Positive class of a binary task, ranked and thresholded; where the task has no such class, plain accuracy
    counts."""
    init: str = ""
    """Run directory or model directory to start from (empty: random weights); encoders and fusion are taken, and the
    heads too where it is a classifier of the same classes."""
    freeze: bool = False
    """Frozen encoders: only gate, fusion and heads train."""
    features: str = ""
    """Folder that keeps the features of frozen encoders: each clip is decoded and encoded once, without
    augmentation, for all runs that name this folder, and gate and heads see the features standardised (needs
    `freeze`; empty: clips are encoded anew at each step)."""
    unimodal_weight: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the mean of the unimodal heads' losses."""
    blend: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Weights of the losses of the fused head and of each modality's own, in this order, instead of `unimodal_weight`
    (Gradient-Blending: in proportion to what each gains on validation over the square of what it overfits)."""
    modulation: Annotated[float, Field(ge=0)] = 0.0
    """Slows the encoder of a modality that is ahead of the others (alpha of OGM; the paper: 0.1 to 0.8)."""
    modulation_noise: Annotated[float, Field(ge=0)] = 0.0
    """Noise on the gradients of all encoders, in standard deviations of the gradient (GE of OGM-GE, beside
    `modulation`; the paper: 1)."""
    label_smoothing: Fraction = 0.0
    """As in torch's cross_entropy."""
    balance: bool = False
    """Weigh classes by their inverse frequency."""
    measure_train: bool = False
    """Each validation also takes the losses of training clips as it takes its own (`train/nll`, which `crossgate blend`
    needs): of `evaluation.clips` at most, nothing hidden, augmented or smoothed."""
    encoder_lr_scale: Annotated[float, Field(ge=0)] = 0.3
    """Learning rate of the pretrained encoders relative to `optim.lr`."""

    @model_validator(mode="after")
    def _agree(self) -> FinetuneConfig:
        if self.features and not self.freeze:
            raise ValueError("features of encoders that still learn cannot be kept: set freeze to true")
        if self.modulation_noise and not self.modulation:
            raise ValueError("modulation_noise goes with modulation, which is 0")
        return self
