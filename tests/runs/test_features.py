"""Kept features of frozen encoders: the same numbers as from clips, made once, each clip once an epoch."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_road import other_class_order, tiny_tree, write_recipe

from crossgate.batch import ClipBatch
from crossgate.cluster.ray_train import launch
from crossgate.config import DataConfig
from crossgate.errors import UserError
from crossgate.evaluation import read_results
from crossgate.model.store import load_model
from crossgate.runs import features
from crossgate.runs.context import run_directory
from crossgate.runs.features import FeatureLoader

NAMES = ("rgb", "audio")


def table(clips: int) -> ClipBatch:
    """Clips whose features tell which clip they are."""
    number = torch.arange(clips)
    return ClipBatch(
        modalities=NAMES,
        streams={name: number.float().unsqueeze(1).repeat(1, 3) for name in NAMES},
        present=torch.ones(clips, 2, dtype=torch.bool),
        group=number,
        labels={"action": number % 3},
        degraded=torch.zeros(clips, 2),
        clip=number,
        keys=[f"clip{i}" for i in range(clips)],
    )


def loader(
    clips: int, batch: int, tail: str = "drop", rank: int = 0, ranks: int = 1, parts: int = 1, of: str = "these"
) -> FeatureLoader:
    data = DataConfig(global_batch=batch, tail=tail)  # type: ignore[arg-type]
    micro = batch // ranks // parts
    return FeatureLoader(table(clips), data, of, seed=3, rank=rank, ranks=ranks, micro_batch=micro)


@given(clips=st.integers(8, 60), batch=st.sampled_from([4, 8]), tail=st.sampled_from(["drop", "wrap"]))
@settings(max_examples=25, deadline=None)
def test_each_clip_comes_at_most_once_an_epoch_and_all_do_with_wrap(clips: int, batch: int, tail: str) -> None:
    one = loader(clips, batch, tail)
    epochs = [torch.cat([b.clip for b in islice(it, one.steps_per_epoch)]) for it in [iter(one)] for _ in range(2)]
    for epoch in epochs:
        whole = epoch[: clips if tail == "wrap" else len(epoch)]
        assert len(set(whole.tolist())) == len(whole)
        if tail == "wrap":
            assert set(epoch.tolist()) == set(range(clips))
    assert epochs[0].tolist() != epochs[1].tolist()


@given(
    ranks=st.sampled_from([1, 2, 4]),
    parts=st.sampled_from([1, 2]),
    stop=st.integers(0, 9),
    after=st.sampled_from([1, 2]),
)
@settings(max_examples=25, deadline=None)
def test_what_is_accumulated_together_does_not_depend_on_ranks_or_restarts(
    ranks: int, parts: int, stop: int, after: int
) -> None:
    straight = [batch.clip.tolist() for batch in islice(loader(30, 8, parts=parts), 12 * parts)]
    whole = [batch.clip.tolist() for batch in islice(loader(30, 8), 12)]
    assert [clip for part in straight for clip in part] == [clip for batch in whole for clip in batch]
    state = None
    seen: list[list[int]] = []
    for count, steps in ((ranks, stop), (after, 12 - stop)):
        if not steps:
            continue
        own = [loader(30, 8, rank=r, ranks=count, parts=parts) for r in range(count)]
        for one in own:
            if state is not None:
                one.load_state_dict(state)
        shares = [[b.clip.tolist() for b in islice(one, steps * parts)] for one in own]
        state = own[0].state_dict()
        seen += [[clip for part in together for clip in part] for together in zip(*shares, strict=True)]
    assert seen == straight


def test_too_few_clips_and_states_of_others_are_refused() -> None:
    with pytest.raises(UserError, match="global batch of 8"):
        loader(7, 8)
    with pytest.raises(UserError, match=r"other features \(clips\)"):
        loader(9, 8).load_state_dict(loader(10, 8).state_dict())
    with pytest.raises(UserError, match=r"other features \(features\)"):  # as many clips, of another index
        loader(9, 8, of="those").load_state_dict(loader(9, 8).state_dict())


@pytest.fixture(scope="module")
def frozen(road: Path, tmp_path_factory: pytest.TempPathFactory):
    """A finished run on kept features, and what makes another one."""
    folder = tmp_path_factory.mktemp("frozen")

    def start(name: str, backbone: str = "test_convnext", data: dict | None = None, **finetune: object) -> Path:
        keys = {"task": "violence", "freeze": True, "features": str(folder / "features"), **finetune}
        tree = tiny_tree(road, folder, "finetune", finetune=keys, run={"output": str(folder), "name": name})
        tree["model"]["encoders"]["rgb"]["backbone"] = backbone
        tree["data"] |= data or {}
        launch(write_recipe(folder / f"{name}.yaml", tree))
        return folder / name

    return start("first"), start


def test_measured_on_features_as_on_clips(road: Path, frozen, tmp_path: Path) -> None:
    directory, _ = frozen
    sections = {"evaluation": {"model": str(directory), "bootstrap": 50}}
    recipe = write_recipe(tmp_path / "again.yaml", tiny_tree(road, tmp_path, "evaluate", **sections))
    launch(recipe)
    on_clips, _ = read_results(run_directory(recipe) / "results.json")
    on_features, _ = read_results(directory / "results.json")
    for name in ("test/average_precision", "test/accuracy"):
        assert on_clips[name] == pytest.approx(on_features[name], abs=1e-5), name


def test_a_second_run_decodes_nothing(frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a clip was decoded again")

    monkeypatch.setattr(features, "sequential", never)
    directory, start = frozen
    first, second = (load_model(run)[0].network for run in (directory, start("second", unimodal_weight=0.7)))
    assert first.standardised
    assert torch.equal(first.feature_mean, second.feature_mean)  # from disk as from the encoders, modality by modality
    assert torch.equal(first.feature_scale, second.feature_scale)


def test_features_belong_to_the_encoders_not_to_the_run(frozen) -> None:
    directory, start = frozen
    folder = directory.parent / "features"
    before = set(folder.glob("*.safetensors"))
    start("same-encoders", init=str(directory))
    assert set(folder.glob("*.safetensors")) == before
    start("other-encoders", backbone="test_vit")
    assert len(set(folder.glob("*.safetensors"))) == 2 * len(before)


def test_features_are_not_taken_over_where_classes_have_other_numbers(road: Path, frozen, tmp_path: Path) -> None:
    directory, start = frozen
    kept = set((directory.parent / "features").glob("train-*.safetensors"))
    data = {"index": str(other_class_order(road / "shards", tmp_path / "turned"))}
    start("other-order", data=data)
    (new,) = set((directory.parent / "features").glob("train-*.safetensors")) - kept
    before, after = (features._read(path) for path in (next(iter(kept)), new))
    assert after.keys == before.keys
    known = before.labels["violence"] >= 0
    assert torch.equal(after.labels["violence"][known], 1 - before.labels["violence"][known])
    with pytest.raises(UserError, match=r"other features \(features\).*classes of its beginning"):
        start("other-order")  # now on the index of before


def test_damaged_features_are_named(frozen) -> None:
    directory, start = frozen
    paths = list((directory.parent / "features").glob("train-*.safetensors"))
    for path in paths:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"train-\w+\.safetensors.*delete the file"):
        start("damaged", unimodal_weight=0.1)
    for path in paths:
        path.unlink()
    assert (start("damaged", unimodal_weight=0.1) / "results.json").exists()


def test_features_need_frozen_encoders(road: Path, tmp_path: Path) -> None:
    tree = tiny_tree(road, tmp_path, "finetune", finetune={"features": "somewhere"})
    with pytest.raises(UserError, match="set freeze to true"):
        write_recipe(tmp_path / "x.yaml", tree)
