"""Gates trained on kept features: first a head for each modality, then a gate on what those heads say, in seconds.

The same fusions and heads as in the network, without encoders around them. A gate that learned from scores of clips
that the heads were trained on would learn to trust the head that overfits most; so it learns from *out-of-fold* scores
(Wolpert 1992): those that each part of the training groups gets by heads trained on the other parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from crossgate.config import FusionConfig, OptimConfig, StudyConfig
from crossgate.errors import UserError
from crossgate.model.fusion import FusionInput, build_fusion
from crossgate.model.heads import ClassHead
from crossgate.model.network import hidden_by_chance
from crossgate.objectives.classification import cross_entropy
from crossgate.objectives.gating import concentration, load_balance
from crossgate.tasks.task import decaying_parameters


@dataclass
class Clips:
    """N labelled clips as a gate sees them.

    Attributes:
        features: ``(N, M, D)``, zeros where absent.
        present: ``(N, M)`` bool.
        labels: ``(N,)`` int64.
        group: ``(N,)`` int64.
        scores: ``(N, M, K)`` logits of the modalities' heads, None before there are heads.
    """

    features: Tensor
    present: Tensor
    labels: Tensor
    group: Tensor
    scores: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor) -> Clips:
        """Returns the clips at these places, or under this mask."""
        scores = None if self.scores is None else self.scores[rows]
        return Clips(self.features[rows], self.present[rows], self.labels[rows], self.group[rows], scores)

    def without(self, hidden: Tensor) -> Clips:
        """Returns the same clips with the modalities of ``hidden (M,)`` taken away."""
        present = self.present & ~hidden
        return replace(self, present=present, features=self.features.masked_fill(~present.unsqueeze(-1), 0))


@dataclass(frozen=True)
class Setting:
    """How heads and gates are trained: the recipe's `study` and `optim`, and how many classes there are."""

    study: StudyConfig
    optim: OptimConfig
    fusion: FusionConfig
    classes: int


class Heads(nn.Module):
    """A head for each modality, ``(N, M, D) -> (N, M, K)``: the streams of late fusion."""

    def __init__(self, modalities: int, dim: int, classes: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(ClassHead(dim, classes) for _ in range(modalities))

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(features[:, m]) for m, head in enumerate(self.each)], dim=1)


