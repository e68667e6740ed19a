"""The model directory: ``model.safetensors`` and ``model.json``. No pickle, nothing half-written, strict on reading."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crossgate.config import ClipConfig, Config, ModelConfig
from crossgate.errors import UserError, writing
from crossgate.model.classifier import Classifier
from crossgate.model.contrastive import ContrastiveModel
from crossgate.model.network import MultimodalNetwork

FORMAT: Literal[1] = 1
WEIGHTS, CARD = "model.safetensors", "model.json"
_NAMED = 3  # of many things, in one line


class ModelCard(Config):
    """What `model.json` holds: all that is needed to rebuild the model, and where it came from."""

    format: Literal[1] = FORMAT
    """Version of the layout."""
    kind: Literal["contrastive", "classifier"]
    """Which model."""
    model: ModelConfig
    """The network."""
    clip: ClipConfig
    """Modalities and tensor shapes."""
    task: str = ""
    """Label task of a classifier."""
    classes: tuple[str, ...] = ()
    """Class names in the order of a classifier's logits."""
    positive: str = ""
    """Positive class of a binary task."""
    threshold: float = 0.5
    """Probability of the positive class from which on a clip is labelled with it; chosen on validation clips."""
    provenance: dict[str, Any] = {}
    """Run, step, index digest, code version and what else the trainer wants to remember (JSON values)."""
    digest: str = ""
    """SHA-256 of the weights file; filled in by `save_model`."""

    def label_of(self, scores: Mapping[str, float], threshold: float | None = None) -> str:
        """Returns the class that a clip's probabilities stand for.

        Args:
            scores: class -> probability.
            threshold: in place of the model's own (None), where the task has a positive class.
        """
        if not self.positive:
            return max(scores, key=scores.__getitem__)
        (other,) = (name for name in self.classes if name != self.positive)
        return self.positive if scores[self.positive] >= (self.threshold if threshold is None else threshold) else other


@dataclass
class WarmStart:
    """What `load_encoders` took.

    Attributes:
        loaded: names of tensors taken.
        skipped: name of a tensor, or of an encoder or fusion as a whole -> why it keeps its own weights.
    """

    loaded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = [f"{name}: {why}" for name, why in self.skipped.items()]
        more = [f"{len(reasons) - _NAMED} more"] if len(reasons) > _NAMED else []
        left = f"; not loaded: {'; '.join(reasons[:_NAMED] + more)}" if reasons else ""
        return f"{len(self.loaded)} tensors loaded{left}"

    @property
    def random(self) -> list[str]:
        """Names of encoders, or tensors of theirs, that start from random weights."""
        return [name for name in self.skipped if name.startswith("encoders.")]


def save_model(
    directory: str | Path, model: nn.Module, card: ModelCard, state: Mapping[str, Tensor] | None = None
) -> ModelCard:
    """Writes a model directory beside its place and renames it; an earlier one there is replaced.

    Args:
        directory: the place.
        model: a `ContrastiveModel` or `Classifier`.
        card: what it is; its digest is filled in.
        state: the model's whole state dict where the model itself holds only a part (ZeRO 3).

    Returns:
        The card as written.

    Raises:
        UserError: for a disk that is full; an earlier model there stays.
    """
    directory = Path(directory)
    with writing("a model", directory):
        return _save(directory, model.state_dict() if state is None else state, card)


