"""Features of frozen encoders: computed once, kept on disk, trained on from memory.

With frozen encoders only gate, fusion and heads learn, so every clip needs to be decoded and encoded once, not once an
epoch and a trial. A set of features is named by all that it depends on: the encoders' weights, the index and how it
numbers labels, the splits and the clip's shape. Runs that name the same folder share it; whoever comes first computes,
the others wait.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from crossgate.batch import ClipBatch
from crossgate.config import DataConfig
from crossgate.errors import UserError, writing
from crossgate.model.network import MultimodalNetwork
from crossgate.runs.context import Part, RunContext
from crossgate.stream.collate import BadClip
from crossgate.stream.loader import agreed_skips, sequential

BATCH = 64
STATE_VERSION = 3


def keep_features(network: MultimodalNetwork, run: RunContext, parts: tuple[Part, ...]) -> str:
    """Puts the features of these parts of the data into `run.kept`, from disk where they are known already.

    Returns a digest of what all of them depend on: encoders, index, its vocabularies and the clip's shape.

    Args:
        network: with frozen encoders, on the run's device.
        run: `finetune.features` names the folder.
        parts: not empty.

    Raises:
        UserError: for features on disk that cannot be read, or a disk that is full.
    """
    folder, identity = Path(run.recipe.finetune.features), run.world.from_leader(_identity(network, run))
    if run.world.leads:
        folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        splits = run.splits(part)
        name = hashlib.sha256(f"{identity} {','.join(splits)}".encode()).hexdigest()[:16]
        path = folder / f"{'-'.join(splits)}-{name}.safetensors"
        with FileLock(f"{path}.lock") if run.world.leads else nullcontext():
            kept = run.world.from_leader(_read(path) if run.world.leads and path.exists() else None)
            if kept is None:
                kept = _joined(run.world.gather(_encoded(network, run, splits)))
                if run.world.leads:
                    _write(path, kept)
        run.kept[part] = kept
    return identity


class FeatureLoader:
    """Endless batches of kept features; a global batch depends on seed, epoch and step alone, as `ClipLoader`'s.

    Args:
        table: N clips whose streams are features ``(N, D)``.
        identity: what the features depend on, as `keep_features` returns it.
        data: global batch and tail.
        seed: of the order.
        rank, ranks: who reads.
        micro_batch: clips in a batch handed over.

    Raises:
        UserError: when there are fewer clips than a global batch needs.
    """

    def __init__(
        self, table: ClipBatch, data: DataConfig, identity: str, *, seed: int, rank: int, ranks: int, micro_batch: int
    ) -> None:
        splits = ",".join(data.train)
        self._identity = {"features": identity, "splits": splits, "clips": len(table), "seed": seed}
        self._table, self._batch, self._seed = table, data.global_batch, seed
        self._rank, self._ranks, self._micro = rank, ranks, micro_batch
        self._parts = data.global_batch // (ranks * micro_batch)
        whole, rest = divmod(len(table), data.global_batch)
        self.steps_per_epoch = whole + (1 if rest and data.tail == "wrap" else 0)
        if not self.steps_per_epoch:
            raise UserError(
                f"{len(table)} clips make no global batch of {data.global_batch}",
                where="data.global_batch",
                cure="make it smaller, or set data.tail=wrap",
            )
        self._epoch = self._step = self._clips = 0

    def __iter__(self) -> Iterator[ClipBatch]:
        while True:
            order = np.random.default_rng([self._seed, self._epoch]).permutation(len(self._table))
            order = np.resize(order, self.steps_per_epoch * self._batch)
            epoch = self._epoch
            while self._epoch == epoch:
                position = divmod(epoch * self.steps_per_epoch + self._step + 1, self.steps_per_epoch)
                start = self._step * self._batch
                for part in range(self._parts):
                    # As `Schedule.slots`: what is accumulated together does not depend on the number of ranks.
                    first = start + (part * self._ranks + self._rank) * self._micro
                    if part + 1 == self._parts:
                        self._epoch, self._step = position
                    self._clips += self._micro
                    yield self._table.select(torch.from_numpy(order[first : first + self._micro]))

    def state_dict(self) -> dict[str, Any]:
        """Returns the next step that was not handed over."""
        return {"version": STATE_VERSION, "epoch": self._epoch, "step": self._step, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state_dict` was taken.

        Raises:
            UserError: when the state belongs to features of other encoders or clips, or to another seed.
        """
        wanted = {"version": STATE_VERSION, **self._identity}
        other = [name for name, value in wanted.items() if state.get(name) != value]
        if other:
            raise UserError(
                f"the checkpoint belongs to other features ({other[0]})",
                where="data",
                cure="resume with the encoders, settings, shards and classes of its beginning, or start a new run",
            )
        self._epoch, self._step = int(state["epoch"]), int(state["step"])

    def settle(self, gather: Callable[[Any], list[Any]]) -> None:
        """Agrees on nothing: no clip is decoded here."""

    def meters(self) -> dict[str, float]:
        """Returns running totals of this rank."""
        return {"data/clips": float(self._clips), "data/wait_s": 0.0}


