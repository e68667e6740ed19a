"""timm works in a loader's worker however it is started, also where torch and torchvision are of different builds.

The worker of Ray is in tests/cluster/test_pack.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import multiprocessing
import sys

import crossgate
from torch.utils.data import DataLoader, Dataset

from crossgate.stream.processes import worker_context


class Probe(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        assert multiprocessing.parent_process() is not None
        import timm

        return timm.create_model("test_vit", num_classes=0).num_features


if __name__ == "__main__":
    method = sys.argv[1]
    context = worker_context() if method == "forkserver" else multiprocessing.get_context(method)
    assert context.get_start_method() == method
    print(int(next(iter(DataLoader(Probe(), num_workers=1, multiprocessing_context=context)))))
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_loaders_worker_builds_a_backbone(method: str, tmp_path: Path) -> None:
    script = tmp_path / "probe.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script, method], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
