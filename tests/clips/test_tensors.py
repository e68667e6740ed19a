"""The same clip, whichever way it comes: in memory, from a shard, from a plain video."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from crossgate.clips.augment import View, draw_view
from crossgate.clips.codec import CODECS
from crossgate.clips.extract import RawClip, extract
from crossgate.clips.spectrogram import FLOOR, log_mel
from crossgate.clips.tensors import clip_tensors
from crossgate.config import AugmentConfig, ClipConfig
from crossgate.errors import UserError
from crossgate.modality import MODALITIES

CLIP = ClipConfig(frames=4, size=48, seconds=2.0, mels=32)
MODES = [None, AugmentConfig(), AugmentConfig(flip=1.0, crop=1.0, jitter=0.0, mask_audio=0.0)]


@pytest.fixture
def raw(shifted_clip, tone_of) -> RawClip:
    rgb = shifted_clip(20, 64, 90, (2.0, 0.0))
    flow = np.zeros((20, 64, 90, 2), np.float16)
    flow[..., 0], flow[..., 1] = 0.5, -0.25
    depth = np.tile(np.linspace(500, 4000, 90).astype(np.uint16), (20, 64, 1))
    audio = tone_of(2.0) + np.random.default_rng(0).normal(size=32_000).astype(np.float32) * 0.01
    return RawClip({"rgb": rgb, "flow": flow, "audio": audio, "depth": depth}, fps=10.0, depth_kind="sensor")


def packed(raw: RawClip) -> dict[str, bytes]:
    members = {CODECS[name].suffix: CODECS[name].encode(stream, raw.fps) for name, stream in raw.streams.items()}
    return members | {"json": json.dumps({"frames": raw.frames, "fps": raw.fps}).encode()}


@pytest.mark.parametrize("augment", MODES)
@pytest.mark.parametrize("source", [lambda raw: raw, packed])
def test_shapes_and_types(raw, augment, source):
    tensors = clip_tensors(source(raw), CLIP, augment, 3)
    assert list(tensors) == list(MODALITIES)
    for name, tensor in tensors.items():
        assert tuple(tensor.shape) == CLIP.shape(name)
        assert tensor.dtype == (torch.uint8 if name == "rgb" else torch.float32)


@pytest.mark.parametrize("augment", MODES)
def test_packed_and_raw_agree(raw, augment):
    one, other = clip_tensors(raw, CLIP, augment, 5), clip_tensors(packed(raw), CLIP, augment, 5)
    assert (one["rgb"].float() - other["rgb"].float()).abs().mean() < 4
    assert (one["flow"] - other["flow"]).abs().max() < 0.03
    assert (one["audio"] - other["audio"]).abs().max() < 0.2
    assert ((one["depth"] - other["depth"]).abs() / one["depth"]).max() < 0.03


def test_only_what_is_asked_for_and_there(raw):
    del raw.streams["depth"]
    assert list(clip_tensors(raw, ClipConfig(modalities=("depth", "flow")))) == ["flow"]
    assert list(clip_tensors(packed(raw), ClipConfig(modalities=("depth", "flow")))) == ["flow"]


def test_units(raw):
    tensors = clip_tensors(raw, CLIP)
    assert tensors["flow"][:, 0].mean() == pytest.approx(0.5, abs=1e-3)
    assert tensors["flow"][:, 1].mean() == pytest.approx(-0.25, abs=1e-3)
    assert 0.9 < tensors["depth"].min() < tensors["depth"].max() < 3.6  # the middle of 0.5 to 4 m


def test_evaluation_takes_the_middles_and_the_centre(raw):
    picture = clip_tensors(raw, ClipConfig(frames=4, size=64, modalities=("rgb",)))["rgb"]
    for number, frame in zip(range(4), (2, 7, 12, 17)):
        expected = raw.streams["rgb"][frame][:, 13:77]
        np.testing.assert_array_equal(picture[number].permute(1, 2, 0).numpy(), expected)


def test_a_flip_mirrors_everything_and_negates_u(raw):
    plain = AugmentConfig(flip=0.0, crop=0.7, jitter=0.0, mask_audio=0.0)
    mirrored = plain.model_copy(update={"flip": 1.0})
    one, other = clip_tensors(raw, CLIP, plain, 9), clip_tensors(raw, CLIP, mirrored, 9)
    for name in ("rgb", "depth"):
        assert torch.equal(one[name], other[name].flip(-1))
    assert torch.allclose(one["flow"][:, 0], -other["flow"][:, 0].flip(-1))
    assert torch.allclose(one["flow"][:, 1], other["flow"][:, 1].flip(-1))
    assert torch.equal(one["audio"], other["audio"])


def test_flow_of_a_flipped_video_is_the_flipped_flow(shifted_clip):
    """Flipping the tensors equals computing the flow on flipped pictures."""
    from crossgate.clips.flow import clip_flow

    rgb = shifted_clip(4, 96, 128, (3.0, 1.0))
    flow = clip_flow(rgb, 10.0).astype(np.float32)
    mirrored = clip_flow(np.ascontiguousarray(rgb[:, :, ::-1]), 10.0).astype(np.float32)[:, :, ::-1]
    inner = (slice(None), slice(24, 72), slice(24, 104))
    np.testing.assert_allclose(np.median(mirrored[inner][..., 0]), -np.median(flow[inner][..., 0]), atol=0.02)
    np.testing.assert_allclose(np.median(mirrored[inner][..., 1]), np.median(flow[inner][..., 1]), atol=0.02)


def test_one_region_for_all_pictures(raw):
    """Each stream is a ramp along x; the crops must see the same part of it."""
    x = np.linspace(0, 1, 90)
    raw.streams["rgb"] = np.tile((x * 255).astype(np.uint8)[None, None, :, None], (20, 64, 1, 3))
    raw.streams["depth"] = np.tile((1000 + 1000 * x).astype(np.uint16), (20, 64, 1))
    raw.streams["flow"][..., 0] = x
    for seed in range(10):
        augment = AugmentConfig(crop=0.3, jitter=0.0, flip=0.0)
        side = draw_view(4, augment, seed).side
        for source in (raw, packed(raw)):
            tensors = clip_tensors(source, CLIP, augment, seed)
            rgb = tensors["rgb"][0, 0].float() / 255
            assert torch.allclose(tensors["depth"][0, 0] - 1, rgb, atol=0.04)
            assert torch.allclose(tensors["flow"][0, 0] * side, rgb, atol=0.06)


def test_a_narrow_view_sees_faster_motion(raw):
    augment = AugmentConfig(crop=0.25, jitter=0.0, flip=0.0)
    side = draw_view(4, augment, 2).side
    assert side < 0.95
    assert clip_tensors(raw, CLIP, augment, 2)["flow"][:, 0].mean() == pytest.approx(0.5 / side, rel=1e-2)


def test_the_seed_alone_decides(raw):
    members = packed(raw)
    first = clip_tensors(members, CLIP, AugmentConfig(), 11)
    clip_tensors(raw, CLIP, AugmentConfig(), 12)
    again = clip_tensors(members, CLIP, AugmentConfig(), 11)
    other = clip_tensors(members, CLIP, AugmentConfig(), 13)
    for name in first:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**64 - 1])
def test_any_seed_will_do(seed):
    view, next_one = draw_view(8, AugmentConfig(), seed), draw_view(8, AugmentConfig(), seed ^ 1)
    for drawn in (view, next_one):
        assert all(0 <= place <= 1 for place in (drawn.x, drawn.y, drawn.start, *drawn.moments))
        assert np.sqrt(AugmentConfig().crop) <= drawn.side <= 1
    assert (view.side, view.x, view.y, view.start) != (next_one.side, next_one.x, next_one.y, next_one.start)


@pytest.mark.parametrize("off", [None, AugmentConfig(enabled=False)])
def test_evaluation_draws_nothing(raw, off):
    one, other = clip_tensors(raw, CLIP, off, 1), clip_tensors(raw, CLIP, off, 2)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_frames_come_from_equal_segments():
    view = View(np.full(4, 0.5))
    assert view.frames(20, 20.0).tolist() == [2, 7, 12, 17]
    assert view.frames(40, 20.0).tolist() == [12, 17, 22, 27]  # the middle window of a longer clip
    assert view.frames(2, 20.0).tolist() == [0, 0, 1, 1]
    for seed in range(20):
        drawn = draw_view(4, AugmentConfig(), seed).frames(20, 20.0)
        assert (drawn // 5).tolist() == [0, 1, 2, 3]


def test_no_single_augmentation_shifts_the_luck_of_another():
    base, changed = AugmentConfig(), AugmentConfig(jitter=0.0, mask_audio=0.0)
    one, other = draw_view(8, base, 4), draw_view(8, changed, 4)
    assert (one.side, one.x, one.flip, one.start) == (other.side, other.x, other.flip, other.start)


def test_sound_is_that_of_the_pictures(raw, tone_of):
    """A long clip's middle window: the sound must come from there too."""
    raw.streams = {name: np.concatenate((s, s, s)) for name, s in raw.streams.items() if name != "audio"}
    quiet = np.full(32_000, 1e-3, np.float32)
    raw.streams["audio"] = np.concatenate((quiet, tone_of(2.0), quiet))
    heard = clip_tensors(raw, CLIP)["audio"][0, 0]
    assert heard.max(dim=0).values.min() > 2
    assert torch.allclose(heard, torch.from_numpy(log_mel(raw.streams["audio"][32_640 : 32_640 + 30_720], 32, 192)))


