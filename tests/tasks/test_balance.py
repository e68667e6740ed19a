"""Balance between modalities while fine-tuning: slowed encoders of every kind of weight, blended losses."""

from __future__ import annotations

from statistics import NormalDist
from types import ModuleType

import numpy as np
import pytest
import torch

from crossgate.errors import UserError
from crossgate.tasks import Task, build_task
from crossgate.tasks.draws import clip_draws
from crossgate.tasks.finetune import SALT


def gradients(task: Task, batch: object) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Every parameter's gradient, and the report."""
    loss, report = task(batch)
    loss.backward()
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}, report


def built(small: ModuleType, **settings: object) -> tuple[Task, object]:
    recipe = small.recipe("finetune")
    recipe = recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update=settings)})
    return build_task(recipe, small.VOCABULARIES).double(), small.clips(recipe)


def test_every_weight_of_a_slowed_encoder_gets_its_factor_and_nothing_else_does(small: ModuleType) -> None:
    plain, _ = gradients(*built(small))
    slowed, report = gradients(*built(small, modulation=0.5))
    factors = {name: float(value) for name, value in report.items() if name.startswith("gradient/factor_")}
    assert min(factors.values()) < 0.7 and max(factors.values()) == 1
    kinds = set()
    for name, slope in plain.items():
        modality = name.split("encoders.")[1].split(".")[0] if "encoders." in name else ""
        factor = factors[f"gradient/factor_{modality}"] if modality else 1.0
        torch.testing.assert_close(slowed[name], factor * slope, rtol=1e-9, atol=1e-12, msg=name)
        kinds |= {slope.ndim} if modality else set()
    assert {1, 4} <= kinds, "weights and biases, not those of convolutions alone"


def test_noise_reaches_every_weight_of_every_encoder_and_is_another_in_each_step(small: ModuleType) -> None:
    slowed, _ = gradients(*built(small, modulation=0.5))
    task, batch = built(small, modulation=0.5, modulation_noise=1.0)
    noisy, _ = gradients(task, batch)
    again, _ = gradients(*built(small, modulation=0.5, modulation_noise=1.0))
    for name, slope in slowed.items():
        torch.testing.assert_close(again[name], noisy[name], rtol=0, atol=0)
        assert ("encoders." in name) == (not torch.equal(noisy[name], slope)), name
    task.zero_grad()
    later, _ = gradients(task, batch)
    assert not any(torch.equal(later[name], noisy[name]) for name in later if "encoders." in name)


def test_blended_losses_replace_the_one_weight_of_all_modalities(small: ModuleType) -> None:
    same, _ = gradients(*built(small, unimodal_weight=0.4))
    blended, _ = gradients(*built(small, blend=(1.0, 0.1, 0.1, 0.1, 0.1)))
    for name, slope in same.items():
        torch.testing.assert_close(blended[name], slope, rtol=1e-9, atol=1e-12)
    alone, _ = gradients(*built(small, blend=(0.0, 1.0, 0.0, 0.0, 0.0)))
    moved = {name.split("encoders.")[1].split(".")[0] for name, s in alone.items() if "encoders." in name and s.any()}
    assert moved == {"rgb"}


def test_a_blend_of_another_length_is_refused(small: ModuleType) -> None:
    with pytest.raises(UserError, match=r"finetune\.blend.*of the fused head, rgb"):
        built(small, blend=(1.0, 1.0))


@pytest.mark.parametrize(
    ("idle", "complaint"),
    [
        ({"unimodal_weight": 0.0}, r"heads of rgb, flow, audio, depth say.* above 0 in finetune\.unimodal_weight, or"),
        ({"blend": (1.0, 0.1, 0.0, 0.1, 0.1)}, r"heads of flow say.* above 0 in finetune\.blend, or"),
        ({"blend": (0.0, 0.1, 0.0, 0.1, 0.1)}, r"heads of flow say.* above 0 in finetune\.blend, or"),
    ],
)
def test_encoders_are_not_slowed_by_heads_that_do_not_learn(small: ModuleType, idle: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=rf"^finetune\.modulation: it goes by what the {complaint} set finetune.modul"):
        built(small, modulation=0.5, **idle)
    built(small, **idle)


