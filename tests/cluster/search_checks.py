"""What a search must have left on disk and in MLflow, whatever was killed on the way."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mlflow import MlflowClient

from crossgate.cluster.trials import TrialRecord, known_trials, reports_of
from crossgate.training.metrics import read_metrics

_ENDS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


def ended(folder: Path) -> list[TrialRecord]:
    """Returns the trials that need no further work."""
    return [record for record in known_trials(folder) if record.status in ("finished", "pruned")]


def check_nesting(uri: str, folder: Path, experiment: str = "crossgate") -> None:
    """Every trial is one MLflow run below the search's, ended as it ended, with the clips that it read."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    every = client.search_runs([found.experiment_id])
    (parent,) = [run for run in every if run.info.run_name == folder.name]
    nested = [run for run in every if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    trials = {path.parent.name: json.loads(path.read_text())["status"] for path in folder.glob("*/trial.json")}
    names = [run.info.run_name for run in nested]
    assert sorted(names) == sorted(trials), "one run a trial"
    assert parent.info.status == "FINISHED"
    for run in nested:
        assert run.info.status == _ENDS[trials[run.info.run_name]], run.info.run_name
        assert {one.tags[0].value for one in run.inputs.dataset_inputs} == {"train", "val"}
    table = json.loads(parent.data.tags["mlflow.loggedArtifacts"])[0]["path"]
    assert table in {one.path for one in client.list_artifacts(parent.info.run_id)}


def check_values(records: Iterable[TrialRecord], metric: str) -> None:
    """Each trial's value is what its own run measured: by the weights that it kept, or where it was stopped."""
    for record in records:
        if record.status == "pruned":
            assert reports_of(record.directory)[-1] == (record.step, record.value), record.name
        elif record.status == "finished":
            lines = [line for line in read_metrics(Path(record.directory)) if line["step"] == record.step]
            told = [line[metric] for line in lines if metric in line]  # the loss of a step has a line of its own
            assert record.value in told, record.name
