"""The adapters of public data sets: each official layout in miniature becomes the manifest that its authors mean."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import folds
import hmdb51
import hockey
import kinetics
import kinetics_sounds
import layouts
import ntu_rgbd
import numpy as np
import pytest
import rwf2000
import surveillance
import ucf101
import utd_mhad
import vggsound
import xd_violence
from manifest_of import Video, listing, report, write_manifest

from crossgate.clips.manifest import ClipRow, Manifest, check_files, read_manifest, with_validation
from crossgate.clips.media import Frames
from crossgate.errors import UserError
from crossgate.runs.pack import PackSettings, pack

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS: dict[str, tuple[Callable, Callable]] = {
    "ucf101": (layouts.ucf101, ucf101.videos),
    "hmdb51": (layouts.hmdb51, hmdb51.videos),
    "kinetics": (layouts.kinetics, kinetics.videos),
    "kinetics_sounds": (layouts.kinetics, kinetics_sounds.videos),
    "vggsound": (layouts.vggsound, vggsound.videos),
    "ntu_rgbd": (layouts.ntu, ntu_rgbd.videos),
    "utd_mhad": (layouts.utd, utd_mhad.videos),
    "rwf2000": (layouts.rwf2000, rwf2000.videos),
    "hockey": (layouts.hockey, hockey.videos),
    "surveillance": (layouts.surveillance, surveillance.videos),
    "xd_violence": (layouts.xd_violence, xd_violence.videos),
}


@pytest.fixture
def manifest(tmp_path: Path, tiny: bytes) -> Callable[..., Manifest]:
    """Builds a layout below `tmp_path / "data"` and returns its manifest as the packer reads it."""

    def make(name: str, *options: object, as_published: bool = False, **more: object) -> Manifest:
        build, videos = LAYOUTS[name]
        root = tmp_path / "data"
        if not root.exists():
            root.mkdir()
            build(root, tiny)
        write_manifest(listing(videos(root, *options, **more), as_published).videos, tmp_path / "out.csv")
        found = read_manifest(tmp_path / "out.csv")
        check_files(found)
        return found

    return make


def by_name(found: Manifest) -> dict[str, ClipRow]:
    return {row.path.stem: row for row in found.rows}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read_and_keeps_its_groups_together(manifest, name):
    found = manifest(name)
    assert {"train", "test"} <= set(found.splits)
    assert all(row.labels for row in found.rows)
    if "val" not in found.splits:
        drawn = with_validation(found, 0.3)
        assert {row.path for row in drawn.rows if row.split == "test"} == {
            row.path for row in found.rows if row.split == "test"
        }
        sides: dict[str, set[str]] = {}
        for row in drawn.rows:
            sides.setdefault(row.group, set()).add(row.split)
        assert all(len(splits) == 1 for splits in sides.values())


def test_ucf101_splits_by_group_of_a_class(manifest):
    first, second = manifest("ucf101"), manifest("ucf101", 2)
    assert first.splits == second.splits == {"train": 8, "test": 4}
    assert {row.group for row in first.rows if row.split == "test"} == {"ApplyEyeMakeup_g01", "HandStandPushups_g01"}
    assert {row.group for row in second.rows if row.split == "test"} == {"ApplyEyeMakeup_g08", "HandStandPushups_g08"}
    assert first.vocabularies == {"action": ["ApplyEyeMakeup", "HandstandPushups"]}


def test_hmdb51_groups_are_source_videos_and_a_film_on_both_sides_is_told(manifest, tmp_path):
    found = manifest("hmdb51", as_published=True)
    assert found.splits == {"train": 4, "test": 2}
    rows = by_name(found)
    assert rows["April_09_brush_hair_u_nm_np1_ba_goo_0"].group == "April_09"
    assert rows["TheBoondockSaints_chew_h_nm_np1_fr_goo_48"].group == "TheBoondockSaints"
    assert rows["TheBoondockSaints_smoke_h_nm_np1_fr_goo_3"].group == "TheBoondockSaints (train)"
    named = list(hmdb51.videos(tmp_path / "data"))
    assert "1 sources are in two official splits: kept as published" in "\n".join(report(listing(named, True)))
    assert "1 sources are in two official splits: 1 videos left out" in "\n".join(report(listing(named)))
    apart = manifest("hmdb51")
    assert apart.splits == {"train": 3, "test": 2}
    assert not any("(train)" in row.group for row in apart.rows)


def test_kinetics_tests_on_the_validation_split_and_counts_what_is_gone(manifest, tmp_path):
    found = manifest("kinetics")
    assert found.splits == {"train": 2, "test": 2}
    row = by_name(found)["---QUuC4vJs_000084_000094"]
    assert (row.group, row.labels) == ("---QUuC4vJs", {"action": "playing piano"})
    listed = listing(kinetics.videos(tmp_path / "data"))
    assert [path.name for path in listed.missing] == ["gone0000000_000001_000011.mp4"]
    assert "1 videos of the official lists are not there" in "\n".join(report(listed))


def test_kinetics_sounds_takes_its_classes_and_all_three_splits(manifest):
    found = manifest("kinetics_sounds")
    assert found.splits == {"train": 1, "val": 1, "test": 1}
    assert found.vocabularies == {"action": ["playing piano"]}
    assert len(set(kinetics_sounds.CLASSES)) == 31


def test_vggsound(manifest):
    found = manifest("vggsound")
    assert found.splits == {"train": 2, "test": 1}
    row = by_name(found)["--56QUhyDQM_000185"]
    assert (row.group, row.labels["action"], row.split) == ("--56QUhyDQM", "playing bass, loud", "train")


def test_ntu_by_subject_and_by_view(manifest):
    by_subject = manifest("ntu_rgbd")
    assert by_subject.splits == {"train": 6, "test": 6}  # what NTU RGB+D 120 adds is left out
    assert {row.group for row in by_subject.rows if row.split == "test"} == {"P003"}
    row = by_name(by_subject)["S001C002P001R001A050_rgb"]
    assert row.labels == {"action": "punch other", "violence": "fight"}
    assert by_name(by_subject)["S001C002P001R001A055_rgb"].labels["violence"] == "nofight"
    assert "violence" not in by_name(by_subject)["S001C002P001R001A001_rgb"].labels
    by_view = manifest("ntu_rgbd", "view", as_published=True)
    assert {row.path.name[4:8] for row in by_view.rows if row.split == "test"} == {"C001"}
    assert {row.group for row in by_view.rows} == {"P001", "P003", "P001 (train)", "P003 (train)"}
    with pytest.raises(UserError, match="every source of the official train split is in another one too; --as-pub"):
        manifest("ntu_rgbd", "view")
    assert len(ntu_rgbd.TRAINING_SUBJECTS) == 20 and len(ntu_rgbd.ACTIONS) == 60


def test_utd_mhad_by_subject(manifest):
    found = manifest("utd_mhad")
    assert found.splits == {"train": 2, "test": 2}
    row = by_name(found)["a27_s2_t1_color"]
    assert (row.group, row.split, row.labels) == ("subject 2", "test", {"action": "squat"})
    assert len(utd_mhad.ACTIONS) == 27


def test_rwf2000_tests_on_the_validation_split(manifest):
    found = manifest("rwf2000")
    assert found.splits == {"train": 3, "test": 2}
    assert [row.group for row in found.rows][:3] == ["0_DzLlklZa0", "0_DzLlklZa0", "-1l5631l3fg"]
    assert found.rows[4].labels == {"violence": "nofight"} and found.rows[4].group == "2Hg5vRq_9iM"


@pytest.mark.parametrize(("name", "clips", "second"), [("hockey", 200, (21, 40)), ("surveillance", 100, (11, 20))])
def test_folds_take_neighbours_and_cover_everything_once(manifest, tmp_path, name, clips, second):
    tested = [
        [row.path.name for row in manifest(name, fold).rows if row.split == "test"]
        for fold in range(1, folds.FOLDS + 1)
    ]
    assert {len(names) for names in tested} == {clips // folds.FOLDS}
    assert len({name for names in tested for name in names}) == clips
    found = manifest(name, 2)
    numbers = [int("".join(filter(str.isdigit, n.partition(".")[0]))) for n in tested[1] if n.startswith("fi")]
    assert (min(numbers), max(numbers), len(numbers)) == (*second, clips // folds.FOLDS // 2)
    assert listing(LAYOUTS[name][1](tmp_path / "data", 2)).shared == 0, "a fold tears no group"
    assert found.vocabularies == {"violence": ["fight", "nofight"]}


def test_xd_violence_tells_films_and_labels_by_the_name(manifest):
    found = manifest("xd_violence", as_published=True)
    assert found.splits == {"train": 3, "test": 2}
    rows = by_name(found)
    both = rows["Bad.Boys.1995__#01-11-55_01-12-40_label_G-B2-B6"]
    assert (both.group, both.labels) == ("Bad.Boys.1995", {"violence": "violent"})
    truth = {"event_frames": "3-5 8-11", "frame_rate": "12", "frames": "12"}
    assert both.extra == {"events": "G-B2-B6"} | truth
    trained = rows["Bad.Boys.1995__#00-26-51_00-27-53_label_B2-0-0"]
    assert (trained.group, trained.extra) == ("Bad.Boys.1995 (train)", {"events": "B2"})
    calm = rows["v=38GQ9L2meyE__#1_label_A"]
    assert calm.labels == {"violence": "normal"}
    assert calm.extra == {"events": "A", "frame_rate": "12", "frames": "12"}
    assert manifest("xd_violence").splits == {"train": 2, "test": 2}


def test_ntu_depth_maps_become_a_video_on_the_clock_of_the_colours(manifest, tmp_path):
    manifest("ntu_rgbd")
    depth = tmp_path / "depth"
    ntu_rgbd.make_depth_videos(ntu_rgbd.recordings(tmp_path / "data", depth), ntu_rgbd.read_maps)
    made = Frames(depth / "S001C001P001R001A001.mkv", size=lambda w, h: (w, h), depth=True)
    assert made.source_rate == pytest.approx(12.0)
    assert [int(picture.max()) for picture in made] == list(range(1000, 1012))
    row = by_name(manifest("ntu_rgbd", depth=depth))["S001C001P001R001A001_rgb"]
    assert (row.depth_path, row.depth_unit) == (depth / "S001C001P001R001A001.mkv", "mm")
    assert by_name(manifest("ntu_rgbd", depth=depth))["S001C001P003R001A001_rgb"].depth_path is None


def test_utd_depth_is_packed_with_its_video(manifest, tmp_path):
    manifest("utd_mhad")
    root, depth = tmp_path / "data", tmp_path / "depth"
    utd_mhad.make_depth_videos(utd_mhad.recordings(root, depth), utd_mhad.read_mat, workers=2)
    before = {path: path.stat().st_mtime_ns for path in depth.iterdir()}
    utd_mhad.make_depth_videos(utd_mhad.recordings(root, depth), utd_mhad.read_mat)
    assert {path: path.stat().st_mtime_ns for path in depth.iterdir()} == before, "finished ones are made again"
    manifest("utd_mhad", depth=depth)
    settings = PackSettings(workers=1, seconds=1.0, short_side=32, val_fraction=0.0)
    index = pack(tmp_path / "out.csv", str(tmp_path / "shards"), settings)
    assert index.modalities == {"rgb": 4, "flow": 4, "audio": 0, "depth": 4}
    assert {name: split.clips for name, split in index.splits.items()} == {"train": 2, "test": 2}
    made = Frames(depth / "a1_s1_t1_depth.mkv", size=lambda w, h: (w, h), depth=True)
    assert made.source_rate == pytest.approx(24.0)  # twice as many pictures in the same second
    assert np.array_equal(next(iter(made)), np.full((12, 16), 2000))


MISSING = {
    "ucf101": ("ucfTrainTestlist/testlist01.txt", "testlist01.txt: no such split file; expected the official one"),
    "hmdb51": ("testTrainMulti_7030_splits", "no folder testTrainMulti_7030_splits; unpack the official archives"),
    "kinetics": ("validate.csv", "validate.csv: no such split file"),
    "kinetics_sounds": ("test.csv", "test.csv: no such split file"),
    "vggsound": ("vggsound.csv", "vggsound.csv: no such split file"),
    "ntu_rgbd": ("nturgb+d_rgb", "no folder nturgb+d_rgb"),
    "utd_mhad": ("RGB", "no videos below this folder; expected files ending in _color.avi"),
    "rwf2000": ("val", "no folder val/Fight"),
    "hockey": ("fi1_xvid.avi", ""),
    "surveillance": ("noFight", "no folder noFight"),
    "xd_violence": ("test_videos", "no folder test_videos"),
}


@pytest.mark.parametrize("name", [name for name, (_, line) in MISSING.items() if line])
def test_what_is_missing_is_one_line(manifest, tmp_path, name):
    manifest(name)
    gone, line = MISSING[name]
    (tmp_path / "data" / gone).rename(tmp_path / "gone")
    with pytest.raises(UserError) as caught:
        manifest(name)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file", "content", "line"),
    [
        ("ucf101", "ucfTrainTestlist/trainlist01.txt", "v_ApplyEyeMakeup_g08_c01.avi 1", "expected CLASS/v_CLASS_gNN"),
        ("ucf101", "ucfTrainTestlist/trainlist01.txt", "", "trainlist01.txt: the split file is empty"),
        ("hmdb51", "testTrainMulti_7030_splits/chew_test_split1.txt", "a.avi 3", "expected NAME.avi and 0, 1 or 2"),
        ("kinetics", "train.csv", "name,id\na,b", "train.csv: no column 'label'"),
        ("kinetics", "train.csv", f"{layouts.KINETICS}\na,b,one,2,train,0", "no whole seconds, line 2"),
        ("vggsound", "vggsound.csv", "a,1,b,validation", "line 1 is not understood"),
        ("ntu_rgbd", "nturgb+d_rgb/S001_rgb.avi", "", "'S001_rgb.avi' is not understood; expected SxxxC"),
        ("utd_mhad", "RGB/a28_s1_t1_color.avi", "", "with N of a from 1 to 27"),
        ("xd_violence", "1-1004/film.mp4", "", "expected TITLE__#PIECE_label_CODES.mp4"),
        ("xd_violence", "annotations.txt", "a__#1_label_G 3 5 8", "expected NAME and pairs of frames"),
        ("xd_violence", "annotations.txt", "a__#1_label_G 3 5", "no line for this violent video in annotations.txt"),
    ],
)
def test_what_is_of_another_form_is_one_line(manifest, tmp_path, name, file, content, line):
    manifest(name)
    (tmp_path / "data" / file).write_text(content)
    with pytest.raises(UserError) as caught:
        manifest(name)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_few_clips_for_folds_is_one_line(manifest, tmp_path):
    manifest("hockey")
    for path in (tmp_path / "data").glob("no*_xvid.avi"):
        if not re.fullmatch(r"no1?\d_xvid", path.stem):
            path.unlink()
    with pytest.raises(UserError, match=r"data: 19 clips of 'nofight'; expected 5 times 10 or more, named no"):
        manifest("hockey")


def test_a_split_without_videos_is_refused(manifest, tmp_path):
    manifest("ucf101")
    for path in (tmp_path / "data" / "UCF-101").rglob("*_g01_*"):
        path.unlink()
    with pytest.raises(UserError, match=r"v_ApplyEyeMakeup_g01_c01.avi: no video of the official test split is there"):
        manifest("ucf101")


def test_a_video_that_is_listed_twice_counts_once_and_for_the_test(tmp_path, tiny):
    layouts.put(tmp_path, tiny, ["a.avi", "b.avi"])
    a, b = tmp_path / "a.avi", tmp_path / "b.avi"
    named = [Video(a, split, "g", {"action": split}) for split in ("train", "test", "train")]
    found = listing([*named, Video(b, "train", "h", {"action": "x"})])
    assert [(video.path.name, video.split) for video in found.videos] == [("a.avi", "test"), ("b.avi", "train")]
    assert found.repeated == 2


@pytest.mark.parametrize(
    ("read", "file", "line"),
    [
        (ntu_rgbd.read_maps, "MDepth-00000001.png", "not a depth map"),
        (ntu_rgbd.read_maps, "", "no depth maps"),
        (utd_mhad.read_mat, "a1_s1_t1_depth.mat", "no depth can be read"),
    ],
)
def test_depth_that_cannot_be_read_is_one_line(tmp_path, read, file, line):
    if file:
        (tmp_path / file).write_bytes(b"no depth")
    with pytest.raises(UserError, match=line):
        read(tmp_path / file if file.endswith(".mat") else tmp_path)


def test_the_script_writes_says_and_packs(tmp_path, tiny):
    root = tmp_path / "data"
    layouts.ucf101(root, tiny)
    script = [sys.executable, "-W", "ignore", str(ROOT / "shards" / "ucf101.py"), str(root), "out.csv"]
    done = subprocess.run([*script, "--split", "2", "--pack", "shards"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "12 videos (train 8, test 4) of 6 groups, 2 classes of action" in done.stdout
    assert (tmp_path / "shards" / "index.json").is_file()
    assert {row.split for row in read_manifest(tmp_path / "out.csv").rows} == {"train", "test"}
    assert (tmp_path / "out.csv").read_text().splitlines()[1].startswith("data/UCF-101/"), "paths move with the file"
    refused = subprocess.run([*script, "--split", "3"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"ucf101.py: {root}/ucfTrainTestlist/trainlist03.txt: no such split file")
    assert refused.stderr.count("\n") == 1