def test_heads_whose_scores_are_fused_learn_without_a_loss_of_their_own(small: ModuleType) -> None:
    fusion = {"fusion": {"name": "average_probabilities"}}
    recipe = small.recipe("finetune", **fusion, finetune={"modulation": 0.5, "unimodal_weight": 0.0})
    slopes, _ = gradients(build_task(recipe, small.VOCABULARIES), small.clips(recipe))
    heads = {
        name.split("unimodal_heads.")[1].split(".")[0] for name, s in slopes.items() if "_heads" in name and s.any()
    }
    assert heads == set(recipe.data.clip.modalities)
    recipe = small.recipe("finetune", **fusion, finetune={"modulation": 0.5, "blend": (0.0, 0.0, 1.0, 1.0, 1.0)})
    with pytest.raises(UserError, match="heads of rgb say"):
        build_task(recipe, small.VOCABULARIES)


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext", "test_efficientnet"])
def test_every_weight_gets_the_formula_of_gradient_modulation_and_noise(small: ModuleType, backbone: str) -> None:
    """OGM-GE written out with NumPy at the encoders' output, taken to each weight by the chain rule."""
    names = ("rgb", "flow", "audio", "depth")
    encoders = {name: {"backbone": backbone, "norm": "group", "temporal": "attention"} for name in names}
    model = {"dim": 16, "embedding": 8, "encoders": encoders, "fusion": {"name": "softmax", "hidden": 8}}
    recipe = small.recipe("finetune", model=model, finetune={"modulation": 0.5, "modulation_noise": 0.7})
    task, batch = build_task(recipe, small.VOCABULARIES).double(), small.clips(recipe)
    found, report = gradients(task, batch)

    task = build_task(recipe, small.VOCABULARIES).double()
    weights, step = {n: p for n, p in task.named_parameters() if "encoders." in n}, task.step
    task.modulation = 0.0
    kept = []
    task.model.register_forward_hook(lambda module, given, output: kept.append(output))
    loss, _ = task(batch)
    features = kept[0].features
    (slope,) = torch.autograd.grad(loss, features, retain_graph=True)  # (B, M, D)
    factors = by_hand_factors(kept[0].unimodal_logits, batch.labels["action"], batch.present, 0.5)
    for name, factor in zip(names, factors):
        assert float(report[f"gradient/factor_{name}"]) == pytest.approx(factor, abs=1e-9)
    draws = clip_draws(task.seed + SALT, step, batch.clip, slope[0].numel()).view_as(slope)
    changed = torch.zeros_like(slope)
    for m, factor in enumerate(factors):
        here = batch.present[:, m]
        spread = slope[here, m].numpy().std()  # over all numbers of all clips that have it
        normal = np.vectorize(NormalDist().inv_cdf)(draws[here, m].double().numpy() + 2**-25)
        changed[here, m] = factor * slope[here, m] + 0.7 * spread * torch.from_numpy(normal)
    expected = torch.autograd.grad(features, list(weights.values()), grad_outputs=changed)
    assert {1, 2, 3, 4} <= {one.ndim for one in expected} | ({3} if backbone != "test_vit" else set())
    for name, wanted in zip(weights, expected):
        torch.testing.assert_close(found[name], wanted, rtol=1e-7, atol=1e-12, msg=name)


def by_hand_factors(logits: torch.Tensor, labels: torch.Tensor, present: torch.Tensor, strength: float) -> list[float]:
    """k_m of each modality."""
    said = logits.detach().numpy()
    said = np.exp(said) / np.exp(said).sum(-1, keepdims=True)  # (B, M, K)
    score = []
    for m in range(said.shape[1]):
        rows = [i for i in range(len(labels)) if present[i, m] and labels[i] >= 0]
        score.append(np.mean([said[i, m, labels[i]] for i in rows]))
    ahead = [own / np.mean([other for n, other in enumerate(score) if n != m]) for m, own in enumerate(score)]
    return [1 - np.tanh(strength * one) if one > 1 else 1.0 for one in ahead]
