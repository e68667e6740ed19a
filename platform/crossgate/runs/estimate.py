"""What a recipe needs of memory on each rank: states by formula, activations measured on one clip."""

from __future__ import annotations

from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor

from crossgate.batch import ClipBatch
from crossgate.config import Recipe
from crossgate.errors import UserError
from crossgate.recipe import micro_batch
from crossgate.runs.context import open_index
from crossgate.tasks import Task, build_task
from crossgate.training.engine import BUCKET, Step

GIB = 1 << 30
STAGES = (0, 1, 2, 3)
USUAL_GPU = 80.0
"""GiB of the device that recipes for GPUs are held against where nothing else is said."""


@dataclass(frozen=True)
class Need:
    """Bytes on one rank's device under one ZeRO stage."""

    stage: int
    states: int
    """Weights, gradients, fp32 masters and Adam's moments, between the steps."""
    activations: int
    """What a micro-batch keeps for its backward pass."""
    step: int
    """What the optimiser's step takes besides, when activations are gone."""
    bucket: int
    """Gradients on their way to other ranks."""

    @property
    def peak(self) -> int:
        """The most at any time; the allocator's waste and NCCL's own buffers come on top, some 10 %."""
        return self.states + max(self.activations + self.bucket, self.step)

    def fits(self, memory: float) -> bool:
        """Whether it does into so many GiB, with a tenth to spare."""
        return 1.1 * self.peak < memory * GIB


@dataclass(frozen=True)
class Estimate:
    """Needs of a recipe under every stage."""

    trained: int
    """Parameters that train."""
    frozen: int
    per_clip: int
    """Bytes of activations."""
    micro_batch: int
    accumulation: int
    ranks: int
    needs: tuple[Need, ...]

    def table(self, stage: int, memory: float) -> str:
        """Returns the estimate for people; marks the recipe's own stage, and what fits into so many GiB."""
        lines = [
            f"{self.trained / 1e6:.1f} M parameters train, {self.frozen / 1e6:.1f} M are frozen; "
            f"{_counted(self.ranks, 'rank')} of {_counted(self.micro_batch, 'clip')} a micro-batch, "
            f"{self.per_clip / (1 << 20):.1f} MiB of activations a clip",
            "",
            "ZeRO    states  activations    bucket      step      peak",
        ]
        for need in self.needs:
            parts = (need.states, need.activations, need.bucket, need.step, need.peak)
            states, activations, bucket, step, peak = (f"{part / GIB:.2f} GiB" for part in parts)
            fits = "fits" if need.fits(memory) else "too large"
            mark = "  <- the recipe's" if need.stage == stage else ""
            lines.append(f"{need.stage:<4}{states:>10}{activations:>13}{bucket:>10}{step:>10}{peak:>10}  {fits}{mark}")
        room = f"a device of {memory:g} GiB (--memory) with a tenth to spare"
        said = f"fits: into {room}" if self.fits(memory) else f"nothing fits into {room}; {self.cure(memory)}"
        return "\n".join([*lines, "", said])

    def fits(self, memory: float) -> bool:
        """Whether it does into so many GiB under some stage."""
        return any(need.fits(memory) for need in self.needs)

    def cure(self, memory: float) -> str:
        """Returns what would make it fit: the fewest micro-batches that do, if one clip at a time is small enough."""
        for parts in range(2, self.micro_batch + 1):
            if self.micro_batch % parts:
                continue
            kept = self.per_clip * self.micro_batch // parts
            for need in self.needs:
                if replace(need, activations=kept).fits(memory):
                    return f"engine.accumulation={self.accumulation * parts} would fit under ZeRO {need.stage}"
        return (
            "nor does one clip at a time: share the model among more ranks (--gpus) under ZeRO 3, keep it in host "
            "memory (engine.offload), or take smaller backbones"
        )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def estimate(recipe: Recipe, ranks: int) -> Estimate:
    """Returns what each of so many ranks needs.

    Raises:
        UserError: for a global batch that does not divide over the ranks, or a model that cannot be built.
    """
    clips = micro_batch(recipe, ranks, where="--gpus")
    index = open_index(recipe) if recipe.data.index and recipe.kind != "pretrain" else None
    task = build_task(recipe, index.vocabularies if index else {recipe.finetune.task: [str(i) for i in range(10)]})
    if recipe.engine.activation_checkpointing:
        task.checkpoint_activations()
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in task.parameters() if not p.requires_grad)
    per_clip = kept_bytes(task, recipe, 2) - kept_bytes(task, recipe, 1)
    needs = []
    for stage in STAGES:
        if stage == 0 and recipe.engine.precision == "bf16":
            continue
        states, step = state_bytes(recipe, stage, trained, frozen, ranks)
        needs.append(Need(stage, states, per_clip * clips, step, bucket_bytes(recipe, stage, trained)))
    return Estimate(trained, frozen, per_clip, clips, recipe.engine.accumulation, ranks, tuple(needs))