class Gate(nn.Module):
    """A fusion with its head, if it has one, on features and scores that stay as they are."""

    def __init__(self, config: FusionConfig, names: Sequence[str], dim: int, classes: int) -> None:
        super().__init__()
        self.fusion = build_fusion(config, len(names), dim, classes, names=names)
        self.head = None if self.fusion.needs_logits else ClassHead(dim, classes)
        self.config = config

    @property
    def learns(self) -> bool:
        """Whether there is anything to train."""
        return any(True for _ in self.parameters())

    def forward(self, clips: Clips, draws: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns logits ``(N, K)``, and weights and routing ``(N, M)`` where the fusion has them."""
        absent = ~clips.present.unsqueeze(-1)
        scores = None if clips.scores is None else clips.scores.masked_fill(absent, 0)
        output = self.fusion(FusionInput(clips.features.masked_fill(absent, 0), clips.present, scores, draws))
        logits = output.logits
        if self.head is not None:
            assert output.embedding is not None
            logits = self.head(output.embedding)
        assert logits is not None
        return logits, output.weights, output.routing


def train_heads(train: Clips, val: Clips, setting: Setting, seed: int) -> Heads:
    """Trains the streams' heads, each by its own cross entropy, each kept where its own log loss on `val` is lowest."""
    with _seeded(seed):
        heads = Heads(train.present.shape[1], train.features.shape[2], setting.classes)
        best = [(float("inf"), head.state_dict()) for head in heads.each]

        def loss(batch: Clips) -> Tensor:
            return cross_entropy(heads(batch.features), batch.labels, batch.present).sum()

        def look() -> None:
            losses = cross_entropy(heads(val.features), val.labels, val.present)  # (M,)
            for m, (head, value) in enumerate(zip(heads.each, losses.tolist())):
                if value < best[m][0]:
                    best[m] = (value, _copied(head))

        _descend(heads, train, loss, look, setting)
    for head, (_, state) in zip(heads.each, best):
        head.load_state_dict(state)
    return heads.eval()


def folds_of(group: Tensor, count: int, seed: int) -> Tensor:
    """Returns ``(N,)`` the part of each clip: whole groups, as even as their number allows.

    Raises:
        UserError: for clips of one group, beside which there are none to train on.
    """
    names, place = torch.unique(group, return_inverse=True)
    if len(names) < 2:
        raise UserError(
            f"{len(group)} labelled training clips are of one group, and heads learn on other groups than they score",
            where="data.train",
            expected="clips of two groups or more",
            cure="name more splits, or pack clips of more source videos (column `group` of the manifest)",
        )
    draws = torch.Generator().manual_seed(seed)
    return (torch.randperm(len(names), generator=draws) % min(count, len(names)))[place]


def out_of_fold(train: Clips, val: Clips, setting: Setting, seed: int) -> Clips:
    """Returns the training clips with the scores that heads give them which never saw their groups."""
    part = folds_of(train.group, setting.study.folds, seed)
    scores = torch.zeros(len(train), train.present.shape[1], setting.classes)
    for k in part.unique().tolist():
        held = part == k
        heads = train_heads(train.select(~held), val, setting, seed)
        with torch.no_grad():
            scores[held] = heads(train.features[held])
    return replace(train, scores=scores)


def scored(heads: Heads, clips: Clips) -> Clips:
    """Returns the clips with the heads' scores."""
    with torch.no_grad():
        return replace(clips, scores=heads(clips.features))


def train_gate(name: str, names: Sequence[str], train: Clips, val: Clips, setting: Setting, seed: int) -> Gate:
    """Trains one gate, kept where its log loss on `val` is lowest; one without parameters is only built.

    It is trained once for every strength of modality dropout and of the penalty on uneven weights that the study
    tries: on some hundred clips a gate that nothing holds back learns them by heart.

    Args:
        name: of the fusion.
        names: of the modalities.
        train: with out-of-fold scores.
        val: with scores.
        seed: of weights and order.

    Raises:
        UserError: for a fusion that these modalities do not suit.
    """
    tried = [_train_gate(config, names, train, val, setting, seed) for config in _tried(name, names, train, setting)]
    return min(tried, key=lambda one: one[0])[1]


def _tried(name: str, names: Sequence[str], train: Clips, setting: Setting) -> Iterator[FusionConfig]:
    """The settings that a gate is trained with, those of them that make a difference to it."""
    config, study = setting.fusion.model_copy(update={"name": name}), setting.study
    with _seeded(0):
        gate = Gate(config, names, train.features.shape[2], setting.classes)
        weights = gate(train.select(torch.arange(1)))[1]
    weighs = weights is not None and weights.requires_grad
    for dropout in study.dropout if gate.learns else (0.0,):
        for entropy in study.entropy if weighs else (0.0,):
            yield config.model_copy(update={"modality_dropout": dropout, "entropy": entropy})


def _train_gate(
    config: FusionConfig, names: Sequence[str], train: Clips, val: Clips, setting: Setting, seed: int
) -> tuple[float, Gate]:
    """Returns the lowest log loss on `val`, and the gate as it was then."""
    with _seeded(seed):
        gate = Gate(config, names, train.features.shape[2], setting.classes)
        if not gate.learns:
            return 0.0, gate.eval()
        best: list[tuple[float, dict[str, Tensor]]] = [(float("inf"), _copied(gate))]

        def loss(batch: Clips) -> Tensor:
            seen = _dropped(batch, config.modality_dropout)
            logits, weights, routing = gate(seen, torch.rand(seen.present.shape))
            value = _entropy(logits, batch)
            if weights is not None and routing is not None:
                value = value + config.balance * load_balance(weights, routing, seen.present)
            if weights is not None and config.entropy > 0:
                value = value + config.entropy * concentration(weights, seen.present)
            return value

        def look() -> None:
            value = float(_entropy(gate(val)[0], val))
            if value < best[0][0]:
                best[0] = (value, _copied(gate))

        _descend(gate, train, loss, look, setting)
    gate.load_state_dict(best[0][1])
    return best[0][0], gate.eval()


def frozen_random(names: Sequence[str], dim: int, setting: Setting, seed: int) -> Gate:
    """Returns the mixture of experts under a gate that was never trained: random weights that do vary with the clip.

    The control that the published gated self-supervision lacks, whose gate got no gradient.
    """
    config = setting.fusion.model_copy(update={"name": "softmax_probabilities"})
    with _seeded(seed):
        gate = Gate(config, names, dim, setting.classes)
        for module in gate.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=2 * module.in_features**-0.5)
    return gate.eval()


# ---- the loop --------------------------------------------------------------------------------------------------


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of their own, so that one gate's training does not depend on which others came before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _descend(
    model: nn.Module, train: Clips, loss: Callable[[Clips], Tensor], look: Callable[[], None], setting: Setting
) -> None:
    study, steps = setting.study, setting.study.steps
    named, decaying = dict(model.named_parameters()), decaying_parameters(model)
    decays = [parameter for name, parameter in named.items() if name in decaying]
    others = [parameter for name, parameter in named.items() if name not in decaying]
    groups = [{"params": decays, "weight_decay": setting.optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=setting.optim.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    order = torch.zeros(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < min(study.batch, len(train)):
            order = torch.randperm(len(train))
        rows, order = order[: study.batch], order[study.batch :]
        optimiser.zero_grad(set_to_none=True)
        loss(train.select(rows)).backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % study.eval_every == 0 or step + 1 == steps:
            model.eval()
            with torch.no_grad():
                look()
            model.train()


def _entropy(logits: Tensor, clips: Clips) -> Tensor:
    return cross_entropy(logits.unsqueeze(1), clips.labels, clips.present.any(1, keepdim=True)).squeeze(0)


def _dropped(clips: Clips, rate: float) -> Clips:
    """The clips after modality dropout."""
    if rate == 0:
        return clips
    present = hidden_by_chance(clips.present, rate)
    return replace(clips, present=present, features=clips.features.masked_fill(~present.unsqueeze(-1), 0))


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
