"""The same maths on any number of ranks, ZeRO stage and accumulation: against a plain PyTorch loop."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run
import torch
from free_ports import free_port
from safetensors.torch import load_file
from tiny_run import TinyTask, global_batch, losses, run_fit, tiny_recipe
from torch import nn

from crossgate.config import OptimConfig
from crossgate.training.schedule import lr_factor

# fp32 sums in another order: 12 steps apart by less than this in every loss.
CLOSE = {"rel": 0, "abs": 2e-5}
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of the loop that anyone would write."""
    task, steps, lr = TinyTask(seed=0), 12, 0.02
    optim = OptimConfig(lr=lr)
    optimizer = torch.optim.AdamW(task.parameter_groups(optim), lr=lr, betas=optim.betas)
    curve = []
    for step in range(1, steps + 1):
        warmup = 1  # round(0.1 * 12)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        factor = step / warmup if step <= warmup else 0.01 + 0.99 * cosine
        for group, peak in zip(optimizer.param_groups, (lr, 0.3 * lr)):
            group["lr"] = peak * factor
        loss, _ = task(global_batch(step - 1, 16))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in task.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        curve.append(loss.item())
    return curve, task.state_dict()


def spawn(
    cases: list[dict], folder: Path, ranks: int, timeout: float = 250, script: str = tiny_run.__file__
) -> list[subprocess.CompletedProcess]:
    """Runs the cases in `ranks` processes, as torchrun would start them."""
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder / f"cases-{ranks}.json"
    listing.write_text(json.dumps(cases))
    port = free_port()
    env = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, script, str(listing)]
    processes = [
        subprocess.Popen(
            command,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    finished = []
    for process in processes:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            pytest.fail("ranks wait for one another:\n" + process.communicate()[0][-2000:])
        finished.append(subprocess.CompletedProcess(command, process.returncode, output, ""))
    return finished


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_like_plain_pytorch(tmp_path, plain, stage):
    recipe = tiny_recipe(tmp_path, f"zero{stage}", engine={"zero_stage": stage})
    result = run_fit(recipe, validated=False)
    curve, state = plain
    assert losses(tmp_path, recipe.run.name) == pytest.approx(curve, **CLOSE)
    saved = load_file(tmp_path / recipe.run.name / "checkpoints" / f"step-{result.step:08d}" / "weights.safetensors")
    assert saved.keys() == state.keys()
    for name, weight in state.items():  # frozen parts and buffers too, whole and in fp32
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=2e-4)


def test_accumulation_changes_nothing(tmp_path, plain):
    recipe = tiny_recipe(tmp_path, "accumulated", engine={"zero_stage": 1, "accumulation": 2})
    run_fit(recipe)
    assert losses(tmp_path, "accumulated") == pytest.approx(plain[0], **CLOSE)


def test_optimizer_offload_changes_nothing(tmp_path, plain):
    recipe = tiny_recipe(tmp_path, "offload", engine={"zero_stage": 3, "offload": "optimizer"})
    run_fit(recipe)
    assert losses(tmp_path, "offload") == pytest.approx(plain[0], **CLOSE)


def test_bf16_trains_near_fp32_and_exports_its_masters(tmp_path, plain):
    recipe = tiny_recipe(tmp_path, "bf16", engine={"zero_stage": 2, "precision": "bf16"})
    run_fit(recipe, validated=False)
    curve = losses(tmp_path, "bf16")
    assert curve == pytest.approx(plain[0], abs=0.05)
    assert curve != pytest.approx(plain[0], abs=1e-6)
    saved = load_file(tmp_path / "bf16" / "checkpoints" / "step-00000012" / "weights.safetensors")
    head = saved["model.head.weight"]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())  # finer than bf16: the optimiser's own
    for name, weight in TinyTask().state_dict(keep_vars=True).items():
        if not weight.requires_grad:
            assert torch.equal(saved[name], weight), f"{name} does not train and must not be rounded"


def test_two_ranks_train_like_one(tmp_path, plain):
    cases = [
        {
            "output": str(tmp_path),
            "name": f"two-zero{stage}",
            "sections": {"engine": {"zero_stage": stage}},
            "validated": stage == 3,  # a look aside between sharded steps must not disturb them
        }
        for stage in STAGES
    ]
    cases[1]["sections"]["engine"]["accumulation"] = 2
    for process in spawn(cases, tmp_path, 2):
        assert process.returncode == 0, process.stdout[-3000:]
        assert "needless: []" in process.stdout  # six seconds of every start
    for case in cases:
        assert losses(tmp_path, case["name"]) == pytest.approx(plain[0], **CLOSE), case["name"]
        best = next((tmp_path / case["name"] / "checkpoints").glob("*/weights.safetensors"))
        saved = load_file(best)
        for name, weight in plain[1].items() if not case["validated"] else ():
            torch.testing.assert_close(saved[name], weight, rtol=0, atol=2e-4)


def test_schedule_rises_to_the_peak_and_falls_to_the_final_rate():
    optim = OptimConfig(warmup=0.1, final_lr=0.01)
    curve = [lr_factor(step, 100, optim) for step in range(1, 101)]
    assert curve[9] == 1.0
    assert curve[-1] == pytest.approx(0.01)
    assert curve[:10] == sorted(curve[:10])
    assert curve[10:] == sorted(curve[10:], reverse=True)
    assert lr_factor(1, 1, OptimConfig(warmup=0.0)) == pytest.approx(0.01)
