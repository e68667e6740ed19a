"""Every setting of every run, typed, documented and validated. `recipe.py` reads YAML into these classes.

Field docstrings are the documentation: ``crossgate explain`` prints them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from crossgate.modality import MODALITIES, ordered

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Kind = Literal["pretrain", "finetune", "evaluate", "search"]


class Config(BaseModel):
    """Common ground: unknown keys are errors, field docstrings are the help."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


# ---- data ------------------------------------------------------------------------------------------------------


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
            raise ValueError(f"unknown modality {sorted(unknown)[0]!r}; valid: {', '.join(MODALITIES)}")
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


class DataConfig(Config):
    """Where clips come from and how they form global batches."""

    index: str = ""
    """URL of a folder of shards (local path, s3://, http(s)://)."""
    train: tuple[str, ...] = ("train",)
    """Splits to train on."""
    val: tuple[str, ...] = ("val",)
    """Splits for validation and selection (`[]`: none, for pretraining; then the last weights are kept)."""
    test: tuple[str, ...] = ("test",)
    """Splits touched once, at the end (`[]`: none, then the trained model is not measured)."""
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
    """Corrupt clips that are skipped before the run stops."""


# ---- model -----------------------------------------------------------------------------------------------------


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
    modality_dropout: Fraction = 0.0
    """Probability of hiding a present modality while training; one is always kept."""


class ModelConfig(Config):
    """The network."""

    dim: Positive = 256
    """Width D of each modality's feature and of the fused one."""
    embedding: Positive = 128
    """Width E of the contrastive embedding."""
    encoders: dict[str, EncoderConfig] = {}
    """Per modality; a modality that is not named gets its defaults."""
    fusion: FusionConfig = FusionConfig()
    """Gate and fusion."""

    @field_validator("encoders")
    @classmethod
    def _known(cls, encoders: dict[str, EncoderConfig]) -> dict[str, EncoderConfig]:
        unknown = encoders.keys() - MODALITIES.keys()
        if unknown:
            raise ValueError(f"unknown modality {sorted(unknown)[0]!r}; valid: {', '.join(MODALITIES)}")
        return encoders

    def encoder(self, modality: str) -> EncoderConfig:
        """Returns the modality's encoder settings with the default backbone filled in."""
        config = self.encoders.get(modality, EncoderConfig())
        return config if config.backbone else config.model_copy(update={"backbone": MODALITIES[modality].backbone})

    def from_scratch(self) -> ModelConfig:
        """Returns the same network without downloaded weights: random, or about to be loaded from elsewhere."""
        encoders = {name: one.model_copy(update={"pretrained": False}) for name, one in self.encoders.items()}
        return self.model_copy(update={"encoders": encoders})


# ---- tasks -----------------------------------------------------------------------------------------------------


class PretrainConfig(Config):
    """Cross-modal contrast."""

    temperature: Annotated[float, Field(gt=0)] = 0.07
    """Start value of the softmax temperature."""
    learn_temperature: bool = True
    """Train the temperature (bounded below by 0.01, as CLIP)."""
    fused_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the contrast between the fused embedding and each modality, which trains gate and fusion."""
    exclude_group: bool = True
    """Clips of the same group are no negatives of one another."""


class FinetuneConfig(Config):
    """Supervised training from a pretrained run."""

    task: str = "action"
    """Label to learn: a name in the index's label vocabularies."""
    positive: str = "fight"
    """Positive class of a binary task, ranked and thresholded; where the task has no such class, plain accuracy
    counts."""
    init: str = ""
    """Run directory or model directory to start from (empty: random weights)."""
    freeze: bool = False
    """Frozen encoders: only gate, fusion and heads train."""
    unimodal_weight: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the mean of the unimodal heads' losses."""
    label_smoothing: Fraction = 0.0
    """As in torch's cross_entropy."""
    balance: bool = False
    """Weigh classes by their inverse frequency."""
    encoder_lr_scale: Annotated[float, Field(ge=0)] = 0.3
    """Learning rate of the pretrained encoders relative to `optim.lr`."""


# ---- training --------------------------------------------------------------------------------------------------


class OptimConfig(Config):
    """AdamW with linear warm-up and cosine decay."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate, for the global batch as it stands."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Decoupled; not applied to biases, norms, and scalars."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's."""
    warmup: Fraction = 0.1
    """Share of all steps."""
    final_lr: Fraction = 0.01
    """Last learning rate as a share of the peak."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradient norm bound (0: none)."""