def _save(directory: Path, state: Mapping[str, Tensor], card: ModelCard) -> ModelCard:
    directory.parent.mkdir(parents=True, exist_ok=True)
    _recover(directory)
    fresh = directory.with_name(f".{directory.name}.{os.getpid()}.new")
    for left in directory.parent.glob(f".{directory.name}.*.new"):  # of a save that was killed
        shutil.rmtree(left, ignore_errors=True)
    fresh.mkdir()
    try:
        save_file(_portable(state), fresh / WEIGHTS)
        card = card.model_copy(update={"digest": _sha256(fresh / WEIGHTS)})
        _write_card(fresh / CARD, card)
        for name in (WEIGHTS, CARD):
            _flush(fresh / name)
        _replace(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return card


def keep_threshold(directory: str | Path, threshold: float) -> None:
    """Writes into a model's card from which probability on it answers with the positive class.

    Raises:
        UserError: as `read_card`, and for a disk that is full.
    """
    directory = Path(directory)
    card = read_card(directory).model_copy(update={"threshold": threshold})
    fresh = directory / f".{CARD}.new"
    with writing("a model's card", directory):
        _write_card(fresh, card)
        _flush(fresh)
        os.replace(fresh, directory / CARD)


def load_model(directory: str | Path) -> tuple[ContrastiveModel | Classifier, ModelCard]:
    """Returns the model of a directory, in evaluation mode on the CPU in fp32, and its card.

    Raises:
        UserError: for a missing or damaged file, another format version, or weights that do not fit the card.
    """
    directory = model_directory(directory)
    card = read_card(directory)
    state = _read_weights(directory, card)
    model = build_model(card)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"the weights do not fit the card ({_one_line(error)})",
            where=directory / WEIGHTS,
            cure="use the version of crossgate and timm that wrote it",
        ) from None
    return model.eval(), card


def build_model(card: ModelCard) -> ContrastiveModel | Classifier:
    """Returns the model that a card describes, with random weights (nothing is downloaded)."""
    config = card.model.from_scratch()
    if card.kind == "contrastive":
        return ContrastiveModel(MultimodalNetwork(config, card.clip))
    return Classifier(MultimodalNetwork(config, card.clip, classes=len(card.classes)), card.classes)


def load_encoders(network: MultimodalNetwork, directory: str | Path, *, raw_fusion: bool = True) -> WarmStart:
    """Takes encoders and fusion from a model directory, or a run directory that has one, into the network.

    An encoder is taken where modality and backbone agree, the features' standardisation where the modalities agree,
    the fusion where its name does too; within them, each tensor whose name and shape agree.

    Args:
        network: takes them.
        directory: gives them.
        raw_fusion: take the fusion although it was trained on features that were not standardised.

    Raises:
        UserError: as `load_model`, and if not one tensor fits.
    """
    directory = model_directory(directory)
    card = read_card(directory)
    prefix = "network."
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in _read_weights(directory, card).items()
        if name.startswith(prefix)
    }
    result = WarmStart()
    wanted = _wanted(network, card, result)
    if not raw_fusion and not _standardised(state) and "fusion." in wanted:
        wanted = tuple(prefix for prefix in wanted if prefix != "fusion.")
        result.skipped["fusion"] = "it knows features that are not standardised"
    own = network.state_dict()
    for name in own:
        if not name.startswith(wanted):
            continue
        if name not in state:
            result.skipped[name] = "not there"
        elif state[name].shape != own[name].shape:
            result.skipped[name] = f"its shape is {tuple(state[name].shape)}, here {tuple(own[name].shape)}"
        else:
            result.loaded.append(name)
    if not any(name.startswith(("encoders.", "fusion.")) for name in result.loaded):
        raise UserError(
            f"nothing in it fits this network ({result})",
            where=directory,
            cure="compare the two recipes' model and data.clip",
        )
    network.load_state_dict({name: state[name] for name in result.loaded}, strict=False)
    return result


def load_heads(model: Classifier, directory: str | Path) -> WarmStart:
    """Takes the heads of a classifier of the same classes; of anything else, nothing.

    Raises:
        UserError: as `load_model`.
    """
    directory = model_directory(directory)
    card, result = read_card(directory), WarmStart()
    if card.kind != "classifier" or card.classes != model.classes:
        return result
    state, own = _read_weights(directory, card), model.state_dict()
    for name in own:
        if not name.startswith("network.") and name in state and state[name].shape == own[name].shape:
            result.loaded.append(name)
    model.load_state_dict({name: state[name] for name in result.loaded}, strict=False)
    return result


def model_directory(directory: str | Path) -> Path:
    """Returns the model directory itself, given it or a run directory that holds it as ``model``.

    Raises:
        UserError: if there is neither.
    """
    directory = Path(directory)
    for place in (directory, directory / "model"):
        _recover(place)
        if (place / CARD).is_file():
            return place
    raise UserError(
        "no model here",
        where=directory,
        expected=f"a model directory with {CARD}, or a run directory with model/{CARD}",
        cure=one_inside(directory),
    )


