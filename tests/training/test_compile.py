"""Compiled encoders, and the profiler: the same numbers, seen from inside."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest
import torch
from tiny_run import losses, run_fit, tiny_recipe

from crossgate.errors import UserError
from crossgate.recipe import parse_recipe
from crossgate.runs.estimate import random_clips
from crossgate.tasks import build_task
from crossgate.training.engine import Step, build_engine
from crossgate.training.world import current_world


@pytest.mark.slow
def test_compiled_encoders_give_the_same_loss_and_gradients(tmp_path):
    from deepspeed.utils import safe_get_full_grad

    clip = {"size": 32, "frames": 2, "modalities": ["depth"]}
    model = {"dim": 16, "encoders": {"depth": {"backbone": "test_vit"}}}
    engine_settings = {"zero_stage": 1, "compile": True}
    recipe = tiny_recipe(tmp_path, "run", data={"clip": clip}, model=model, engine=engine_settings)
    words = {recipe.finetune.task: ["a", "b"]}
    task, plain, clips = build_task(recipe, words), build_task(recipe, words), random_clips(recipe, 4)
    plain.load_state_dict(task.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    engine = build_engine(task, recipe, current_world())
    engine.train()
    loss, _ = engine(clips)
    engine.backward(loss)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    expected, _ = Step(plain.train(), torch.device("cpu"), "fp32")(clips)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    theirs = torch.cat([p.grad.flatten() for p in plain.parameters() if p.requires_grad])
    found = torch.cat([safe_get_full_grad(p).flatten() for p in engine.module.task.parameters() if p.requires_grad])
    torch.testing.assert_close(found, theirs, rtol=1e-3, atol=1e-5)
    assert engine.module.task.state_dict().keys() == plain.state_dict().keys()  # checkpoints know nothing of it
    engine.destroy()


def test_what_cannot_go_together_is_refused(tmp_path):
    for engine, complaint in (
        ({"compile": True, "zero_stage": 3}, "compile needs zero_stage 0, 1 or 2"),
        ({"precision": "fp16", "zero_stage": 0}, "fp16 needs zero_stage"),
    ):
        with pytest.raises(UserError, match=complaint):
            parse_recipe({"kind": "finetune", "engine": engine})


def test_fp16_on_a_device_without_is_one_line(tmp_path, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    recipe = tiny_recipe(tmp_path, "run", engine={"precision": "fp16"})
    with pytest.raises(UserError, match=r"engine\.precision: this CPU cannot train in fp16; set it to bf16 or fp32"):
        run_fit(recipe, validated=False)


def test_fp16_scales_losses_and_trains_near_fp32(tmp_path, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)  # slowly, but in the right arithmetic
    run_fit(tiny_recipe(tmp_path, "fp32"), validated=False)
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"fp16": {"initial_scale_power": 8}}))
    engine = {"precision": "fp16", "zero_stage": 2, "deepspeed": str(settings)}
    run_fit(tiny_recipe(tmp_path, "fp16", engine=engine), validated=False)
    assert losses(tmp_path, "fp16") == pytest.approx(losses(tmp_path, "fp32"), abs=0.02)
    assert losses(tmp_path, "fp16") != pytest.approx(losses(tmp_path, "fp32"), abs=1e-6)


def test_the_scale_of_fp16s_losses_goes_on_where_it_was(tmp_path, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"fp16": {"initial_scale_power": 8, "loss_scale_window": 2}}))
    engine = {"precision": "fp16", "zero_stage": 2, "deepspeed": str(settings)}
    recipe = tiny_recipe(tmp_path, "run", engine=engine, training={"steps": 6, "save_every": 3, "keep": 9})
    run_fit(recipe, validated=False)
    newest = tmp_path / "run" / "checkpoints" / "step-00000006"
    undisturbed = json.loads((newest / "manifest.json").read_text())["loss_scale"]
    shutil.rmtree(newest)
    assert run_fit(recipe, validated=False).resumed_from == 3
    assert json.loads((newest / "manifest.json").read_text())["loss_scale"] == undisturbed
    assert undisturbed["cur_scale"] > 2**8


def test_a_profile_shows_the_phases_of_the_steps_asked_for(tmp_path):
    recipe = tiny_recipe(tmp_path, "run", training={"profile": [3, 4]})
    run_fit(recipe, validated=False)
    path = tmp_path / "run" / "profile" / "rank-00000.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert [names.count(phase) for phase in ("load", "forward", "backward", "step", "log", "save")] == [
        2,
        2,
        2,
        2,
        2,
        1,
    ]
    assert any(event["name"] == "aten::addmm" for event in events)