class EngineConfig(Config):
    """DeepSpeed."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over ranks: 1 optimizer states, 2 also gradients, 3 also weights (ViTs run at 0.4 to 0.7 of
    the speed under 3: use it only when the model does not fit)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward and backward pass; bf16 needs `zero_stage` of 1 or more."""
    accumulation: Positive = 1
    """Micro-batches a step."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """Keep states in host memory (`parameters` needs stage 3)."""
    deepspeed: str = ""
    """Path of a DeepSpeed JSON merged over what these settings produce."""

    @model_validator(mode="after")
    def _agree(self) -> EngineConfig:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("precision bf16 needs zero_stage 1, 2 or 3 (stage 0 uses an unfused optimizer)")
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError("offload parameters needs zero_stage 3")
        return self


class TrainingConfig(Config):
    """The loop."""

    epochs: Positive = 10
    """Passes over the training splits."""
    steps: Count = 0
    """Optimiser steps in all; 0: as many as `epochs` takes."""
    log_every: Positive = 10
    """Steps between log lines and logged metrics."""
    eval_every: Count = 0
    """Steps between validations (0: at each epoch's end)."""
    save_every: Count = 0
    """Steps between checkpoints (0: at each epoch's end)."""
    keep: Positive = 2
    """Checkpoints kept; the best one by validation is kept besides."""


class ClusterConfig(Config):
    """Ray."""

    workers: Positive = 1
    """Ranks. One runs in this process without Ray, unless `launcher` is ray."""
    launcher: Literal["auto", "ray", "local"] = "auto"
    """`auto`: torchrun's world if there is one, Ray for several workers, else this process."""
    address: str = ""
    """Ray cluster (empty: the running one, else a private one on this machine)."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that Ray reserves for one worker."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for one worker."""
    max_failures: Count = 3
    """Restarts from the last checkpoint before the run is given up."""


class TrackingConfig(Config):
    """MLflow."""

    uri: str = ""
    """Tracking server (empty: MLFLOW_TRACKING_URI, else sqlite beside the runs)."""
    experiment: str = "crossgate"
    """Experiment name."""
    enabled: bool = True
    """Off: metrics stay in the run directory."""


class EvaluationConfig(Config):
    """What is measured after training."""

    probe: bool = True
    """Linear probe on frozen features (pretraining)."""
    knn: Positive = 20
    """Neighbours of the kNN classifier."""
    gallery: Positive = 1000
    """Largest retrieval gallery."""
    clips: Positive = 20000
    """Clips of a split that are measured, at most."""
    model: str = ""
    """Run directory or model directory to measure (runs of kind evaluate)."""
    bootstrap: Positive = 1000
    """Resamples of groups for the 95 % intervals."""
    fixed_fpr: Fraction = 0.1
    """False-positive rate at which misses of the positive class are counted."""
    random_baseline: bool = True
    """Also probe a randomly initialised encoder (pretraining)."""


class SearchConfig(Config):
    """Ray Tune over gating variants."""

    space: dict[str, list] = {"model.fusion.name": ["mean", "sigmoid", "softmax"]}
    """Dotted recipe key -> values to try."""
    samples: Count = 0
    """Random draws from the space (0: the whole grid)."""
    concurrent: Positive = 1
    """Trials side by side."""
    metric: str = "val/accuracy"
    """Validation metric, to be maximised."""
    cpus_per_trial: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that Ray reserves for one trial."""
    gpus_per_trial: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for one trial."""


class ReleaseConfig(Config):
    """The MLflow registry."""

    name: str = ""
    """Registered model's name (empty: crossgate-TASK)."""
    alias: str = "champion"
    """Alias set on the new version."""


class RunConfig(Config):
    """Name and place of the run."""

    name: str = ""
    """Run name (empty: kind, recipe file and a digest of the settings, so that a resubmitted job resumes)."""
    output: str = "runs"
    """Folder that holds run directories."""
    seed: Count = 0
    """Seed of weights, schedule and augmentation."""


class Recipe(Config):
    """A whole run."""

    kind: Kind
    """What kind of run this is."""
    run: RunConfig = RunConfig()
    """Name and place."""
    data: DataConfig = DataConfig()
    """Clips."""
    model: ModelConfig = ModelConfig()
    """Network."""
    pretrain: PretrainConfig = PretrainConfig()
    """Objective of pretraining."""
    finetune: FinetuneConfig = FinetuneConfig()
    """Objective of fine-tuning."""
    optim: OptimConfig = OptimConfig()
    """Optimiser."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed."""
    training: TrainingConfig = TrainingConfig()
    """Loop."""
    cluster: ClusterConfig = ClusterConfig()
    """Ray."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Measurements."""
    search: SearchConfig = SearchConfig()
    """Ray Tune."""
    release: ReleaseConfig = ReleaseConfig()
    """Registry."""

    @model_validator(mode="after")
    def _divides(self) -> Recipe:
        share = self.cluster.workers * self.engine.accumulation
        if self.data.global_batch % share:
            raise ValueError(
                f"data.global_batch {self.data.global_batch} is not divisible by cluster.workers x "
                f"engine.accumulation = {share}"
            )
        if self.kind == "pretrain" and len(self.data.clip.modalities) < 2:
            raise ValueError("data.clip.modalities: pretraining contrasts modalities and needs two or more")
        return self
