"""Watching a long video: windows in order, scores of the very clips, an alarm that does not flutter, a timeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from tiny_road import tiny_classifier
from typer.testing import CliRunner

from crossgate.cli import app
from crossgate.clips.extract import RawClip
from crossgate.clips.media import SAMPLE_RATE
from crossgate.errors import UserError
from crossgate.model.store import keep_threshold
from crossgate.registry.predictor import Predictor
from crossgate.runs.watch import Alarm, Watch, join


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier(tmp_path_factory.mktemp("watch") / "model", seconds=2.0)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven seconds of drifting noise at 8 frames a second."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    texture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(56):
            picture = np.roll(texture, number * (number // 14), 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_windows_slide_and_score_as_the_predictor_does(model: Path, video: Path) -> None:
    whole = Watch(str(model), str(video), stride=1)
    moments = list(whole)
    table = Predictor(model).predict(str(video))
    assert [moment.start_s for moment in moments] == table["start_s"].tolist()
    for moment, scores in zip(moments, table["scores"], strict=True):
        assert moment.scores == pytest.approx(scores, abs=1e-5)
    sliding = list(Watch(str(model), str(video), stride=2))
    assert [moment.start_s for moment in sliding] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert all(moment.end_s - moment.start_s == pytest.approx(2) for moment in sliding)
    assert sliding[0].modalities == ["rgb", "flow"]
    assert whole.speed > 0


def test_a_video_shorter_than_a_window_is_one_moment(model: Path, video: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.mp4"
    with av.open(str(video)) as given, av.open(str(short), "w") as out:
        stream = out.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(given.demux(video=0)):
            if number < 6 and packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    assert len(list(Watch(str(model), str(short)))) == 1


def test_the_alarm_has_hysteresis() -> None:
    alarm = Alarm(on=0.7, off=0.5, after=2)
    scores = [0.8, 0.6, 0.8, 0.9, 0.6, 0.55, 0.69, 0.4, 0.8, 0.6]
    assert [alarm.hear(score) for score in scores] == [False] * 3 + [True] * 4 + [False] * 3
    with pytest.raises(UserError, match="off <= on"):
        Alarm(on=0.4, off=0.5)


def test_the_alarm_rings_by_default_where_the_model_answers_so(model: Path, video: Path, tmp_path: Path) -> None:
    own = tmp_path / "model"
    shutil.copytree(model, own)
    keep_threshold(own, 0.2)
    watch = Watch(str(own), str(video))
    assert (watch.alarm.on, watch.alarm.off) == (0.2, pytest.approx(0.14))
    other = Watch(str(own), str(video), label="nofight", off=0.1)
    assert (other.alarm.on, other.alarm.off) == (0.5, 0.1)


def test_pieces_join_into_a_window_with_sound_where_there_was_some() -> None:
    def piece(start: float, sound: bool) -> RawClip:
        clip = RawClip({"rgb": np.full((8, 4, 4, 3), start, np.uint8)}, fps=8.0, start=start)
        if sound:
            clip.streams["audio"] = np.ones(SAMPLE_RATE, np.float32)
        return clip

    joined = join([piece(3, False), piece(4, True)])
    assert (joined.start, joined.seconds) == (3, 2)
    assert joined.streams["audio"].sum() == SAMPLE_RATE
    assert not joined.streams["audio"][:SAMPLE_RATE].any()
    assert "audio" not in join([piece(0, False), piece(1, False)]).streams


def test_the_command_prints_json_lines_and_draws(model: Path, video: Path, tmp_path: Path) -> None:
    figure = tmp_path / "timeline.png"
    done = CliRunner().invoke(
        app, ["watch", str(model), str(video), "--figure", str(figure), "--on", "0", "--off", "0"]
    )
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["alarm"] for row in rows] == [False] + [True] * 5
    assert set(rows[0]) >= {"start_s", "end_s", "score", "scores", "weights", "modalities"}
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figure.stat().st_size > 10_000


def test_what_cannot_be_watched_says_why(model: Path, video: Path) -> None:
    with pytest.raises(UserError, match="no class 'dance'"):
        Watch(str(model), str(video), label="dance")
    with pytest.raises(UserError, match="no such file"):
        Watch(str(model), "nowhere.mp4")
