"""The folder: whole files, groups, splits, resuming, refusing."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from synth_features import read_depth, read_sound, read_video, rows

from crossgate.clips.synth import ACTIONS, generate
from crossgate.clips.synth.plan import plan_clip, plan_splits
from crossgate.errors import UserError

SMALL = {"size": (64, 48), "fps": 8, "seconds": 1.0, "workers": 1}


def digest(manifest) -> dict[str, str]:
    """What the files decode to, by path."""
    found = {}
    for row in rows(manifest):
        wave = read_sound(manifest.parent / row["path"])
        parts = [read_video(manifest.parent / row["path"]).tobytes(), b"" if wave is None else wave.tobytes()]
        if row["depth_path"]:
            parts.append(read_depth(manifest.parent / row["depth_path"]).tobytes())
        found[row["path"]] = hashlib.sha256(b"".join(parts)).hexdigest()
    return found


def test_every_file_decodes_to_what_the_manifest_says(few):
    lines = rows(few)
    assert len(lines) == 36
    for row in lines:
        shape = (int(row["frames"]), int(row["height"]), int(row["width"]))
        assert read_video(few.parent / row["path"]).shape == (*shape, 3)
        wave = read_sound(few.parent / row["path"])
        if wave is not None:
            assert len(wave) / 16000 == pytest.approx(shape[0] / int(row["fps"]), abs=0.1)
            assert np.abs(wave).max() <= 1.2
        if row["depth_path"]:
            depth = read_depth(few.parent / row["depth_path"])
            assert depth.shape == shape
            assert depth.dtype == np.uint16
            assert row["depth_unit"] == "mm"
            assert depth[depth > 0].min() > 500
            assert depth.max() <= 12_000
    assert not list(few.parent.rglob("*.part"))


def test_names_do_not_betray_the_label(few):
    for row in rows(few):
        for word in (*(action.name for action in ACTIONS), "fight"):
            assert word not in row["path"] + row["depth_path"] + row["group"]


def test_the_actions_are_balanced_and_a_third_are_fights(few):
    lines = rows(few)
    assert set(Counter(row["action"] for row in lines).values()) == {3}
    assert sum(row["violence"] == "fight" for row in lines) == 12
    fights = {row["action"] for row in lines if row["violence"] == "fight"}
    assert fights == {"punch", "kick", "shove", "grapple"}


@pytest.mark.parametrize(("clips", "per_group"), [(36, 6), (120, 6), (600, 6), (400, 6), (240, 5), (144, 4), (216, 12)])
def test_no_group_is_cut_and_every_split_covers_every_action(clips, per_group):
    splits = plan_splits(7, clips, per_group, {"val": 0.15, "test": 0.2})
    plans = [plan_clip(7, i, per_group, 0.5) for i in range(clips)]
    groups, actions = defaultdict(set), defaultdict(set)
    for plan, split in zip(plans, splits):
        groups[plan.group].add(split)
        actions[split].add(plan.action.name)
    assert all(len(found) == 1 for found in groups.values())
    assert {split: len(found) for split, found in actions.items()} == dict.fromkeys(("train", "val", "test"), 12)
    if clips >= 400:
        share = Counter(splits)
        assert share["test"] / clips == pytest.approx(0.2, abs=0.06)
        assert share["val"] / clips == pytest.approx(0.15, abs=0.06)


def test_few_clips_still_train_and_test():
    assert set(plan_splits(0, 12, 6, {"val": 0.15, "test": 0.2})) == {"train", "test"}
    assert set(plan_splits(0, 18, 6, {"val": 0.15, "test": 0.2})) == {"train", "val", "test"}
    assert plan_splits(0, 5, 6, {"val": 0.15, "test": 0.2}) == ["train"] * 5
    assert "val" not in plan_splits(0, 120, 6, {"val": 0.0, "test": 0.2})
    four = {"val": 0.15, "test": 0.2, "unlabelled": 0.3}
    assert (
        set(plan_splits(0, 36, 6, four)) == set(plan_splits(0, 24, 6, four)) == {"train", "val", "test", "unlabelled"}
    )


@pytest.mark.parametrize(("clips", "share"), [(600, 0.5), (600, 0.2), (240, 0.4), (48, 0.3)])
def test_the_unlabelled_share_is_of_whole_groups_and_leaves_all_actions_to_train(clips, share):
    fractions = {"val": 0.15, "test": 0.2}
    splits = plan_splits(3, clips, 6, fractions | {"unlabelled": share})
    homes = defaultdict(set)
    for index, split in enumerate(splits):
        homes[index // 6].add(split)
    assert all(len(found) == 1 for found in homes.values())
    assert Counter(splits)["unlabelled"] / clips == pytest.approx(share, abs=0.08)
    actions = defaultdict(set)
    for index, split in enumerate(splits):
        actions[split].add(plan_clip(3, index, 6, 0.5).action.name)
    assert {split: len(found) for split, found in actions.items()} == dict.fromkeys(
        ("train", "val", "test", "unlabelled"), 12
    )
    labelled = plan_splits(3, clips, 6, fractions)
    assert labelled == plan_splits(3, clips, 6, fractions | {"unlabelled": 0.0})
    for held_out in ("val", "test"):  # withholding labels moves clips out of train only
        assert [split == held_out for split in splits] == [split == held_out for split in labelled]


def test_labels_are_withheld_in_the_unlabelled_split_and_nowhere_else(tmp_path):
    with_some = generate(tmp_path / "a", clips=36, seed=4, unlabelled=0.3, **SMALL)
    without = generate(tmp_path / "b", clips=36, seed=4, **SMALL)
    blank = [row for row in rows(with_some) if row["split"] == "unlabelled"]
    assert blank
    assert all(row["action"] == row["violence"] == "" for row in blank)
    for mine, other in zip(rows(with_some), rows(without), strict=True):
        assert other["action"] and other["violence"] and other["split"] != "unlabelled"
        hidden = {"split"} if mine["split"] != "unlabelled" else {"split", "action", "violence"}
        assert {name for name in mine if mine[name] != other[name]} <= hidden
    assert digest(with_some) == digest(without)


def test_packing_keeps_unlabelled_clips_without_a_label(tmp_path):
    from crossgate.clips.manifest import read_manifest

    manifest = read_manifest(generate(tmp_path / "a", clips=36, seed=4, unlabelled=0.3, **SMALL))
    assert set(manifest.splits) == {"train", "val", "test", "unlabelled"}
    assert all(bool(row.labels) == (row.split != "unlabelled") for row in manifest.rows)


def test_confusable_neighbours_share_a_scene():
    groups = defaultdict(set)
    for index in range(120):
        plan = plan_clip(2, index, 6, 0.5)
        groups[plan.group].add(plan.action.name)
    assert all(("punch" in found) == ("feint" in found) for found in groups.values())


def test_a_clip_depends_on_the_seed_and_its_number_alone(tmp_path):
    first = digest(generate(tmp_path / "a", clips=14, seed=2, **SMALL))
    more = digest(generate(tmp_path / "b", clips=20, seed=2, **(SMALL | {"workers": 2})))
    other = digest(generate(tmp_path / "c", clips=14, seed=3, **SMALL))
    assert first == {path: more[path] for path in first}
    assert not set(first.values()) & set(other.values())


def test_it_goes_on_where_it_was_interrupted(tmp_path):
    def stop(done, total):
        if done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "a", clips=14, seed=2, progress=stop, **SMALL)
    assert not (tmp_path / "a" / "manifest.csv").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "videos").iterdir()}
    assert len(kept) == 6
    seen = []
    manifest = generate(tmp_path / "a", clips=14, seed=2, progress=lambda *args: seen.append(args), **SMALL)
    assert seen == [(12, 14), (14, 14)]
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert digest(manifest) == digest(generate(tmp_path / "b", clips=14, seed=2, **SMALL))


def test_a_second_call_does_nothing_and_a_lost_file_is_made_again(tmp_path):
    manifest = generate(tmp_path / "a", clips=6, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in manifest.parent.rglob("*") if path.is_file()}
    calls = []
    assert generate(tmp_path / "a", clips=6, progress=lambda *args: calls.append(args), **SMALL) == manifest
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert calls == []
    lost = manifest.parent / rows(manifest)[2]["path"]
    whole = lost.read_bytes()
    lost.unlink()
    generate(tmp_path / "a", clips=6, **SMALL)
    assert lost.read_bytes() == whole


def test_the_unlabelled_share_must_leave_something_to_train(tmp_path):
    with pytest.raises(UserError, match="sum to less than 1"):
        generate(tmp_path / "a", clips=36, val=0.2, test=0.3, unlabelled=0.5, **SMALL)


def test_other_arguments_in_the_same_folder_are_refused(tmp_path):
    generate(tmp_path / "a", clips=2, **SMALL)
    with pytest.raises(UserError, match="another seed.*same arguments"):
        generate(tmp_path / "a", clips=2, seed=1, **SMALL)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        generate(tmp_path / "b", clips=2, **SMALL)
    (tmp_path / "c").write_text("a file")
    with pytest.raises(UserError, match="is a file"):
        generate(tmp_path / "c", clips=2, **SMALL)
    (tmp_path / "a" / "synth.json").write_text("{broken")
    with pytest.raises(UserError, match="same arguments"):
        generate(tmp_path / "a", clips=2, **SMALL)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clips": 0},
        {"seed": -1},
        {"size": (65, 48)},
        {"degraded": 2.0},
        {"test": 0.6, "val": 0.6},
        {"fps": 1},
        {"unlabelled": -0.1},
    ],
)
def test_arguments_out_of_range_are_named(tmp_path, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        generate(tmp_path / "a", **({"clips": 2} | SMALL | wrong))
    assert not (tmp_path / "a").exists()


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["crossgate.clips.synth.generate"], "write_depth", full)
    with pytest.raises(UserError, match="No space left.*free some space"):
        generate(tmp_path / "a", clips=2, degraded=0.0, **SMALL)
    assert not (tmp_path / "a" / "manifest.csv").exists()


def test_workers_need_no_torch():
    code = "import sys, crossgate.clips.synth; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
