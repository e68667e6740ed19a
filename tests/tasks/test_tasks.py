"""Tasks: what they learn, what they report, what trains and how fast."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from crossgate.config import OptimConfig, Recipe
from crossgate.errors import UserError
from crossgate.model.fusion import FUSIONS
from crossgate.model.store import ModelCard, save_model
from crossgate.tasks import Task, build_task
from crossgate.tasks.pretrain import spread

KINDS = ["pretrain", "finetune"]


def fit(task: Task, batch: object, steps: int = 25) -> tuple[float, float]:
    """Returns the loss before and after some steps on one batch."""
    optimizer = torch.optim.AdamW(task.parameter_groups(OptimConfig(lr=3e-3)))
    losses = []
    for _ in range(steps):
        loss, _ = task(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_can_be_learnt(small: ModuleType, kind: str) -> None:
    recipe = small.recipe(kind)
    before, after = fit(build_task(recipe, small.VOCABULARIES), small.clips(recipe))
    assert after < 0.75 * before


@pytest.mark.parametrize("fusion", sorted(FUSIONS))
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter(small: ModuleType, kind: str, fusion: str) -> None:
    recipe = small.recipe(kind, fusion={"name": fusion})
    if kind == "pretrain" and FUSIONS[fusion].needs_logits:
        with pytest.raises(UserError, match=r"model\.fusion\.name.*pretraining has no classes"):
            build_task(recipe, small.VOCABULARIES)
        return
    task = build_task(recipe, small.VOCABULARIES)
    loss, _ = task(small.clips(recipe))
    loss.backward()
    dead = [name for name, p in task.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead


@pytest.mark.parametrize("kind", KINDS)
def test_report_holds_detached_scalars_under_plain_names(small: ModuleType, kind: str) -> None:
    recipe = small.recipe(kind)
    loss, report = build_task(recipe, small.VOCABULARIES)(small.clips(recipe))
    assert loss.ndim == 0
    assert all(value.ndim == 0 and not value.requires_grad for value in report.values())
    common = {"loss/total", "gate/weight_rgb", "gate/weight_audio", "gate/entropy"}
    own = {
        "pretrain": {"loss/pair_rgb_flow", "loss/fused_depth", "contrast/top1", "contrast/logit_scale"},
        "finetune": {"accuracy", "accuracy_flow", "loss/fused", "loss/depth"},
    }[kind]
    assert common | own <= report.keys()
    assert report["loss/total"] == loss
    assert 0 <= report["gate/entropy"] <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_equal_weights_are_reported_as_equal_under_modality_dropout(small: ModuleType, kind: str) -> None:
    recipe = small.recipe(kind, fusion={"name": "mean", "modality_dropout": 0.5})
    task, batch = build_task(recipe, small.VOCABULARIES), small.clips(recipe)
    visible = task.model.network.hide(batch.present, task.draws(batch))
    task.forwards.zero_()
    assert (visible != batch.present).any()
    _, report = task(batch)
    assert report["gate/entropy"] == pytest.approx(1)
    weights = visible / visible.sum(1, keepdim=True).clamp(min=1)
    for m, name in enumerate(recipe.data.clip.modalities):
        assert report[f"gate/weight_{name}"] == pytest.approx(weights[visible[:, m], m].mean().item()), name


@pytest.mark.parametrize("kind", KINDS)
def test_removing_a_corrupt_clip_changes_nothing(small: ModuleType, kind: str) -> None:
    recipe = small.recipe(kind)
    task, batch = build_task(recipe, small.VOCABULARIES), small.clips(recipe)
    with_it, _ = task(batch)
    without, _ = task(batch.select(batch.present.any(1).nonzero().squeeze(1)))
    torch.testing.assert_close(with_it, without, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_corrupt_clips_gives_zero_and_no_gradient(small: ModuleType, kind: str) -> None:
    recipe = small.recipe(kind)
    task, batch = build_task(recipe, small.VOCABULARIES), small.clips(recipe)
    batch.present[:] = False
    loss, report = task(batch)
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in task.parameters())
    assert report["gate/entropy"].isnan()  # nothing was measured


@pytest.mark.parametrize("clip", [{"modalities": ["rgb", "flow"]}, {"modalities": ["rgb", "audio", "depth"]}])
def test_subsets_of_modalities(small: ModuleType, clip: dict) -> None:
    recipe = small.recipe("pretrain", clip=clip)
    task = build_task(recipe, {})
    loss, report = task(small.clips(recipe))
    loss.backward()
    assert loss > 0
    assert (
        sum(name.startswith("loss/pair_") for name in report)
        == len(clip["modalities"]) * (len(clip["modalities"]) - 1) / 2
    )
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in task.model.network.fusion.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_what_keeps_gates_from_collapse_is_part_of_the_loss(small: ModuleType, kind: str) -> None:
    losses = {}
    for balance, entropy in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        recipe = small.recipe(kind, fusion={"name": "sparse", "balance": balance, "entropy": entropy})
        loss, report = build_task(recipe, small.VOCABULARIES)(small.clips(recipe))
        losses[balance, entropy] = loss.item()
    plain = losses[0.0, 0.0]
    assert losses[1.0, 0.0] - plain == pytest.approx(report["loss/balance"].item(), rel=1e-3)
    assert losses[0.0, 1.0] - plain == pytest.approx(1, rel=1e-3)  # hard weights are as uneven as can be
    assert report["loss/concentration"].item() == pytest.approx(1)


@pytest.mark.parametrize("objective", ["siglip", "vicreg"])
def test_other_objectives_train_everything_too(small: ModuleType, objective: str) -> None:
    recipe = small.recipe("pretrain", pretrain={"objective": objective, "temperature": 0.1, "tile": 3})
    task, batch = build_task(recipe, {}), small.clips(recipe)
    loss, report = task(batch)
    loss.backward()
    assert {"loss/pair_rgb_flow", "loss/fused_depth"} <= report.keys()
    trained = [(name, p) for name, p in task.named_parameters() if p.requires_grad]
    assert not [name for name, p in trained if p.grad is None or not p.grad.abs().sum() > 0]
    assert all(p.ndim > 0 for p in task.parameters())
    task.zero_grad()
    before, after = fit(task, batch)
    assert after < before
    batch.present[:] = False
    assert task(batch)[0] == 0


def test_agreement_adds_its_part(small: ModuleType) -> None:
    losses = []
    for agreement, weight in ((0, 1.0), (2, 1.0), (2, 0.5)):
        recipe = small.recipe("pretrain", pretrain={"agreement": agreement, "agreement_weight": weight})
        loss, report = build_task(recipe, {})(small.clips(recipe))
        losses.append(loss.item())
        part = report["loss/agreement"].item() if agreement else 0.0
        assert losses[-1] - losses[0] == pytest.approx(weight * part, rel=1e-4)
    assert losses[1] > losses[2] > losses[0]


def test_tiles_change_nothing(small: ModuleType) -> None:
    losses = []
    for tile in (0, 3):
        recipe = small.recipe("pretrain", pretrain={"tile": tile})
        losses.append(build_task(recipe, {})(small.clips(recipe))[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)


def test_contrast_around_a_core_modality(small: ModuleType) -> None:
    recipe = small.recipe("pretrain", pretrain={"core": "flow"})
    _, report = build_task(recipe, {})(small.clips(recipe))
    assert {name for name in report if "pair" in name} == {
        f"loss/pair_{p}" for p in ("rgb_flow", "flow_audio", "flow_depth")
    }
    with pytest.raises(UserError, match=r"pretrain\.core.*no modality 'pose'"):
        build_task(small.recipe("pretrain", pretrain={"core": "pose"}), {})


def test_clips_of_one_group_are_no_negatives_unless_the_recipe_says_so(small: ModuleType) -> None:
    losses = {}
    for exclude in (True, False):
        recipe = small.recipe("pretrain", pretrain={"exclude_group": exclude})
        batch = small.clips(recipe)
        batch.group[:] = 0
        losses[exclude] = build_task(recipe, {})(batch)[0].item()
    assert losses[True] == pytest.approx(0, abs=1e-5)
    assert losses[False] > 0.5


def test_training_repeats_itself(small: ModuleType) -> None:
    recipe = small.recipe("pretrain", fusion={"modality_dropout": 0.5})
    first = fit(build_task(recipe, {}), small.clips(recipe), 4)
    torch.rand(10)
    assert fit(build_task(recipe, {}), small.clips(recipe), 4) == first


def test_modality_dropout_goes_on_where_a_restart_left_it(small: ModuleType) -> None:
    recipe = small.recipe("finetune", fusion={"modality_dropout": 0.5})
    task, batch = build_task(recipe, small.VOCABULARIES), small.clips(recipe)
    task(batch)
    again = build_task(recipe, small.VOCABULARIES)
    again.load_state_dict(task.state_dict())
    assert torch.equal(task.draws(batch), again.draws(batch))
    assert not torch.equal(task.draws(batch), build_task(recipe, small.VOCABULARIES).draws(batch))


@pytest.mark.parametrize("kind", KINDS)
def test_predict_is_repeatable_keeps_the_mode_and_does_not_count_as_a_step(small: ModuleType, kind: str) -> None:
    recipe = small.recipe(kind, fusion={"modality_dropout": 0.5})
    task, batch = build_task(recipe, small.VOCABULARIES), small.clips(recipe)
    first, second = task.predict(batch), task.predict(batch)
    assert task.training
    assert task.forwards == 0
    assert torch.equal(first.fused, second.fused)
    assert not first.fused.requires_grad
    assert first.weights is not None
    assert first.weights[~batch.present].abs().sum() == 0
    if kind == "pretrain":
        assert first.embeddings is not None
        assert first.logits is None
    else:
        assert first.logits is not None
        assert first.logits.shape == (len(batch), 3)
        assert first.unimodal_logits is not None
        assert first.unimodal_logits.shape == (len(batch), 4, 3)


def groups(task: Task, optim: OptimConfig) -> dict[str, tuple[float, float, set[str]]]:
    names = {id(p): name for name, p in task.named_parameters()}
    return {
        g["name"]: (g["lr"], g["weight_decay"], {names[id(p)] for p in g["params"]})
        for g in task.parameter_groups(optim)
    }


def test_parameter_groups_cover_everything_once_and_spare_norms(small: ModuleType) -> None:
    task = build_task(small.recipe("pretrain"), {})
    found = groups(task, OptimConfig(lr=0.1, weight_decay=0.5))
    covered = [name for _, _, names in found.values() for name in names]
    assert sorted(covered) == sorted(name for name, _ in task.named_parameters())
    for label, (lr, decay, _) in found.items():
        assert lr == 0.1
        assert decay == (0.5 if label.endswith("/decay") else 0.0)
    spared = found["rest/no_decay"][2] | found["encoders/no_decay"][2]
    assert "model.scale.raw" in spared
    assert "model.network.fusion.experts.bias" in spared
    assert "model.network.encoders.rgb.backbone.pos_embed" in spared
    assert "model.network.encoders.rgb.temporal.place" in spared
    assert "model.network.fusion.experts.weight" in found["rest/decay"][2]


@pytest.mark.parametrize("kind", KINDS)
def test_no_parameter_is_a_bare_scalar(small: ModuleType, kind: str) -> None:
    """DeepSpeed's broadcast views parameters as bytes, which fails for 0-d ones."""
    assert all(p.ndim > 0 for p in build_task(small.recipe(kind), small.VOCABULARIES).parameters())