# ---- making them -----------------------------------------------------------------------------------------------


def _identity(network: MultimodalNetwork, run: RunContext) -> str:
    digest = hashlib.sha256(run.index.digest.encode())
    digest.update(json.dumps(run.index.vocabularies, sort_keys=True).encode())  # the kept labels are numbers
    digest.update(run.recipe.data.clip.model_dump_json().encode())
    for name, tensor in sorted(network.encoders.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _encoded(network: MultimodalNetwork, run: RunContext, splits: tuple[str, ...]) -> list[ClipBatch]:
    """This rank's share of the splits, as features on the host."""
    skipped: list[BadClip] = []
    batches = sequential(
        run.index,
        splits,
        run.recipe.data,
        batch_size=BATCH,
        rank=run.world.rank,
        ranks=run.world.ranks,
        skipped=skipped,
    )
    found = []
    for batch in batches:
        moved = batch.to(run.world.device)
        with torch.no_grad():
            features = network.raw_features(moved.streams, moved.present).float().cpu()  # (B, M, D)
        streams = {name: features[:, m].contiguous() for m, name in enumerate(network.modalities)}
        found.append(replace(batch, streams=streams))
    agreed_skips(skipped, run.recipe.data, run.world.gather)
    return found


def _joined(shares: list[list[ClipBatch]]) -> ClipBatch:
    batches = [batch for share in shares for batch in share]
    if not batches:
        raise UserError("not one clip could be decoded", cure="run crossgate check on the index")
    return ClipBatch.concatenate(batches)


# ---- keeping them ----------------------------------------------------------------------------------------------


def _write(path: Path, table: ClipBatch) -> None:
    tensors = {f"streams/{name}": stream for name, stream in table.streams.items()}
    tensors |= {f"labels/{task}": labels for task, labels in table.labels.items()}
    tensors |= {name: getattr(table, name) for name in ("present", "group", "degraded", "clip")}
    about = {"modalities": json.dumps(table.modalities), "keys": json.dumps(table.keys)}
    partial = path.with_suffix(".partial")
    with writing("features", path):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, about)
        partial.replace(path)


def _read(path: Path) -> ClipBatch:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            about = file.metadata()
            parts: dict[str, dict[str, torch.Tensor]] = {"streams": {}, "labels": {}}
            for name in [name for name in tensors if "/" in name]:
                kind, _, key = name.partition("/")
                parts[kind][key] = tensors.pop(name)
            modalities = tuple(json.loads(about["modalities"]))
            return ClipBatch(
                modalities=modalities,
                keys=json.loads(about["keys"]),
                streams={name: parts["streams"][name] for name in modalities},  # the file sorts them
                labels=parts["labels"],
                **tensors,
            )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"kept features cannot be read ({error})", where=path, cure="delete the file: it is made anew"
        ) from None
