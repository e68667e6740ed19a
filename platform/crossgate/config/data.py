"""Settings of clips and of how they form global batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from crossgate.config.base import Config, Count, FolderUrl, Fraction, Positive
from crossgate.errors import nearest
from crossgate.modality import MODALITIES, ordered


class ClipConfig(Config):
    """What one clip is as tensors. Travels with every trained model."""

    modalities: tuple[str, ...] = ("rgb", "flow", "audio", "depth")
    """Modalities in use, two or more (one is allowed for single-modality baselines)."""
    frames: Positive = 8
    """Frames drawn from a clip (T of rgb, flow and depth)."""
    size: Annotated[int, Field(ge=16, le=1024)] = 112
    """Side in pixels of the square that the network sees."""
    seconds: Annotated[float, Field(gt=0, le=60)] = 2.0
    """Length of a clip."""
    mels: Annotated[int, Field(ge=8, le=256)] = 64
    """Mel bins of the audio spectrogram."""

    @field_validator("modalities")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = set(names) - MODALITIES.keys()
        if unknown:
            name = min(unknown)
            raise ValueError(f"unknown modality '{name}'; {nearest(name, MODALITIES)}")
        if not names:
            raise ValueError("name at least one modality")
        return ordered(names)

    @property
    def audio_steps(self) -> int:
        """Time steps of the spectrogram: 100 a second, rounded to a multiple of 32 for the encoder's strides."""
        return max(32, round(self.seconds * 100 / 32) * 32)

    def shape(self, modality: str) -> tuple[int, int, int, int]:
        """Returns ``(T, C, H, W)`` of one clip of this modality."""
        entry = MODALITIES[modality]
        if entry.layout == "spectrogram":
            return 1, entry.channels, self.mels, self.audio_steps
        return self.frames, entry.channels, self.size, self.size


class AugmentConfig(Config):
    """Random changes of training clips, drawn once a clip and applied alike to all its modalities."""

    enabled: bool = True
    """Off for evaluation always; here for training."""
    crop: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Smallest share of the picture that a random crop keeps (1: no random crop)."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip (negates the flow's u)."""
    jitter: Fraction = 0.2
    """Strength of brightness, contrast and colour changes of rgb, and of loudness changes of audio."""
    time: bool = True
    """Draw frames at random within equal segments instead of their middles."""
    mask_audio: Fraction = 0.1
    """Largest share of mel bins and of time steps that a SpecAugment mask covers."""


class CacheConfig(Config):
    """Whole shards of a remote store, kept on a local disk for all processes of a machine."""

    folder: str = ""
    """Folder on a local disk, made if need be (empty: no cache). Nothing else should lie in it."""
    size_gb: Annotated[float, Field(gt=0)] = 100.0
    """What the folder may take, in 10⁹ bytes; the least recently used shards make room."""


class CorpusConfig(Config):
    """A further folder of shards to train on, beside `data.index`."""

    index: FolderUrl
    """URL of its folder of shards (local path, s3://, http(s)://)."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Clips of it in every global batch for each clip of `data.index`, rounded to whole clips of a batch."""
    train: tuple[str, ...] = ()
    """Its splits to train on (`[]`: those of `data.train`)."""


class DataConfig(Config):
    """Where clips come from and how they form global batches."""

    index: FolderUrl = ""
    """URL of a folder of shards (local path, s3://, http(s)://)."""
    train: tuple[str, ...] = ("train",)
    """Splits to train on."""
    val: tuple[str, ...] = ("val",)
    """Splits for validation and selection (`[]`: none, for pretraining; then the last weights are kept)."""
    test: tuple[str, ...] = ("test",)
    """Splits touched once, at the end (`[]`: none, then the trained model is not measured)."""
    mix: tuple[CorpusConfig, ...] = ()
    """Further corpora to train on, mixed by weight into every global batch; an epoch is one pass of `index`."""
    clip: ClipConfig = ClipConfig()
    """What one clip is as tensors."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training clips."""
    global_batch: Positive = 64
    """Clips in one optimiser step over all ranks; must be divisible by ranks times accumulation."""
    tail: Literal["drop", "wrap"] = "drop"
    """What happens to the clips that do not fill a last global batch: dropped, or filled up from the epoch's start."""
    loader_workers: Count = 0
    """Decoding processes a rank (0: decode in the trainer's process)."""
    prefetch: Positive = 4
    """Batches that a worker decodes ahead."""
    max_bad_clips: Count = 100
    """Corrupt clips, over all ranks, that are skipped before the run stops."""
    cache: CacheConfig = CacheConfig()
    """Where shards of a remote store are kept (local shards are read in place)."""
