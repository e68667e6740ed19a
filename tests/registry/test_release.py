"""From a run directory to a registered model, loaded back by alias, in a real MLflow on SQLite."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow.artifacts
import mlflow.pyfunc
import pandas as pd
import psutil
import pytest
import requests
from free_ports import free_port
from hostile import BOUNDS, hostile
from mlflow import MlflowClient

from crossgate.config import ReleaseConfig, TrackingConfig
from crossgate.errors import UserError
from crossgate.recipe import parse_recipe
from crossgate.registry.package import consumer_code, package_model
from crossgate.registry.predictor import Predictor
from crossgate.registry.release import ReleasedModel, load, release
from crossgate.tracking import open_tracker


@contextmanager
def running(command: list[str], alive: str, log: Path, environment: dict[str, str]) -> Iterator[int]:
    """A server process, by its number, from its first sign of life to the end of the block."""
    full = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", **environment}
    full["PATH"] = f"{Path(sys.executable).parent}:{full['PATH']}"  # mlflow starts uvicorn by its name
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=full, stdout=out, stderr=out, start_new_session=True)
    try:
        for _ in range(400):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                if requests.get(alive, timeout=1).ok:
                    break
            except requests.RequestException:
                time.sleep(0.3)
        else:
            pytest.fail(log.read_text()[-2000:])
        yield process.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def strict(text: str) -> Any:
    """JSON as other languages read it."""

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def peak(pid: int) -> int:
    """The most memory that a process or one of its children has had, in MiB."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    said = [Path(f"/proc/{process.pid}/status").read_text() for process in family]
    return max(int(text.split("VmHWM:")[1].split()[0]) for text in said) >> 10


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run_dir(output: Path, model_dir: Path) -> Path:
    """A finished fine-tuning run, tracked."""
    folder = output / "finetune-violence"
    with open_tracker(parse_recipe({"kind": "finetune"}), folder, 0) as tracker:
        tracker.log_metrics({"val/ap": 0.8}, 1)
    shutil.copytree(model_dir, folder / "model")
    metrics = {"test/ap": 0.8123, "test/ap_low": 0.7, "test/ap_high": 0.9, "val/ap": 0.82, "test/top5": None}
    (folder / "results.json").write_text(json.dumps({"format": 1, "metrics": metrics, "provenance": {"clips": 321}}))
    return folder


@pytest.fixture(scope="module")
def released(run_dir: Path) -> ReleasedModel:
    return release(run_dir, ReleaseConfig(), TrackingConfig())


@pytest.fixture
def client(released: ReleasedModel) -> MlflowClient:
    return MlflowClient(tracking_uri=released.tracking_uri, registry_uri=released.tracking_uri)


def test_a_release_is_a_version_with_card_lineage_and_alias(
    released: ReleasedModel, client: MlflowClient, run_dir: Path
) -> None:
    assert released == ReleasedModel(
        "crossgate-violence", 1, "champion", "models:/crossgate-violence@champion", released.tracking_uri
    )
    version = client.get_model_version_by_alias("crossgate-violence", "champion")
    assert version.tags["crossgate.init"] == "pretrain-abc"
    assert version.tags["crossgate.index"] == "d1g35t"
    assert version.tags["crossgate.run"] == run_dir.name
    assert client.get_run(version.run_id).info.run_name == run_dir.name
    for part in ("fight, nofight", "| ap | 0.8123 (0.7 to 0.9) |", "not measurable", "d1g35t", "## Limits", "Licence"):
        assert part in version.description


