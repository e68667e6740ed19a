"""The estimate against what DeepSpeed really holds, and against what really is kept for the backward pass."""

from __future__ import annotations

import psutil
import pytest
import torch
from typer.testing import CliRunner

from crossgate.cli import app
from crossgate.errors import UserError
from crossgate.recipe import dump_recipe, parse_recipe
from crossgate.runs.estimate import (
    bucket_bytes,
    device_memory,
    estimate,
    kept_bytes,
    short_of_clips,
    state_bytes,
)
from crossgate.stream.index import Index
from crossgate.tasks import build_task
from crossgate.training.engine import build_engine
from crossgate.training.pieces import _flat_tensors, begin_moments
from crossgate.training.world import current_world


def recipe(**sections):
    encoders = {name: {"backbone": "test_vit"} for name in ("rgb", "audio")}
    tree = {
        "kind": "pretrain",
        "data": {
            "global_batch": 8,
            "clip": {"size": 32, "frames": 2, "mels": 32, "seconds": 0.5, "modalities": ["rgb", "audio"]},
        },
        "model": {"dim": 64, "embedding": 16, "encoders": encoders},
    }
    return parse_recipe(tree | sections)


def held(engine) -> int:
    """Bytes of weights, masters and moments that the engine holds, each memory once."""
    tensors = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    optimizer = engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer
    tensors += _flat_tensors(engine)
    tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(memory.values())


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_states_are_what_deepspeed_holds(stage, precision):
    config = recipe(engine={"zero_stage": stage, "precision": precision})
    task = build_task(config, {})
    engine = build_engine(task, config, current_world())
    begin_moments(engine, 1)
    trained = sum(p.numel() for p in task.parameters())
    states, _ = state_bytes(config, stage, trained, 0, 1)
    gradients = trained * (2 if precision == "bf16" else 4)
    assert states - gradients == pytest.approx(held(engine), rel=0.05)
    engine.destroy()


def test_ranks_share_what_the_stage_shards():
    config = recipe()
    one, four = ([state_bytes(config, stage, 1000, 0, ranks)[0] for stage in range(4)] for ranks in (1, 4))
    assert one == [16_000, 20_000, 20_000, 20_000]
    assert four == [16_000, 11_000, 8_000, 5_000]
    offloaded = recipe(engine={"zero_stage": 2, "offload": "optimizer"})
    assert state_bytes(offloaded, 2, 1000, 0, 4)[0] == 5_000


@pytest.mark.parametrize(
    ("engine", "trained", "expected"),
    [
        ({"zero_stage": 1}, 300_000_000, 20_000_000),
        ({"zero_stage": 2, "precision": "bf16"}, 300_000_000, 10_000_000),
        ({"zero_stage": 2}, 1_000, 4_000),
        ({"zero_stage": 2, "offload": "optimizer"}, 1_000, 20_000_000),
        ({"zero_stage": 3, "precision": "bf16"}, 1_000, 10_000_000),
        ({"zero_stage": 0}, 300_000_000, 1_200_000_000),
    ],
)
def test_a_bucket_of_gradients_is_laid_beside_them(engine, trained, expected):
    assert bucket_bytes(recipe(engine=engine), engine["zero_stage"], trained) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bucket_that_is_whole_from_the_start_is_what_deepspeed_holds(precision):
    config = recipe(engine={"zero_stage": 3, "precision": precision})
    engine = build_engine(build_task(config, {}), config, current_world())
    assert sum(bucket.buffer.nbytes for bucket in engine.optimizer.ipg_buckets.values()) == bucket_bytes(config, 3, 1)
    engine.destroy()


def test_activations_grow_by_the_clip_and_shrink_when_recomputed():
    config = recipe()
    task = build_task(config, {})
    one, two, four = (kept_bytes(task, config, clips) for clips in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)
    task.checkpoint_activations()
    assert kept_bytes(task, config, 2) < 0.7 * two


def test_the_table_says_what_fits():
    said = estimate(recipe(engine={"zero_stage": 2}), 2)
    assert said.micro_batch == 4
    table = said.table(2, 80)
    assert "M parameters train" in table
    assert [line.startswith("2 ") and "fits" in line for line in table.splitlines() if "<-" in line] == [True]
    assert table.splitlines()[-1] == "fits: into a device of 80 GiB (--memory) with a tenth to spare"
    with pytest.raises(UserError, match="--gpus: .*not divisible by 3 ranks"):
        estimate(recipe(), 3)


def test_where_nothing_fits_the_nearest_cure_is_named():
    said = estimate(recipe(), 1)
    assert "; 1 rank of 8 clips a micro-batch" in said.table(0, 80)
    least = {need.stage: need.states + need.bucket + 2 * said.per_clip for need in said.needs}
    room = 1.1 * (min(least.values()) + 1) / 2**30  # for two clips of eight
    stage = min(least, key=least.get)
    last = said.table(0, room).splitlines()[-1]
    assert not said.fits(room) and "too large" in said.table(0, room)
    assert last.startswith(f"nothing fits into a device of {room:g} GiB (--memory) with a tenth to spare; ")
    assert last.endswith(f"; engine.accumulation=4 would fit under ZeRO {stage}")
    assert estimate(recipe(engine={"accumulation": 4}), 1).fits(room), "as it says"
    assert "share the model among more ranks (--gpus)" in said.table(0, 1e-3)


def test_a_recipe_without_gpus_is_held_against_this_machine_shared_by_its_ranks():
    whole = psutil.virtual_memory().total / 2**30
    assert device_memory(recipe(), 1) == pytest.approx(whole, abs=0.1)
    assert device_memory(recipe(), 4) == pytest.approx(whole / 4, abs=0.1)
    assert device_memory(recipe(cluster={"gpus_per_worker": 1}), 4) == 80


def test_a_split_that_does_not_fill_a_batch_is_told(road):
    data = {"index": str(road / "shards"), "clip": {"size": 32, "frames": 2, "mels": 32, "seconds": 0.5}}
    clips = Index.load(str(road / "shards")).splits["train"].clips
    assert short_of_clips(recipe(data=data | {"global_batch": clips})) == ""
    said = short_of_clips(recipe(data=data | {"global_batch": clips + 1}))
    assert said == f"warning: data.train has {clips} clips, which do not fill a global batch of {clips + 1}"
    assert short_of_clips(recipe()) == ""


def test_the_command_ends_with_1_where_nothing_fits(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(dump_recipe(recipe(run={"name": "mine"})))
    ends = {
        memory: CliRunner().invoke(app, ["estimate", "-c", str(path), "--memory", memory]) for memory in ("80", "0")
    }
    assert [ends[memory].exit_code for memory in ("80", "0")] == [0, 1]
    assert "nothing fits" in ends["0"].output
