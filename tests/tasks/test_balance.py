"""Balance between modalities while fine-tuning: slowed encoders of every kind of weight, blended losses."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from crossgate.errors import UserError
from crossgate.tasks import Task, build_task


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
