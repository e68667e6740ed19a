"""Several corpora in one run: shares of every batch, each corpus exactly once a pass, resumable, told apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpora import write_corpus
from stub_codec import number_tensors

from crossgate.batch import ClipBatch
from crossgate.config import ClipConfig, CorpusConfig, DataConfig
from crossgate.errors import UserError
from crossgate.stream.index import Index, write_index
from crossgate.stream.loader import ClipLoader
from crossgate.stream.mix import shares_of
from crossgate.stream.plan import spread

CLIP = ClipConfig(modalities=("rgb", "audio"), frames=1, size=16, seconds=0.3, mels=8)
BATCH = 12
TOTALS = (36, 21, 5)  # clips to train on of the three corpora


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The second corpus has no sound; the third calls its classes otherwise and its split too."""
    folders = [str(tmp_path_factory.mktemp(name)) for name in ("main", "silent", "small")]
    write_corpus(folders[0], {"train": [20, 0, 16], "val": [4]})
    write_corpus(folders[1], {"train": [10, 11]}, audio=False)
    index = write_corpus(folders[2], {"extra": [5]})
    write_index(index.store, index.names, vocabularies={"action": ["wave", "sit", "run", "walk"]})
    return folders


def mixture(urls: Sequence[str], **changes) -> DataConfig:
    further = (CorpusConfig(index=urls[1], weight=0.5), CorpusConfig(index=urls[2], weight=0.1, train=("extra",)))
    return DataConfig(**({"clip": CLIP, "global_batch": BATCH, "mix": further, "tail": "wrap"} | changes))


def make(urls: Sequence[str], *, rank=0, ranks=1, micro_batch=None, **changes) -> ClipLoader:
    data = mixture(urls, **changes)
    how = {"seed": 3, "rank": rank, "ranks": ranks, "micro_batch": micro_batch, "decode": number_tensors}
    return ClipLoader(Index.load(urls[0]), ["train"], data, **how)


def take(loader: ClipLoader, batches: int) -> list[ClipBatch]:
    found = iter(loader)
    taken = [next(found) for _ in range(batches)]
    found.close()  # type: ignore[attr-defined]
    return taken


def told(batch: ClipBatch) -> list[tuple]:
    """What can be told of each clip, its augmented picture included."""
    pictures = batch.streams["rgb"].flatten(1).sum(1).tolist()
    return list(zip(batch.clip.tolist(), batch.keys, pictures, batch.labels["action"].tolist()))


def corpus_of(clip: int) -> int:
    return int(np.searchsorted([40, 61], clip, side="right"))  # the main corpus has 4 clips of validation too


