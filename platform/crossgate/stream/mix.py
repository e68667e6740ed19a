"""Several corpora as one: which there are, and how many clips of a global batch each gives."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from crossgate.config import CorpusConfig, DataConfig
from crossgate.errors import UserError
from crossgate.stream.index import Index, Selection


@dataclass(frozen=True)
class Corpus:
    """One folder of shards in a mixture.

    Attributes:
        index: of the folder.
        selection: its shards to train on.
        share: clips of every global batch.
    """

    index: Index
    selection: Selection
    share: int


def open_corpora(index: Index, splits: Iterable[str], data: DataConfig) -> list[Corpus]:
    """Opens what a run trains on: the corpus of `data.index`, then those of `data.mix`.

    Args:
        index: of `data.index`, opened already.
        splits: of it, to train on.
        data: mixture, modalities, global batch.

    Raises:
        UserError: for a split that does not exist or is used twice, a modality that no clip has, or a global batch
            with too few clips for so many corpora.
    """
    if not data.mix:
        return [Corpus(index, index.select(splits, data.clip.modalities), data.global_batch)]
    splits = tuple(splits)
    indices = [index, *(Index.load(corpus.index) for corpus in data.mix)]
    _check_apart(indices, [(*splits, *data.val, *data.test), *(corpus.train or splits for corpus in data.mix)])
    selections = [index.select(splits), *(i.select(c.train or splits) for i, c in zip(indices[1:], data.mix))]
    _check_modalities(selections, data.clip.modalities)
    shares = shares_of(data.global_batch, [1.0, *(corpus.weight for corpus in data.mix)])
    corpora = [Corpus(*parts) for parts in zip(indices, selections, shares)]
    for corpus, settings in zip(corpora[1:], data.mix):
        _check_size(corpus, settings, data)
    return corpora


def mix_digest(corpora: Sequence[Corpus]) -> str:
    """Returns what the schedule depends on, besides seed and global batch: selections and their shares."""
    first = corpora[0].selection.digest
    if len(corpora) == 1:
        return first
    text = "\0".join(f"{corpus.selection.digest} {corpus.share}" for corpus in corpora)
    return hashlib.sha256(text.encode()).hexdigest()


def shares_of(global_batch: int, weights: Sequence[float]) -> list[int]:
    """Returns how many clips of a global batch each corpus gives: by weight, rounded, at least one.

    Every corpus gets a clip; the others go by largest remainder, ties to the earlier corpus.

    Raises:
        UserError: when there are more corpora than clips.
    """
    if global_batch < len(weights):
        raise UserError(
            f"a global batch of {global_batch} has no clip for each of {len(weights)} corpora",
            where="data.mix",
            cure="make data.global_batch larger or name fewer corpora",
        )
    exact = np.asarray(weights) / np.sum(weights) * global_batch
    shares = np.maximum(1, np.floor(exact).astype(np.int64))
    while shares.sum() > global_batch:  # clips that went to the smallest corpora come from where most is left over
        shares[np.argmax(np.where(shares > 1, shares - exact, -np.inf))] -= 1
    while shares.sum() < global_batch:
        shares[np.argmax(exact - shares)] += 1
    return shares.tolist()


def _check_apart(indices: Sequence[Index], used: Sequence[tuple[str, ...]]) -> None:
    """A clip in two corpora would come twice; one of validation would be no measure any more."""
    seen: set[tuple[str, str]] = set()
    for number, (index, splits) in enumerate(zip(indices, used)):
        for split in dict.fromkeys(splits):
            if (index.digest, split) in seen:
                raise UserError(
                    f"split {split!r} of {index.store.url} is used already",
                    where=f"data.mix[{number - 1}]",
                    expected="corpora that have no clip in common, nor with data.val and data.test",
                )
            seen.add((index.digest, split))


def _check_modalities(selections: Sequence[Selection], modalities: Iterable[str]) -> None:
    for name in modalities:
        if not any(selection.modalities[name] for selection in selections):
            urls = ", ".join(selection.index.store.url for selection in selections)
            raise UserError(f"no clip of {urls} has modality {name!r}", where="data.clip.modalities")


def _check_size(corpus: Corpus, settings: CorpusConfig, data: DataConfig) -> None:
    if data.tail == "drop" and corpus.selection.total < corpus.share:
        raise UserError(
            f"{settings.index} has {corpus.selection.total} clips and would give {corpus.share} to every global batch",
            where="data.mix",
            cure="lower its weight, or set data.tail to wrap",
        )
