"""Watching a long video: windows in order, scores of the very clips, an alarm that does not flutter, a timeline."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from tiny_road import tiny_classifier
from typer.testing import CliRunner

from crossgate.cli import app
from crossgate.clips.extract import RawClip
from crossgate.clips.media import SAMPLE_RATE, Frames
from crossgate.errors import UserError
from crossgate.model.store import keep_threshold
from crossgate.registry.predictor import Predictor
from crossgate.runs import watch
from crossgate.runs.watch import Alarm, Course, Moment, Watch, join, watched


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
    watching = Watch(str(own), str(video))
    assert (watching.alarm.on, watching.alarm.off) == (0.2, pytest.approx(0.14))
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


@pytest.mark.parametrize("pieces", [6, 1])
def test_what_breaks_off_leaves_the_timeline_of_what_was_scored(
    model: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    whole = Frames.runs

    def torn(frames: Frames, length: int) -> Iterator[tuple[int, np.ndarray]]:
        yield from islice(whole(frames, length), pieces)
        raise UserError("not readable (no data for 30 s)", where="rtsp://door")

    monkeypatch.setattr(Frames, "runs", torn)
    figure = tmp_path / "timeline.png"
    done = CliRunner().invoke(app, ["watch", str(model), str(video), "--figure", str(figure)])
    assert isinstance(done.exception, UserError) and "no data for 30 s" in str(done.exception)
    assert len(done.stdout.splitlines()) == pieces - 1
    assert figure.is_file() == (pieces > 1)
    assert f"{pieces} s of video at" in done.stderr
    (tmp_path / "taken.png").mkdir()
    done = CliRunner().invoke(app, ["watch", str(model), str(video), "--figure", str(tmp_path / "taken.png")])
    assert isinstance(done.exception, UserError) and "no data for 30 s" in str(done.exception)
    assert ("no timeline: " in done.stderr and "cannot write the picture" in done.stderr) == (pieces > 1)


@pytest.mark.parametrize("name", ["no/timeline.png", "timeline.txt"])
def test_where_no_timeline_can_be_is_said_before_anything_is_scored(model: Path, video: Path, tmp_path, name) -> None:
    done = CliRunner().invoke(app, ["watch", str(model), str(video), "--figure", str(tmp_path / name)])
    assert isinstance(done.exception, UserError) and "expected a .png in a folder that is there" in str(done.exception)
    assert not done.stdout


class Camera:
    """Sends a video as MPEG-TS, by HTTP in chunks or bare, and the end of it only when it is told to."""

    def __init__(self, content: bytes, http: bool) -> None:
        self._content, self._http, self.go_on = content, http, threading.Event()
        self.ending = False
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._server.accept()
        with connection, contextlib.suppress(OSError):
            if self._http:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            middle = len(self._content) * 3 // 4
            connection.sendall(self._part(self._content[:middle]))
            self.go_on.wait(120)
            self.ending = True
            connection.sendall(self._part(self._content[middle:]) + self._part(b""))

    def _part(self, data: bytes) -> bytes:
        return b"%x\r\n%s\r\n" % (len(data), data) if self._http else data

    def close(self) -> None:
        self.go_on.set()
        self._thread.join(10)
        self._server.close()


def broadcast(video: Path, tone: int, clock: int = 0, *, step: int = 1, rate: Fraction | int = 8) -> bytes:
    """The long video as a camera would send it, a key frame every eight, with a tone for so many frames.

    Its clock shows so many seconds at the beginning; a frame comes every `step` eighths of a second, whatever `rate`
    the stream declares.
    """
    out = io.BytesIO()
    with av.open(str(video)) as given, av.open(out, "w", format="mpegts") as target:
        stream = target.add_stream("libx264", rate=rate, options={"tune": "zerolatency", "g": "8"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        track = target.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for number, frame in enumerate(given.decode(video=0)):
            picture = av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")
            picture.pts, picture.time_base = 8 * clock + number * step, Fraction(1, 8)
            target.mux(stream.encode(picture))
            if number >= tone:
                continue
            wave = np.sin(np.arange(SAMPLE_RATE // 8 * step) * 0.3).astype(np.float32)[None] * 0.3
            block = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            block.sample_rate, block.pts = SAMPLE_RATE, (8 * clock + number * step) * SAMPLE_RATE // 8
            target.mux(track.encode(block))
        target.mux(stream.encode(None))
        target.mux(track.encode(None))
    return out.getvalue()


@pytest.mark.parametrize(("scheme", "tone"), [("tcp", 56), ("http", 56), ("tcp", 20)])
def test_a_live_stream_is_scored_while_it_comes(tmp_path: Path, video: Path, scheme: str, tone: int) -> None:
    model = tiny_classifier(tmp_path / "model", seconds=2.0, modalities=("rgb", "audio"))
    recorded = tmp_path / "recorded.ts"
    sent = broadcast(video, tone)
    recorded.write_bytes(sent)
    expected = list(Watch(str(model), str(recorded)))
    camera = Camera(sent, http=scheme == "http")
    watching = iter(Watch(str(model), f"{scheme}://127.0.0.1:{camera.port}/door?key=s3cret", live=scheme == "http"))
    found = [next(watching)]
    assert not camera.ending, "the first window waits for no more than itself"
    camera.go_on.set()
    found += watching
    camera.close()
    assert [(moment.start_s, moment.modalities) for moment in found] == [
        (moment.start_s, moment.modalities) for moment in expected
    ]
    assert found[0].modalities == ["rgb", "audio"]
    assert ("audio" in found[-1].modalities) == (tone == 56)
    same = 1e-5 if tone == 56 else 1e-2  # a decoder gives its last 64 ms when told that the end has come
    for moment, known in zip(found, expected, strict=True):
        assert moment.scores == pytest.approx(known.scores, abs=same)


@pytest.mark.parametrize("clocks", [(0, 600), (600, 0), (0, 86_400, 5)])
def test_a_camera_that_sets_its_clock_is_watched_on(
    tmp_path: Path, video: Path, caplog: pytest.LogCaptureFixture, clocks: tuple[int, ...]
) -> None:
    """No window is made up for the time that it leaves out, none is lost to the time that comes again."""
    model = tiny_classifier(tmp_path / "model", seconds=2.0, modalities=("rgb", "audio"))
    camera = Camera(b"".join(broadcast(video, 56, clock) for clock in clocks), http=False)
    camera.go_on.set()
    found = list(Watch(str(model), f"tcp://127.0.0.1:{camera.port}"))
    camera.close()
    assert [moment.start_s for moment in found] == list(range(7 * len(clocks) - 1))
    assert all(moment.modalities == ["rgb", "audio"] for moment in found)
    said = [record.getMessage() for record in caplog.records if "video: the clock jumps" in record.getMessage()]
    assert len(said) == len(clocks) - 1


@pytest.mark.parametrize(("rate", "warnings"), [(Fraction(1, 3), 0), (8, 1)])
def test_a_camera_of_a_picture_every_three_seconds_is_watched(
    tmp_path: Path, video: Path, caplog: pytest.LogCaptureFixture, rate: Fraction | int, warnings: int
) -> None:
    """Its steps are no jumps; where it has declared shorter ones, all but the first."""
    model = tiny_classifier(tmp_path / "model", seconds=2.0, modalities=("rgb", "audio"))
    camera = Camera(broadcast(video, 56, step=24, rate=rate), http=False)
    camera.go_on.set()
    found = list(Watch(str(model), f"tcp://127.0.0.1:{camera.port}"))
    camera.close()
    assert len(found) >= 54, "one a picture, but for the first and the last"
    assert 160 < found[-1].end_s <= 168
    assert all(moment.modalities == ["rgb", "audio"] for moment in found)
    assert sum("the clock jumps" in record.getMessage() for record in caplog.records) == warnings


def test_a_long_gap_in_a_file_has_no_windows_and_counts(video: Path, tmp_path: Path) -> None:
    """Seven seconds, ten minutes of nothing, seven seconds: the last picture counts for a window's length."""
    model = tiny_classifier(tmp_path / "model", seconds=2.0, modalities=("rgb", "audio"))
    path = tmp_path / "gap.ts"
    path.write_bytes(broadcast(video, 56) + broadcast(video, 56, clock=600))
    watching = Watch(str(model), str(path))
    found = list(watching)
    assert [moment.start_s for moment in found] == [*range(8), *range(600, 606)]
    assert watching.seconds == pytest.approx(15.8, abs=0.2)
    assert all(moment.modalities == ["rgb", "audio"] for moment in found[8:]), "sound goes with its pictures"


