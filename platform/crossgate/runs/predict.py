"""Predictions for a person: from the registry, a run directory or a model directory, as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pandas as pd

from crossgate.config import TrackingConfig
from crossgate.errors import UserError
from crossgate.evaluation.tables import Table
from crossgate.registry.predictor import Predictor, Settings, as_json
from crossgate.registry.release import load


def predict_videos(
    model: str,
    videos: Sequence[str],
    *,
    depth: Sequence[str] | None = None,
    units: Sequence[str] | None = None,
    tracking_uri: str = "",
    bounds: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Returns one row a clip, as `registry.predictor.Predictor.predict`.

    Args:
        model: ``models:/NAME@ALIAS``, or the directory of a run or model.
        videos: paths or URLs.
        depth: a depth file for each video; empty where there is none.
        units: what one step of each depth file means (None: millimetres).
        tracking_uri: server of a registered model.
        bounds: fields of `registry.predictor.Settings` that are not to have their defaults.

    Raises:
        UserError: no such model, or depth files or their units that do not pair with videos.
    """
    if depth and len(depth) != len(videos):
        raise UserError(f"{len(depth)} depth files for {len(videos)} videos", where="--depth", expected="one each")
    if units and len(units) != len(videos):
        raise UserError(f"{len(units)} depth units for {len(videos)} videos", where="units", expected="one each")
    items = [
        {"source": video, "depth": beside, "depth_unit": unit} if beside else {"source": video}
        for video, beside, unit in zip(videos, depth or [""] * len(videos), units or ["mm"] * len(videos), strict=True)
    ]
    if model.startswith("models:/"):
        registered = load(model, TrackingConfig(uri=tracking_uri), **(bounds or {}))
        return cast(pd.DataFrame, registered.predict(pd.DataFrame(items)))
    return Predictor(Path(model), Settings(**(bounds or {}))).predict(items)


def format_rows(frame: pd.DataFrame) -> str:
    """Returns the predictions as an aligned table."""
    table = Table(["clip", "start", "label", "score", "gate weights", "note"])
    for row in frame.to_dict(orient="records"):
        weights = row["weights"] if isinstance(row["weights"], dict) else {}
        used = list(row["modalities"]) if isinstance(row["modalities"], list | tuple) else []
        failed = bool(row["error"])
        said = " ".join(f"{name} {weights[name]:.2f}" for name in used) if weights else " ".join(used)
        table.rows.append(
            [
                str(row["source"]),
                f"{row['start_s']:.1f} s",
                "" if failed else str(row["label"]),
                "" if failed else f"{row['score']:.2f}",
                said,
                str(row["error"] or ""),
            ]
        )
    return table.text()


def json_rows(frame: pd.DataFrame) -> list[str]:
    """Returns a JSON object a clip; what a failed one has no number for is null."""
    return [json.dumps(as_json(row), default=str, allow_nan=False) for row in frame.to_dict(orient="records")]
