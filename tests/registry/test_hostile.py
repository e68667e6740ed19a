"""200 hostile inputs: each becomes its row's error in one line, the good one beside it is scored, memory is bounded."""

from __future__ import annotations

import re
import resource
from pathlib import Path

from hostile import COUNT, hostile

from crossgate.registry.predictor import Predictor
from crossgate.registry.sources import Settings


def test_every_hostile_input_is_a_row_error(model_dir: Path, videos: Path, tmp_path: Path) -> None:
    good = (videos / "whole.mp4").read_bytes()
    predictor = Predictor(model_dir, Settings(megabytes=8, seconds=60, megapixels=4))
    predictor.predict([good])
    named = list(hostile(good, tmp_path))
    assert len(named) == COUNT
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table = predictor.predict([*(item for _, item in named), good])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert len(table) == COUNT + 1, "one row an input"
    accepted = [name for (name, _), error in zip(named, table["error"], strict=False) if error is None]
    assert accepted == []
    assert all("\n" not in error and len(error) < 1000 for error in table["error"][:-1])
    unforeseen = [error for error in table["error"][:-1] if re.match(r"\w+(Error|Exception): ", error)]
    assert unforeseen == [], "a UserError says what was expected; anything else was caught by the last net"
    assert table["error"].iloc[-1] is None
    assert grown < 300, f"{grown:.0f} MB for inputs of a few kilobytes"