def device_memory(recipe: Recipe, ranks: int) -> float:
    """Returns GiB of a rank's device where the user names none: a usual GPU, or a rank's share of this machine."""
    if recipe.cluster.gpus_per_worker:
        return USUAL_GPU
    return round(psutil.virtual_memory().total / GIB / ranks, 1)


def short_of_clips(recipe: Recipe) -> str:
    """Returns a warning where the training splits do not fill one global batch; empty: they do, or nobody knows."""
    if not recipe.data.index or recipe.data.mix:
        return ""
    clips = open_index(recipe).select(recipe.data.train, recipe.data.clip.modalities).total
    if clips >= recipe.data.global_batch:
        return ""
    return f"warning: data.train has {clips} clips, which do not fill a global batch of {recipe.data.global_batch}"


def refuse_too_large(recipe: Recipe, memory: float, where: str) -> None:
    """Raises where a rank of the recipe wants more than so many GiB.

    Raises:
        UserError: it does, or what `estimate` raises.
    """
    needs = {need.stage: need for need in estimate(recipe, recipe.cluster.workers).needs}
    need = needs[recipe.engine.stage(recipe.cluster.workers)]
    if not need.fits(memory):
        raise UserError(
            f"a rank wants {need.peak / GIB:.0f} GiB and a tenth to spare, its GPU has {memory:g}",
            where=where,
            cure="lower data.global_batch, raise engine.accumulation, or set engine.activation_checkpointing",
        )


def state_bytes(recipe: Recipe, stage: int, trained: int, frozen: int, ranks: int) -> tuple[int, int]:
    """Returns bytes of states between steps, and of what a step takes besides, on one rank's device.

    After Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054, section 5), with what DeepSpeed does differently: under fp32
    too, every stage from 1 on keeps a master besides the weights, and a step flattens its share of the gradient anew.
    """
    width = _width(recipe)
    share = trained // ranks
    weights = gradients = width * trained
    if stage == 0:
        return 16 * trained + width * frozen, 0
    optimizer = 12 * share
    if stage == 3:
        weights, frozen = width * share, frozen // ranks
    if stage >= 2:
        gradients = width * share
    if recipe.engine.offload != "none":
        optimizer = 0
    if recipe.engine.offload == "parameters":
        weights = 0
    at_once = 0 if recipe.engine.offload != "none" else 4 * share
    return weights + gradients + optimizer + width * frozen, at_once


def bucket_bytes(recipe: Recipe, stage: int, trained: int) -> int:
    """Returns bytes of gradients that DeepSpeed lays in a row before ranks sum them.

    Stage 3 and offloading have room for a whole bucket from the start.
    """
    if stage == 0:
        return _width(recipe) * trained  # all at once, at the step
    whole = stage == 3 or recipe.engine.offload != "none"
    return _width(recipe) * (BUCKET if whole else min(BUCKET, trained))


def _width(recipe: Recipe) -> int:
    """Returns bytes of a weight on the device."""
    return 4 if recipe.engine.precision == "fp32" else 2


def kept_bytes(task: Task, recipe: Recipe, clips: int) -> int:
    """Returns the bytes that a forward pass over random clips keeps for its backward pass, parameters left out."""
    own = {value.untyped_storage().data_ptr() for value in (*task.parameters(), *task.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # an address that is used again would count once
        return tensor

    alive: list[Tensor] = []
    step = Step(task, torch.device("cpu"), recipe.engine.precision)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step(random_clips(recipe, clips))
    return sum(kept.values())


def random_clips(recipe: Recipe, count: int) -> ClipBatch:
    """Returns clips of the recipe's shape that have every modality."""
    clip = recipe.data.clip
    return ClipBatch(
        modalities=clip.modalities,
        streams={name: torch.rand(count, *clip.shape(name)) for name in clip.modalities},
        present=torch.ones(count, len(clip.modalities), dtype=torch.bool),
        group=torch.arange(count),
        labels={recipe.finetune.task: torch.zeros(count, dtype=torch.int64)},
        degraded=torch.full((count, len(clip.modalities)), torch.nan),
        clip=torch.arange(count),
        keys=[str(number) for number in range(count)],
    )
