"""Pretext tasks on a second view of the clips, beside the contrast: their heads, and the gate that mixes their losses.

The view has one quadrant changed (`quadrants`), goes through the same encoders, and its frames' features are
reordered (`moments`). Every pair of a task and a modality has its own head. Heads and gate serve training only: they
belong to the task, not to the model that is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crossgate.batch import ClipBatch
from crossgate.config import ClipConfig, PretextConfig
from crossgate.errors import UserError
from crossgate.model.network import MultimodalNetwork
from crossgate.objectives.pretext import task_losses, weigh
from crossgate.tasks import moments
from crossgate.tasks.draws import clip_draws
from crossgate.tasks.quadrants import CHANNEL_ORDERS, Quadrants

Measured = dict[str, tuple[Tensor, Tensor]]
DRAWS = 11  # random numbers a clip and step
SALT = 0x5E1F  # on the seed: other numbers than those of modality dropout


@dataclass(frozen=True)
class Kind:
    """What a pretext task asks: of how many classes, of which modalities, of at least how many frames."""

    classes: int
    modalities: tuple[str, ...]
    frames: int = 1
    of_pictures: bool = False
    needs: str = ""


PICTURES = ("rgb", "flow", "depth")
# Flow is a motion a second: played backwards or faster, its values would have to change with the frames' order.
KINDS: dict[str, Kind] = {
    "rotation": Kind(16, PICTURES, of_pictures=True),
    "flip": Kind(2, PICTURES, of_pictures=True),
    "channels": Kind(len(CHANNEL_ORDERS), ("rgb",), of_pictures=True),
    "arrow": Kind(2, ("rgb", "depth"), frames=2),
    "speed": Kind(2, ("rgb", "depth"), frames=4),
    "order": Kind(len(moments.SEGMENT_ORDERS), PICTURES, frames=3),
    "synchrony": Kind(2, PICTURES, frames=2, needs="audio"),
}


@dataclass
class Answers:
    """What was asked of B clips, and answered.

    Attributes:
        rows: name -> ``(B, ...)`` with gradient: logits of every pair of a task and a modality, the gate's scores.
        labels: ``(B, K)`` int64, of K tasks.
    """

    rows: dict[str, Tensor]
    labels: Tensor


class Pretext(nn.Module):
    """Pretext tasks of one recipe.

    Args:
        config: with at least one task.
        clip: modalities and shapes.
        dim: D of the encoders.

    Raises:
        UserError: for a task that the recipe's clips cannot be asked.
    """

    def __init__(self, config: PretextConfig, clip: ClipConfig, dim: int) -> None:
        super().__init__()
        self.tasks, self.names = config.tasks, clip.modalities
        self.weighting, self.entropy = config.weighting, config.entropy
        self.of = {task: _modalities(task, clip) for task in self.tasks}
        self.quadrants = Quadrants(clip.size)
        self.heads = nn.ModuleDict()
        for task, names in self.of.items():
            for name in names:
                self.heads[f"{task}_{name}"] = _head(_inputs(task, clip.frames, dim), dim, KINDS[task].classes)
        if self.weighting != "uniform":
            self.gate = nn.Linear(dim, len(self.tasks))
            nn.init.zeros_(self.gate.bias)
            nn.init.normal_(self.gate.weight, std=dim**-0.5 if self.weighting == "random" else 1e-3)
            self.gate.requires_grad_(self.weighting == "gate")

    # ---- asking -----------------------------------------------------------------------------------------------

    def ask(self, network: MultimodalNetwork, batch: ClipBatch, features: Tensor, seed: int, step: Tensor) -> Answers:
        """Returns labels and logits of the batch; what is asked of a clip depends on clip, step and seed only.

        Args:
            network: whose encoders learn.
            batch: B clips.
            features: ``(B, M, D)`` of the clips as they are, zeros where absent: what the gate sees.
            seed: of the run.
            step: 0-d int64.
        """
        draws = clip_draws(seed + SALT, step, batch.clip, DRAWS)  # (B, DRAWS)
        asked = _Asked(draws, self.tasks)
        rows: dict[str, Tensor] = {}
        sound = self._sound(network, batch, asked) if "synchrony" in self.of else None
        for m, name in enumerate(self.names):
            tasks = [task for task in self.tasks if name in self.of[task]]
            if not tasks:
                continue
            view = self.quadrants(batch.streams[name], *asked.changes, modality=name)
            frames = network.frame_features(name, view, batch.present[:, m])  # (B, T, D)
            for task in tasks:
                rows[f"pretext/{task}_{name}"] = self.heads[f"{task}_{name}"](asked.seen(task, frames, sound))
        if self.weighting != "uniform":
            here = batch.present.sum(1, keepdim=True).clamp(min=1).to(features.dtype)
            rows["pretext/gate"] = self.gate(features.detach().sum(1) / here)  # encoders do not learn to please it
        labels = torch.stack([asked.labels[task] for task in self.tasks], dim=1)
        return Answers(rows, labels)

    def _sound(self, network: MultimodalNetwork, batch: ClipBatch, asked: _Asked) -> Tensor:
        """Returns the feature ``(B, D)`` of every clip's sound, rolled."""
        spectrogram = batch.streams["audio"]  # (B, 1, 1, mels, steps)
        steps = spectrogram.shape[-1]
        places = moments.rolled(steps, moments.within(asked.roll, steps)).view(-1, 1, 1, 1, steps)
        view = spectrogram.gather(-1, places.expand_as(spectrogram))
        return network.frame_features("audio", view, batch.present[:, self.names.index("audio")])[:, 0]

    # ---- scoring ----------------------------------------------------------------------------------------------

    def score(self, rows: Mapping[str, Tensor], labels: Tensor, present: Tensor) -> tuple[Tensor, Measured]:
        """Returns the mixed loss of the global batch, and sums and counts to report; uses no weights.

        Args:
            rows, labels: of `ask`, of this rank's clips.
            present: ``(B, M)`` bool.
        """
        losses, asked = [], []
        measured: Measured = {}
        for k, task in enumerate(self.tasks):
            logits = [rows[f"pretext/{task}_{name}"] for name in self.of[task]]
            valid = torch.stack([present[:, self.names.index(name)] for name in self.of[task]], dim=1)
            if KINDS[task].needs:
                valid = valid & present[:, self.names.index(KINDS[task].needs)].unsqueeze(1)
            loss, there = task_losses(logits, labels[:, k], valid)
            hits = (torch.stack(logits, dim=1).argmax(-1) == labels[:, k : k + 1]) & valid
            measured[f"pretext/loss_{task}"] = (loss.sum(), there.sum())
            measured[f"pretext/accuracy_{task}"] = (hits.sum(), valid.sum())
            losses.append(loss)
            asked.append(there)
        scores, possible = rows.get("pretext/gate"), torch.stack(asked, dim=1)
        evenness = self.entropy if self.weighting == "gate" else 0.0
        if scores is not None and self.weighting == "random":
            scores = scores.detach()
        total, weights = weigh(torch.stack(losses, dim=1), possible, scores, evenness)
        for k, task in enumerate(self.tasks):
            measured[f"pretext/weight_{task}"] = (weights[:, k].sum(), possible[:, k].sum())
        return total, measured


