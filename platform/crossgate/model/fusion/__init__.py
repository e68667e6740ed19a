"""Gates and fusions by name. A new one is a new file in this folder; nothing else changes."""

from __future__ import annotations

import importlib
import pkgutil

from crossgate.model.fusion.base import (
    FUSIONS,
    Fusion,
    FusionInput,
    FusionOutput,
    build_fusion,
    check_name,
    register,
    uniform_weights,
)

__all__ = [
    "FUSIONS",
    "Fusion",
    "FusionInput",
    "FusionOutput",
    "build_fusion",
    "check_name",
    "register",
    "uniform_weights",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
