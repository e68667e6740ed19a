"""Settings of how it is trained: optimiser, DeepSpeed, the loop, Ray, MLflow."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from crossgate.config.base import Config, Count, FolderUrl, Fraction, Positive


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

    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """What is sharded over ranks: 0 nothing, 1 optimizer states, 2 also gradients, 3 also weights (ViTs run at 0.4 to
    0.7 of the speed under 3: use it only when the model does not fit). `auto` is 1, or 0 for one rank in fp32."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward pass; bf16 and fp16 need `zero_stage` of 1 or more. fp16 is for GPUs
    without bf16 (before Ampere): the loss is scaled, and steps that overflow are left out while the scale is sought."""
    compile: bool = False
    """Compile the encoders' backbones (torch.compile): a minute or more at the start of each process, faster steps on a
    GPU. Not under stage 3, which fetches weights layer by layer."""
    accumulation: Positive = 1
    """Micro-batches a step, for a global batch larger than memory. Pretraining contrasts the whole global batch all the
    same: it encodes every micro-batch a second time for it, a third more work."""
    activation_checkpointing: bool = False
    """Keep no activations inside the encoders but compute them again backward: a third more work, far less memory."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """Keep states in host memory (`parameters` needs stage 3)."""
    deepspeed: str = ""
    """Path of a DeepSpeed JSON merged over what these settings produce."""

    @model_validator(mode="after")
    def _agree(self) -> EngineConfig:
        if self.precision != "fp32" and self.zero_stage == 0:
            raise ValueError(f"precision {self.precision} needs zero_stage 1, 2 or 3 (stage 0 keeps no fp32 masters)")
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile needs zero_stage 0, 1 or 2")
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError("offload parameters needs zero_stage 3")
        return self

    def stage(self, ranks: int) -> int:
        """Returns the ZeRO stage of so many ranks: one alone has nobody to share with, and in fp32 no masters."""
        if self.zero_stage != "auto":
            return self.zero_stage
        return 0 if (ranks, self.precision, self.offload, self.deepspeed) == (1, "fp32", "none", "") else 1


CHANGEABLE = (
    "optim.lr",
    "optim.weight_decay",
    "optim.clip_norm",
    "finetune.unimodal_weight",
    "finetune.modulation",
    "finetune.label_smoothing",
    "finetune.encoder_lr_scale",
    "model.fusion.temperature",
    "model.fusion.modality_dropout",
    "model.fusion.entropy",
    "model.fusion.balance",
)
"""Settings that may change while training: they shape neither the network nor the order of the clips."""


class ChangeConfig(Config):
    """Settings that have other values from a step on."""

    after: Positive
    """Last optimiser step with the values before."""
    settings: Annotated[dict[str, float], Field(min_length=1)]
    """Dotted keys and their new values; others stay as they are."""


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
    save_minutes: Annotated[float, Field(ge=0)] = 0.0
    """Minutes between checkpoints by rank 0's clock, besides those by steps (0: by steps alone): what a lost node costs
    is then the same at any speed."""
    keep: Positive = 2
    """Checkpoints kept; the best one by validation is kept besides."""
    schedule: tuple[ChangeConfig, ...] = ()
    """Settings that change on the way, as a search with `scheduler: pbt` finds them:
    `[{after: 400, settings: {optim.lr: 2.0e-3}}]`. For fine-tuning; the learning rate is the peak of its cosine."""
    watchdog_s: Annotated[float, Field(ge=0)] = 900.0
    """Seconds that a rank may spend in one phase of a step (load, forward, backward, step, log, save; of a validation:
    in one batch) before the run is taken to hang: each rank then writes its phase and the stacks of its threads below
    the run's `hangs/` and ends with status 75, so that Ray or torchrun starts the run again (0: wait for ever)."""
    nonfinite_skips: Count = 0
    """Steps between two checkpoints whose loss or gradient may be other than finite; they change no weight, and their
    clips are named. One more, and the run goes back or stops."""
    nonfinite_rollbacks: Count = 0
    """Times that the run then puts weights and optimiser back to its last checkpoint, and goes on with the clips that
    come next, before it stops."""
    profile: tuple[Positive, Positive] | None = None
    """First and last step that torch's profiler records, on every rank, below the run's `profile/` (for Perfetto or
    chrome://tracing)."""
    trace: tuple[Positive, Positive] | None = None
    """First and last step of which every rank notes when each phase began, below the run's `trace/` (for
    `crossgate trace`)."""
    checkpoint_url: FolderUrl = ""
    """Folder or s3:// URL that checkpoints are uploaded to while training goes on, below the run's name; the same ones
    are kept there, and a run whose own folder is lost goes on from there (empty: none)."""

    @field_validator("profile", "trace")
    @classmethod
    def _in_order(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps and steps[0] > steps[1]:
            raise ValueError("begins after its end; give [first step, last step]")
        return steps


class ClusterConfig(Config):
    """Ray."""

    workers: Positive = 1
    """Ranks. One runs in this process without Ray, unless `launcher` is ray. A pair `[2, 8]` is short for
    `min_workers` 2 and `workers` 8."""
    min_workers: Count = 0
    """On Ray: go on with as few, rather than wait for those that are lost, and grow back when there is room
    (0: all `workers` or none). The global batch stays the same."""
    regrow_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds between looks for room to grow back; the run saves before it does."""
    launcher: Literal["auto", "ray", "local"] = "auto"
    """`auto`: Ray for several workers and in a Ray job, else this process. Under torchrun, its ranks in any case."""
    address: str = ""
    """Ray cluster (empty: the running one, else a private one on this machine)."""
    wait_s: Annotated[float, Field(ge=0)] = 1800.0
    """Seconds that a cluster too small for the fewest workers, or for one trial of a search, may take to grow before
    the run is refused. One that is started on this machine for the run does not grow."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that Ray reserves for one worker."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for one worker."""
    max_failures: Count = 3
    """Restarts from the last checkpoint before the run is given up; nodes that Ray knows to be taken away do not
    count."""

    @model_validator(mode="before")
    @classmethod
    def _pair(cls, given: Any) -> Any:
        workers = given.get("workers") if isinstance(given, dict) else None
        if not isinstance(workers, (list, tuple)):
            return given
        if len(workers) != 2 or "min_workers" in given:
            raise ValueError("workers is a number or a pair [fewest, most]")
        return given | {"min_workers": workers[0], "workers": workers[1]}

    @model_validator(mode="after")
    def _ordered(self) -> ClusterConfig:
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}")
        return self

    @property
    def fewest_workers(self) -> int:
        """Workers that the run needs at least."""
        return self.min_workers or self.workers


class TrackingConfig(Config):
    """MLflow."""

    uri: str = ""
    """Tracking server (empty: MLFLOW_TRACKING_URI, else sqlite beside the runs)."""
    experiment: str = "crossgate"
    """Experiment name."""
    enabled: bool = True
    """Off: metrics stay in the run directory."""