class _Asked:
    """What is asked of each clip, from its random numbers ``(B, DRAWS)``.

    Attributes:
        labels: task -> ``(B,)`` int64.
        changes: arguments of `Quadrants`.
        roll: ``(B,)`` in 0..1, how far the sound is rolled.
    """

    def __init__(self, draws: Tensor, tasks: tuple[str, ...]) -> None:
        quadrant, flip, turns, order = (
            moments.within(draws[:, column], count) for column, count in enumerate((4, 2, 4, len(CHANNEL_ORDERS)))
        )
        still = torch.zeros_like(quadrant)  # a change that nobody asks about is not made
        flip = flip if "flip" in tasks else still
        turns = turns if "rotation" in tasks else still
        order = order if "channels" in tasks else still
        self.changes = quadrant, flip, turns, order
        self.labels = {"rotation": 4 * quadrant + turns, "flip": flip, "channels": order}
        for column, task in enumerate(("arrow", "speed", "order", "synchrony"), start=4):
            self.labels[task] = moments.within(draws[:, column], KINDS[task].classes)
        self.start, self.roll, self.offset = draws[:, 8], draws[:, 9], draws[:, 10]

    def seen(self, task: str, frames: Tensor, sound: Tensor | None) -> Tensor:
        """Returns what the task's head sees of frame features ``(B, T, D)`` and of the sound's ``(B, D)``."""
        count = frames.shape[1]
        if KINDS[task].of_pictures:
            return frames.mean(1)
        if task == "arrow":
            return moments.shown(frames, moments.arrow(count, self.labels[task]))
        if task == "speed":
            return moments.shown(frames, moments.speed(count, self.labels[task], self.start))
        if task == "order":
            return moments.shown(frames, moments.order(count, self.labels[task]))
        assert sound is not None
        # In step (1): pictures are rolled as far as the sound. Out of step (0): by a good part of the clip more.
        shift = moments.within(self.roll, count)
        shift = shift + moments.apart(count, self.offset) * (1 - self.labels[task])
        return torch.cat([moments.shown(frames, moments.rolled(count, shift)), sound], dim=1)


def _modalities(task: str, clip: ClipConfig) -> tuple[str, ...]:
    """The modalities that the task is asked of."""
    kind = KINDS[task]
    names = tuple(name for name in clip.modalities if name in kind.modalities)
    if not names or (kind.needs and kind.needs not in clip.modalities):
        wanted = f"{kind.needs} and one of " if kind.needs else "one of "
        raise UserError(
            f"{task} cannot be asked of {', '.join(clip.modalities)}",
            where="pretrain.pretext.tasks",
            expected=wanted + ", ".join(kind.modalities),
        )
    if clip.frames < kind.frames:
        raise UserError(
            f"{task} cannot be asked of {clip.frames} frames",
            where="pretrain.pretext.tasks",
            expected=f"data.clip.frames of {kind.frames} or more",
        )
    return names


def _inputs(task: str, frames: int, dim: int) -> int:
    """Width of what a task's head sees."""
    if KINDS[task].of_pictures:
        return dim
    seen = {"speed": frames // 2, "order": 3 * (frames // 3)}.get(task, frames)
    return dim * (min(moments.PARTS, seen) + bool(KINDS[task].needs))


def _head(inputs: int, dim: int, classes: int) -> nn.Sequential:
    """Two layers: whether sound and pictures go together is no sum of what each says."""
    return nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, dim), nn.GELU(), nn.Linear(dim, classes))
