"""The official layouts in miniature, under their official names; the videos' bytes are given."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from scipy.io import savemat


def put(root: Path, video: bytes, names: Iterable[str]) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(video)


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def ucf101(root: Path, video: bytes) -> None:
    """Split 1 tests groups 1 to 7, split 2 groups 8 to 14; the training lists add the class number."""
    names = [
        f"{label}/v_{stem}_g{group:02d}_c{clip:02d}.avi"
        for label, stem in (("ApplyEyeMakeup", "ApplyEyeMakeup"), ("HandstandPushups", "HandStandPushups"))
        for group in (1, 8, 15)
        for clip in (1, 2)
    ]
    put(root / "UCF-101", video, names)
    for split, tested in ((1, "_g01_"), (2, "_g08_")):
        lists = root / "ucfTrainTestlist"
        text(lists / f"trainlist{split:02d}.txt", *(f"{name} 1" for name in names if tested not in name))
        text(lists / f"testlist{split:02d}.txt", *(name for name in names if tested in name))


def hmdb51(root: Path, video: bytes) -> None:
    """A film that is in the training of one class and the test of another; one video that is in neither."""
    listed = {
        "brush_hair": {
            "April_09_brush_hair_u_nm_np1_ba_goo_0.avi": 1,
            "April_09_brush_hair_u_nm_np1_ba_goo_1.avi": 1,
            "Brushing_Her_Hair__[_NEW_AUDIO_]_UPDATED!!!!_brush_hair_h_cm_np1_fr_goo_0.avi": 2,
            "atheistinterview_brush_hair_u_nm_np2_le_goo_0.avi": 0,
        },
        "chew": {
            "TheBoondockSaints_chew_h_nm_np1_fr_goo_48.avi": 2,
            "Chewing_Gum_chew_h_nm_np1_fr_med_0.avi": 1,
        },
        "smoke": {"TheBoondockSaints_smoke_h_nm_np1_fr_goo_3.avi": 1},
    }
    for label, names in listed.items():
        put(root / "hmdb51_org" / label, video, names)
        lines = (f"{name} {side} " for name, side in names.items())
        text(root / "testTrainMulti_7030_splits" / f"{label}_test_split1.txt", *lines)


KINETICS = "label,youtube_id,time_start,time_end,split,is_cc"


def kinetics(root: Path, video: bytes) -> None:
    """Folders of classes in training, none in validation; one video was taken down."""
    rows = {
        "train": ['"playing piano",---QUuC4vJs,84,94', "abseiling,0347ZoDXyP0,95,105", "abseiling,gone0000000,1,11"],
        "validate": ['"playing piano",-0Eb-jPVHJ4,0,10', "abseiling,3E7Jib8Yq5M,118,128"],
        "test": ['"playing piano",-9a5bWSGzE4,7,17'],
    }
    for name, lines in rows.items():
        text(root / f"{name}.csv", KINETICS, *(f"{line},{name},0" for line in lines))
    put(
        root,
        video,
        [
            "train/playing piano/---QUuC4vJs_000084_000094.mp4",
            "train/abseiling/0347ZoDXyP0_000095_000105.mp4",
            "val/-0Eb-jPVHJ4_000000_000010.mp4",
            "val/3E7Jib8Yq5M_000118_000128.mp4",
            "test/-9a5bWSGzE4_000007_000017.mp4",
        ],
    )


def vggsound(root: Path, video: bytes) -> None:
    """A label with a comma, in quotes as the authors write it."""
    text(
        root / "vggsound.csv",
        '---g-f_I2yQ,1,"people marching",test',
        '--0PQM4-hqg,30,"waterfall burbling",train',
        '--56QUhyDQM,185,"playing bass, loud",train',
        'gone0000000,5,"people marching",train',
    )
    names = ("---g-f_I2yQ_000001", "--0PQM4-hqg_000030", "--56QUhyDQM_000185")
    put(root / "video", video, (f"{name}.mp4" for name in names))


def ntu(root: Path, video: bytes, frames: int = 12) -> None:
    """Subjects 1 (training) and 3 (test), cameras 1 and 2, with depth for one; what NTU RGB+D 120 adds besides."""
    names = [f"S001C{c:03d}P{p:03d}R001A{a:03d}" for c in (1, 2) for p in (1, 3) for a in (1, 50, 55)]
    added = ["S018C001P008R001A001", "S001C001P001R001A061"]
    put(root / "nturgb+d_rgb", video, (f"{name}_rgb.avi" for name in [*names, *added]))
    maps = root / "nturgb+d_depth_masked" / names[0]
    maps.mkdir(parents=True)
    for number in range(frames):
        cv2.imwrite(str(maps / f"MDepth-{number + 1:08d}.png"), np.full((12, 16), 1000 + number, np.uint16))


def utd(root: Path, video: bytes) -> None:
    """Two subjects; twice as many depth pictures as colour ones."""
    for action, subject in ((1, 1), (27, 1), (1, 2), (27, 2)):
        stem = f"a{action}_s{subject}_t1"
        put(root / "RGB", video, [f"{stem}_color.avi"])
        depth = np.broadcast_to(np.arange(2000, 2024, dtype=np.uint16), (12, 16, 24))
        (root / "Depth").mkdir(exist_ok=True)
        savemat(root / "Depth" / f"{stem}_depth.mat", {"d_depth": depth})


def rwf2000(root: Path, video: bytes) -> None:
    put(
        root,
        video,
        [
            "train/Fight/0_DzLlklZa0_0.avi",
            "train/Fight/0_DzLlklZa0_3.avi",
            "train/NonFight/-1l5631l3fg_0.avi",
            "val/Fight/39BFeYnbu-I_0.avi",
            "val/NonFight/2Hg5vRq_9iM_1.avi",
        ],
    )


def hockey(root: Path, video: bytes) -> None:
    put(root, video, (f"{name}{number}_xvid.avi" for name in ("fi", "no") for number in range(1, 101)))


def surveillance(root: Path, video: bytes) -> None:
    put(root / "fight", video, (f"fi{number:03d}.mp4" for number in range(1, 51)))
    put(root / "noFight", video, (f"nofi{number:03d}.mp4" for number in range(1, 51)))


def xd_violence(root: Path, video: bytes) -> None:
    """Bad.Boys.1995 is on both sides, as films are in the official lists."""
    put(
        root,
        video,
        [
            "1-1004/Bad.Boys.1995__#00-26-51_00-27-53_label_B2-0-0.mp4",
            "1-1004/A.Beautiful.Mind.2001__#00-01-45_00-02-50_label_A.mp4",
            "1005-2004/v=0QJGkGLbwOI__#1_label_B6-0-0.mp4",
            "test_videos/Bad.Boys.1995__#01-11-55_01-12-40_label_G-B2-B6.mp4",
            "test_videos/v=38GQ9L2meyE__#1_label_A.mp4",
        ],
    )
    text(
        root / "annotations.txt",
        "Bad.Boys.1995__#01-11-55_01-12-40_label_G-B2-B6.mp4 3 5 8 11",
        "v=away__#1_label_G 1 2",
    )
