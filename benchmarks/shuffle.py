"""How well clips are mixed: the schedule against webdataset's shuffle buffers, and against a perfect shuffle.

    python benchmarks/shuffle.py [--shards 250] [--clips 1000] [--global-batch 256] [--ranks 8]

No clip is read: an epoch is the order of their numbers. crossgate's order is its schedule's. webdataset's is that of
its own code: shards are shuffled, dealt out to ranks with one worker each, and go through a buffer of 1,000 or 10,000
clips; a global batch takes as many clips of every rank. Measured over two epochs:

- shards per global batch: how many different shards a batch has clips of;
- distance: by what share of an epoch two clips that are neighbours in a shard are apart (perfect: 0.29 in the median);
- met again: of the pairs of clips in one batch of the first epoch, those that share a batch in the second one too.

Leaves the figure in docs/images/shuffle.png; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import webdataset as wds
from matplotlib.figure import Figure
from webdataset.filters import shuffle

from crossgate.evaluation import style
from crossgate.stream.schedule import Schedule

HERE = Path(__file__).parent
Order = Callable[[int], np.ndarray]
"""Epoch -> ``(steps, global batch)`` numbers of clips."""


class Corpus:
    """So many shards of as many clips each, read in global batches by ranks."""

    def __init__(self, shards: int, clips: int, batch: int, ranks: int) -> None:
        self.shards, self.clips, self.batch, self.ranks = shards, clips, batch, ranks
        self.total = shards * clips

    def scheduled(self, epoch: int) -> np.ndarray:
        plan = Schedule(np.full(self.shards, self.clips), digest="", seed=1, epoch=epoch, global_batch=self.batch)
        found = [shards * self.clips + rows for shards, rows in map(plan.batch, range(plan.steps))]
        return np.stack(found)

    def perfect(self, epoch: int) -> np.ndarray:
        order = np.random.default_rng([2, epoch]).permutation(self.total)
        return order[: self.total // self.batch * self.batch].reshape(-1, self.batch)

    def buffered(self, size: int) -> Order:
        def order(epoch: int) -> np.ndarray:
            rng = random.Random(epoch)
            shards = list(range(self.shards))
            rng.shuffle(shards)
            share, ranks = self.batch // self.ranks, []
            for rank in range(self.ranks):
                stored = (s * self.clips + row for s in shards[rank :: self.ranks] for row in range(self.clips))
                ranks.append(np.fromiter(shuffle(size, rng=random.Random(epoch * 1000 + rank))(stored), np.int64))
            steps = min(map(len, ranks)) // share
            return np.concatenate([found[: steps * share].reshape(steps, share) for found in ranks], axis=1)

        return order


def shards_per_batch(batches: np.ndarray, clips: int) -> float:
    return float(np.mean([len(np.unique(batch // clips)) for batch in islice(batches, 0, None, 5)]))


def distances(batches: np.ndarray, corpus: Corpus) -> np.ndarray:
    """Returns by what share of the epoch neighbours in a shard are apart, ascending."""
    step = np.full(corpus.total, -1)
    step[batches.ravel()] = np.repeat(np.arange(len(batches)), corpus.batch)
    by_shard = step.reshape(corpus.shards, corpus.clips)
    there = (by_shard[:, 1:] >= 0) & (by_shard[:, :-1] >= 0)
    return np.sort(np.abs(np.diff(by_shard, axis=1))[there]) / len(batches)


def met_again(first: np.ndarray, second: np.ndarray, corpus: Corpus) -> float:
    """Returns the share of the pairs of one batch that are in one batch of the next epoch again."""
    step = np.full(corpus.total, -1, np.int64)
    step[second.ravel()] = np.repeat(np.arange(len(second)), corpus.batch)
    pairs = again = 0
    for batch in first:
        _, counts = np.unique(step[batch][step[batch] >= 0], return_counts=True)
        again += int((counts * (counts - 1) // 2).sum())
        pairs += corpus.batch * (corpus.batch - 1) // 2
    return again / pairs


def draw(found: dict[str, dict], corpus: Corpus) -> Figure:
    """Three panels: shards per batch, distance, pairs that meet again."""
    figure = Figure(figsize=(11, 3.4), facecolor="white", layout="constrained")
    shards, distance, meeting = figure.subplots(1, 3)
    names, colours = list(found), [style.ACCENT, *style.SEQUENCE[0:1], style.SEQUENCE[4], style.REFERENCE]
    rows = range(len(names))
    shards.barh(rows, [found[name]["shards"] for name in names], color=colours)
    shards.set(title="shards per global batch", yticks=rows, yticklabels=names, xlabel=f"of {corpus.shards}")
    shards.invert_yaxis()
    for name, colour in zip(names, colours):
        apart = found[name]["distances"]
        distance.plot(apart, np.linspace(0, 1, len(apart)), color=colour, label=name)
    distance.set(title="neighbours in a shard: how far apart", xlabel="share of an epoch", ylabel="share of neighbours")
    distance.set(xscale="log", xlim=(2 / (corpus.total // corpus.batch), 1))
    meeting.barh(rows, [found[name]["again"] * 100 for name in names], color=colours)
    meeting.set(title="pairs of a batch that meet again", yticks=rows, yticklabels=[], xlabel="% in the next epoch")
    meeting.invert_yaxis()
    for axes in (shards, meeting):
        for row, bar in zip(rows, axes.patches):
            axes.annotate(
                f"{bar.get_width():.3g}", (bar.get_width(), row), (3, 0), textcoords="offset points", va="center"
            )
        axes.margins(x=0.18)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=250)
    parser.add_argument("--clips", type=int, default=1000, help="of a shard")
    parser.add_argument("--global-batch", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "shuffle.md")
    parser.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "images" / "shuffle.png")
    arguments = parser.parse_args()
    corpus = Corpus(arguments.shards, arguments.clips, arguments.global_batch, arguments.ranks)
    orders: dict[str, Order] = {
        "crossgate": corpus.scheduled,
        "webdataset, buffer 1,000": corpus.buffered(1000),
        "webdataset, buffer 10,000": corpus.buffered(10_000),
        "perfect shuffle": corpus.perfect,
    }
    found: dict[str, dict] = {}
    for name, order in orders.items():
        first, second = order(0), order(1)
        found[name] = {
            "shards": shards_per_batch(first, corpus.clips),
            "distances": distances(first, corpus),
            "again": met_again(first, second, corpus),
        }
    figure = draw(found, corpus)
    figure.savefig(arguments.figure, dpi=110)
    lines = [
        f"{datetime.date.today()}, webdataset {wds.__version__}: {corpus.total:,} clips in {corpus.shards} shards,",
        f"global batch {corpus.batch}, {corpus.ranks} ranks with a worker and a buffer each.",
        "",
        "| order | shards per global batch | neighbours apart, median | 5 % are nearer than | pairs that meet again |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in found.items():
        median, near = (float(np.quantile(row["distances"], q)) for q in (0.5, 0.05))
        lines.append(f"| {name} | {row['shards']:.1f} | {median:.4f} | {near:.5f} | {row['again'] * 100:.3f} % |")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    summary = {
        name: {
            "shards_per_batch": round(row["shards"], 1),
            "distance": round(float(np.median(row["distances"])), 5),
            "met_again_pct": round(row["again"] * 100, 4),
        }
        for name, row in found.items()
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