def test_short_sound_is_followed_by_the_floor(raw, tone_of):
    raw.streams = {name: stream[:10] for name, stream in raw.streams.items()} | {"audio": tone_of(1.0)}
    heard = clip_tensors(raw, CLIP)["audio"][0, 0]
    assert (heard[:, 110:] == np.float32(FLOOR)).all()
    assert heard[:, :95].max(dim=0).values.min() > 2


def test_what_is_done_to_the_sound_is_done_before_its_spectrogram(raw):
    clip = ClipConfig(frames=2, size=32, mels=32)
    deaf = clip_tensors(raw, clip, heard=np.zeros_like)
    plain = clip_tensors(raw, clip)
    assert (deaf["audio"] == np.float32(FLOOR)).all() and (plain["audio"] > np.float32(FLOOR)).any()
    assert all(torch.equal(deaf[name], plain[name]) for name in plain if name != "audio")


def test_masks_cover_what_they_say(raw):
    augment = AugmentConfig(mask_audio=0.5, jitter=0.0)
    tensors = [clip_tensors(raw, CLIP, augment, seed)["audio"][0, 0] for seed in range(30)]
    rows = np.array([(t == np.float32(FLOOR)).all(dim=1).float().mean() for t in tensors])
    assert rows.max() <= 0.54
    assert rows.mean() > 0.1