def one_inside(directory: Path) -> str:
    """Returns the advice to take a run inside it, a search's trials for instance; nothing where there is none."""
    names = sorted(card.parents[1].name for card in directory.glob(f"*/model/{CARD}"))
    more = f" or another of {len(names)}" if len(names) > _NAMED else ""
    return f"give a run inside it: {', '.join(names[:_NAMED])}{more}" if names else ""


def read_card(directory: Path) -> ModelCard:
    """Returns the card of a model directory.

    Raises:
        UserError: for a card that is missing, damaged or of another format version.
    """
    path = directory / CARD
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"not readable ({_one_line(error)})", where=path) from None
    version = tree.get("format") if isinstance(tree, dict) else None
    if version != FORMAT:
        raise UserError(
            f"model format {version!r}",
            where=path,
            expected=str(FORMAT),
            cure="use the version of crossgate that wrote it",
        )
    try:
        return ModelCard.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"key '{key}': {first['msg']}", where=path) from None


def _standardised(state: Mapping[str, Tensor]) -> bool:
    mean, scale = state.get("feature_mean"), state.get("feature_scale")
    return mean is not None and scale is not None and bool((mean != 0).any() or (scale != 1).any())


def _wanted(network: MultimodalNetwork, card: ModelCard, result: WarmStart) -> tuple[str, ...]:
    """Returns the prefixes of what may be taken, and notes the rest as skipped."""
    prefixes = []
    for modality in network.modalities:
        here, there = network.config.encoder(modality).backbone, card.model.encoder(modality).backbone
        if modality not in card.clip.modalities:
            result.skipped[f"encoders.{modality}"] = "no such modality there"
        elif here != there:
            result.skipped[f"encoders.{modality}"] = f"its backbone is {there}, here {here}"
        else:
            prefixes.append(f"encoders.{modality}.")
    if network.modalities == card.clip.modalities:
        prefixes.append("feature_")
    if network.modalities == card.clip.modalities and network.config.exchange == card.model.exchange:
        prefixes.append("exchange.")
    elif card.model.exchange.name != "none":
        result.skipped["exchange"] = "it is another, or between other modalities"
    here, there = network.config.fusion.name, card.model.fusion.name
    if here != there:
        result.skipped["fusion"] = f"its fusion is {there}, here {here}"
    elif network.modalities != card.clip.modalities:
        result.skipped["fusion"] = f"it fuses {', '.join(card.clip.modalities)}"
    else:
        prefixes.append("fusion.")
    return tuple(prefixes)


def _portable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state as fp32 (floating tensors) on the CPU, without shared memory."""
    return {
        name: tensor.detach()
        .to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        .contiguous()
        for name, tensor in state.items()
    }


def _read_weights(directory: Path, card: ModelCard) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    if not path.is_file():
        raise UserError("the weights are missing", where=path, cure="copy the whole model directory")
    if _sha256(path) != card.digest:
        raise UserError(
            "the weights are not those that the card describes (digest mismatch)",
            where=path,
            cure="copy it again",
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"not readable as safetensors ({_one_line(error)})", where=path) from None


def _replace(fresh: Path, directory: Path) -> None:
    """Puts the fresh directory in the place of the old one; `_recover` mends a kill between the two renames."""
    if directory.exists():
        aside = _aside(directory)
        os.rename(directory, aside)
        os.rename(fresh, directory)
        shutil.rmtree(aside)
    else:
        os.rename(fresh, directory)


def _recover(directory: Path) -> None:
    aside = _aside(directory)
    if aside.is_dir():
        if directory.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, directory)


def _aside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.old")


def _write_card(path: Path, card: ModelCard) -> None:
    path.write_text(json.dumps(card.model_dump(mode="json"), indent=2) + "\n")


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _one_line(error: BaseException) -> str:
    """Returns all of a message on one line: torch names the tensors at fault below the first."""
    return " ".join(str(error).split())[:200]
