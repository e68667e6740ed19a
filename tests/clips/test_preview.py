"""The contact sheet is a picture of what it is given."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from crossgate.clips.codec import CODECS
from crossgate.clips.extract import extract
from crossgate.clips.preview import contact_sheet, flow_colours
from crossgate.errors import UserError


def test_flow_colours_follow_the_wheel():
    flow = np.array([[0, 0], [1, 0], [0, 1], [-1, 0], [5, 0]], np.float32)
    white, right, down, left, beyond = flow_colours(flow, 1.0)
    assert white.tolist() == [255, 255, 255]
    assert right.tolist() == [255, 0, 0]
    assert left.tolist() == [0, 255, 255]
    assert down[1] == 255
    assert down[2] == 0
    assert beyond.tolist() == right.tolist()


def test_a_sheet_of_packed_and_plain_clips(moving, tone_of, tmp_path):
    data = moving(frames=30, size=(48, 64), sound=tone_of(1.2, 44_100)).read_bytes()
    raw = extract(data, estimator=lambda rgb: np.tile(np.linspace(1, 4, rgb.shape[2]), (*rgb.shape[:2], 1)))[0]
    record = {"key": "k", "frames": raw.frames, "fps": raw.fps, "seconds": raw.seconds, "split": "train", "group": "g",
              "labels": {"violence": "fight"}, "degraded": {"rgb": 0.8}, "depth": {"kind": "estimated"}}  # fmt: skip
    members = {CODECS[name].suffix: CODECS[name].encode(stream, raw.fps) for name, stream in raw.streams.items()}
    members["json"] = json.dumps(record).encode()
    path = contact_sheet([members, {"mp4": data}, members], tmp_path / "new" / "sheet.png")
    picture = cv2.imread(str(path))
    assert picture.shape[0] > 600
    assert picture.shape[1] > 1200
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000
    only_rgb = {"rgb.mp4": members["rgb.mp4"], "json": members["json"]}
    small = cv2.imread(str(contact_sheet([only_rgb], tmp_path / "one.png")))
    assert small.shape[0] < picture.shape[0] / 2


def test_nothing_to_show(tmp_path):
    with pytest.raises(UserError, match="no clips"):
        contact_sheet([], tmp_path / "x.png")


def test_a_picture_that_cannot_be_written_is_one_line(moving, tmp_path):
    (tmp_path / "file").write_text("")
    clip = {"mp4": moving(frames=6, size=(48, 64)).read_bytes()}
    for path, reason in ((tmp_path / "file" / "sheet.png", "File exists"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=rf"^{path}: cannot write the picture \({reason}\); check the path"):
            contact_sheet([clip], path)