@pytest.fixture
def pretrained(small: ModuleType, tmp_path: Path) -> Path:
    recipe: Recipe = small.recipe("pretrain", run={"seed": 77})
    task = build_task(recipe, {})
    save_model(tmp_path / "model", task.model, ModelCard(kind="contrastive", model=recipe.model, clip=recipe.data.clip))
    return tmp_path


def test_fine_tuning_starts_from_a_pretrained_run_with_slower_encoders(small: ModuleType, pretrained: Path) -> None:
    recipe = small.recipe("finetune", finetune={"init": str(pretrained), "encoder_lr_scale": 0.1})
    task, source = build_task(recipe, small.VOCABULARIES), build_task(small.recipe("pretrain", run={"seed": 77}), {})
    assert task.warm_start is not None
    assert not task.warm_start.skipped
    batch = small.clips(recipe)
    torch.testing.assert_close(task.predict(batch).features, source.predict(batch).features)
    rates = {label: lr for label, (lr, _, _) in groups(task, OptimConfig(lr=0.1)).items()}
    assert rates["encoders/decay"] == pytest.approx(0.01)
    assert rates["rest/decay"] == pytest.approx(0.1)


def test_from_scratch_the_encoders_learn_at_full_speed(small: ModuleType) -> None:
    task = build_task(small.recipe("finetune", finetune={"encoder_lr_scale": 0.1}), small.VOCABULARIES)
    assert {lr for lr, _, _ in groups(task, OptimConfig(lr=0.1)).values()} == {0.1}


