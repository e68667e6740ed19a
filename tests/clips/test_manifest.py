"""Manifests: what is read, what is refused, and how a validation split is drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from crossgate.clips.manifest import Manifest, check_files, read_manifest, with_validation
from crossgate.errors import UserError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "corpus.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_labels_groups_depth_and_the_rest(tmp_path):
    path = write(
        tmp_path,
        "path,label,split,group,depth_path,depth_unit,degraded_rgb,scene\n"
        "a/x.mp4,jump,train,g1,a/x.depth.mkv,cm,0.5,gym\n"
        "b.mp4,,test,g2,,,,\n",
    )
    manifest = read_manifest(path)
    first, second = manifest.rows
    assert first.path == tmp_path / "a/x.mp4"
    assert (first.split, first.group, first.labels) == ("train", "g1", {"action": "jump"})
    assert (first.depth_path, first.depth_unit) == (tmp_path / "a/x.depth.mkv", "cm")
    assert first.degraded == {"rgb": 0.5}
    assert first.extra == {"scene": "gym"}
    assert (second.labels, second.depth_path, second.degraded, second.extra) == ({}, None, {}, {})
    assert manifest.vocabularies == {"action": ["jump"]}
    assert manifest.splits == {"train": 1, "test": 1}


@pytest.mark.parametrize(
    ("labels", "task", "expected"),
    [
        (("fight", "nofight"), "", "violence"),
        (("fight", "unlabelled"), "", "violence"),
        (("fight", "run"), "", "action"),
        (("fight", "nofight"), "brawl", "brawl"),
    ],
)
def test_the_task_is_told_by_the_labels(tmp_path, labels, task, expected):
    path = write(tmp_path, "path,label\n" + "".join(f"{i}.mp4,{label}\n" for i, label in enumerate(labels)))
    assert list(read_manifest(path, task=task).vocabularies) == [expected]


def test_columns_named_after_tasks(tmp_path):
    path = write(tmp_path, "path,action,violence\na.mp4,hug,nofight\nb.mp4,punch,fight\nc.mp4,,\n")
    manifest = read_manifest(path)
    assert manifest.rows[1].labels == {"action": "punch", "violence": "fight"}
    assert manifest.rows[2].labels == {}
    assert manifest.vocabularies == {"action": ["hug", "punch"], "violence": ["fight", "nofight"]}


def test_keys_are_unique_and_fit_for_tars(tmp_path):
    path = write(tmp_path, "path\na/v1.0 (é).mp4\nb/v1.0 (é).mp4\n")
    keys = [row.key for row in read_manifest(path).rows]
    assert len(set(keys)) == 2
    assert all(key.replace("-", "").replace("_", "").isalnum() and key.isascii() for key in keys)


def test_without_columns_everything_is_train_and_its_own_group(tmp_path):
    row = read_manifest(write(tmp_path, "path\na.mp4\n")).rows[0]
    assert (row.split, row.group, row.labels) == ("train", "a.mp4", {})


BAD = {
    "": "no column 'path'",
    "path,label\n": "no videos in the manifest",
    "file,label\na.mp4,x\n": "no column 'path'",
    "path,label\na.mp4\n": "line 2: the row has another number of columns",
    "path,label\n,x\n": "line 2: the path is empty",
    "path,split\na.mp4,\n": "line 2: the split is empty",
    "path,split\na.mp4,../x\n": "line 2: split '../x' is not usable",
    "path\na.mp4\na.mp4\n": "line 3: a.mp4 is also on line 2",
    "path\na.mp4\n./a.mp4\n": "line 3: a.mp4 is also on line 2",
    "path,split,group\na.mp4,train,g\nb.mp4,test,g\n": "line 3: group 'g' is in split 'test', and on line 2 in 'train'",
    "path,degraded_rgb\na.mp4,dark\n": "line 2: degraded_rgb is 'dark'",
    "path,degraded_rgb\na.mp4,7\n": "line 2: degraded_rgb is '7'; expected a number from 0 to 1",
    "path,degraded_rgb\na.mp4,nan\n": "line 2: degraded_rgb is 'nan'",
    "path,depth_path,depth_unit\na.mp4,b.mkv,inch\n": "line 2: unknown depth unit 'inch'",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_manifests_are_one_clear_line(tmp_path, text):
    with pytest.raises(UserError) as caught:
        read_manifest(write(tmp_path, text))
    assert BAD[text] in str(caught.value)
    assert "corpus.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_the_manifest_cannot_meet(tmp_path):
    path = write(tmp_path, "path,label,split\na.mp4,jump,train\n")
    with pytest.raises(UserError, match="split 'tset' has no videos; valid: train"):
        read_manifest(path, splits=("tset",))
    with pytest.raises(UserError, match="line 2: unknown label 'jump'; did you mean 'jumping'"):
        read_manifest(path, classes=("jumping", "sitting"))
    with pytest.raises(UserError, match="no labels of task 'violence'"):
        read_manifest(write(tmp_path, "path\na.mp4\n"), task="violence")
    with pytest.raises(UserError, match="no such manifest"):
        read_manifest(tmp_path / "none.csv")
    assert read_manifest(path, classes=("jump", "sit")).vocabularies == {"action": ["jump", "sit"]}


def test_missing_videos_are_named_with_their_line(tmp_path):
    (tmp_path / "a.mp4").touch()
    manifest = read_manifest(write(tmp_path, "path,depth_path\na.mp4,\nb.mp4,\n"))
    with pytest.raises(UserError, match=r"line 3: no such video: .*b\.mp4"):
        check_files(manifest)
    manifest = read_manifest(write(tmp_path, "path,depth_path\na.mp4,d.mkv\n"))
    with pytest.raises(UserError, match=r"line 2: no such video: .*d\.mkv"):
        check_files(manifest)


def test_unlabelled_videos_follow_their_group(tmp_path):
    text = "path,label,split,group\na.mp4,x,test,g\nb.mp4,unlabelled,unlabelled,g\nc.mp4,unlabelled,unlabelled,h\n"
    assert [row.split for row in read_manifest(write(tmp_path, text)).rows] == ["test", "test", "unlabelled"]


def corpus_of(tmp_path: Path, groups: int, a_group: int, classes: int = 3) -> Manifest:
    lines = [
        f"{g}_{i}.mp4,c{(g + i) % classes},train,g{g}" for g in range(groups) for i in range(1 + (g * 7) % a_group)
    ]
    return read_manifest(write(tmp_path, "path,label,split,group\n" + "\n".join([*lines, "t.mp4,c0,test,t"])))


@pytest.mark.parametrize("seed", range(5))
def test_validation_takes_whole_groups_of_each_class(tmp_path, seed):
    manifest = corpus_of(tmp_path, 40, 5)
    drawn = with_validation(manifest, 0.2, seed)
    splits: dict[str, set[str]] = {}
    for row in drawn.rows:
        splits.setdefault(row.group, set()).add(row.split)
    assert all(len(found) == 1 for found in splits.values())
    total = Counter(row.labels["action"] for row in manifest.rows if row.split == "train")
    val = Counter(row.labels["action"] for row in drawn.rows if row.split == "val")
    for label, count in total.items():
        assert val[label] / count == pytest.approx(0.2, abs=0.1)
    assert drawn.splits["test"] == 1
    assert with_validation(manifest, 0.2, seed) == drawn
    assert with_validation(manifest, 0.2, seed + 100) != drawn


def test_validation_leaves_what_it_must(tmp_path):
    manifest = corpus_of(tmp_path, 10, 3)
    assert with_validation(manifest, 0.0) is manifest
    drawn = with_validation(manifest, 0.2)
    assert with_validation(drawn, 0.2) is drawn  # there is a val already
    single = read_manifest(write(tmp_path, "path,group\na.mp4,g\nb.mp4,g\n"))
    assert with_validation(single, 0.5) is single
    two = read_manifest(write(tmp_path, "path,group\na.mp4,g\nb.mp4,h\n"))
    assert sorted(with_validation(two, 0.15).splits) == ["train", "val"]
    assert sorted(with_validation(two, 1.0).splits) == ["train", "val"]


@pytest.mark.corpus
@pytest.mark.parametrize("name", ["violence", "action", "rgbd", "audio"])
def test_real_manifests_are_read_as_they_are(corpus, name):
    manifest = read_manifest(corpus / name / "manifest.csv")
    check_files(manifest)
    assert list(manifest.vocabularies) == ["violence" if name == "violence" else "action"]
    drawn = with_validation(manifest, 0.15)
    assert 0.05 < drawn.splits["val"] / manifest.splits["train"] < 0.25
