"""The file that MLflow runs to make the packaged model: code in place of a pickle."""

from __future__ import annotations

import logging
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

# At each load it would warn that a union is not checked; the predictor checks each item by itself.
logging.getLogger("mlflow.types.type_hints").setLevel(logging.ERROR)


class CrossgateModel(PythonModel):
    """A `Predictor` behind MLflow's interface."""

    # Else MLflow reduces a table to its first column, and fails a request for one odd item.
    _skip_type_hint_validation = True

    def load_context(self, context: PythonModelContext) -> None:
        """Reads the weights; MLflow calls it once."""
        from crossgate.registry.predictor import Predictor
        from crossgate.registry.sources import Settings

        self._predictor = Predictor(context.artifacts["model"], Settings(**(context.model_config or {})))

    # MLflow derives the model's signature from these hints: a list of whatever names a video.
    def predict(
        self,
        context: PythonModelContext,
        model_input: list[str | bytes | dict[str, Any]],
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """See `Predictor.predict`; what is no finite number is None, for MLflow writes the table as JSON.

        Raises:
            UserError: more items than the settings allow.
        """
        from crossgate.registry.predictor import as_json

        table = self._predictor.predict(model_input)
        for name in ("score", "scores", "weights"):
            table[name] = pd.Series([as_json(value) for value in table[name]], table.index, dtype=object)
        return table


mlflow.models.set_model(CrossgateModel())
