"""Nothing lost: kills, half-written and damaged checkpoints, other recipes, SIGTERM."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_numbers import spawn
from tiny_run import TinyTask, losses, run_fit, tiny_recipe

from crossgate.errors import UserError
from crossgate.training.checkpoint import newest_whole, prune
from crossgate.training.loop import Selection
from crossgate.training.metrics import MetricsFile, read_metrics

DROPOUT = 0.2  # the curve depends on the random states, so they must come back


def same(curve: list[float]):
    """The same curve up to the last bits: vector kernels round by where memory lies, which no two processes share.

    A lost random state, optimizer moment or step moves these losses by more than 1e-3.
    """
    return pytest.approx(curve, rel=0, abs=2e-6)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A finished run: 12 steps, saved at 4, 8 and 12, validated at 6 and 12."""
    output = tmp_path_factory.mktemp("undisturbed")
    run_fit(tiny_recipe(output, "run"), dropout=DROPOUT)
    return output / "run"


@pytest.fixture
def copied(undisturbed, tmp_path) -> Path:
    """A copy of the finished run to damage."""
    shutil.copytree(undisturbed, tmp_path / "run")
    return tmp_path / "run"


def steps(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_kill_then_resume_gives_the_undisturbed_curve(tmp_path, undisturbed):
    case = {"output": str(tmp_path), "name": "run", "dropout": DROPOUT, "kill_at": 11}
    assert spawn([case], tmp_path, 1)[0].returncode == -signal.SIGKILL
    assert len(losses(tmp_path, "run")) == 10
    result = run_fit(tiny_recipe(tmp_path, "run"), dropout=DROPOUT)
    assert result.resumed_from == 8
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 13))  # no gap, no doubles
    assert losses(tmp_path, "run") == same(losses(undisturbed.parent, "run"))


@pytest.mark.parametrize("stage", [0, 3])
def test_other_stages_resume_exactly(tmp_path, stage):
    straight = tiny_recipe(tmp_path, "straight", engine={"zero_stage": stage})
    run_fit(straight, dropout=DROPOUT)
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    for step in (6, 12):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    result = run_fit(tiny_recipe(tmp_path, "again", engine={"zero_stage": stage}), dropout=DROPOUT)
    assert result.resumed_from == 8
    assert losses(tmp_path, "again") == same(losses(tmp_path, "straight"))


def test_a_finished_run_is_not_run_again(copied, capsys):
    before = (copied / "metrics.jsonl").read_text()
    result = run_fit(tiny_recipe(copied.parent, "run"), dropout=DROPOUT)
    assert (result.step, result.resumed_from) == (12, 12)
    assert (copied / "metrics.jsonl").read_text() == before
    assert "the run is complete" in capsys.readouterr().err
    assert "val/accuracy" in result.metrics


def test_a_start_says_what_trains_and_what_was_saved(tmp_path, capsys):
    run_fit(tiny_recipe(tmp_path, "run"), validated=False)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        "run: 1 rank on cpu, fp32, ZeRO 0; 461 of 617 parameters train; 96 clips an epoch in 6 global batches of 16"
    )
    assert [line for line in said if "saved" in line] == [f"run: saved step-{step:08d}" for step in (4, 8, 12)]


def test_a_half_written_checkpoint_is_ignored_and_cleared_away(copied):
    shutil.move(copied / "checkpoints" / "step-00000012", copied / "checkpoints" / ".tmp-step-00000012")
    (copied / "checkpoints" / "step-00000011").mkdir()  # a folder without a manifest
    checkpoint, refused = newest_whole(copied)
    assert checkpoint.step == 8
    assert refused == ["step-00000011: no manifest, so it was never finished"]
    run_fit(tiny_recipe(copied.parent, "run"), dropout=DROPOUT)
    assert not [name for name in steps(copied) if name.startswith(".")]