def test_a_linear_probe_leaves_the_encoders_as_they_are(small: ModuleType, pretrained: Path) -> None:
    recipe = small.recipe("finetune", finetune={"init": str(pretrained), "freeze": True})
    task, batch = build_task(recipe, small.VOCABULARIES), small.clips(recipe)
    before = task.predict(batch).features
    start, end = fit(task, batch)
    assert end < start
    assert torch.equal(task.predict(batch).features, before)
    assert not any(name.startswith("encoders") for name in groups(task, OptimConfig()))


def test_balance_weighs_rare_classes_more(small: ModuleType) -> None:
    recipe = small.recipe("finetune", finetune={"balance": True})
    task = build_task(recipe, small.VOCABULARIES, {"action": [30, 10, 0]})
    assert task.class_weights.tolist() == pytest.approx([2 / 3, 2.0, 0.0])
    with pytest.raises(UserError, match=r"finetune\.balance"):
        build_task(recipe, small.VOCABULARIES)


def test_unknown_label_task_is_told_the_nearest(small: ModuleType) -> None:
    with pytest.raises(UserError, match=r"finetune\.task.*no labels 'actoin'.*did you mean 'action'"):
        build_task(small.recipe("finetune", finetune={"task": "actoin"}), small.VOCABULARIES)


def test_spread() -> None:
    present = torch.ones(400, dtype=torch.bool)
    directions = torch.nn.functional.normalize(torch.randn(400, 16), dim=-1)
    assert spread(directions, present) > 0.95
    assert spread(directions[:1].expand(400, -1), present) < 0.01
    assert spread(directions, ~present).isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_bf16(small: ModuleType, kind: str) -> None:
    recipe = small.recipe(kind)
    batch = small.clips(recipe)
    exact, _ = build_task(recipe, small.VOCABULARIES)(batch)
    task = build_task(recipe, small.VOCABULARIES).bfloat16()
    loss, _ = task(batch)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())
