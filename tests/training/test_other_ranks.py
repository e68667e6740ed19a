"""A checkpoint belongs to no number of ranks and no ZeRO stage: it goes on with its optimiser under any of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from test_numbers import CLOSE, spawn
from tiny_run import Crash, TinyTask, losses, run_fit, tiny_recipe

from crossgate.errors import UserError
from crossgate.training.checkpoint import newest_whole
from crossgate.training.engine import build_engine
from crossgate.training.pieces import begin_moments, held_pieces, own_pieces, publish_values
from crossgate.training.states import PieceReader, Unfit, write_pieces
from crossgate.training.world import World, current_world

STAGES = (0, 1, 2, 3)


def everything(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every parameter, buffer and moment of a checkpoint, put together from its pieces."""
    task, whole = TinyTask(), {}
    with PieceReader(checkpoint / "state") as saved:
        assert saved.steps == int(checkpoint.name[-8:])
        for name, kind in list(saved._parts):
            whole[name, kind] = torch.full((task.state_dict()[name].numel(),), float("nan"))
            assert saved._fill(name, kind, 0, whole[name, kind]) == len(whole[name, kind])
    return whole


def kept(output: Path, name: str, step: int) -> dict[tuple[str, str], torch.Tensor]:
    return everything(output / name / "checkpoints" / f"step-{step:08d}")


