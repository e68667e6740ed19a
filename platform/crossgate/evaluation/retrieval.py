"""Cross-modal instance retrieval: does a clip's embedding in one modality find the same clip in another?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossgate.evaluation.intervals import Bootstrap, Interval, Statistic, mean, median

Array = NDArray[Any]

RECALLS = (1, 5, 10)
_TIE = 1e-9  # scores closer than this are equal: matrix products round differently from tile to tile
_TILE = 1024


@dataclass(frozen=True)
class Retrieval:
    """Ranks of one ordered pair of modalities.

    Attributes:
        query, target: modalities.
        rows: ``(Q,)`` clips of the split that take part: those that have both, at most the gallery's limit.
        ranks: ``(Q,)`` rank of the right clip, see `ranks`.
        gallery: ``(Q,)`` size of each query's gallery, the right clip included, its siblings not.
    """

    query: str
    target: str
    rows: Array
    ranks: Array
    gallery: Array

    @property
    def name(self) -> str:
        return f"{self.query}_to_{self.target}"

    def chance_recall(self, k: int) -> float:
        """R@k of a random order."""
        return float(np.minimum(k / self.gallery, 1.0).mean()) if len(self.gallery) else math.nan

    @property
    def chance_median(self) -> float:
        """Median rank of a random order."""
        return float(np.median((self.gallery + 1) / 2)) if len(self.gallery) else math.nan


def ranks(query: Array, target: Array, group: Array, tile: int = _TILE) -> tuple[Array, Array]:
    """Ranks the right target of each query by cosine similarity, in float64 and in tiles of rows.

    rank = 1 + targets strictly more similar + half of the others equally similar, so that a collapsed embedding
    scores as chance does. Other clips of the query's group are left out of its gallery: they are near duplicates,
    neither right nor wrong.

    Args:
        query, target: ``(Q, E)``, row i of both is the same clip.
        group: ``(Q,)``.
        tile: rows compared at once; memory is tile x Q.

    Returns:
        Ranks ``(Q,)`` and gallery sizes ``(Q,)``.
    """
    a, b = _unit(query), _unit(target)
    rank, gallery = np.empty(len(a)), np.empty(len(a))
    for start in range(0, len(a), tile):
        rows = np.arange(start, min(start + tile, len(a)))
        similarity = a[rows] @ b.T  # (tile, Q)
        own = similarity[np.arange(len(rows)), rows][:, None]
        other = group[rows][:, None] != group[None, :]
        above = (similarity > own + _TIE) & other
        equal = (np.abs(similarity - own) <= _TIE) & other
        rank[rows] = 1 + above.sum(axis=1) + equal.sum(axis=1) / 2
        gallery[rows] = 1 + other.sum(axis=1)
    return rank, gallery


def retrieve(
    embeddings: Array, present: Array, group: Array, modalities: tuple[str, ...], limit: int, seed: int = 0
) -> list[Retrieval]:
    """Retrieval for every ordered pair of modalities that at least two clips have.

    Args:
        embeddings: ``(N, M, E)``.
        present: ``(N, M)`` bool.
        group: ``(N,)``.
        modalities: names, length M.
        limit: largest gallery; above it a seeded draw, the same for both directions.
        seed: of the draw.
    """
    found = []
    for i, j in permutations(range(len(modalities)), 2):
        rows = np.flatnonzero(present[:, i] & present[:, j])
        if len(rows) > limit:
            rows = np.sort(np.random.default_rng(seed).choice(rows, size=limit, replace=False))
        if len(rows) < 2:
            continue
        rank, gallery = ranks(embeddings[rows, i], embeddings[rows, j], group[rows])
        found.append(Retrieval(modalities[i], modalities[j], rows, rank, gallery))
    return found


def intervals(found: list[Retrieval], bootstrap: Bootstrap) -> dict[str, dict[str, Interval]]:
    """R@1/5/10 and median rank with intervals, by pair, and their averages over pairs under ``mean``.

    Queries are resampled by group; the gallery stays as it is.

    Args:
        found: from `retrieve`.
        bootstrap: made from the groups of the whole split.
    """
    if not found:
        return {}
    table: dict[str, dict[str, Interval]] = {}
    names = [f"r_at_{k}" for k in RECALLS] + ["median_rank"]
    statistics = [_statistics(one) for one in found]
    for one, own in zip(found, statistics):
        table[one.name] = {name: bootstrap.interval(own[name]) for name in names}
    table["mean"] = {name: bootstrap.interval(_average([own[name] for own in statistics])) for name in names}
    return table


def _statistics(one: Retrieval) -> dict[str, Statistic]:
    scores: dict[str, Statistic] = {
        f"r_at_{k}": _on(one.rows, mean((one.ranks <= k).astype(np.float64))) for k in RECALLS
    }
    scores["median_rank"] = _on(one.rows, median(one.ranks))
    return scores


def _on(rows: Array, statistic: Statistic) -> Statistic:
    return lambda weights: statistic(weights[:, rows])


def _average(statistics: list[Statistic]) -> Statistic:
    return lambda weights: np.mean([one(weights) for one in statistics], axis=0)


def _unit(x: Array) -> Array:
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
