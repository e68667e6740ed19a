"""Model directories: round trip, refusals, replacement that a kill cannot tear, warm starts."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from crossgate.config import ClipConfig, EncoderConfig, FusionConfig, ModelConfig
from crossgate.errors import UserError
from crossgate.model.classifier import Classifier
from crossgate.model.contrastive import ContrastiveModel
from crossgate.model.network import MultimodalNetwork
from crossgate.model.store import (
    ModelCard,
    keep_threshold,
    load_encoders,
    load_heads,
    load_model,
    model_directory,
    save_model,
)

CLIP = ClipConfig(modalities=("rgb", "audio"), size=32, frames=2, mels=32, seconds=0.5)


def config(fusion: str = "softmax", backbone: str = "test_vit") -> ModelConfig:
    return ModelConfig(
        dim=16,
        embedding=8,
        encoders={name: EncoderConfig(backbone=backbone) for name in CLIP.modalities},
        fusion=FusionConfig(name=fusion, hidden=8),
    )


def contrastive(seed: int = 0, model: ModelConfig | None = None, clip: ClipConfig = CLIP) -> ContrastiveModel:
    torch.manual_seed(seed)
    return ContrastiveModel(MultimodalNetwork(model or config(), clip), temperature=0.05)


def card(**changes: object) -> ModelCard:
    return ModelCard.model_validate({"kind": "contrastive", "model": config(), "clip": CLIP, **changes})


def clips() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    streams = {name: torch.randn(3, *CLIP.shape(name), generator=draw) for name in CLIP.modalities}
    return streams, torch.tensor([[True, True], [True, False], [False, True]])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", contrastive(), card(provenance={"step": 3}))
    return tmp_path / "model"


@pytest.mark.parametrize("fusion", ["concat", "mean", "sigmoid", "softmax", "gmu"])
def test_round_trip_gives_equal_outputs(tmp_path: Path, fusion: str) -> None:
    model = contrastive(model=config(fusion)).eval()
    save_model(tmp_path / "model", model, card(model=config(fusion)))
    again, _ = load_model(tmp_path / "model")
    a, b = model(*clips()), again(*clips())
    assert torch.equal(a.embeddings, b.embeddings)
    assert torch.equal(a.fused_embedding, b.fused_embedding)
    assert torch.equal(a.scale, b.scale)


def test_a_classifier_comes_back_with_its_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier(MultimodalNetwork(config(), CLIP, classes=2), ("fight", "nofight")).eval()
    written = save_model(
        tmp_path / "m",
        model,
        card(kind="classifier", task="violence", classes=("fight", "nofight"), positive="fight"),
    )
    again, read = load_model(tmp_path / "m")
    assert read == written
    assert isinstance(again, Classifier)
    assert again.classes == ("fight", "nofight")
    assert torch.equal(model(*clips()).logits, again(*clips()).logits)


def test_a_binary_task_is_answered_by_the_threshold_that_is_kept(tmp_path: Path) -> None:
    classes = ("calm", "storm")
    binary = card(kind="classifier", classes=classes, positive="storm")
    save_model(tmp_path / "model", Classifier(MultimodalNetwork(config(), CLIP, classes=2), classes), binary)
    scores = {"calm": 0.6, "storm": 0.4}
    before = load_model(tmp_path / "model")[1]
    assert before.label_of(scores) == "calm"
    keep_threshold(tmp_path / "model", 0.4)
    after = load_model(tmp_path / "model")[1]
    assert after == before.model_copy(update={"threshold": 0.4}) and after.digest
    assert (after.label_of(scores), after.label_of(scores, threshold=0.41)) == ("storm", "calm")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.json", "model.safetensors"}
    three = card(kind="classifier", classes=("a", "b", "c"), threshold=0.1)
    assert three.label_of({"a": 0.3, "b": 0.4, "c": 0.3}) == "b"


def test_bf16_weights_are_stored_as_fp32(tmp_path: Path) -> None:
    save_model(tmp_path / "model", contrastive().bfloat16(), card())
    again, _ = load_model(tmp_path / "model")
    assert {p.dtype for p in again.parameters()} == {torch.float32}


def test_a_run_directory_will_do(saved: Path) -> None:
    _, read = load_model(saved.parent)
    assert read.provenance == {"step": 3}


def test_nothing_is_left_beside_it(saved: Path) -> None:
    save_model(saved, contrastive(1), card())
    assert [p.name for p in saved.parent.iterdir()] == ["model"]
    assert sorted(p.name for p in saved.iterdir()) == ["model.json", "model.safetensors"]


def test_a_kill_between_the_two_renames_loses_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_model(saved)[0].state_dict()
    rename, calls = os.rename, []

    def killed(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save_model(saved, contrastive(1), card())
    monkeypatch.undo()
    assert not saved.exists()
    after = load_model(saved)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_full_disk_is_one_line_and_the_earlier_model_stays(saved: Path) -> None:
    before = (saved / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"model: cannot write a model \(.*\); free some space") as caught:
            save_model(saved, contrastive(seed=1), card())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert (saved / "model.safetensors").read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("missing", ["model.json", "model.safetensors"])
def test_missing_files(saved: Path, missing: str) -> None:
    (saved / missing).unlink()
    with pytest.raises(UserError, match="no model here" if missing == "model.json" else "weights are missing"):
        load_model(saved)


def test_another_format_version(saved: Path) -> None:
    tree = json.loads((saved / "model.json").read_text())
    (saved / "model.json").write_text(json.dumps(tree | {"format": 2}))
    with pytest.raises(UserError, match=r"model\.json: model format 2; expected 1"):
        load_model(saved)


def test_damaged_card(saved: Path) -> None:
    tree = json.loads((saved / "model.json").read_text())
    tree["model"]["dims"] = 3
    (saved / "model.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"key 'model\.dims'"):
        load_model(saved)
    (saved / "model.json").write_text("{")
    with pytest.raises(UserError, match="not readable"):
        load_model(saved)


def test_damaged_weights(saved: Path) -> None:
    weights = bytearray((saved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (saved / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="digest mismatch"):
        load_model(saved)


def test_weights_that_do_not_fit_the_card(saved: Path) -> None:
    tree = json.loads((saved / "model.json").read_text())
    tree["model"]["dim"] = 24
    (saved / "model.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="do not fit the card .*size mismatch for network"):
        load_model(saved)


def test_a_pickle_is_never_read(saved: Path) -> None:
    """A pickled file under the weights' name, with its right digest, is refused as no safetensors."""
    import hashlib

    torch.save({"x": torch.zeros(1)}, saved / "model.safetensors")
    tree = json.loads((saved / "model.json").read_text())
    tree["digest"] = hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    (saved / "model.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="not readable as safetensors"):
        load_model(saved)


def test_warm_start_takes_encoders_and_fusion(saved: Path) -> None:
    torch.manual_seed(9)
    network = MultimodalNetwork(config(), CLIP, classes=2)
    result = load_encoders(network, saved.parent)
    assert not result.skipped
    assert set(result.loaded) == set(network.state_dict())
    pretrained = load_model(saved)[0].network.state_dict()
    assert all(torch.equal(tensor, pretrained[name]) for name, tensor in network.state_dict().items())


def test_warm_start_says_what_it_did_not_take(saved: Path) -> None:
    clip = CLIP.model_copy(update={"modalities": ("rgb", "flow", "audio"), "frames": 3})
    network = MultimodalNetwork(config(), clip)
    own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    result = load_encoders(network, saved)
    assert result.skipped["encoders.flow"] == "no such modality there"
    assert result.skipped["fusion"] == "it fuses rgb, audio"
    assert "shape" in result.skipped["encoders.rgb.temporal.place"]
    assert all(name.startswith(("encoders.rgb.", "encoders.audio.")) for name in result.loaded)
    kept = [name for name in own if name not in result.loaded]
    assert all(torch.equal(own[name], network.state_dict()[name]) for name in kept)
    assert "encoders.flow: no such modality there" in str(result)


def test_warm_start_from_another_fusion_takes_encoders_only(saved: Path) -> None:
    result = load_encoders(MultimodalNetwork(config("gmu"), CLIP), saved)
    assert result.skipped == {"fusion": "its fusion is softmax, here gmu"}
    assert not any(name.startswith("fusion.") for name in result.loaded)


def test_what_starts_from_random_weights_is_counted_and_told_in_a_short_line(saved: Path) -> None:
    wider = config().model_copy(update={"dim": 32})
    result = load_encoders(MultimodalNetwork(wider, CLIP), saved)
    assert {"encoders.rgb.project.weight", "encoders.audio.norm.weight"} <= set(result.random)
    assert all(name.startswith("encoders.") for name in result.random)
    assert str(result).endswith(f"; {len(result.skipped) - 3} more") and str(result).count("its shape is") <= 3


def test_warm_start_from_something_that_does_not_fit_at_all(saved: Path) -> None:
    other = MultimodalNetwork(config("gmu", backbone="test_convnext"), CLIP)
    with pytest.raises(UserError, match="nothing in it fits"):
        load_encoders(other, saved)
    shutil.rmtree(saved)
    with pytest.raises(UserError, match="no model here"):
        load_encoders(other, saved)


def test_of_a_search_its_trials_are_named(saved: Path, tmp_path: Path) -> None:
    for trial in ("d", "b", "a", "c"):
        shutil.copytree(saved, tmp_path / "search" / trial / "model")
    with pytest.raises(UserError, match="no model here.*; give a run inside it: a, b, c or another of 4$"):
        model_directory(tmp_path / "search")


def test_heads_come_along_from_a_classifier_of_the_same_classes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = Classifier(MultimodalNetwork(config(), CLIP, classes=2), ("fight", "nofight"))
    first.network.feature_mean += 0.5
    save_model(tmp_path / "first", first, card(kind="classifier", classes=first.classes))
    second = Classifier(MultimodalNetwork(config(), CLIP, classes=2), ("fight", "nofight"))
    load_encoders(second.network, tmp_path / "first")
    assert load_heads(second, tmp_path / "first").loaded
    mine, theirs = second.state_dict(), first.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    other = Classifier(MultimodalNetwork(config(), CLIP, classes=2), ("calm", "storm"))
    assert not load_heads(other, tmp_path / "first").loaded


@pytest.mark.parametrize("fusion", ["classwise_logits", "fixed_probabilities", "bottleneck", "sparse"])
def test_classifiers_of_every_kind_of_fusion_come_back(tmp_path: Path, fusion: str) -> None:
    settings = config(fusion)
    settings = settings.model_copy(update={"fusion": settings.fusion.model_copy(update={"weights": (1.0, 2.0)})})
    model = Classifier(MultimodalNetwork(settings, CLIP, classes=2), ("fight", "nofight")).eval()
    about = card(kind="classifier", model=settings, task="violence", classes=("fight", "nofight"), positive="fight")
    save_model(tmp_path / "m", model, about)
    again, _ = load_model(tmp_path / "m")
    assert torch.equal(model(*clips()).logits, again(*clips()).logits)


def test_a_fusion_that_knows_raw_features_stays_behind_where_they_will_be_standardised(saved: Path) -> None:
    result = load_encoders(MultimodalNetwork(config(), CLIP), saved, raw_fusion=False)
    assert result.skipped == {"fusion": "it knows features that are not standardised"}
    model = contrastive()
    model.network.feature_mean += 0.5
    save_model(saved, model, card())
    assert not load_encoders(MultimodalNetwork(config(), CLIP), saved, raw_fusion=False).skipped