def phase(output: Path, stage: int, crash_at: int | None) -> dict:
    """A start of the run `run` that comes to no end before that step."""
    sections = {"engine": {"zero_stage": stage}, "training": {"save_every": 3, "keep": 9}}
    return {"output": str(output), "name": "run", "sections": sections, "validated": False, "crash_at": crash_at}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The undisturbed run of one rank."""
    output = tmp_path_factory.mktemp("straight")
    recipe = tiny_recipe(output, "run", engine={"zero_stage": 0}, training={"save_every": 3, "keep": 9})
    run_fit(recipe, validated=False)
    return output


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[Path, list[list[CompletedProcess]]]:
    """All that takes two ranks, in two starts of them, with one rank in between.

    `run`: two ranks at ZeRO 2, one at ZeRO 3, two at ZeRO 1. `termed`: stopped by SIGTERM, then gone on with, beside
    `calm`, which is not stopped; both with dropout.
    """
    output = tmp_path_factory.mktemp("two")
    termed = {"output": str(output), "name": "termed", "sections": {"engine": {"zero_stage": 2}}, "dropout": 0.2}
    first = spawn([phase(output, 2, 5), termed | {"term_at": 6}], output, 2)

    def crash(step: int) -> None:
        if step == 8:
            raise Crash

    with pytest.raises(Crash):
        run_fit(tiny_recipe(output, "run", **phase(output, 3, 8)["sections"]), on_step=crash, validated=False)
    second = spawn([phase(output, 1, None), termed, termed | {"name": "calm"}], output, 2)
    return output, [first, second]


def test_two_ranks_then_one_then_two_at_changing_stages_are_one_undisturbed_run(two_ranks, straight):
    output, (_, finished) = two_ranks
    assert [process.returncode for process in finished] == [0, 0], finished[0].stdout[-3000:]
    assert "step-00000006, the newest whole checkpoint" in " ".join(finished[0].stdout.split())
    assert losses(output, "run") == pytest.approx(losses(straight, "run"), **CLOSE)
    for step in (3, 6, 12):
        mine, theirs = kept(output, "run", step), kept(straight, "run", step)
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(mine[key], tensor, rtol=1e-4, atol=2e-4 if key[1] == "value" else 2e-6)


def test_sigterm_saves_on_both_ranks_and_resumes(two_ranks):
    output, (stopped, finished) = two_ranks
    assert [process.returncode for process in stopped] == [143, 143], stopped[0].stdout[-3000:]
    assert "stopped at step 7 as asked" in stopped[0].stdout  # agreed at the step after, also by who got no signal
    assert "step-00000007, the newest whole checkpoint" in " ".join(finished[0].stdout.split())
    assert losses(output, "termed") == pytest.approx(losses(output, "calm"), rel=0, abs=2e-6)


@pytest.mark.parametrize("after", STAGES)
@pytest.mark.parametrize("before", STAGES)
def test_every_stage_reads_what_every_stage_wrote(tmp_path, before, after):
    torch.manual_seed(0)
    first = build_engine(TinyTask(1), tiny_recipe(tmp_path, "x", engine={"zero_stage": before}), current_world())
    begin_moments(first, 7)
    for piece in held_pieces(first, current_world()):
        for view in piece.views.values():
            view.copy_(torch.rand(len(view)))
    publish_values(first)
    (tmp_path / "a").mkdir()
    write_pieces(tmp_path / "a" / "rank.safetensors", own_pieces(first, current_world()), 7)
    written = {p.name: {k: v.clone() for k, v in p.views.items()} for p in held_pieces(first, current_world())}
    first.destroy()
    second = build_engine(TinyTask(2), tiny_recipe(tmp_path, "x", engine={"zero_stage": after}), current_world())
    with PieceReader(tmp_path / "a") as saved:
        assert saved.steps == 7
        begin_moments(second, saved.steps)
        for piece in held_pieces(second, current_world()):
            saved.fill(piece)
    publish_values(second)
    read = {p.name: p.views for p in held_pieces(second, current_world())}
    assert read.keys() == written.keys()
    for name, views in written.items():
        assert {kind: view.tolist() for kind, view in views.items()} == {k: v.tolist() for k, v in read[name].items()}
    second.destroy()


def test_what_every_rank_holds_is_written_once(tmp_path):
    engine = build_engine(TinyTask(), tiny_recipe(tmp_path, "x", engine={"zero_stage": 0}), current_world())
    begin_moments(engine, 1)
    (tmp_path / "a").mkdir()
    for rank in range(3):
        pieces = own_pieces(engine, World(rank, rank, 3, torch.device("cpu")))
        write_pieces(tmp_path / "a" / f"rank-{rank}.safetensors", pieces, 1)
    size = sum(value.numel() for value in TinyTask().state_dict().values())
    trained = sum(value.numel() for value in TinyTask().parameters() if value.requires_grad)
    with PieceReader(tmp_path / "a") as saved:
        parts = [part for parts in saved._parts.values() for part in parts]
        assert sum(file.get_slice(key).get_shape()[0] for _, key, file in parts) == size + 2 * trained
    engine.destroy()


def test_pieces_that_are_missing_or_of_another_model_are_named(tmp_path):
    engine = build_engine(TinyTask(), tiny_recipe(tmp_path, "x"), current_world())
    begin_moments(engine, 1)
    (tmp_path / "a").mkdir()
    pieces = own_pieces(engine, current_world())
    write_pieces(tmp_path / "a" / "rank.safetensors", [piece.part(0, 2) for piece in pieces], 1)
    with PieceReader(tmp_path / "a") as saved:
        with pytest.raises(Unfit, match="is of another size"):
            saved.fill(pieces[0])
        with pytest.raises(Unfit, match="it lacks elsewhere"):
            saved.check_names({piece.name for piece in pieces} | {"elsewhere"})
    engine.destroy()


def test_a_finished_run_goes_on_under_another_stage(tmp_path, straight, capsys):
    shutil.copytree(straight / "run", tmp_path / "run")
    recipe = tiny_recipe(tmp_path, "run", engine={"zero_stage": 3, "offload": "optimizer"})
    assert run_fit(recipe, validated=False).resumed_from == 12
    assert "the run is complete" in capsys.readouterr().err


def test_a_checkpoint_of_another_format_is_refused_in_one_line(tmp_path, straight):
    shutil.copytree(straight / "run", tmp_path / "run")
    checkpoint, _ = newest_whole(tmp_path / "run")
    manifest = checkpoint.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 2\n', '"version": 1\n'))
    with pytest.raises(UserError, match="it has format 1, not 2.*version that wrote it"):
        run_fit(tiny_recipe(tmp_path, "run"), validated=False)
