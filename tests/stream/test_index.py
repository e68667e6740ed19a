"""The index: small to open, strict about what is asked of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from crossgate.errors import UserError
from crossgate.stream.index import Index, group_hash, write_index
from crossgate.stream.shards import ShardWriter
from crossgate.stream.storage import Store


def test_totals_and_vocabularies(make_corpus) -> None:
    index = Index.load(make_corpus({"train": [5, 0, 4], "val": [3]}).store.url)
    assert index.vocabularies == {"action": ["run", "sit", "wave"]}
    assert index.modalities == {"rgb": 12, "flow": 0, "audio": 8, "depth": 0}
    assert (index.splits["train"].clips, index.splits["train"].shards) == (9, 3)
    assert index.splits["train"].groups == 3
    assert index.first.tolist() == [0, 5, 5, 9]
    assert index.settings == {"by": "test"}


def test_opening_reads_no_sidecar(make_corpus) -> None:
    index = make_corpus({"train": [5, 4], "val": [3]})
    for name in os.listdir(index.store.url):
        if name.endswith(".idx.parquet") or name.endswith(".tar"):
            os.unlink(index.store.path(name))
    assert Index.load(index.store.url).select(["train"]).total == 9


def test_selection_is_the_shards_of_its_splits(make_corpus) -> None:
    index = make_corpus({"test": [1], "train": [5, 4], "val": [3]})
    selection = index.select(["train", "val"])
    assert [index.names[i] for i in selection.shards] == ["train-000000.tar", "train-000001.tar", "val-000000.tar"]
    assert selection.counts.tolist() == [5, 4, 3]
    assert selection.digest == index.select(["val", "train"]).digest != index.select(["train"]).digest


def test_other_splits_do_not_touch_a_selection(make_corpus) -> None:
    alone, beside = make_corpus({"train": [5, 4]}), make_corpus({"train": [5, 4], "val": [3]})
    assert alone.digest != beside.digest
    assert alone.select(["train"]).digest == beside.select(["train"]).digest


def test_what_is_not_there_is_named(make_corpus) -> None:
    index = make_corpus({"train": [3], "val": [0]})
    with pytest.raises(UserError, match="'trian' does not exist.*did you mean 'train'"):
        index.select(["trian"])
    with pytest.raises(UserError, match="'val' has no clips"):
        index.select(["val"])
    with pytest.raises(UserError, match="no split named"):
        index.select([])
    with pytest.raises(UserError, match="modality 'depth'.*rgb, audio"):
        index.select(["train"], ["rgb", "depth"])


def test_missing_shards_are_told_without_reading_any(make_corpus, monkeypatch) -> None:
    index = make_corpus({"train": [1, 1, 1], "val": [1, 1, 1], "test": [1]})
    assert index.missing(["train", "val", "test"]) == []
    gone = ["train-000001.tar", "val-000002.tar"]
    for name in gone:
        os.unlink(index.store.path(name))
    assert index.missing(["train", "val"]) == gone
    assert index.missing(["train"]) == gone[:1]
    asked: list[str] = []

    def refuse(self: Store, suffix: str = "") -> list[str]:
        raise UserError("access denied", where=self.url)

    def exists(self: Store, name: str) -> bool:
        asked.append(name)
        return os.path.exists(self.path(name))

    monkeypatch.setattr(Store, "list", refuse)
    monkeypatch.setattr(Store, "exists", exists)
    assert index.missing(["train", "val"]) == gone[1:], "the ends of each split, where nobody may list"
    assert asked == ["train-000000.tar", "train-000002.tar", "val-000000.tar", "val-000002.tar"]


def write(store: Store, name: str, split: str, group: str, label: str = "run") -> None:
    with ShardWriter(store, name, split=split) as writer:
        writer.add(f"{split}-clip", {"rgb.bin": b"1"}, {"group": group, "labels": {"action": label}})


def test_a_group_in_two_splits_is_refused(store: Store) -> None:
    write(store, "train-0.tar", "train", "film")
    write(store, "val-0.tar", "val", "film")
    with pytest.raises(UserError, match="group 'film' is in splits 'train' and 'val'"):
        write_index(store, ["train-0.tar", "val-0.tar"])
    assert not store.exists("index.json")


def test_labels_follow_a_given_vocabulary(store: Store) -> None:
    write(store, "train-0.tar", "train", "film", "sit")
    words = {"action": ["walk", "sit"], "violence": ["nofight", "fight"]}
    index = write_index(store, ["train-0.tar"], vocabularies=words)
    assert index.vocabularies == words
    assert index.sidecar(0).label_ids("action", index.vocabularies["action"]).tolist() == [1]
    assert index.sidecar(0).label_ids("violence", index.vocabularies["violence"]).tolist() == [-1]
    with pytest.raises(UserError, match="label 'sit' is not in the vocabulary of task 'action'"):
        write_index(store, ["train-0.tar"], vocabularies={"action": ["walk"]})


def test_damage_is_noticed_on_opening(make_corpus) -> None:
    index = make_corpus({"train": [3]})
    path = Path(index.store.path("index.json"))
    header = json.loads(path.read_text())
    for text, match in (
        ("{", "damaged"),
        (json.dumps(header | {"version": 99}), "version 99"),
        (json.dumps(header | {"digest": "0"}), "do not belong together"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=match):
            Index.load(index.store.url)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither an index nor tars"):
        Index.load(str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        Index.load(str(tmp_path / "nowhere"))


def test_a_packing_that_was_stopped_is_not_taken_for_tars_of_others(make_corpus) -> None:
    index = make_corpus({"train": [3, 2]})
    before = index.store.read("train-000000.idx.parquet")
    index.store.delete("index.json")
    with pytest.raises(UserError, match="packing was not finished: 2 shards, no index; run crossgate pack again"):
        Index.load(index.store.url)
    assert index.store.read("train-000000.idx.parquet") == before


def test_group_hashes_fit_tensors() -> None:
    hashes = np.array([group_hash(f"g{i}") for i in range(1000)], dtype=np.int64)
    assert (hashes >= 0).all()
    assert len(np.unique(hashes)) == 1000
    assert group_hash("g0") == 4138431230778696347, "written in shards: must never change"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"digest": 7}, "digest': Input should be a valid string"),
        ({"vocabularies": {"action": "run"}}, "vocabularies.action': Input should be a valid list"),
        ({"splits": {"train": {"shards": 1, "clips": "many", "groups": 1}}}, "splits.train.clips': Input should be"),
        ({"modalities": None}, "modalities': Input should be a valid dictionary"),
        ({"version": "1"}, "version' is no number"),
    ],
)
def test_the_key_of_a_damaged_index_is_named(make_corpus, change: dict, key: str) -> None:
    index = make_corpus({"train": [1]})
    path = Path(index.store.path("index.json"))
    path.write_text(json.dumps(index.header | change))
    with pytest.raises(UserError, match=f"index.json: the index is damaged: key '{key}"):
        Index.load(index.store.url)
    path.write_text(json.dumps({name: value for name, value in index.header.items() if name not in change}))
    with pytest.raises(UserError, match=f"the index is damaged: key '{next(iter(change))}'"):
        Index.load(index.store.url)
