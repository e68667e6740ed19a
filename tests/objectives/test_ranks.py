"""Contract C4 for the objectives: 1, 2 and 4 real gloo processes give the same losses and gradients in fp64."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_WORKER = Path(__file__).with_name("ranks_worker.py")


def _alone() -> dict[str, torch.Tensor]:
    spec = importlib.util.spec_from_file_location("objectives_ranks_worker", _WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.solve(0, 1)


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, str(_WORKER), str(folder)], check=True, timeout=200)
    return folder


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_and_gradients_do_not_depend_on_the_number_of_ranks(solved: Path, ranks: int) -> None:
    expected = _alone()
    for rank in range(ranks):  # each holds the global loss and, after averaging, the global gradient
        found = torch.load(solved / f"{ranks}-{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_the_fixed_batch_is_a_hard_one() -> None:
    found = _alone()
    assert found["pairs"][3].isnan()
    torch.testing.assert_close(found["tiled"], found["loss"], rtol=1e-12, atol=1e-12)
    assert found["tiled_top1"] == found["top1"]
    assert found["pairs"][:3].isfinite().all()
    assert all(found[name].abs().sum() > 0.01 for name in ("weights", "classifier", "log_scale"))
    assert found["weights"][3].abs().sum() == 0  # a view that no clip has gets no gradient
