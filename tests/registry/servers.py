"""A registry as a team runs it: MLflow over HTTP, its tables in PostgreSQL, its files in S3, all on loopback."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests

sys.path.append(str(Path(__file__).resolve().parents[1] / "stream"))
import s3_server
from free_ports import free_port

_OWNERS = ("postgres", "nobody")


@dataclass(frozen=True)
class Registry:
    """A running MLflow server.

    Attributes:
        uri: its address.
        database: what keeps its tables.
        artifacts: what keeps its files.
    """

    uri: str
    database: str
    artifacts: str


@contextmanager
def registry(folder: Path) -> Iterator[Registry]:
    """Runs a server in an empty folder; SQLite and files stand in for a database and an S3 that are not installed."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        keys: dict[str, str] = {}
        artifacts = "files"
        place = str(folder / "artifacts")
        if s3_server.binary() is not None:
            (folder / "s3").mkdir()
            url = stack.enter_context(s3_server.seaweed(folder / "s3"))
            s3_server.client(url).create_bucket(Bucket="models")
            keys = {"MLFLOW_S3_ENDPOINT_URL": url, "AWS_REGION": "us-east-1"}
            keys |= {"AWS_ACCESS_KEY_ID": s3_server.KEY, "AWS_SECRET_ACCESS_KEY": s3_server.SECRET}
            artifacts, place = "S3 (SeaweedFS)", "s3://models/mlflow"
        database, tables = "SQLite", f"sqlite:///{folder / 'mlflow.db'}"
        if has_postgres():
            database, tables = "PostgreSQL", stack.enter_context(postgres())
        port = free_port()
        words = ["server", "--host", "127.0.0.1", "--port", port, "--workers", 1, "--backend-store-uri", tables]
        command = [sys.executable, "-m", "mlflow", *words, "--artifacts-destination", place]
        uri = f"http://127.0.0.1:{port}"
        stack.enter_context(serving(list(map(str, command)), f"{uri}/health", folder / "mlflow.log", keys))
        yield Registry(uri, database, artifacts)


@contextmanager
def serving(
    command: list[str], alive: str, log: Path, environment: dict[str, str], patience: float = 120
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a web server from its first answer to the end of the block; what it started ends with it."""
    full = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1", **environment}
    full["PATH"] = f"{Path(command[0]).parent}:{full['PATH']}"  # mlflow starts uvicorn by its name
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=full, stdout=out, stderr=out, start_new_session=True)
    try:
        until = time.monotonic() + patience
        while not _answers(alive):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.1)
        yield process
    finally:
        _end(process)


def has_postgres() -> bool:
    """Whether the server, a way to it for MLflow, and a user that may run it are there."""
    installed = _tool("initdb") and _tool("postgres") and importlib.util.find_spec("psycopg2")
    return bool(installed and (os.getuid() != 0 or _owner()))


@contextmanager
def postgres() -> Iterator[str]:
    """Runs PostgreSQL, which refuses to be root, in a folder of its own; gives the URL of an empty database."""
    owner, port = _owner() if os.getuid() == 0 else None, free_port()
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as name:  # sockets' names are short
        if owner:
            shutil.chown(name, owner)
        data = f"{name}/data"
        made = [_tool("initdb"), "-D", data, "-U", "crossgate", "--auth=trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(made, check=True, user=owner, stdout=subprocess.DEVNULL, cwd=name)
        command = [_tool("postgres"), "-D", data, "-p", str(port), "-k", name, "-c", "listen_addresses=127.0.0.1", "-F"]
        with open(f"{name}/log", "wb") as log:
            process = subprocess.Popen(command, user=owner, stdout=log, stderr=log, cwd=name, start_new_session=True)
        try:
            _wait_for_postgres(port)
            yield f"postgresql+psycopg2://crossgate@127.0.0.1:{port}/postgres"
        finally:
            _end(process)


def _tool(name: str) -> str:
    """Returns the path of a program of PostgreSQL, or nothing; Debian keeps them off the search path."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(debian[-1]) if debian else "")


def _owner() -> str | None:
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in _OWNERS if name in known), None)


def _wait_for_postgres(port: int) -> None:
    import psycopg2

    until = time.monotonic() + 60
    while True:
        try:
            psycopg2.connect(host="127.0.0.1", port=port, user="crossgate", dbname="postgres").close()
            return
        except psycopg2.OperationalError:
            assert time.monotonic() < until, "PostgreSQL did not start"
            time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=2).ok
    except requests.RequestException:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a server and its workers."""
    import psutil

    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        return
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=5)
    for one in alive:
        one.kill()
    process.wait()
