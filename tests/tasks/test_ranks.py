"""Contract C4 for whole tasks: real gloo processes give one process's loss, report and gradients in fp64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory, small: ModuleType) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, str(small.__file__), str(folder)], check=True, timeout=200)
    return folder


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_tasks_do_not_depend_on_the_number_of_ranks(solved: Path, small: ModuleType, ranks: int, kind: str) -> None:
    expected = small.solve(kind, 0, 1)
    assert expected["loss"] > 0
    for rank in range(ranks):
        found = torch.load(solved / f"{ranks}-{rank}.pt", weights_only=True)[kind]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # reports are measured in fp32; the loss and its gradients are fp64 throughout
            exact = name == "loss" or name.startswith(("gradient/", "loss/"))
            tolerance = 1e-9 if exact else 1e-5
            difference = torch.nan_to_num((found[name] - value).abs(), nan=0.0)
            assert torch.equal(found[name].isnan(), value.isnan()), name
            assert (difference <= tolerance * (1 + torch.nan_to_num(value.abs(), nan=0.0))).all(), name
