"""Which MLflow server, and a client for it without any global state of MLflow's."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from crossgate import environment
from crossgate.config import TrackingConfig
from crossgate.errors import Unreachable, UserError, first_line
from crossgate.recipe import HIDDEN, redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PROBE_SECONDS = 5.0
_WEB = ("http", "https")
_FILE = "sqlite:///"
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


@dataclass(frozen=True)
class Server:
    """A reachable server and the experiment of a recipe.

    Attributes:
        uri: as MLflow takes it.
        client: bound to this server for runs and for the registry; independent of `mlflow.set_tracking_uri`.
        experiment_id: of `TrackingConfig.experiment`.
    """

    uri: str
    client: MlflowClient
    experiment_id: str

    @property
    def label(self) -> str:
        """The URI without a password, for messages and files."""
        return redacted(self.uri)


def tracking_uri(config: TrackingConfig, output: str | Path) -> str:
    """Returns the recipe's server, else ``MLFLOW_TRACKING_URI``, else a SQLite file beside the runs.

    Raises:
        UserError: for the address of a stored recipe whose password is nowhere to be had.
    """
    configured = config.uri or environment.tracking_uri()
    return _with_credentials(configured) if configured else f"sqlite:///{Path(output).absolute() / 'mlflow.db'}"


def pinned(config: TrackingConfig, output: str | Path) -> TrackingConfig:
    """Returns the settings with the SQLite default spelt out, for runs that keep their directories elsewhere."""
    if config.uri or environment.tracking_uri():
        return config
    return config.model_copy(update={"uri": tracking_uri(config, output)})


def _with_credentials(uri: str) -> str:
    """Returns a stored address, which has lost its password, as it can be used.

    Raises:
        UserError: for a database whose full address the environment does not have.
    """
    named = environment.tracking_uri() or ""
    if HIDDEN not in uri:
        return uri
    if redacted(named) == uri:
        return named
    if urlsplit(uri).scheme in _WEB:  # MLflow itself takes MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD
        return uri.replace(f"{HIDDEN}@", "", 1)
    raise UserError(
        "passwords are not stored with a run",
        where=f"tracking.uri {uri}",
        cure="set MLFLOW_TRACKING_URI to the whole address, or give --tracking-uri",
    )


def make_client(uri: str) -> MlflowClient:
    """Returns a client whose runs and registered models both live at the URI."""
    environment.calm_mlflow()
    from mlflow import MlflowClient

    for chatty in ("alembic", "mlflow.tracking._tracking_service.client"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # It shows a trace for each refusal of a database that it raises as well: `connect` and `delivery` tell that once.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # an outage is told once, by `delivery`
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def connect(config: TrackingConfig, output: str | Path) -> Server:
    """Returns the server with its experiment, which is made on first use.

    Args:
        config: the recipe's section.
        output: folder of the runs; the SQLite default and its artifacts live in it.

    Raises:
        Unreachable: when the server does not answer or refuses.
        UserError: when it is of a kind that MLflow no longer writes to, or its experiment was deleted.
    """
    uri = tracking_uri(config, output)
    _check_scheme(uri)
    _probe(uri)
    try:
        client = make_client(uri)
        return Server(uri, client, _experiment(client, config.experiment, _artifacts(uri)))
    except UserError:
        raise
    except Exception as error:  # database drivers and HTTP stacks raise whatever they like
        raise _unreachable(uri, error) from None


def _check_scheme(uri: str) -> None:
    scheme = urlsplit(uri).scheme
    if scheme in ("", "file"):
        raise UserError(
            "MLflow no longer writes to plain folders",
            where=f"tracking.uri {uri}",
            expected="sqlite:///FILE.db or http(s)://HOST:PORT",
        )
    if scheme == "sqlite":
        file = Path(uri.removeprefix(_FILE))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"its folder cannot be made ({error.strerror})", where=f"tracking.uri {uri}") from None
    elif scheme not in _WEB and scheme.partition("+")[0] not in _DATABASES and not scheme.startswith("databricks"):
        raise UserError(
            f"unknown kind of tracking server '{scheme}'",
            where=f"tracking.uri {redacted(uri)}",
            expected="sqlite:///FILE.db, http(s)://HOST:PORT or a database URL",
        )


def _probe(uri: str) -> None:
    """Asks a web server, or a SQLite file, for a sign of life, since MLflow's own first call retries for long."""
    if uri.startswith(_FILE):
        _probe_file(uri)
    if urlsplit(uri).scheme not in _WEB:
        return
    import requests

    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=_PROBE_SECONDS)
    except requests.RequestException as error:
        raise _unreachable(uri, error) from None


def _probe_file(uri: str) -> None:
    """Begins to write; a file that another run is just writing is no refusal."""
    path = uri.removeprefix(_FILE).partition("?")[0]
    if not path or path.startswith(("file:", ":memory:")):
        return
    try:
        with closing(sqlite3.connect(path, timeout=_PROBE_SECONDS, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise _unreachable(uri, error) from None


def _unreachable(uri: str, error: Exception) -> Unreachable:
    reason = first_line(error)[:200]
    password = urlsplit(uri).password
    if password:
        reason = reason.replace(password, "***")
    where = f"tracking.uri {redacted(uri)}"
    if uri.startswith(_FILE):
        cure = "free some space, check who may write there, or name another file in tracking.uri"
        return Unreachable(f"this database takes no data ({reason})", where=where, cure=cure)
    return Unreachable(
        f"the tracking server does not answer ({reason})",
        where=where,
        cure="start it, correct tracking.uri or MLFLOW_TRACKING_URI, or set tracking.enabled=false",
    )


def _artifacts(uri: str) -> str | None:
    """Artifacts of a SQLite store go beside its file; a real server knows its own place."""
    if not uri.startswith(_FILE):
        return None
    return (Path(uri.removeprefix(_FILE)).absolute().parent / "mlartifacts").as_uri()


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifacts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another run was faster
            assert found is not None
    if found.lifecycle_stage != "active":
        raise UserError(
            f"experiment '{name}' was deleted on the server",
            where="tracking.experiment",
            cure="restore it (mlflow experiments restore) or choose another name",
        )
    return found.experiment_id
