"""Who is champion: reading it, handing the alias on, and taking it back. MLflow keeps no history; tags here do."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crossgate.config import TrackingConfig
from crossgate.errors import UserError, first_line
from crossgate.tracking import Server, connect

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER = "challenger"
_BEFORE = "crossgate.{}_before"
_SINCE = "crossgate.{}_since"
_DECISION = "crossgate.decision"
NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class Decision:
    """What the gate said of a model.

    Attributes:
        passed: whether it may have the alias.
        reasons: a sentence a condition, whether met or not.
        champion: version that it was compared with; 0 where there was none.
    """

    passed: bool
    reasons: tuple[str, ...]
    champion: int = 0

    def text(self) -> str:
        """Returns the decision and its reasons, a line each."""
        return "\n".join(["the gate passes it" if self.passed else "the gate refuses it", *self.reasons])


@contextmanager
def explained(server: Server, name: str) -> Iterator[None]:
    """Turns what the registry says against a name, or its silence, into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # HTTP, database and object storage each have their own family
        reason = first_line(error)[:200]
        raise UserError(f"the registry refused '{name}' ({reason})", where=f"tracking.uri {server.label}") from None


def holder(server: Server, name: str, alias: str) -> ModelVersion | None:
    """Returns the version that has the alias, None where there is no such alias or model."""
    from mlflow.exceptions import MlflowException

    try:
        return server.client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in NOT_THERE:
            return None
        raise


@contextmanager
def model_of(server: Server, version: ModelVersion) -> Iterator[Path]:
    """Gives the model directory inside a version's package, for as long as the block lasts.

    Raises:
        UserError: the version was not made by `release`.
    """
    import mlflow.artifacts

    source = server.client.get_model_version_download_uri(version.name, version.version)
    with tempfile.TemporaryDirectory() as scratch:
        folder = mlflow.artifacts.download_artifacts(artifact_uri=source, tracking_uri=server.uri, dst_path=scratch)
        found = Path(folder) / "artifacts" / "model"
        if not found.is_dir():
            raise UserError("holds no model of crossgate", where=f"models:/{version.name}/{version.version}")
        yield found


def hand_on(server: Server, version: ModelVersion, alias: str, decision: Decision | None = None) -> None:
    """Gives the alias to a version and notes who had it before."""
    client, name = server.client, version.name
    before = holder(server, name, alias)
    if decision is not None:
        client.set_model_version_tag(name, version.version, _DECISION, decision.text()[:5000])
    if before is not None and int(before.version) == int(version.version):
        return
    if before is not None:
        client.set_model_version_tag(name, version.version, _BEFORE.format(alias), str(before.version))
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    client.set_model_version_tag(name, version.version, _SINCE.format(alias), since)
    client.set_registered_model_alias(name, alias, version.version)


def challenge(server: Server, version: ModelVersion, decision: Decision) -> None:
    """Leaves the alias where it is and keeps with the version why."""
    server.client.set_model_version_tag(version.name, version.version, _DECISION, decision.text()[:5000])


def rollback(
    name: str, tracking: TrackingConfig, *, alias: str = "champion", to: int = 0, output: str | Path = "runs"
) -> tuple[int, int]:
    """Gives the alias back to the version that had it before, or to a named one.

    Args:
        name: registered model.
        tracking: the server (default: the environment's, else the SQLite file in `output`).
        alias: that moves.
        to: version (0: the one before).

    Returns:
        The version that had the alias, 0 if none, and the one that has it now.

    Raises:
        UserError: no such model, alias or version, or nobody before; the server is unreachable or refuses.
    """
    server = connect(tracking, output)
    with explained(server, name):
        now = holder(server, name, alias)
        if now is None and not to:
            raise UserError(f"no version is '{alias}'", where=f"models:/{name}", cure="name the version with --to")
        target = to or int((now.tags if now is not None else {}).get(_BEFORE.format(alias), 0))
        if not target:
            raise UserError(f"no version was '{alias}' before", where=f"models:/{name}", cure="name one with --to")
        if not _has_version(server, name, target):
            raise UserError(f"no version {target}", where=f"models:/{name}", cure="see its versions in MLflow")
        server.client.set_registered_model_alias(name, alias, str(target))
    return int(now.version) if now is not None else 0, target


def _has_version(server: Server, name: str, number: int) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        server.client.get_model_version(name, str(number))
    except MlflowException as error:
        if error.error_code not in NOT_THERE:  # a server that is lost or forbids has not said that
            raise
        return False
    return True
