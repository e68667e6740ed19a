"""Ranks as real processes: killed and resumed as others, and of one mind about what was skipped."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loader_process import digests, make
from small_corpora import add_clip, write_corpus

from crossgate.stream.index import Index, write_index
from crossgate.stream.shards import ShardWriter
from crossgate.stream.storage import open_store

HERE = Path(__file__).parent
COUNTS = {"train": [17, 0, 23, 31, 1, 20]}
STEPS = 12  # 92 clips in batches of 12 are 8 steps: an epoch and a half


def start(url: str, rank: int, ranks: int, state: Path, last: int, pause: float) -> subprocess.Popen[str]:
    arguments = [url, rank, ranks, state, last, pause]
    command = [sys.executable, str(HERE / "loader_process.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def read(process: subprocess.Popen[str]) -> Iterator[tuple[int, list[str]]]:
    assert process.stdout is not None
    for line in process.stdout:
        step, *clips = line.split()
        yield int(step), clips


def run(url: str, ranks: int, state: Path, last: int) -> dict[int, list[str]]:
    """Runs ranks to their end; returns the global batches: their clips' digests in the order of ranks."""
    processes = [start(url, rank, ranks, state, last, 0.0) for rank in range(ranks)]
    found: dict[int, list[str]] = {}
    for process in processes:
        for step, clips in read(process):
            found.setdefault(step, []).extend(clips)
        assert process.wait(timeout=200) == 0
    return found


@pytest.mark.slow
def test_two_ranks_killed_go_on_as_one_then_as_four(tmp_path: Path) -> None:
    url, state = str(tmp_path / "corpus"), tmp_path / "state.json"
    write_corpus(url, COUNTS)
    whole = zip(range(1, STEPS + 1), make(url, 0, 1))
    undisturbed = {step: digests(batch) for step, batch in whole}

    doomed = [start(url, rank, 2, state, STEPS, 0.5) for rank in range(2)]
    seen: dict[int, list[str]] = {}
    for process in doomed:
        for step, clips in read(process):
            seen.setdefault(step, []).extend(clips)
            if step >= 3:
                process.send_signal(signal.SIGKILL)
                process.wait()
                break
    assert {step: seen[step] for step in (1, 2, 3)} == {step: undisturbed[step] for step in (1, 2, 3)}

    alone = run(url, 1, state, 7)
    assert 3 <= min(alone) <= 7, "in the middle of the epoch, at the last step that was saved"
    four = run(url, 4, state, STEPS)
    assert min(four) == 8, "where the one stopped"
    for leg in (alone, four):
        assert leg == {step: undisturbed[step] for step in leg}
    assert sorted(four)[-1] == STEPS


@pytest.fixture
def spoilt(tmp_path: Path) -> Index:
    """Twelve clips, of which 3, 7 and 10 cannot be decoded."""
    store = open_store(str(tmp_path / "spoilt"))
    with ShardWriter(store, "train-000000.tar", split="train") as writer:
        for number in range(12):
            add_clip(writer, number, "train", audio=True, rgb=b"noise" if number in (3, 7, 10) else None)
    return write_index(store, [writer.entry])


def test_ranks_agree_on_what_was_skipped_and_on_stopping(spoilt: Index, tmp_path: Path) -> None:
    command = [sys.executable, HERE / "agree_process.py", spoilt.store.url, tmp_path, "3", "2"]
    subprocess.run(command, check=True, timeout=250)
    too_many = "data.max_bad_clips: more than 2 clips cannot be used, clip 'clip_00010' of train-000000.tar"
    for limit, steps, end in ((3, 6, "end"), (2, 3, too_many)):
        told = [(tmp_path / f"{rank}-{limit}").read_text() for rank in range(2)]
        assert told[0] == told[1], "one rank knows more, or took more steps, than the other"
        measured = [(tmp_path / f"{rank}-{limit}-measured").read_text() for rank in range(2)]
        if limit == 3:
            assert measured == ["1 of 3", "2 of 3"]
        else:
            assert measured[0] == measured[1] and measured[0].startswith(too_many), "the limit is for all ranks"
        assert told[0].startswith(f"{steps}|['clip_00003', 'clip_00007', 'clip_00010']|[3, 7, 10]|{end}")
