"""A contrast over micro-batches is the contrast over their union: the same loss, the same gradients."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from crossgate.tasks import Task, build_task
from crossgate.tasks.encoded import Encoded
from crossgate.training.accumulate import contrasts, step_as_one
from crossgate.training.engine import Step

PARTS = 4


class Engine:
    """What DeepSpeed's does with micro-batches, and nothing else."""

    def __init__(self, task: Task) -> None:
        self.module, self.steps = Step(task, torch.device("cpu"), "fp32"), 0

    def __call__(self, *given: Any, **options: Any) -> Any:
        return self.module(*given, **options)

    def backward(self, loss: Tensor) -> None:
        (loss / PARTS).backward()

    def step(self) -> None:
        self.steps += 1


def gradients(task: Task) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in task.named_parameters() if parameter.grad is not None}


def fp64(batch: Any) -> Any:
    batch.streams = {name: stream.double() for name, stream in batch.streams.items()}
    return batch


def micro_batches(batch: Any) -> list[Any]:
    size = len(batch) // PARTS
    return [batch.select(slice(i * size, (i + 1) * size)) for i in range(PARTS)]


@pytest.mark.parametrize(
    ("objective", "fusion"),
    [
        ("infonce", {"name": "softmax", "modality_dropout": 0.3, "entropy": 0.1}),
        ("siglip", {"name": "sparse"}),
        ("vicreg", {"name": "concat"}),
    ],
)
def test_a_step_as_one_has_the_gradient_of_the_undivided_batch(small: ModuleType, objective, fusion) -> None:
    pretext = {"tasks": ["rotation", "flip", "channels", "arrow", "synchrony"] if objective == "vicreg" else []}
    agreement = 3 if objective == "infonce" else 0
    sections = {
        "pretrain": {"objective": objective, "agreement": agreement, "pretext": pretext},
        "engine": {"accumulation": PARTS},
    }
    recipe = small.recipe("pretrain", fusion=fusion, **sections)
    batch = fp64(small.clips(recipe))
    undivided = build_task(recipe, {}).double()
    loss, report = undivided(batch)
    loss.backward()
    task = build_task(recipe, {}).double()
    assert contrasts(task)
    engine = Engine(task)
    as_one, same_report = step_as_one(engine, micro_batches(batch), engine)
    assert engine.steps == PARTS
    assert task.forwards == PARTS  # draws count micro-batches, and each but once
    torch.testing.assert_close(as_one, loss.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(same_report, report, rtol=1e-9, atol=1e-9, equal_nan=True)
    theirs, mine = gradients(undivided), gradients(task)
    assert mine.keys() == theirs.keys()
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_dropout_hides_the_same_the_second_time(small: ModuleType) -> None:
    encoders = {name: {"backbone": "test_vit", "drop_path": 0.5} for name in ("rgb", "flow", "audio", "depth")}
    model = {"dim": 16, "embedding": 8, "encoders": encoders}
    recipe = small.recipe("pretrain", engine={"accumulation": PARTS}, model=model)
    batches = micro_batches(small.clips(recipe))
    kept = build_task(recipe, {})
    torch.manual_seed(3)
    parts = [kept.encode(batch) for batch in batches]
    whole = Encoded(
        {name: torch.cat([part.rows[name] for part in parts]) for name in parts[0].rows},
        parts[0].scalars,
        {name: torch.cat([part.facts[name] for part in parts]) for name in parts[0].facts},
    )
    kept.score(whole)[0].backward()
    after = torch.get_rng_state()
    task = build_task(recipe, {})
    engine = Engine(task)
    torch.manual_seed(3)
    step_as_one(engine, batches, engine)
    torch.testing.assert_close(gradients(task), gradients(kept), rtol=1e-4, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), after)  # what comes next draws on, as if nothing had been done twice


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext", "lcnet_035"])
def test_recomputed_activations_change_no_gradient(small: ModuleType, backbone: str) -> None:
    encoder = {"backbone": backbone, "norm": "group"}
    model = {"dim": 16, "embedding": 8, "encoders": {name: encoder for name in ("rgb", "audio")}}
    recipe = small.recipe("pretrain", clip={"modalities": ["rgb", "audio"]}, model=model)
    found, saved = [], []
    for recomputed in (False, True):
        task, bytes_kept = build_task(recipe, {}), [0]
        if recomputed:
            task.checkpoint_activations()

        def pack(tensor: Tensor, count: list[int] = bytes_kept) -> Tensor:
            count[0] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = task(small.clips(recipe))
        loss.backward()
        found.append(gradients(task))
        saved.append(bytes_kept[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
    assert saved[1] < 0.7 * saved[0]
