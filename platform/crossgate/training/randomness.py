"""Random states of a rank: kept in a safetensors file, put back, or drawn anew where a rank had none."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_WORDS = "words"


def save_random_states(path: Path) -> None:
    """Writes the states of torch, CUDA, Python and NumPy."""
    tensors, words = _states()
    save_file(tensors, path, {_WORDS: json.dumps(words)})


def load_random_states(path: Path) -> None:
    """Puts the states back that `save_random_states` wrote."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        _restore(tensors, json.loads(file.metadata()[_WORDS]))


def begin_random_states(seed: int, rank: int, step: int) -> None:
    """Draws states for a rank that had none at this step, since there were fewer: its own, and other ones each time."""
    torch.manual_seed(int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def device_random_state() -> list[Tensor]:
    """Returns the states that a model draws from: torch's, and CUDA's where there is one."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])


def set_device_random_state(state: list[Tensor]) -> None:
    """Puts back what `device_random_state` returned."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])


class random_states_kept:
    """Context that leaves random states as they were, so that a look aside does not change the run."""

    def __enter__(self) -> None:
        self._kept = _states()

    def __exit__(self, *exception: object) -> None:
        _restore(*self._kept)


def _states() -> tuple[dict[str, Tensor], list[Any]]:
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(internal),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, [version, gauss, str(kind), int(position), int(has_gauss), float(cached)]


def _restore(tensors: dict[str, Tensor], words: list[Any]) -> None:
    version, gauss, kind, position, has_gauss, cached = words
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
