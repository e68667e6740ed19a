"""Contract C4 for whole tasks: real gloo processes give one process's loss, report and gradients in fp64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.mark.parametrize("ranks", [2, 4])
def test_tasks_do_not_depend_on_the_number_of_ranks(tmp_path: Path, small: ModuleType, ranks: int) -> None:
    outputs = [tmp_path / f"{rank}.pt" for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, small.__file__, str(rank), str(ranks), str(tmp_path / "rendezvous"), str(output)]
        )
        for rank, output in enumerate(outputs)
    ]
    assert [process.wait(timeout=200) for process in processes] == [0] * ranks
    for kind in ("pretrain", "finetune"):
        expected = small.solve(kind, 0, 1)
        assert expected["loss"] > 0
        for output in outputs:
            found = torch.load(output, weights_only=True)[kind]
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                # reports are measured in fp32; the loss and its gradients are fp64 throughout
                exact = name == "loss" or name.startswith(("gradient/", "loss/"))
                tolerance = 1e-9 if exact else 1e-5
                torch.testing.assert_close(
                    found[name],
                    value,
                    rtol=tolerance,
                    atol=tolerance,
                    equal_nan=True,
                    msg=lambda t, n=name: f"{n}: {t}",
                )
