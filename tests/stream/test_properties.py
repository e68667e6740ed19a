"""Any corpus, ranks, workers, stops and restarts, through the real loader: every clip once, the same global batches."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from small_corpora import write_corpus
from stub_codec import LanesCodec

from crossgate.batch import ClipBatch
from crossgate.config import ClipConfig, CorpusConfig, DataConfig
from crossgate.stream import schedule
from crossgate.stream.loader import ClipLoader

CLIP = ClipConfig(modalities=("rgb", "audio"), frames=1, size=16, seconds=0.3, mels=8)
PROCESSES = 6  # of all ranks in a leg: they are real ones

shards = st.lists(st.one_of(st.just(0), st.integers(1, 3), st.integers(4, 40)), min_size=1, max_size=5)
corpora = shards.filter(lambda counts: sum(counts) > 1)  # one clip alone has no sound
fixed = partial(
    settings,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would start processes for minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, as wished

Told = tuple[int, int, int]


def told(batch: ClipBatch) -> list[Told]:
    """Returns of each clip its number, its augmented picture and its sound."""
    pictures, sounds = (batch.streams[name].flatten(1).sum(1).long().tolist() for name in ("rgb", "audio"))
    return list(zip(batch.clip.tolist(), pictures, sounds))


def draw_workers(data: st.DataObject, ranks: int) -> list[int]:
    """Returns the worker processes of each rank: 0 to 4, not alike, `PROCESSES` in all at most."""
    left, found = PROCESSES, []
    for _ in range(ranks):
        found.append(data.draw(st.integers(0, min(4, left)), label="workers"))
        left -= found[-1]
    return found


def through_legs(data: st.DataObject, mixed: int, processes: bool) -> None:
    """Draws a corpus and legs of a run over two epochs and more, and compares them with the undisturbed run."""
    counts = data.draw(corpora, label="clips of shards")
    further = data.draw(st.one_of(st.none(), corpora), label="clips of the second corpus's shards")
    batch = data.draw(st.sampled_from([12, 16, 48]), label="global batch")
    with TemporaryDirectory() as folder:
        index = write_corpus(f"{folder}/one", {"train": counts})
        mix: tuple[CorpusConfig, ...] = ()
        if further is not None:
            write_corpus(f"{folder}/two", {"train": further}, audio=False)
            mix = (CorpusConfig(index=f"{folder}/two", weight=data.draw(st.sampled_from([0.2, 1.0, 3.0]))),)
        drop = further is None and sum(counts) >= batch and data.draw(st.booleans(), label="drop")
        settings = {"clip": CLIP, "global_batch": batch, "mix": mix, "tail": "drop" if drop else "wrap"}

        def make(rank: int, ranks: int, workers: int) -> ClipLoader:
            config = DataConfig(**settings, loader_workers=workers, prefetch=2)
            return ClipLoader(
                index, ["train"], config, seed=len(counts), rank=rank, ranks=ranks, decode=LanesCodec(mixed)
            )

        undisturbed = make(0, 1, 0)
        steps = undisturbed.steps_per_epoch
        length = min(2 * steps + 1, 24)
        expected = [told(found) for _, found in zip(range(length), undisturbed)]
        check_once(expected, steps, sum(counts), drop)
        state, at = make(0, 1, 0).state_dict(), 0
        while at < length:
            ranks = data.draw(st.sampled_from([n for n in range(1, 17) if batch % n == 0]), label="ranks")
            taken = data.draw(st.integers(1, length - at), label="steps")
            workers = draw_workers(data, ranks) if processes else [0] * ranks
            state = leg(make, expected[at : at + taken], state, workers)
            at += taken


def leg(make, expected: list[list[Told]], state: dict, workers: list[int]) -> dict:
    """Resumes as so many ranks, takes steps, compares; returns the state that every rank ends with."""
    loaders = [make(rank, len(workers), count) for rank, count in enumerate(workers)]
    for loader in loaders:
        loader.load_state_dict(state)
    running = [iter(loader) for loader in loaders]
    for step, whole in enumerate(expected):
        assert [clip for rank in running for clip in told(next(rank))] == whole, f"step {step} of the leg"
    for rank in running:
        rank.close()  # type: ignore[attr-defined]
    states = [loader.state_dict() for loader in loaders]
    assert all(each == states[0] for each in states)
    return states[0]


def check_once(batches: list[list[Told]], steps: int, total: int, drop: bool) -> None:
    """Every clip of the first corpus is there once in its first epoch, and once in its second."""
    for epoch in range(2):
        if len(batches) < (epoch + 1) * steps:
            return
        one = [clip for part in batches[epoch * steps : (epoch + 1) * steps] for clip, _, _ in part if clip < total]
        assert len(one) == len(set(one)) if drop else set(one) == set(range(total)) == set(one[:total])
        assert not drop or total - len(one) < len(batches[0])


@fixed(max_examples=8)
@given(data=st.data())
@pytest.mark.parametrize("mixed", [8, schedule.MIXED])
def test_any_ranks_stops_and_restarts(mixed: int, data: st.DataObject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "MIXED", mixed)
    through_legs(data, mixed, processes=False)


@fixed(max_examples=2)
@given(data=st.data())
def test_any_workers_too(data: st.DataObject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "MIXED", 8)
    through_legs(data, 8, processes=True)


@pytest.mark.slow
@fixed(max_examples=5)
@given(data=st.data())
@pytest.mark.parametrize("mixed", [8, schedule.MIXED])
def test_any_workers_many_times(mixed: int, data: st.DataObject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "MIXED", mixed)
    through_legs(data, mixed, processes=True)


def test_the_codec_carries_its_setting_into_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would compare two regimes, or try one only."""
    monkeypatch.setattr(schedule, "MIXED", 8)
    index = write_corpus(str(tmp_path / "corpus"), {"train": [40]})
    config = DataConfig(clip=CLIP, global_batch=4, loader_workers=1)
    found = {}
    for mixed in (8, schedule.MIXED + 1000):
        loader = ClipLoader(index, ["train"], config, seed=0, decode=LanesCodec(mixed))
        found[mixed] = [told(batch) for _, batch in zip(range(12), loader)][10:]  # of the second epoch: made there
    assert found[8] != found[schedule.MIXED + 1000]
