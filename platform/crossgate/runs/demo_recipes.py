"""The demo's recipes: small enough for two CPU cores, written to files that a user can go on with."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from crossgate.config import Recipe
from crossgate.recipe import load_recipe

GATES = ("mean", "sigmoid", "softmax")

# Of the small timm models it learns most per second on a CPU, at 64 pixels.
_ENCODER = {"backbone": "test_efficientnet", "norm": "group"}


class DemoRecipes:
    """Makes the recipes of a demo.

    Args:
        folder: where the YAML files go.
        index: folder of the shards.
        modalities: that the clips have.
        pretrain_splits: splits without a need for labels.
        generated: clips of one group are different actions in one scene: the hardest negatives, not siblings.
        workers: ranks of pretraining.
        quick: a tenth of the steps.
    """

    def __init__(
        self,
        folder: Path,
        index: str,
        *,
        modalities: tuple[str, ...],
        pretrain_splits: tuple[str, ...],
        output: Path,
        generated: bool,
        workers: int,
        quick: bool,
    ) -> None:
        self._folder, self._generated, self._workers, self._quick = folder, generated, workers, quick
        self._pretrain_splits = list(pretrain_splits)
        self._common: dict[str, Any] = {
            "run": {"output": str(output)},
            "data": {
                "index": index,
                "clip": {"modalities": list(modalities), "frames": 4, "size": 64, "mels": 64},
                "global_batch": 16 if quick else 32,
            },
            "model": {
                "dim": 128,
                "embedding": 64,
                "encoders": {name: dict(_ENCODER) for name in modalities},
            },
            "engine": {"zero_stage": 1},
            "tracking": {"experiment": "crossgate-demo"},
        }

    def pretrain(self) -> Recipe:
        """Cross-modal contrast on all clips that may be used without labels."""
        tree = self._tree("pretrain")
        tree["data"]["train"] = self._pretrain_splits
        tree["data"]["global_batch"] = 64 if not self._quick else 16
        tree["data"]["augment"] = {"crop": 0.7}
        tree["pretrain"] = {"temperature": 0.2, "exclude_group": not self._generated}
        tree["optim"] = {"lr": 1.5e-3}
        tree["training"] = {"epochs": 1 if self._quick else 6}
        tree["cluster"] = {"workers": self._workers, "launcher": "ray"}
        return self._write("pretrain", tree, "contrast of all pairs of modalities")

    def search(self, init: Path, task: str) -> Recipe:
        """Every gate of the demo on the frozen pretrained encoders, selected on validation groups."""
        tree = self._tree("search")
        tree["data"]["global_batch"] = 64 if not self._quick else 16
        tree["finetune"] = {
            "task": task,
            "init": str(init),
            "freeze": True,
            "features": str(self._folder.parent / "features"),
            "unimodal_weight": 0.5,
        }
        tree["optim"] = {"lr": 3e-3, "weight_decay": 3.0}
        tree["training"] = {"epochs": 2 if self._quick else 40, "log_every": 60, "eval_every": 24, "save_every": 120}
        metric = "val/average_precision" if task == "violence" else "val/accuracy"
        tree["search"] = {
            "space": {"model.fusion.name": list(GATES)},
            "metric": metric,
            "concurrent": len(GATES),  # a trial's process takes longer to start than the trial
            "cpus_per_trial": round(self._workers / len(GATES), 2),
        }
        return self._write(f"search-{task}", tree, "one trial a gate on frozen encoders, selected on validation groups")

    def finetune(self, trial: Path, task: str, gate: str) -> Recipe:
        """The search's winner with its encoders set free."""
        tree = self._tree("finetune")
        tree["model"]["fusion"] = {"name": gate}
        tree["finetune"] = {"task": task, "init": str(trial), "encoder_lr_scale": 1.0, "unimodal_weight": 0.5}
        tree["data"]["augment"] = {"crop": 0.85, "jitter": 0.1, "mask_audio": 0.0}
        tree["optim"] = {"lr": 3e-4}  # faster ones first unlearn what the encoders bring along
        tree["training"] = {"epochs": 1 if self._quick else 2}
        tree["cluster"] = {
            "workers": self._workers,
            "launcher": "ray",
        }  # two threads of one rank are no faster than one
        return self._write(f"finetune-{task}", tree, f"the {task} classifier, measured on the test groups")

    def _tree(self, kind: str) -> dict[str, Any]:
        return {"kind": kind, **deepcopy(self._common)}

    def _write(self, name: str, tree: dict[str, Any], about: str) -> Recipe:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{name}.yaml"
        head = f"# {about}\n# run: crossgate {tree['kind']} --config {path}\n"
        path.write_text(head + yaml.safe_dump(tree, sort_keys=False))
        return load_recipe(path)
