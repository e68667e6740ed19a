"""200 hostile inputs: each becomes its row's error in one line, the good one beside it is scored, memory is bounded."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import BOUNDS, COUNT, hostile, static, strips

from crossgate.registry.predictor import Predictor
from crossgate.registry.sources import Settings


def test_every_hostile_input_is_a_row_error(model_dir: Path, videos: Path, tmp_path: Path) -> None:
    good = (videos / "whole.mp4").read_bytes()
    predictor = Predictor(model_dir, Settings(**BOUNDS))
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


def test_wide_pictures_take_no_memory(tmp_path: Path) -> None:
    """A clip of them would be 590 MB in the height to which it is stored."""
    (tmp_path / "strips.avi").write_bytes(strips(65_000))
    script = (
        "import sys\n"
        "from crossgate.clips.extract import extract\n"
        "from crossgate.errors import UserError\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) >> 10\n"
        "before = peak()\n"
        "try: extract(sys.argv[1])\n"
        "except UserError as error: print(peak() - before, error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "strips.avi")]
    grown, _, error = subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition(" ")
    assert "pictures of 65000 x 128; expected sides of at most 8 to 1" in error
    assert int(grown) < 150, "MiB"


@pytest.mark.parametrize("hidden", [0, 270])
def test_what_is_decoded_of_a_video_is_bounded_shown_or_not(model_dir: Path, hidden: int) -> None:
    video = static(280, hidden)
    (error,) = Predictor(model_dir, Settings(gigapixels=1)).predict([video], aggregate=True)["error"]
    assert error.endswith("too many pictures; expected at most 1 gigapixels to decode; cut it into parts")
    assert Predictor(model_dir, Settings(gigapixels=2)).predict([video], aggregate=True)["error"][0] is None


def test_the_bound_of_what_is_decoded_goes_with_the_length() -> None:
    """Ten minutes of 1080p at 60 a second pass, and so does a day of it where a day may be scored."""
    for seconds in (600, 86_400):
        assert Settings(seconds=seconds).limits.decoded == seconds * 60 * 1920 * 1080
    assert Settings(gigapixels=3).limits.decoded == 3e9
