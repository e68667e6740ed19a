"""Losses and gradients that are not finite: left out on every rank alike, gone back on, or the end of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from test_numbers import spawn
from tiny_run import TinyTask, global_batch, losses, run_fit, tiny_recipe
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from crossgate.config import OptimConfig
from crossgate.errors import UserError
from crossgate.training.checkpoint import newest_whole
from crossgate.training.metrics import read_metrics
from crossgate.training.schedule import lr_factor

CLOSE = {"rel": 0, "abs": 2e-5}
STEPS, LR = 12, 0.02


def plain(left_out: set[int], back: Mapping[int, int] | None = None) -> list[float]:
    """Losses of a plain loop in which some steps change nothing, and some go back to the weights of another one."""
    task, optim = TinyTask(seed=0), OptimConfig(lr=LR)
    optimizer = torch.optim.AdamW(task.parameter_groups(optim), lr=LR, betas=optim.betas)
    curve, kept = [], {}
    for step in range(1, STEPS + 1):
        for group, peak in zip(optimizer.param_groups, (LR, 0.3 * LR)):
            group["lr"] = peak * lr_factor(step, STEPS, optim)
        loss, _ = task(global_batch(step - 1, 16))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in task.parameters() if p.requires_grad], 1.0)
        if step in left_out:
            curve.append(math.nan)
        else:
            optimizer.step()
            curve.append(loss.item())
        kept[step] = (
            {name: value.clone() for name, value in task.state_dict().items()},
            {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()},
        )
        if step in (back or {}):
            weights, states = kept[back[step]]
            task.load_state_dict(weights)
            optimizer.state.update(states)
    return curve


def agree(curve: list[float | None], expected: list[float]) -> bool:
    assert [value is None for value in curve] == [math.isnan(value) for value in expected]
    return [value for value in curve if value is not None] == pytest.approx(
        [value for value in expected if not math.isnan(value)], **CLOSE
    )


@pytest.mark.parametrize(
    "engine", [{"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3}, {"zero_stage": 1, "offload": "optimizer"}]
)
def test_a_poisoned_step_is_left_out_and_its_clips_named(tmp_path, capsys, engine):
    recipe = tiny_recipe(tmp_path, "run", engine=engine, training={"nonfinite_skips": 2})
    run_fit(recipe, poison=[1, 6], validated=False)
    assert agree(losses(tmp_path, "run"), plain({1, 6}))
    said = " ".join(capsys.readouterr().err.split())
    assert "step 6 was left out, its loss or gradient is not finite: clips clip-5-0, clip-5-1" in said
    assert read_metrics(tmp_path / "run")[-1]["train/nonfinite_steps"] == 2


@pytest.mark.slow
def test_ranks_agree_on_what_one_of_them_met(tmp_path):
    case = {"output": str(tmp_path), "name": "run", "poison": [6], "validated": False}
    case["sections"] = {"engine": {"zero_stage": 2}, "training": {"nonfinite_skips": 1}}
    bf16 = case | {"name": "bf16", "sections": case["sections"] | {"engine": {"zero_stage": 1, "precision": "bf16"}}}
    ended = spawn([case, bf16], tmp_path, 2)
    assert [process.returncode for process in ended] == [0, 0], ended[0].stdout[-3000:]
    expected = plain({6})
    # The poison is in the last rank's share: the other one's loss is finite, and its weights must stay all the same.
    curve = losses(tmp_path, "run")
    assert curve[:5] + curve[6:] == pytest.approx(expected[:5] + expected[6:], **CLOSE)
    curve = losses(tmp_path, "bf16")
    assert curve[:5] + curve[6:] == pytest.approx(expected[:5] + expected[6:], abs=0.05)
    said = " ".join(ended[0].stdout.split())
    assert "step 6 was left out, its loss or gradient is not finite: clips clip-5-8, clip-5-9" in said
    assert "clip-5-0," not in said


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_too_many_and_the_run_goes_back(tmp_path, capsys, stage):
    training = {"nonfinite_skips": 1, "nonfinite_rollbacks": 1}
    recipe = tiny_recipe(tmp_path, "run", engine={"zero_stage": stage}, training=training)
    run_fit(recipe, poison=[6, 7, 8], validated=False)
    assert "put weights and optimiser back to step-00000004" in " ".join(capsys.readouterr().err.split())
    assert agree(losses(tmp_path, "run"), plain({6, 7, 8}, back={7: 4}))


def test_then_it_stops_and_starts_again_from_where_it_went_back(tmp_path):
    recipe = tiny_recipe(tmp_path, "run", training={"nonfinite_rollbacks": 1, "keep": 9})
    with pytest.raises(UserError, match=r"clips clip-7-0, .*not finite at step 8.*training\.nonfinite_skips"):
        run_fit(recipe, poison=[6, 8], validated=False)
    assert newest_whole(tmp_path / "run")[0].step == 6
    again = tiny_recipe(
        tmp_path, "run", training={"nonfinite_skips": 1, "keep": 9}
    )  # what the cure says, and it resumes
    assert run_fit(again, poison=[8], validated=False).resumed_from == 6
    assert agree(losses(tmp_path, "run"), plain({6, 8}, back={6: 4}))


def test_without_a_checkpoint_there_is_no_way_back(tmp_path):
    with pytest.raises(UserError, match="not finite at step 2"):
        run_fit(tiny_recipe(tmp_path, "run", training={"nonfinite_rollbacks": 1}), poison=[2], validated=False)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_gradient_that_is_not_finite_is_found_without_clipping_too(tmp_path, monkeypatch, capsys, stage):
    forward, calls = TinyTask.forward, []

    def broken(self, batch):
        loss, report = forward(self, batch)
        calls.append(1)
        if len(calls) == 6:
            loss.register_hook(lambda slope: slope * math.inf)
        return loss, report

    monkeypatch.setattr(TinyTask, "forward", broken)
    sections = {"engine": {"zero_stage": stage}, "optim": {"clip_norm": 0.0}, "training": {"nonfinite_skips": 1}}
    run_fit(tiny_recipe(tmp_path, "run", **sections), validated=False)
    assert "step 6 was left out" in capsys.readouterr().err
    curve = losses(tmp_path, "run")
    assert all(map(math.isfinite, curve))
    assert curve[6] != pytest.approx(curve[5])


def test_a_loss_that_is_not_finite_spoils_its_step_though_the_gradient_is(tmp_path, monkeypatch):
    forward, calls = TinyTask.forward, []

    def infinite(self, batch):
        loss, report = forward(self, batch)
        calls.append(1)
        return (loss + math.inf if len(calls) == 6 else loss), report

    monkeypatch.setattr(TinyTask, "forward", infinite)
    run_fit(tiny_recipe(tmp_path, "run", training={"nonfinite_skips": 1}), validated=False)
    monkeypatch.undo()
    assert agree(losses(tmp_path, "run"), plain({6}))


class Reads(TorchDispatchMode):
    """Counts the times that the host reads a number from a tensor, for which a GPU must have done everything before."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", [{"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2, "precision": "bf16"}])
def test_no_step_reads_from_the_device(tmp_path, engine):
    reads = Reads()

    def on_step(step):
        if step == 3:
            reads.__enter__()
        if step == 8:
            reads.__exit__(None, None, None)

    recipe = tiny_recipe(tmp_path, "run", engine=engine, training={"log_every": 12, "save_every": 12})
    run_fit(recipe, on_step=on_step, validated=False)
    assert reads.count == 0
