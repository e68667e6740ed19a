"""Engine settings, meters, window and progress line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from tiny_run import TinyTask, run_fit, tiny_recipe

from crossgate.errors import UserError
from crossgate.training.engine import BUCKET, build_engine, deepspeed_settings
from crossgate.training.meters import Meters, peak_flops
from crossgate.training.progress import ProgressLine, describe, duration
from crossgate.training.window import Window
from crossgate.training.world import Flag, World, current_world

CPU = torch.device("cpu")
ALONE = World(0, 0, 1, CPU)


def test_settings_follow_the_recipe_and_the_users_json_is_merged_over(tmp_path):
    extra = tmp_path / "ds.json"
    extra.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1234}, "wall_clock_breakdown": True}))
    engine = {"zero_stage": 3, "offload": "parameters", "accumulation": 2, "deepspeed": str(extra)}
    settings = deepspeed_settings(tiny_recipe(tmp_path, "x", engine=engine), World(0, 0, 2, CPU), 1000)
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1234
    assert settings["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert settings["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "not a DeepSpeed configuration"),
        ('{"train_batch_size": 8}', "'train_batch_size' belongs to the recipe; set data.global_batch"),
        ('{"optimizer": {}}', "set optim instead"),
    ],
)
def test_an_unusable_json_gets_one_line(tmp_path, content, complaint):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=complaint) as caught:
        deepspeed_settings(tiny_recipe(tmp_path, "x", engine={"deepspeed": str(path)}), ALONE, 1000)
    assert "ds.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path):
    with pytest.raises(UserError, match="multiple of 3"):
        deepspeed_settings(tiny_recipe(tmp_path, "x"), World(0, 0, 3, CPU), 1000)


@pytest.mark.parametrize(("ranks", "for_all"), [(2, False), (4, False), (5, True), (1000, True)])
def test_a_sum_goes_to_its_owner_alone_while_a_bucket_has_one_or_two(tmp_path, ranks, for_all):
    recipe = tiny_recipe(tmp_path, "x", data={"global_batch": 1000})
    zero = deepspeed_settings(recipe, World(0, 0, ranks, CPU), 4 * BUCKET)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["use_multi_rank_bucket_allreduce"]) == (BUCKET, for_all)


def test_the_callers_task_stays_plain(tmp_path):
    task = TinyTask()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    engine = build_engine(task, tiny_recipe(tmp_path, "x", engine={"zero_stage": 3}), current_world())
    engine.destroy()
    assert all(torch.equal(before[name], value) for name, value in task.state_dict().items())


def test_meters_leave_pauses_out_and_count_waiting(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("crossgate.training.meters.time.perf_counter", lambda: now[0])
    meters = Meters(8, 2, CPU)
    for wait, work in ((1.0, 3.0), (0.0, 4.0)):
        with meters.waiting():
            now[0] += wait
        now[0] += work
        meters.step()
        with meters.paused():
            now[0] += 100.0
    metrics = meters.read()
    assert metrics["throughput/clips_per_s"] == pytest.approx(2.0)
    assert metrics["throughput/clips_per_s_per_rank"] == pytest.approx(1.0)
    assert metrics["time/data_wait_pct"] == pytest.approx(12.5)
    assert metrics["time/step_s_p50"] == pytest.approx(4.0)
    assert metrics["memory/host_gib"] > 0
    assert "throughput/mfu_pct" not in metrics
    assert meters.eta_s(10) == pytest.approx(40.0)


def test_mfu_is_against_the_dense_peak_and_only_where_it_is_known(monkeypatch):
    assert peak_flops(CPU, "bf16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    cuda = torch.device("cuda")
    assert peak_flops(cuda, "bf16") == 989e12
    assert peak_flops(cuda, "fp32") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert peak_flops(cuda, "bf16") == 756e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Someone's New Device")
    assert peak_flops(cuda, "bf16") is None


def test_the_line_says_everything_and_makes_nothing_up():
    metrics = {
        "train/loss": 1.5,
        "throughput/clips_per_s": 20.0,
        "time/data_wait_pct": 3.0,
        "memory/host_gib": 1.25,
    }
    line = describe(5, 10, metrics, 61.0)
    assert line == (
        "step 5/10 (50 %) | loss 1.5000 | 20.0 clips/s | data-wait 3 % | MFU not measurable here | 1.25 GiB | ETA 1:01"
    )
    assert "MFU 41.0 %" in describe(5, 10, metrics | {"throughput/mfu_pct": 41.0}, 1.0)
    assert duration(3723) == "1:02:03"
    assert duration(float("nan")) == "?"


def test_other_ranks_are_silent(capsys):
    with ProgressLine("run", 10, enabled=False) as line:
        line.say("hello")
    assert capsys.readouterr().err == ""


def test_a_log_that_takes_no_more_lines_costs_the_run_nothing(tmp_path, capsys, caplog, monkeypatch):
    log, opened = tmp_path / "log.txt", Path.open

    def full(path, *given, **named):
        if path == log:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, *given, **named)

    with ProgressLine("run", 10, log=log) as line:
        line.say("hello")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", full)
            line.say("lost")
            line.say("lost as well")
        line.say("again")
    assert [said.split()[-1] for said in log.read_text().splitlines()] == ["hello", "again"]
    assert [one.message for one in caplog.records] == [f"{log} takes no more lines (No space left on device)"]
    assert capsys.readouterr().err == ""


def test_window_averages_what_was_said_and_skips_nan():
    window = Window(ALONE)
    window.add(1, ["a"], torch.tensor(1.0), {"gate/rgb": torch.tensor(float("nan"))})
    window.add(2, ["b"], torch.tensor(3.0), {"gate/rgb": torch.tensor(0.5)})
    window.settle()
    window.add(3, ["c"], torch.tensor([5.0]), {})
    assert window.settle() == []
    assert window.read() == {"train/loss": 3.0, "train/gate/rgb": 0.5}
    window.add(4, ["d"], torch.tensor(1.0), {})
    window.settle()
    assert window.read() == {"train/loss": 1.0}


def test_alone_a_flag_answers_at_once():
    flag = Flag(ALONE)
    assert not flag(False)
    assert flag(True)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GB200", None),
    ],
)
def test_a_card_is_known_by_whole_words_of_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == peak


def test_deepspeed_does_not_wait_for_the_gpu_to_time_it(tmp_path):
    engine = build_engine(TinyTask(), tiny_recipe(tmp_path, "x"), current_world())
    assert not engine.tput_timer.config.enabled
    engine.destroy()


def test_what_the_device_still_owes_is_counted_in_the_last_step_before_a_log_line(tmp_path, monkeypatch):
    seen = []
    settle, step = Window.settle, Meters.step
    monkeypatch.setattr(Window, "settle", lambda self: seen.append("settle") or settle(self))
    monkeypatch.setattr(Meters, "step", lambda self: (seen.append("step"), step(self)))
    run_fit(tiny_recipe(tmp_path, "x", training={"steps": 4, "log_every": 2, "save_every": 4}), validated=False)
    assert seen[:6] == ["step", "settle", "step", "step", "settle", "step"]


def test_one_rank_in_fp32_shards_nothing_unless_it_is_told_to(tmp_path):
    def stages(**engine):
        return [tiny_recipe(tmp_path, "x", engine=engine).engine.stage(ranks) for ranks in (1, 2)]

    assert stages() == [0, 1]
    assert stages(precision="bf16") == stages(offload="optimizer") == stages(deepspeed="ds.json") == [1, 1]
    assert stages(zero_stage=2) == [2, 2]
    assert build_engine(TinyTask(), tiny_recipe(tmp_path, "x"), current_world()).zero_optimization_stage() == 0
