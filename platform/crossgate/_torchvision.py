"""Lets timm and torchmetrics import where PyPI's torchvision (a CUDA build) stands beside a CPU build of torch.

There torchvision's compiled part cannot be loaded, so the operator schemas that its Python part refers to at import
time are missing and ``import torchvision`` raises RuntimeError. Declaring those two schemas is enough for everything
we use (transforms, timm's models); calling the operators still raises. The hook does nothing until somebody imports
torchvision, and nothing at all where the import works by itself: a machine with a GPU, or a true CPU build.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_MISSING = "operator torchvision::"
_kept: list[object] = []  # a torch Library takes its schemas with it when it is collected


class _Loader(importlib.abc.Loader):
    """Runs torchvision's own loader, once more with the schemas declared if the first try lacked them."""

    def __init__(self, real: importlib.abc.Loader) -> None:
        self._real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self._real.exec_module(module)
        except RuntimeError as error:
            if _MISSING not in str(error):
                raise
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in _SCHEMAS:
                library.define(schema)
            _kept.append(library)
            self._real.exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps the loader of ``torchvision`` and of nothing else."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Puts the hook in front of Python's importers, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
