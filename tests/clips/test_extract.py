"""Cutting, flow, depth."""

from __future__ import annotations

import sys
import types
from fractions import Fraction

import av
import numpy as np
import pytest

from crossgate.clips.depth import TransformersDepth, load_estimator, to_millimetres
from crossgate.clips.extract import extract, iter_clips
from crossgate.clips.flow import clip_flow, pair_flow
from crossgate.errors import UserError


def test_a_video_is_one_clip_of_its_length(moving, tone_of):
    clips = extract(moving(frames=50, sound=tone_of(2.0, 44_100)), short_side=64)
    assert len(clips) == 1
    clip = clips[0]
    assert clip.frames == 17
    assert clip.fps == pytest.approx(25 / 3)
    assert clip.streams["rgb"].shape == (17, 64, 86, 3)
    assert clip.streams["flow"].shape == (17, 64, 86, 2)
    assert clip.streams["audio"].dtype == np.float32
    assert "depth" not in clip.streams


@pytest.mark.parametrize(("frames", "expected"), [(10, [10]), (20, [20]), (29, [20]), (30, [20, 10]), (41, [20, 20])])
def test_long_videos_are_cut_and_half_a_last_clip_is_kept(moving, frames, expected):
    clips = extract(moving(frames=frames, size=(48, 64), fps=10), seconds=2.0)
    assert [clip.frames for clip in clips] == expected
    assert [clip.start for clip in clips] == pytest.approx([2.0 * i for i in range(len(expected))])


def test_sound_is_cut_with_the_pictures(moving, tone_of):
    """Two seconds of silence, then a tone: only the second clip has sound."""
    sound = np.concatenate((np.zeros(2 * 44_100, np.float32), tone_of(2.0, 44_100)))
    clips = extract(moving(frames=40, size=(48, 64), fps=10, sound=sound))
    assert [("audio" in clip.streams) for clip in clips][1]
    quiet = clips[0].streams.get("audio", np.zeros(1))
    assert np.abs(quiet[: 31 * 1000]).max() < 0.05  # but for the codec's echo at the border


def test_clips_come_one_at_a_time(moving):
    clips = iter_clips(moving(frames=100, size=(48, 64), fps=10), seconds=1.0)
    assert next(clips).start == 0.0
    assert next(clips).start == 1.0


