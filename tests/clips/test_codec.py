"""What a shard keeps of each stream, and that it keeps it the same way every time."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from crossgate.clips.codec import CODECS, MEMBER_LIMITS, FlowCodec, decode_sound, encode_sound
from crossgate.clips.spectrogram import log_mel
from crossgate.errors import UserError
from crossgate.modality import MODALITIES


def smooth_flow(frames: int = 8, height: int = 64, width: int = 90) -> np.ndarray:
    y, x, t = np.meshgrid(np.linspace(0, 6, height), np.linspace(0, 6, width), np.arange(frames), indexing="ij")
    u, v = np.sin(x + t) * np.cos(y), 0.3 * np.cos(x - t)
    return np.stack((u, v), axis=-1).transpose(2, 0, 1, 3).astype(np.float16)


def streams(texture_clip, tone_of) -> dict[str, np.ndarray]:
    depth = np.linspace(400, 9000, 8 * 64 * 90).reshape(8, 64, 90).astype(np.uint16)
    depth[:, 10:20, 10:20] = 0
    return {"rgb": texture_clip(8, 64, 90), "flow": smooth_flow(), "audio": tone_of(1.0), "depth": depth}


def test_every_modality_has_a_codec_of_its_name():
    assert CODECS.keys() == MODALITIES.keys()
    for name, codec in CODECS.items():
        assert codec.suffix.split(".")[0] == name
        assert codec.suffix.count(".") == 1


@pytest.mark.parametrize("name", MODALITIES)
def test_same_stream_same_bytes(texture_clip, tone_of, name):
    stream = streams(texture_clip, tone_of)[name]
    assert CODECS[name].encode(stream, 25 / 3) == CODECS[name].encode(stream.copy(), 25 / 3)


@pytest.mark.parametrize("name", ["rgb", "flow", "depth"])
def test_chosen_frames_are_those_of_the_whole(texture_clip, tone_of, name):
    data = CODECS[name].encode(streams(texture_clip, tone_of)[name], 10.0)
    chosen = np.array([1, 1, 4, 7])
    np.testing.assert_array_equal(CODECS[name].decode(data, chosen), CODECS[name].decode(data)[chosen])


def test_rgb_error(texture_clip):
    clip = texture_clip(12, 128, 170)
    back = CODECS["rgb"].decode(CODECS["rgb"].encode(clip, 10.0))
    assert back.shape == clip.shape
    assert back.dtype == np.uint8
    mse = np.mean((back.astype(float) - clip) ** 2)
    assert 10 * np.log10(255**2 / mse) > 33


def test_flow_error():
    flow = smooth_flow(6, 128, 170).astype(np.float32)
    back = CODECS["flow"].decode(CODECS["flow"].encode(flow, 10.0))
    assert back.shape == (6, 64, 84, 2)
    import cv2

    whole = np.stack([cv2.resize(field, (170, 128)) for field in back])
    error = np.linalg.norm(whole - flow, axis=-1)
    assert error.mean() < 0.02
    assert np.percentile(error, 99) < 0.08


def test_no_motion_stays_no_motion():
    still = np.zeros((4, 64, 64, 2), np.float16)
    assert np.abs(FlowCodec().decode(FlowCodec().encode(still, 10.0))).max() < 1e-3


def test_flow_beyond_the_range_is_the_range():
    wild = np.full((2, 64, 64, 2), -50.0, np.float32)
    np.testing.assert_allclose(FlowCodec().decode(FlowCodec().encode(wild, 10.0)), -FlowCodec.RANGE, rtol=0.03)


def test_depth_error_and_holes():
    rng = np.random.default_rng(0)
    depth = rng.integers(250, 16_000, (5, 48, 65)).astype(np.uint16)
    depth[rng.random(depth.shape) < 0.2] = 0
    back = CODECS["depth"].decode(CODECS["depth"].encode(depth, 10.0))
    np.testing.assert_array_equal(back == 0, depth == 0)
    known = depth > 0
    assert (np.abs(back[known].astype(float) - depth[known]) <= 0.0083 * depth[known] + 0.5).all()


def test_audio_is_exact_to_16_bits(tone_of):
    samples = tone_of(2.0) + np.random.default_rng(0).normal(size=32_000).astype(np.float32) * 0.01
    back = CODECS["audio"].decode(CODECS["audio"].encode(samples, 10.0))
    assert len(back) == len(samples)
    assert np.abs(back - samples).max() <= 0.51 / 32768
    np.testing.assert_allclose(log_mel(back, 64, 192), log_mel(samples, 64, 192), atol=0.05)


def test_too_loud_sound_is_clipped_not_wrapped():
    loud = np.full(1600, 1.5, np.float32)
    assert CODECS["audio"].decode(CODECS["audio"].encode(loud, 10.0)).min() > 0.99


@pytest.mark.parametrize("name", MODALITIES)
@pytest.mark.parametrize("damage", ["empty", "half", "noise"])
def test_damaged_members_are_one_clear_error(texture_clip, tone_of, name, damage):
    data = CODECS[name].encode(streams(texture_clip, tone_of)[name], 10.0)
    broken = {"empty": b"", "half": data[: len(data) // 3], "noise": bytes(range(256)) * 8}[damage]
    if damage == "half":  # a cut stream of packets that stand alone may give its first part
        try:
            assert len(CODECS[name].decode(broken)) < len(CODECS[name].decode(data))
        except UserError:
            return
    else:
        with pytest.raises(UserError):
            CODECS[name].decode(broken)


def test_a_member_is_bounded(tone_of):
    long = encode_sound(
        np.zeros(int(MEMBER_LIMITS.seconds + 60) * 16_000, np.float32),
        codec="flac",
        sample_format="s16",
        options={},
        container="flac",
    )
    with pytest.raises(UserError, match="lasts"):
        decode_sound(long, "flac")


def test_a_member_that_hides_its_length_is_bounded_while_it_is_decoded():
    seconds = int(MEMBER_LIMITS.seconds) * 3
    whole = np.zeros(seconds * 16_000, np.float32)
    data = bytearray(encode_sound(whole, codec="flac", sample_format="s16", options={}, container="flac"))
    assert data[:4] == b"fLaC"
    assert data[4] & 0x7F == 0  # STREAMINFO comes first
    data[8 + 13] &= 0xF0  # its 36 bits that count the samples: 0 says unknown
    data[8 + 14 : 8 + 18] = bytes(4)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="too much sound"):
            decode_sound(bytes(data), "flac")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * MEMBER_LIMITS.seconds * 16_000 * 2, "decoded beyond the limit"


def test_other_containers_are_refused(texture_clip):
    data = CODECS["rgb"].encode(texture_clip(4, 64, 64), 10.0)
    with pytest.raises(UserError):
        decode_sound(data, "flac")
