"""The GPU benchmark where there is no GPU: it says so, and its parts measure on a CPU what they would there."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FOLDER / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


def tiny(gpu, precision: str):
    return gpu.Case("test_vit", False, batch=4, steps=2, precision=precision, size=32, frames=2, dim=16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_succeeds(gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "gpu.md")])
    gpu.main()  # returns: status 0, so that all benchmarks can be run one after the other on any machine
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("No GPU here")
    assert "nothing was measured" in said[0]
    assert json.loads(said[-1]) == {"gpu": None}
    assert not (tmp_path / "gpu.md").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_loops_count_the_same_work(gpu, monkeypatch, precision):
    for place in ("gpu_benchmark", "crossgate.training.loop", "crossgate.training.meters"):
        monkeypatch.setattr(sys.modules[place], "peak_flops", lambda device, precision: 1e12)
    case = tiny(gpu, precision)
    bare, trained = gpu.bare(case, CPU), gpu.trained(case, CPU)
    assert trained.mfu_pct / trained.clips_per_s == pytest.approx(bare.mfu_pct / bare.clips_per_s, rel=1e-6)
    assert 0 <= trained.data_wait_pct < 100
    assert bare.peak_gib is trained.peak_gib is None


def test_the_batch_is_what_the_estimate_lets_fit(gpu):
    shape = {"size": 32, "frames": 2, "dim": 16}
    need = gpu.estimated_gib(gpu.Case("test_vit", False, batch=128, steps=1, **shape))
    assert gpu.fitting_batch("test_vit", 1.11 * need, **shape) == 128
    assert gpu.fitting_batch("test_vit", 1.09 * need, **shape) == 64
    with pytest.raises(gpu.UserError, match="test_vit on four modalities needs more than 0 GiB"):
        gpu.fitting_batch("test_vit", 1e-6, **shape)


def test_a_row_says_what_is_not_known(gpu):
    case = tiny(gpu, "bf16")
    found = gpu.middle(
        [gpu.Found(2.0, None, None, 1.0), gpu.Found(4.0, None, None, 2.0), gpu.Found(3.0, None, None, 9.0)]
    )
    assert found == gpu.Found(3.0, None, None, 2.0)
    assert gpu.row(case, "crossgate", found, 1.25) == (
        "| test_vit | no | crossgate | 4 | 3.0 | not known | not known | 1.2 | 2.0 % |"
    )
    assert gpu.HEAD[0].count("|") == gpu.row(case, "bare", found, 1.0).count("|")


def test_the_contrast_is_measured_tiled_and_full(gpu):
    lines = gpu.contrasts((64,), 8, 32, "cpu")
    assert [line.split(" | ")[1] for line in lines[2:]] == ["tiles", "full"]