def test_loaded_by_alias_it_equals_the_direct_predictor(
    released: ReleasedModel, run_dir: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, mute = videos / "whole.mp4", videos / "mute.mp4"
    direct = Predictor(run_dir).predict([whole, mute, "none.mp4"])
    given = [str(whole), mute.read_bytes(), "none.mp4"]

    ours = load(released.uri, TrackingConfig(uri=released.tracking_uri))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", released.tracking_uri)
    plain = mlflow.pyfunc.load_model(released.uri)
    depth = videos / "depth.mkv"
    for model in (ours, plain):
        for items in (given, pd.DataFrame({"source": given}), [{"source": item} for item in given]):
            table = model.predict(items)
            assert table["scores"].tolist() == direct["scores"].tolist()
            assert table["error"].tolist() == direct["error"].tolist()
        paired = [{"depth": str(depth), "source": str(whole)}]
        for items in (paired, paired[0], pd.DataFrame(paired)):
            assert model.predict(items)["modalities"].tolist() == [["rgb", "audio", "depth"]]
        assert model.predict(str(whole))["scores"][0] == direct["scores"][0]
    strict(json.dumps(table.to_dict(orient="records")))
    assert table["score"].tolist() == [*direct["score"][:2], None]
    merged = load(released.uri, TrackingConfig(uri=released.tracking_uri), aggregate=True)
    assert len(merged.predict([str(videos / "long.mp4")])) == 1


def test_what_a_packaged_model_answers_is_json_whatever_the_network_gives() -> None:
    """MLflow's server and its `models predict` write NaN as it is, and no other language reads that."""
    from crossgate.registry.pyfunc_model import CrossgateModel

    nan, inf = float("nan"), float("inf")
    row = {"source": "x", "start_s": 0.0, "label": "a", "score": nan, "scores": {"a": nan, "b": 0.5}}
    rows = [{**row, "weights": {"rgb": inf}}, {**row, "score": 0.5, "weights": None}]
    model = CrossgateModel()
    model._predictor = SimpleNamespace(predict=lambda items: pd.DataFrame(rows))
    answer = strict(json.dumps(model.predict(None, ["x"]).to_dict(orient="records")))
    assert [row["score"] for row in answer] == [None, 0.5]
    assert answer[0]["scores"] == {"a": None, "b": 0.5}
    assert [row["weights"] for row in answer] == [{"rgb": None}, None]


def test_released_again_it_is_the_same_version_under_another_alias(
    released: ReleasedModel, client: MlflowClient, run_dir: Path
) -> None:
    again = release(run_dir, ReleaseConfig(alias="challenger"), TrackingConfig())
    assert (again.version, again.fresh) == (released.version, False)
    assert client.get_model_version_by_alias(released.name, "challenger").version == released.version
    assert len(client.search_model_versions(f"name = '{released.name}'")) == 1


def test_a_run_that_was_not_tracked_can_be_released(
    run_dir: Path, model_dir: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    untracked = tmp_path / "runs" / "untracked"
    shutil.copytree(model_dir, untracked / "model")
    shutil.copy(run_dir / "results.json", untracked)
    done = release(untracked, ReleaseConfig(name="other"), TrackingConfig())
    table = load(done.uri).predict([str(videos / "mute.mp4")])  # the default: beside ./runs
    assert table["error"][0] is None
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}, "nothing lands in MLflow's own default places"


def test_a_release_touches_no_global_state(released: ReleasedModel) -> None:
    assert mlflow.active_run() is None
    assert mlflow.get_tracking_uri() != released.tracking_uri


def test_the_package_has_no_pickle_and_pinned_requirements(model_dir: Path, tmp_path: Path) -> None:
    package_model(model_dir, tmp_path / "package")
    files = [path for path in (tmp_path / "package").rglob("*") if path.is_file()]
    assert any(path.name == "model.safetensors" for path in files)
    for path in files:
        assert path.suffix in (".py", ".json", ".txt", ".yaml", ".safetensors", "") or path.name == "MLmodel", path
        start = path.read_bytes()[:4]
        assert not start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")), path
    assert "python_model:" not in (tmp_path / "package" / "MLmodel").read_text()
    pins = (tmp_path / "package" / "requirements.txt").read_text().split()
    names = {pin.partition("==")[0] for pin in pins}
    assert {"torch", "timm", "av", "opencv-python-headless", "numpy", "safetensors", "pydantic", "mlflow"} <= names
    assert not names & {"ray", "deepspeed", "webdataset", "torchmetrics"}
    assert all("==" in pin and "+" not in pin for pin in pins)


def test_the_packaged_code_alone_predicts(model_dir: Path, tmp_path: Path, videos: Path) -> None:
    """In a process that has no other crossgate and no training stack."""
    code = consumer_code(tmp_path / "code")
    script = f"""
import sys
sys.path.insert(0, {str(code.parent)!r})
for name in ("ray", "deepspeed", "mlflow", "webdataset", "matplotlib", "sklearn", "torchmetrics"):
    sys.modules[name] = None  # importing it fails
import crossgate
assert crossgate.__file__.startswith({str(code)!r})
from crossgate.registry.predictor import Predictor
table = Predictor({str(model_dir)!r}).predict([{str(videos / "whole.mp4")!r}])
assert table["error"][0] is None, table["error"][0]
print(table["label"][0])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("fight", "nofight")


def test_what_cannot_be_released_says_why(output: Path, run_dir: Path, model_dir: Path) -> None:
    def refused(folder: Path, says: str, **tracking: str) -> None:
        with pytest.raises(UserError, match=says) as caught:
            release(folder, ReleaseConfig(), TrackingConfig(**tracking))
        assert "\n" not in str(caught.value)

    refused(output / "none", "no such run directory")
    unfinished = output / "unfinished"
    unfinished.mkdir()
    refused(unfinished, "not finished")
    shutil.copytree(model_dir, output / "search" / "trial" / "model")
    refused(output / "search", "no model here.*; give a run inside it: trial$")
    shutil.copytree(model_dir, unfinished / "model")
    refused(unfinished, "not evaluated")
    (unfinished / "results.json").write_text("[]")
    refused(unfinished, "not a results file")
    card = json.loads((unfinished / "model" / "model.json").read_text())
    (unfinished / "model" / "model.json").write_text(json.dumps({**card, "kind": "contrastive"}))
    refused(unfinished, "a pretraining run")
    refused(run_dir, "does not answer", uri="http://127.0.0.1:9")


def test_what_is_not_registered_says_so(released: ReleasedModel) -> None:
    for uri in ("models:/none@champion", f"models:/{released.name}@nobody", f"models:/{released.name}/99", "x"):
        with pytest.raises(UserError, match="regist"):
            load(uri, TrackingConfig(uri=released.tracking_uri))


def test_loaded_from_a_server_it_leaves_no_copy_behind(
    released: ReleasedModel, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(artifact_uri: str, tracking_uri: str, dst_path: str | None = None) -> str:
        """As MLflow does it over HTTP; from a folder of this machine it copies nothing by itself."""
        folder = Path(dst_path or tempfile.mkdtemp()) / "model"
        return str(shutil.copytree(artifact_uri.removeprefix("file://"), folder))

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", download)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = load(released.uri, TrackingConfig(uri=released.tracking_uri))
    assert list(tmp_path.iterdir()) == []
    assert model.predict([str(videos / "mute.mp4")])["error"][0] is None


@pytest.mark.slow
def test_the_same_through_a_server_over_http(
    run_dir: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/health", tmp_path / "server.log", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}):
        tracking = TrackingConfig(uri=url)
        fresh = tmp_path / "runs" / run_dir.name
        shutil.copytree(run_dir, fresh)  # tracked elsewhere before: this server gets the whole journal
        first = release(fresh, ReleaseConfig(), tracking)
        assert (first.version, first.fresh) == (1, True)
        assert release(fresh, ReleaseConfig(alias="challenger"), tracking).fresh is False
        (tmp_path / "scratch").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
        table = load(first.uri, tracking).predict([str(videos / "whole.mp4")])
        assert list((tmp_path / "scratch").iterdir()) == []
        (expected,) = Predictor(run_dir).predict([videos / "whole.mp4"])["scores"]
        assert table["scores"].tolist() == [pytest.approx(expected, abs=1e-5)]


_UNSENDABLE = object()


def _as_json(item: Any) -> Any:
    """What a client can put into JSON: bytes as base64."""
    if isinstance(item, bytes):
        return "data:video/mp4;base64," + base64.b64encode(item).decode()
    try:
        json.dumps(item, allow_nan=False)
    except (TypeError, ValueError):
        return _UNSENDABLE
    return item


@pytest.mark.slow
def test_mlflow_serves_it_over_http(released: ReleasedModel, run_dir: Path, videos: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "-p", str(port)]
    command += ["-m", released.uri]
    url = f"http://127.0.0.1:{port}"
    environment = {
        "MLFLOW_TRACKING_URI": released.tracking_uri,
        "SERVING_MODEL_CONFIG": json.dumps(BOUNDS),
        "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "600",  # the hostile request has a gigapixel to decode
    }
    with running(command, f"{url}/ping", tmp_path / "serve.log", environment) as pid:
        data = (videos / "whole.mp4").read_bytes()
        text = base64.b64encode(data).decode()
        wanted = Predictor(run_dir).predict([data])["scores"][0]
        for body in (
            {"inputs": [text, "none.mp4"]},
            {"inputs": [{"source": text}, {"source": "none.mp4"}]},
            {"inputs": [{"source": text, "name": "camera 1"}, {"source": 3, "depth": []}]},
        ):
            answer = requests.post(f"{url}/invocations", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            good, bad = strict(answer.text)["predictions"]
            assert good["scores"] == pytest.approx(wanted, abs=1e-5)
            assert bad["error"]
            assert bad["label"] is bad["score"] is None
        before = peak(pid)
        sent = [_as_json(item) for _, item in hostile(data, tmp_path)]
        body = json.dumps({"inputs": [item for item in sent if item is not _UNSENDABLE]})
        answer = requests.post(
            f"{url}/invocations", data=body, headers={"Content-Type": "application/json"}, timeout=600
        )
        assert answer.status_code == 200, answer.text[:500]
        rows = strict(answer.text)["predictions"]
        assert len(rows) > 180
        assert all(row["error"] and row["label"] is None for row in rows)
        assert peak(pid) - before < 300, f"MiB for a body of {len(body) >> 20}"
        answer = requests.post(f"{url}/invocations", json={"inputs": [0] * 10_001}, timeout=60)
        assert answer.status_code == 400 and "10001 videos at once; expected at most 10000" in answer.text
        # For a model whose input is a list, MLflow's server takes no tables.
        for body in ("{", "[]", '{"dataframe_records": [{"source": "x"}]}', '{"inputs": 3}'):
            json_type = {"Content-Type": "application/json"}
            answer = requests.post(f"{url}/invocations", data=body, headers=json_type, timeout=60)
            assert 400 <= answer.status_code < 500, (body, answer.text)
        assert requests.get(f"{url}/ping", timeout=60).ok


@pytest.mark.slow
def test_mlflow_predicts_from_a_file(released: ReleasedModel, run_dir: Path, videos: Path, tmp_path: Path) -> None:
    text = base64.b64encode((videos / "whole.mp4").read_bytes()).decode()
    (tmp_path / "in.json").write_text(json.dumps({"inputs": [text, "none.mp4"]}))
    command = [sys.executable, "-m", "mlflow", "models", "predict", "--env-manager", "local", "-m", released.uri]
    command += ["-i", str(tmp_path / "in.json"), "-o", str(tmp_path / "out.json")]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": released.tracking_uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    good, bad = strict((tmp_path / "out.json").read_text())["predictions"]
    wanted = Predictor(run_dir).predict([videos / "whole.mp4"])["scores"][0]
    assert good["scores"] == pytest.approx(wanted, abs=1e-5)
    assert bad["error"].startswith("none.mp4: no such file") and bad["score"] is None