def test_a_gap_that_is_not_held_over_is_in_no_clip(tmp_path):
    """Pictures of 0 to 2, 10 to 10.3 and 20 to 22 s: the middle ones are less than half a clip."""
    path = tmp_path / "gaps.mkv"
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=10, options={"bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for tenth in (*range(20), *range(100, 103), *range(200, 220)):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), tenth, np.uint8), format="rgb24")
            frame.pts, frame.time_base = tenth, Fraction(1, 10)
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    clips = extract(path, seconds=1.0, hold=0.1)
    assert [(clip.start, clip.frames) for clip in clips] == [(0, 10), (1, 10), (20, 10), (21, 10)]
    assert len(extract(path, seconds=1.0)) == 22


def test_one_frame_has_no_flow(moving):
    clip = extract(moving(frames=1, size=(48, 64)))[0]
    assert set(clip.streams) == {"rgb"}


@pytest.mark.parametrize("step", [(3.0, 0.0), (0.0, 2.0), (-2.0, 1.0)])
def test_flow_has_sign_and_unit(shifted_clip, step):
    """Right and down are positive; the unit is short sides a second whatever the resolution."""
    for scale in (1, 2):
        rgb = shifted_clip(3, 96 * scale, 128 * scale, (step[0] * scale, step[1] * scale))
        flow = clip_flow(rgb, fps=10.0)
        inner = flow[0, 24 * scale : 72 * scale, 24 * scale : 104 * scale].astype(np.float64)
        np.testing.assert_allclose(np.median(inner, axis=(0, 1)), np.array(step) / 96 * 10, atol=0.02)
        np.testing.assert_array_equal(flow[-1], flow[-2])


def test_flow_survives_tiny_pictures():
    tiny = np.zeros((8, 10, 3), np.uint8)
    assert not pair_flow(tiny, tiny, 0.1).any()


def test_sensor_depth_is_aligned_and_scaled(moving, save_video, tmp_path):
    video = moving(frames=20, size=(96, 128), fps=10)
    depth = np.stack([np.full((48, 64), 1000 + 100 * i, np.uint16) for i in range(20)])
    depth[:, :5] = 0
    path = save_video(tmp_path / "depth.mkv", depth, 10, codec="ffv1", pixel_format="gray16le")
    clip = extract(video, depth_source=path, short_side=48)[0]
    assert clip.depth_kind == "sensor"
    assert clip.streams["depth"].shape == clip.streams["rgb"].shape[:3] == (20, 48, 64)
    np.testing.assert_array_equal(clip.streams["depth"][:, 30, 30], 1000 + 100 * np.arange(20))
    assert not clip.streams["depth"][:, :5].any()


def test_a_depth_stream_that_ends_early_has_no_measurement(moving, save_video, tmp_path):
    depth = np.full((5, 48, 64), 2000, np.uint16)
    path = save_video(tmp_path / "depth.mkv", depth, 10, codec="ffv1", pixel_format="gray16le")
    clip = extract(moving(frames=20, size=(48, 64), fps=10), depth_source=path)[0]
    assert clip.streams["depth"][:5].all()
    assert not clip.streams["depth"][6:].any()


def test_colour_video_is_no_depth(moving):
    path = moving(frames=5)
    with pytest.raises(UserError, match="expected 16-bit grey"):
        extract(path, depth_source=path)


def test_depth_units():
    depth = np.array([[1, 70]], np.uint16)
    assert to_millimetres(depth, "m").tolist() == [[1000, 0]]  # beyond 16 bits: no measurement
    assert to_millimetres(depth, "cm").tolist() == [[10, 700]]
    with pytest.raises(UserError, match="unknown depth unit 'inch'; expected mm"):
        to_millimetres(depth, "inch")


def test_an_estimator_is_used_only_where_there_is_no_sensor(moving):
    clip = extract(moving(frames=10, size=(48, 64)), estimator=lambda rgb: np.full(rgb.shape[:3], 2.5))[0]
    assert clip.depth_kind == "estimated"
    assert (clip.streams["depth"] == 2500).all()
    with pytest.raises(UserError, match="estimator returned"):
        extract(moving("b.mp4", frames=10, size=(48, 64)), estimator=lambda rgb: np.zeros(3))


def test_estimators_are_found_by_name(monkeypatch):
    assert load_estimator("") is None
    module = types.ModuleType("my_depth")
    module.flat = lambda rgb: np.ones(rgb.shape[:3])
    monkeypatch.setitem(sys.modules, "my_depth", module)
    assert load_estimator("my_depth:flat") is module.flat
    for name in ("nonsense", "my_depth:missing", "no.such.module:f"):
        with pytest.raises(UserError):
            load_estimator(name)


def test_without_transformers_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"crossgate\[depth\]"):
        load_estimator("transformers:some/model")


def test_relative_depth_models_keep_the_order_only(monkeypatch):
    import torch

    class Pipeline:
        class model:
            class config:
                depth_estimation_type = "relative"
                model_type = "depth_anything"

        def __call__(self, picture):
            inverse = torch.linspace(0, 7, 8 * 8).reshape(1, 8, 8)
            return {"predicted_depth": inverse}

    fake = types.ModuleType("transformers")
    fake.pipeline = lambda task, model: Pipeline()
    monkeypatch.setitem(sys.modules, "transformers", fake)
    depth = TransformersDepth("some/model")(np.zeros((2, 8, 8, 3), np.uint8))
    assert depth.shape == (2, 8, 8)
    assert depth.max() == pytest.approx(10)
    assert depth.min() == pytest.approx(1)
    assert (np.diff(depth.reshape(2, -1), axis=1) < 0).all()


@pytest.mark.corpus
def test_real_depth(corpus):
    folder = corpus / "rgbd" / "clips"
    clip = extract(folder / "7scenes_kitchen_00.rgb.mp4", depth_source=folder / "7scenes_kitchen_00.depth.mkv")[0]
    metres = clip.streams["depth"][clip.streams["depth"] > 0] / 1000
    assert 0.5 < np.median(metres) < 5
    assert (clip.streams["depth"] > 0).mean() > 0.8
