"""Files are opened within bounds, frames come at their times, sound is present or absent."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from crossgate.clips.codec import CODECS
from crossgate.clips.media import (
    SAMPLE_RATE,
    Frames,
    Limits,
    Sound,
    chosen_frames,
    divided_rate,
    open_media,
    probe,
    storage_size,
)
from crossgate.errors import UserError


def plain_decode(data: bytes, path: Path) -> np.ndarray:
    path.write_bytes(data)
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("width", [128, 170, 228])
def test_fast_decoding_is_pixel_identical_to_plain_pyav(tmp_path, texture_clip, width):
    clip = texture_clip(20, 128, width)
    data = CODECS["rgb"].encode(clip, 10.0)
    plain = plain_decode(data, tmp_path / "clip.mp4")
    chosen = np.array([0, 3, 3, 7, 12, 19])
    np.testing.assert_array_equal(np.stack([p.copy() for p in chosen_frames(data, chosen, "rgb24")]), plain[chosen])
    np.testing.assert_array_equal(np.stack([p.copy() for p in chosen_frames(data, None, "rgb24")]), plain)


@pytest.mark.corpus
def test_fast_decoding_is_pixel_identical_on_a_real_clip(corpus, tmp_path):
    path = corpus / "violence" / "clips" / "fight" / "fi001.mp4"
    plain = plain_decode(path.read_bytes(), tmp_path / "clip.mp4")
    fast = np.stack([p.copy() for p in chosen_frames(path.read_bytes(), np.array([5, 25, 49]), "rgb24")])
    np.testing.assert_array_equal(fast, plain[[5, 25, 49]])


def test_a_frame_that_is_not_there_is_an_error(texture_clip):
    data = CODECS["rgb"].encode(texture_clip(5, 64, 64), 10.0)
    with pytest.raises(UserError, match="frames are missing"):
        list(chosen_frames(data, np.array([2, 5]), "rgb24"))


@pytest.mark.parametrize(
    ("rate", "expected"), [(25, 25 / 3), (30, 10), (24, 12), (12, 12), (29.97, 9.99), (10, 10), (60, 12), (12.5, 6.25)]
)
def test_the_rate_is_divided_by_whole_numbers(rate, expected):
    assert divided_rate(rate, 12.0) == pytest.approx(expected)


def test_storage_size_is_even_and_never_larger():
    assert storage_size(1920, 1080, 128) == (228, 128)
    assert storage_size(1080, 1920, 128) == (128, 228)
    assert storage_size(101, 90, 128) == (100, 90)


def test_frames_are_those_that_have_begun(moving, tmp_path):
    """A video whose frame numbers can be read from its pictures: at 25 / 3 fps every third one is held."""
    levels = np.repeat(np.arange(0, 250, 5, dtype=np.uint8), 64 * 64 * 3).reshape(50, 64, 64, 3)
    from_file = Frames(moving(frames=50), size=lambda w, h: (w, h))
    assert from_file.rate == pytest.approx(25 / 3)
    path = tmp_path / "levels.mp4"
    write_levels(path, levels)
    frames = Frames(path, size=lambda w, h: (w, h))
    means = np.array([picture.mean() for picture in frames])
    np.testing.assert_allclose(means, np.arange(0, 50, 3) * 5, atol=2.5)
    seeking = dict(frames.pictures({11, 14}))
    assert sorted(seeking) == [11, 14]
    assert seeking[14].mean() == pytest.approx(14 * 3 * 5, abs=2.5)


def write_levels(path: Path, levels: np.ndarray) -> None:
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=25, options={"g": "10", "crf": "10"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for picture in levels:
            target.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        target.mux(stream.encode(None))


@pytest.fixture
def gap(tmp_path):
    """Frames of three levels at 0, 0.1 and 0.8 s."""
    path = tmp_path / "gap.mkv"
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=10, options={"crf": "10", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for level, tenth in ((40, 0), (80, 1), (120, 8)):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = tenth, stream.codec_context.time_base or 1 / stream.average_rate
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return path


def test_gaps_in_time_hold_the_last_frame(gap):
    means = [round(float(picture.mean()), -1) for picture in Frames(gap, rate=10.0, size=lambda w, h: (w, h))]
    assert means == [40, 80, 80, 80, 80, 80, 80, 80, 120]


def test_a_frame_may_be_held_for_so_long_and_runs_of_frames_end_there(gap):
    frames = Frames(gap, rate=10.0, size=lambda w, h: (w, h), hold=0.3)
    found = [(number, [round(float(picture.mean()), -1) for picture in run]) for number, run in frames.runs(3)]
    assert found == [(0, [40, 80, 80]), (3, [80]), (8, [120])]


def test_a_frame_is_held_until_the_next_is_due_however_short_the_hold(gap):
    frames = Frames(gap, rate=10.0, size=lambda w, h: (w, h), hold=0.01)
    assert [number for number, _ in frames.pictures()] == [0, 1, 8]


def test_strips_are_refused_upright_or_not(tmp_path):
    for number, (width, height, fits) in enumerate(((64, 8, True), (72, 8, False), (8, 64, True), (8, 72, False))):
        path = tmp_path / f"{number}.mkv"
        with av.open(str(path), "w") as target:
            stream = target.add_stream("ffv1", rate=10)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            picture = np.zeros((height, width, 3), np.uint8)
            target.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            target.mux(stream.encode(None))
        frames = Frames(path, size=lambda w, h: storage_size(w, h, 4))
        if fits:
            assert len(list(frames)) == 1
        else:
            with pytest.raises(UserError, match=f"pictures of {width} x {height}; expected sides of at most 8 to 1"):
                list(frames)


def test_probe_reads_the_header(moving, tone_of):
    path = moving(sound=tone_of(2.0, 44_100))
    info = probe(path)
    assert (info.width, info.height, info.fps, info.sound) == (128, 96, 25.0, True)
    assert info.seconds == pytest.approx(2.0, abs=0.1)
    assert probe(path.read_bytes()) == info


def test_sound_is_16_khz_mono_in_pieces(moving, tone_of):
    path = moving(sound=tone_of(2.0, 44_100))
    whole = Sound(path).read(0.0, 2.0)
    assert whole is not None
    assert len(whole) == pytest.approx(32_000, abs=64)
    spectrum = np.abs(np.fft.rfft(whole[8000:24_000]))
    assert np.argmax(spectrum) == 1000  # a second of sound: one bin is one hertz
    sound = Sound(path)
    np.testing.assert_array_equal(sound.read(0.5, 1.0), whole[8000:16_000])
    np.testing.assert_array_equal(sound.read(1.0, 1.5), whole[16_000:24_000])


def test_sound_before_the_first_picture_is_dropped_with_its_gaps(tmp_path):
    """Pictures from 10 s on, sound from 0 to 1 s and from 6 to 14 s: of that four seconds are left."""
    path = tmp_path / "late.mkv"
    rate, tenth = SAMPLE_RATE, SAMPLE_RATE // 10
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=10, options={"bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        track = target.add_stream("pcm_s16le", rate=rate, layout="mono")
        for start in [*range(0, 10), *range(60, 140)]:  # tenths
            level = np.full((1, tenth), 1000 * (1 + start // 10), np.int16)
            block = av.AudioFrame.from_ndarray(level, format="s16", layout="mono")
            block.sample_rate, block.pts, block.time_base = rate, start * tenth, Fraction(1, rate)
            target.mux(track.encode(block))
        for number in range(100, 150):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            target.mux(stream.encode(frame))
        target.mux([*stream.encode(None), *track.encode(None)])
    heard = Sound(path, start=10.0).read(0.0, 5.0)
    assert heard is not None
    assert len(heard) == pytest.approx(4 * rate, abs=64)
    seconds = [round(float(heard[rate * n + 2000 : rate * n + 14_000].mean()) * 32.768) for n in range(4)]
    assert seconds == [11, 12, 13, 14]


def test_no_track_and_digital_silence_are_absence(moving):
    assert Sound(moving("a.mp4")).read(0.0, 2.0) is None
    assert Sound(moving("b.mp4", sound=np.zeros(88_200, np.float32))).read(0.0, 2.0) is None


@pytest.mark.parametrize(
    ("limits", "message"),
    [(Limits(bytes=1000), "file of"), (Limits(pixels=1000), "pictures of 128 x 96"), (Limits(seconds=1), "lasts 2 s")],
)
def test_limits_are_checked_before_anything_is_decoded(moving, limits, message):
    path = moving()
    with pytest.raises(UserError, match=message), open_media(path, limits):
        pytest.fail("opened")


def test_a_bomb_is_refused_before_its_picture_is_allocated(tmp_path):
    """170 kB of PNG that unpack to 144 megapixels must not cost their memory, neither in opening nor in decoding."""
    path = tmp_path / "bomb.mov"
    side = 12_000
    with av.open(str(path), "w") as target:
        stream = target.add_stream("png", rate=10)
        stream.height, stream.width, stream.pix_fmt = side, side, "gray"
        target.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((side, side), np.uint8), format="gray")))
        target.mux(stream.encode(None))
    script = (
        "import resource, sys\n"
        "from crossgate.clips.media import Frames\n"
        "from crossgate.errors import UserError\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "before = peak()\n"
        "try: list(Frames(sys.argv[1], size=lambda w, h: (64, 64)))\n"
        "except UserError: print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60, "MiB"


@pytest.mark.parametrize("content", [b"", b"not a video" * 100, b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"])
def test_what_is_no_video_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "x.mp4"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(UserError) as caught:
            probe(source)
        assert "\n" not in str(caught.value)


def test_playlists_that_name_other_files_are_refused(moving, tmp_path):
    moving("inner.mp4")
    playlist = tmp_path / "list.ffconcat"
    playlist.write_text("ffconcat version 1.0\nfile inner.mp4\n")
    with pytest.raises(UserError, match="not decodable"):
        probe(playlist)


@pytest.mark.parametrize("name", ["pipe:0", "concat:a|b", "missing.mp4"])
def test_names_are_never_protocols(name):
    with pytest.raises(UserError, match="no such file"):
        probe(name)


def test_a_truncated_video_is_an_error_or_shorter(moving):
    data = moving().read_bytes()
    with pytest.raises(UserError, match="not decodable"):
        list(Frames(data[: len(data) // 2], size=lambda w, h: (w, h)))


@pytest.mark.corpus
def test_sound_without_pictures_says_so(corpus):
    path = next((corpus / "audio" / "clips").rglob("*.ogg"))
    with pytest.raises(UserError, match="no pictures in the file"):
        Frames(path, size=lambda w, h: (w, h))


@pytest.mark.corpus
def test_every_fixture_decodes(corpus):
    paths = [path for path in (corpus / "fixtures").iterdir() if path.suffix in {".avi", ".mp4", ".mkv"}]
    assert len(paths) >= 10
    for path in paths:
        first = next(iter(Frames(path, size=lambda w, h: storage_size(w, h, 64))))
        assert first.shape[2] == 3
        assert cv2.Laplacian(first, cv2.CV_32F).std() > 0