def test_a_flipped_bit_is_found_and_the_one_before_used(copied, undisturbed, capsys):
    victim = next((copied / "checkpoints" / "step-00000012" / "state").glob("rank-*"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    result = run_fit(tiny_recipe(copied.parent, "run"), dropout=DROPOUT)
    assert result.resumed_from == 8
    said = capsys.readouterr().err
    assert "passed over checkpoint step-00000012: state/" in said
    assert "has changed since it was written" in said
    assert losses(copied.parent, "run") == same(losses(undisturbed.parent, "run"))
    assert newest_whole(copied)[0].step == 12  # replaced by a good one


def test_a_run_with_damaged_checkpoints_only_is_refused_and_left_as_it_is(copied):
    for folder in (copied / "checkpoints").iterdir():
        (folder / "random-00000.safetensors").unlink()
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        run_fit(tiny_recipe(copied.parent, "run"), dropout=DROPOUT)
    for fragment in (
        f"{copied / 'checkpoints'}: no checkpoint of this run is whole, of 3",
        "(the newest: step-00000012: random-00000.safetensors is missing)",
        "move this folder aside to start anew, or set another run.name",
    ):
        assert fragment in str(caught.value)
    before.pop(copied / "recipe.yaml")
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    (copied / "checkpoints").rename(copied / "aside")
    assert run_fit(tiny_recipe(copied.parent, "run"), dropout=DROPOUT).resumed_from == 0


@pytest.mark.parametrize("harm", ["truncate", "remove", "manifest"])
def test_other_damage_is_named(copied, harm):
    folder = copied / "checkpoints" / "step-00000012"
    victim = folder / "random-00000.safetensors"
    if harm == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif harm == "remove":
        victim.unlink()
    else:
        (folder / "manifest.json").write_text('{"step": 12')
    checkpoint, refused = newest_whole(copied)
    assert checkpoint.step == 8
    expected = {
        "truncate": "bytes instead of",
        "remove": "random-00000.safetensors is missing",
        "manifest": "unreadable manifest",
    }
    assert expected[harm] in refused[0]


def test_code_in_a_checkpoint_does_not_run(copied, tmp_path):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harmed",))

    victim = copied / "checkpoints" / "step-00000012" / "state" / "rank-00000.safetensors"
    torch.save({"module": Harm()}, victim)
    manifest = json.loads((victim.parents[1] / "manifest.json").read_text())
    del manifest["files"][f"state/{victim.name}"]  # someone who can forge the digests too
    (victim.parents[1] / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is no safetensors file"):
        run_fit(tiny_recipe(copied.parent, "run"), dropout=DROPOUT)
    assert not (tmp_path / "harmed").exists()


FULL = """
import resource, sys
from pathlib import Path
from tiny_run import run_fit, tiny_recipe
from crossgate.errors import UserError

unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in sys.argv[2:]:
    def fill(step):
        if step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), unlimited[1]))

    try:
        run_fit(tiny_recipe(Path(sys.argv[1]), limit, training={"log_every": 20}), on_step=fill, validated=False)
    except UserError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
"""


def test_a_full_disk_is_one_line_and_the_earlier_checkpoint_stays(tmp_path):
    """A bound on the length of a file stands for the end of a disk, in a process where it meets no other file."""
    limits = ["2000", "9000", "12000"]  # met by model, optimiser and random states
    command = [sys.executable, "-c", FULL, str(tmp_path), *limits]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.splitlines()
    assert len(told) == len(limits)
    for limit, line in zip(limits, told):
        assert re.search(r"cannot write a checkpoint \(.*\); free some space", line)
        checkpoint, refused = newest_whole(tmp_path / limit)
        assert (checkpoint.step, refused) == (4, [])


def test_another_recipe_under_the_same_name_is_refused(copied):
    other = tiny_recipe(copied.parent, "run", optim={"lr": 0.5, "warmup": 0.2})
    with pytest.raises(
        UserError,
        match=r"run 'run' was made with other settings: optim\.lr was 0\.02, is 0\.5, optim\.warmup was 0\.1, is 0\.2; "
        r".*another run\.name",
    ):
        run_fit(other)
    (copied / "recipe.yaml").unlink()  # the checkpoints know as well
    with pytest.raises(UserError, match="other settings"):
        run_fit(other)


def test_a_look_at_validation_does_not_change_the_run(tmp_path, undisturbed):
    run_fit(tiny_recipe(tmp_path, "blind"), dropout=DROPOUT, validated=False)
    assert losses(tmp_path, "blind") == same(losses(undisturbed.parent, "run"))


def test_best_weights_are_kept_and_given_back(undisturbed, copied):
    lines = [line for line in read_metrics(undisturbed) if "val/accuracy" in line]
    selection = Selection("val/accuracy", "higher")
    best, best_step = None, 0
    for line in lines:
        if selection.improves(line["val/accuracy"], best):
            best, best_step = line["val/accuracy"], line["step"]
    assert f"step-{best_step:08d}" in steps(undisturbed)
    task = TinyTask()
    task.load_state_dict(torch.load(undisturbed / "model" / "w.pt", weights_only=True))
    from tiny_run import validate

    assert validate(task.eval(), 0)["val/accuracy"] == pytest.approx(best)


@pytest.mark.parametrize(("minutes", "saved"), [(0.0, [8, 12]), (1.0, [3, 6, 8, 11, 12])])
def test_checkpoints_come_by_the_clock_besides(tmp_path, monkeypatch, minutes, saved):
    """A step takes 20 seconds; whatever saves starts the minute anew."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("crossgate.training.loop.time", clock)

    def step(number: int) -> None:
        clock.now += 20.0

    training = {"save_every": 8, "save_minutes": minutes, "keep": 9}
    run_fit(tiny_recipe(tmp_path, "run", training=training), on_step=step, validated=False)
    assert steps(tmp_path / "run") == [f"step-{number:08d}" for number in saved]


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 8):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    prune(tmp_path, keep=2, saved_step=7, best_step=3)
    assert steps(tmp_path) == ["step-00000003", "step-00000006", "step-00000007"]


@pytest.mark.parametrize(("keep", "left"), [(1, [8]), (2, [4, 8])])
def test_damaged_newer_checkpoints_do_not_push_out_whole_ones(tmp_path, keep, left):
    for step in (4, 8, 12, 99):  # a run that found 12 and 99 damaged has just saved 8
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    prune(tmp_path, keep=keep, saved_step=8, best_step=0)
    assert steps(tmp_path) == [f"step-{step:08d}" for step in left]


def test_a_loss_that_is_not_finite_stops_with_the_clips_named(tmp_path):
    recipe = tiny_recipe(tmp_path, "nan", training={"log_every": 5})
    with pytest.raises(UserError, match=r"clip-5-0, .*loss is not finite at step 6"):
        run_fit(recipe, poison=[6])
    assert newest_whole(tmp_path / "nan")[0].step == 4  # nothing that the NaN has touched was saved


def test_an_unmeasured_selection_metric_is_named():
    with pytest.raises(UserError, match="no metric 'val/map'.*val/accuracy"):
        Selection("val/map", "higher").value({"val/accuracy": 0.5})


def test_metrics_file_drops_what_comes_after_the_checkpoint(tmp_path):
    file = MetricsFile(tmp_path, resume_step=0)
    for step in range(1, 6):
        file.write(step, {"train/loss": 1.0 / step, "gate/entropy": float("nan")})
    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 6, "train/lo')
    MetricsFile(tmp_path, resume_step=3).write(4, {"train/loss": 7.0})
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["train/loss"] == 7.0
    assert lines[0]["gate/entropy"] is None


def test_a_checkpoint_of_another_version_of_the_model_is_refused_in_one_line(copied, monkeypatch):
    for step in steps(copied):
        if step > "step-00000008":
            shutil.rmtree(copied / "checkpoints" / step)

    class Grown(TinyTask):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_buffer("new_in_this_version", torch.zeros(3))

    monkeypatch.setattr("tiny_run.TinyTask", Grown)
    with pytest.raises(UserError, match=r"weights are not this model's.*new_in_this_version.*version that wrote it"):
        run_fit(tiny_recipe(copied.parent, "run"), dropout=DROPOUT)


def test_a_finished_run_whose_best_weights_are_damaged_ends_with_its_last(copied, capsys):
    manifest_path = copied / "checkpoints" / "step-00000012" / "manifest.json"
    best = json.loads(manifest_path.read_text())["best_step"]
    if best == 12:  # make an earlier one the best, as a worse last validation would have
        best = 8
        manifest = json.loads(manifest_path.read_text()) | {"best_step": best}
        del manifest["files"]["weights.safetensors"]
        manifest_path.write_text(json.dumps(manifest))
        (manifest_path.parent / "weights.safetensors").unlink()
        with next((copied / "checkpoints" / "step-00000008" / "state").iterdir()).open("ab") as file:
            file.write(b"x")
    else:
        with (copied / "checkpoints" / f"step-{best:08d}" / "weights.safetensors").open("ab") as file:
            file.write(b"x")
    result = run_fit(tiny_recipe(copied.parent, "run"), dropout=DROPOUT)
    assert (result.step, result.best_step) == (12, 12)
    assert f"forgot the best checkpoint so far, of step {best}" in capsys.readouterr().err


def test_a_run_directory_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the run's folder .*check the path"):
        run_fit(tiny_recipe(tmp_path / "file", "run"))