def test_memory_is_channels_last(raw):
    assert clip_tensors(raw, CLIP)["rgb"].permute(0, 2, 3, 1).is_contiguous()


def test_plain_videos_give_what_extract_gives(moving, tone_of):
    data = moving(frames=50, size=(128, 170), sound=tone_of(2.0, 44_100)).read_bytes()
    plain, whole = clip_tensors({"mp4": data}, CLIP), clip_tensors(extract(data)[0], CLIP)
    assert list(plain) == list(whole) == ["rgb", "flow", "audio"]
    assert torch.equal(plain["rgb"], whole["rgb"])
    assert torch.allclose(plain["flow"], whole["flow"], atol=2e-3)
    assert torch.allclose(plain["audio"], whole["audio"], atol=1e-4)


def test_a_window_of_a_long_plain_video(moving):
    data = moving(frames=200, size=(64, 96), fps=20, options={"g": "20"}).read_bytes()
    clip = ClipConfig(frames=4, size=48, seconds=2.0, modalities=("rgb", "flow"))
    whole = clip_tensors(extract(data, seconds=10.0)[0], clip)
    plain = clip_tensors({"mp4": data, "json": b"{}"}, clip)
    assert torch.equal(plain["rgb"], whole["rgb"])
    assert torch.allclose(plain["flow"], whole["flow"], atol=2e-3)


def break_frames(members: dict[str, bytes]) -> None:
    members["json"] = json.dumps({"frames": 500, "fps": 10.0}).encode()


def break_json(members: dict[str, bytes]) -> None:
    members["json"] = b'{"frames": "many"}'


def break_claims(members: dict[str, bytes]) -> None:
    members["json"] = json.dumps({"frames": 10**12, "fps": 10.0}).encode()


def lose_json(members: dict[str, bytes]) -> None:
    del members["json"]


def break_video(members: dict[str, bytes]) -> None:
    members["rgb.mp4"] = members["rgb.mp4"][:700]


@pytest.mark.parametrize("damage", [break_frames, break_json, break_claims, lose_json, break_video])
def test_broken_clips_are_one_clear_error(raw, damage: Callable[[dict[str, bytes]], None]):
    members = packed(raw)
    damage(members)
    with pytest.raises(UserError):
        clip_tensors(members, CLIP)


def test_pickles_are_never_read(raw):
    import pickle

    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    bomb = pickle.dumps(Bomb())
    for name in MODALITIES:
        members = packed(raw) | {CODECS[name].suffix: bomb}
        with pytest.raises(UserError):
            clip_tensors(members, CLIP)
    clip_tensors(packed(raw) | {"rgb.pyd": bomb, "pickle": bomb}, CLIP)


@pytest.mark.corpus
def test_a_real_clip_survives_the_shard(corpus):
    folder = corpus / "rgbd" / "clips"
    raw = extract(folder / "7scenes_kitchen_00.rgb.mp4", depth_source=folder / "7scenes_kitchen_00.depth.mkv")[0]
    one, other = clip_tensors(raw, ClipConfig()), clip_tensors(packed(raw), ClipConfig())
    assert set(one) == set(other) == {"rgb", "flow", "depth"}
    assert (one["rgb"].float() - other["rgb"].float()).abs().mean() < 4
    assert (one["flow"] - other["flow"]).abs().mean() < 0.01
    assert ((one["depth"] - other["depth"]).abs() <= 0.009 * one["depth"] + 1e-3).all()