def test_every_batch_has_its_shares_and_every_pass_each_clip_once(urls: list[str]) -> None:
    loader = make(urls)
    assert loader.steps_per_epoch == -(-36 // 7), "an epoch is a pass of the first corpus"
    seen: list[list[int]] = [[], [], []]
    for batch in take(loader, 21):
        clips = batch.clip.tolist()
        assert Counter(map(corpus_of, clips)) == {0: 7, 1: 4, 2: 1}
        for clip in clips:
            seen[corpus_of(clip)].append(clip)
    for corpus, (share, total) in enumerate(zip((7, 4, 1), TOTALS)):
        length = -(-total // share) * share  # a pass under `wrap`
        passes = [seen[corpus][at : at + length] for at in range(0, len(seen[corpus]), length)]
        assert len(passes) >= 3
        for one in passes[:-1]:
            assert len(set(one)) == total and len(set(one[:total])) == total
        assert passes[0] != passes[1]


def test_ranks_workers_and_restarts_change_nothing(urls: list[str]) -> None:
    undisturbed = [told(batch) for batch in take(make(urls), 12)]
    assert [told(batch) for batch in take(make(urls, loader_workers=2), 6)] == undisturbed[:6]
    state, at = make(urls).state_dict(), 0
    for ranks, steps in ((3, 2), (1, 3), (12, 4), (2, 3)):  # of 12 ranks each has clips of one corpus only
        loaders = [make(urls, rank=rank, ranks=ranks) for rank in range(ranks)]
        for loader in loaders:
            loader.load_state_dict(state)
        shares = [take(loader, steps) for loader in loaders]
        for step in range(steps):
            assert [clip for share in shares for clip in told(share[step])] == undisturbed[at + step]
        state, at = loaders[-1].state_dict(), at + steps
    assert at == 12


def test_micro_batches_are_mixed_alike(urls: list[str]) -> None:
    for batch in take(make(urls, micro_batch=4), 9):
        assert abs(Counter(map(corpus_of, batch.clip.tolist()))[0] - 4 * 7 / 12) < 1.5


def test_labels_are_numbered_by_the_first_corpus_and_absent_is_absent(urls: list[str]) -> None:
    classes = Index.load(urls[0]).vocabularies["action"]
    for batch in take(make(urls), 7):
        for clip, key, present, label in zip(
            batch.clip.tolist(), batch.keys, batch.present.tolist(), batch.labels["action"].tolist()
        ):
            number = int(key.removeprefix("clip_"))
            assert clip == number + (0, 40, 61)[corpus_of(clip)]
            assert classes[label] == ("run", "sit", "wave")[number % 3]
            assert present == [True, corpus_of(clip) != 1 and number % 3 != 0]


def test_another_mixture_cannot_be_resumed(urls: list[str]) -> None:
    state = make(urls).state_dict()
    assert len(repr(state)) < 400
    heavier = (CorpusConfig(index=urls[1], weight=2.0), CorpusConfig(index=urls[2], weight=0.1, train=("extra",)))
    for other in ((), heavier):
        with pytest.raises(UserError, match="cannot resume: digest"):
            make(urls, mix=other).load_state_dict(state)


def test_mixtures_that_make_no_sense(urls: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.mix\[0\]: split 'val' of .* is used already"):
        make(urls, mix=(CorpusConfig(index=urls[0], train=("val",)),))
    with pytest.raises(UserError, match=r"data.mix\[1\]: split 'train' of .* is used already"):
        make(urls, mix=(CorpusConfig(index=urls[1]), CorpusConfig(index=urls[1])))
    with pytest.raises(UserError, match="5 clips and would give 10 to every global batch"):
        make(urls, mix=(CorpusConfig(index=urls[2], train=("extra",), weight=5.0),), tail="drop")
    with pytest.raises(UserError, match="no clip of .*modality 'depth'"):
        make(urls, clip=CLIP.model_copy(update={"modalities": ("rgb", "depth")}))
    with pytest.raises(UserError, match="split 'extra' does not exist"):
        make(urls, mix=(CorpusConfig(index=urls[1], train=("extra",)),))
    with pytest.raises(UserError, match="nothing: no such file"):
        make(urls, mix=(CorpusConfig(index=str(tmp_path / "nothing")),))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=6), st.integers(6, 300))
def test_shares_are_by_weight(weights: list[float], batch: int) -> None:
    shares = shares_of(batch, weights)
    exact = [weight / sum(weights) * batch for weight in weights]
    assert sum(shares) == batch and min(shares) >= 1
    assert all(share > want - len(weights) and share < max(want, 1) + 1 for share, want in zip(shares, exact))
    pattern = spread(shares)
    assert np.bincount(pattern).tolist() == shares
    for corpus, share in enumerate(shares):  # in any stretch of the batch there is its part of each corpus
        there = np.cumsum(pattern == corpus)
        wanted = np.arange(1, batch + 1) * share / batch
        assert np.abs(there - wanted).max() <= len(weights)


def test_too_many_corpora_for_a_batch() -> None:
    with pytest.raises(UserError, match="global batch of 2 has no clip for each of 3 corpora"):
        shares_of(2, [1, 1, 1])