def test_a_url_is_watched_from_a_file_that_is_gone_afterwards(
    model: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more of it is held in memory than a piece."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sent, torn = [video.read_bytes()[:700], video.read_bytes()[700:]], [video.read_bytes()[:700]]
    monkeypatch.setattr(watch, "pieces", lambda url, settings: iter(torn if "torn" in url else sent))
    watching = Watch(str(model), "http://ann:s3cret@host/long.mp4?token=s3cret")
    (folder,) = tmp_path.iterdir()
    assert (folder / "video").read_bytes() == video.read_bytes() and not isinstance(watching._video, bytes)
    found = [moment.scores for moment in watching]
    assert found == [moment.scores for moment in Watch(str(model), str(video))]
    assert list(tmp_path.iterdir()) == []

    with pytest.raises(UserError, match=r"^http://host/torn.mp4: not decodable"):
        list(Watch(str(model), "http://ann:s3cret@host/torn.mp4"))

    def refused(url: str, settings: object) -> Iterator[bytes]:
        yield sent[0]
        raise UserError("too large", where="http://host/long.mp4")

    monkeypatch.setattr(watch, "pieces", refused)
    with pytest.raises(UserError, match="too large"):
        Watch(str(model), "http://host/long.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_timeline_of_what_never_ends_stays_bounded_and_keeps_every_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_POINTS", 16)
    course = Course()
    for number in range(1000):
        course.add(Moment(number, number + 2, (number % 7) / 10, {}, None, ["rgb"], number in (3, 400, 999)))
        assert len(course.moments) <= 16 and len(course._next) < course._each
    kept = course.moments
    assert [moment.start_s for moment in kept if moment.alarm] == [3, 400, 999]
    assert [moment.start_s for moment in kept] == sorted(moment.start_s for moment in kept)
    assert all(moment.score == 0.6 for moment in kept if not moment.alarm)
    monkeypatch.undo()
    few = Course()
    for moment in kept:
        few.add(moment)
    assert few.moments == kept


def test_a_camera_that_is_not_there_is_one_line_without_its_password(model: Path) -> None:
    with pytest.raises(UserError, match=r"^rtsp://127.0.0.1:9/door: not decodable \(") as caught:
        Watch(str(model), "rtsp://ann:s3cret@127.0.0.1:9/door?token=s3cret")
    assert "s3cret" not in str(caught.value)


def test_what_cannot_be_watched_says_why(model: Path, video: Path) -> None:
    with pytest.raises(UserError, match="no class 'dance'"):
        Watch(str(model), str(video), label="dance")
    with pytest.raises(UserError, match="no such file"):
        Watch(str(model), "nowhere.mp4")
    with pytest.raises(UserError, match=r"cannot write the picture \(Is a directory\)"):
        watched(model, [], Watch(str(model), str(video)))
    for keys, complaint in (
        ({"stride": 0}, "--stride: windows 0 to a length; expected 1 to 16"),
        ({"stride": 17}, "--stride"),
        ({"after": 0}, "--after: 0 windows in a row; expected 1 or more"),
        ({"on": 0.2, "off": 0.3}, "off <= on"),
    ):
        with pytest.raises(UserError, match=complaint):
            Watch(str(model), str(video), **keys)
