"""From a finished run to a version in the MLflow registry, and back by alias. Uses clients, no global state."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossgate.config import ReleaseConfig, TrackingConfig
from crossgate.errors import UserError, first_line
from crossgate.model.store import ModelCard, model_directory, one_inside, read_card
from crossgate.registry.aliases import CHALLENGER, NOT_THERE, Decision, challenge, explained, hand_on, holder, model_of
from crossgate.registry.card import description, model_card
from crossgate.registry.frozen import Frozen, check_frozen, pin
from crossgate.registry.package import package_model
from crossgate.tracking import Server, connect, deliver, known_run

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.pyfunc import PyFuncModel

_DIGEST_TAG = "crossgate.digest"


@dataclass(frozen=True)
class ReleasedModel:
    """A version in the registry.

    Attributes:
        name, version, alias: of the version.
        uri: ``models:/NAME@ALIAS``, for `load` and `mlflow.pyfunc.load_model`.
        tracking_uri: the server that has it.
        fresh: False where this very model had been released before and only the alias was set.
        decision: of the gate; None where it was not asked.
    """

    name: str
    version: int
    alias: str
    uri: str
    tracking_uri: str
    fresh: bool = True
    decision: Decision | None = None


Judge = Callable[[Path | None], Decision]
"""Gets the champion's model directory (None: there is none) and says whether the run's model may take its place."""


def release(
    run_dir: str | Path,
    config: ReleaseConfig,
    tracking: TrackingConfig,
    judge: Judge | None = None,
    frozen: Frozen | None = None,
    renew: bool = False,
) -> ReleasedModel:
    """Registers the model of a finished fine-tuning run as `challenger`, and sets the alias where it passes.

    Args:
        run_dir: has ``model/`` and ``results.json``.
        config: name and alias.
        tracking: the server; the default is the SQLite file beside the run directory.
        judge: asked where another version has the alias (None: nobody is asked).
        frozen: evaluation set that it judges on, pinned to the name (None: nothing is pinned).
        renew: judge on this set from now on, though another is pinned.

    Raises:
        UserError: the run is not finished, not evaluated or has no classes; it would be judged on another evaluation
            set than the name's; the server is unreachable or refuses.
    """
    run_dir = Path(run_dir)
    card, metrics, provenance = _finished_run(run_dir)
    name = config.name or f"crossgate-{card.task}"
    server = connect(tracking, run_dir.absolute().parent)
    deliver(run_dir, tracking)
    run_id = _run_on(server, run_dir)
    decision = _decide(server, name, config, card, judge, frozen, renew)
    with explained(server, name):
        version = _released_before(server, name, card)
        fresh = version is None
        if version is None:
            version = _register(server, name, run_dir, run_id, card, metrics, provenance)
        if decision is not None and frozen is not None:
            pin(server, name, frozen, renew)
        server.client.set_registered_model_alias(name, CHALLENGER, version.version)
        if decision is None or decision.passed:
            hand_on(server, version, config.alias, decision)
        else:
            challenge(server, version, decision)
    alias = config.alias if decision is None or decision.passed else CHALLENGER
    return ReleasedModel(name, int(version.version), alias, f"models:/{name}@{alias}", server.uri, fresh, decision)


def decide(
    run_dir: str | Path,
    config: ReleaseConfig,
    tracking: TrackingConfig,
    judge: Judge,
    frozen: Frozen | None = None,
    renew: bool = False,
) -> Decision:
    """Returns what `release` would decide, and registers nothing.

    Raises:
        UserError: as `release`.
    """
    card, _, _ = _finished_run(Path(run_dir))
    name = config.name or f"crossgate-{card.task}"
    server = connect(tracking, Path(run_dir).absolute().parent)
    decision = _decide(server, name, config, card, judge, frozen, renew)
    return decision or Decision(True, (f"nobody competes for '{config.alias}'",))


def _decide(
    server: Server,
    name: str,
    config: ReleaseConfig,
    card: ModelCard,
    judge: Judge | None,
    frozen: Frozen | None,
    renew: bool,
) -> Decision | None:
    """Returns the gate's decision; None where the alias needs no gate.

    Only what the registry is asked for is its own to explain: the gate has the models' and clips' failures.
    """
    if judge is None or config.alias == CHALLENGER:
        return None
    with explained(server, name):
        present = holder(server, name, config.alias)
    if present is None:
        return judge(None)
    number = int(present.version)
    if present.tags.get(_DIGEST_TAG) == card.digest:
        return Decision(True, (f"version {number}, the {config.alias}, has these very weights",), number)
    with ExitStack() as stack:
        with explained(server, name):
            note = check_frozen(server, name, frozen, renew) if frozen is not None else ""
            folder = stack.enter_context(model_of(server, present))
        decision = judge(folder)
    return replace(decision, champion=number, reasons=(*decision.reasons, *([note] if note else [])))


def load(uri: str, tracking: TrackingConfig | None = None, output: str | Path = "runs", **settings: Any) -> PyFuncModel:
    """Returns a registered model, to call with ``.predict(videos)``.

    Args:
        uri: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        tracking: the server (default: the environment's, else the SQLite file in ``output``).
        settings: fields of `sources.Settings`.

    Raises:
        UserError: no such model, or the server is unreachable.
    """
    server = connect(tracking or TrackingConfig(), output)
    import mlflow.artifacts
    import mlflow.pyfunc

    version = _known(server, uri)
    with tempfile.TemporaryDirectory() as scratch:  # a loaded model needs its files no more
        with explained(server, uri):
            source = server.client.get_model_version_download_uri(version.name, version.version)
            folder = mlflow.artifacts.download_artifacts(artifact_uri=source, tracking_uri=server.uri, dst_path=scratch)
        paths = list(sys.path)
        try:
            return mlflow.pyfunc.load_model(folder, model_config=settings or None)
        finally:
            # MLflow puts the package's own, smaller copy of crossgate first: processes started later would find only
            # that.
            sys.path[:] = paths


def pinned_version(uri: str, tracking: TrackingConfig, output: str | Path = "runs") -> str:
    """Returns ``models:/NAME/VERSION`` of the version that an address means at this moment.

    Raises:
        UserError: no such model, or the server is unreachable.
    """
    version = _known(connect(tracking, output), uri)
    return f"models:/{version.name}/{version.version}"


@contextmanager
def fetched(uri: str, tracking: TrackingConfig, output: str | Path = "runs") -> Iterator[Path]:
    """Gives the model directory of a registered model, for as long as the block lasts.

    Raises:
        UserError: no such model, or the server is unreachable.
    """
    server = connect(tracking, output)
    version = _known(server, uri)
    with ExitStack() as stack:
        with explained(server, uri):
            folder = stack.enter_context(model_of(server, version))
        yield folder


def _known(server: Server, uri: str) -> ModelVersion:
    """Returns the version; that it is not there, and that nobody can say, are two `UserError`s."""
    from mlflow.exceptions import MlflowException

    with explained(server, uri):
        try:
            return _resolved(server, uri)
        except MlflowException as error:
            if error.error_code not in NOT_THERE:
                raise
            reason = first_line(error)[:200]
            cure = "name another server (--tracking-uri, MLFLOW_TRACKING_URI), or see this one's models in MLflow"
            raise UserError(f"not in the registry {server.label} ({reason})", where=uri, cure=cure) from None


def _finished_run(run_dir: Path) -> tuple[ModelCard, dict[str, float], dict[str, Any]]:
    """Returns card, metrics and provenance of a run that may be released."""
    if not run_dir.is_dir():
        raise UserError("no such run directory", where=run_dir, cure="give the folder of a finished fine-tuning run")
    if not (run_dir / "model").is_dir() and not one_inside(run_dir):
        raise UserError(
            "the run is not finished: it has no model yet", where=run_dir, cure="start it again, it resumes by itself"
        )
    card = read_card(model_directory(run_dir))
    if card.kind != "classifier":
        raise UserError(
            "a pretraining run: its model has no classes", where=run_dir, cure="fine-tune it: crossgate finetune"
        )
    results = run_dir / "results.json"
    try:
        body = json.loads(results.read_text())
        metrics = {str(k): math.nan if v is None else float(v) for k, v in body["metrics"].items()}
        return card, metrics, dict(body.get("provenance", {}))
    except FileNotFoundError:
        raise UserError("the run is not evaluated", where=results, cure=_finish(run_dir)) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError("not a results file", where=results, cure=_finish(run_dir)) from None


def _finish(run_dir: Path) -> str:
    """Started again, a run that is trained goes straight to its evaluation."""
    return f"run `crossgate finetune --config {run_dir / 'recipe.yaml'}`: it resumes and is evaluated"


def _run_on(server: Server, run_dir: Path) -> str:
    """Returns the MLflow run of the directory where this server has it: the model's source."""
    from mlflow.exceptions import MlflowException

    run_id = known_run(run_dir)
    if not run_id:
        return ""
    try:
        return server.client.get_run(run_id).info.run_id
    except MlflowException:
        return ""


def _released_before(server: Server, name: str, card: ModelCard) -> ModelVersion | None:
    found = server.client.search_model_versions(f"name = '{name}' and tags.`{_DIGEST_TAG}` = '{card.digest}'")
    return max(found, key=lambda version: int(version.version), default=None)


def _register(
    server: Server,
    name: str,
    run_dir: Path,
    run_id: str,
    card: ModelCard,
    metrics: dict[str, float],
    provenance: dict[str, Any],
) -> ModelVersion:
    """Packs the model, stores it with its run, and makes the next version of the name from it."""
    from mlflow.exceptions import MlflowException

    lineage = _lineage(run_dir, run_id, card, provenance)
    client = server.client
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "package"
        package_model(run_dir, package, metadata=lineage)
        (package / "README.md").write_text(model_card(card, metrics, lineage))
        stored = client.create_logged_model(
            server.experiment_id, name=name, source_run_id=run_id or None, tags=lineage, model_type="crossgate"
        )
        client.log_model_artifacts(stored.model_id, str(package))
        client.finalize_logged_model(stored.model_id, "READY")
    try:
        client.create_registered_model(name, description=f"crossgate {card.task}: {', '.join(card.classes)}")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # A server resolves models:/ itself and refuses places on its own disk; a database store would resolve it, and
    # a model without a run, by the process-wide tracking URI, which may be another one.
    on_server = server.uri.startswith("http")
    return client.create_model_version(
        name,
        source=f"models:/{stored.model_id}" if on_server else stored.artifact_location,
        run_id=run_id or None,
        model_id=stored.model_id if on_server or run_id else None,
        tags={**lineage, _DIGEST_TAG: card.digest},
        description=description(card, metrics, lineage),
    )


def _lineage(run_dir: Path, run_id: str, card: ModelCard, provenance: dict[str, Any]) -> dict[str, str]:
    """Returns where the model came from, as tags: what trainer and evaluation noted, run by run."""
    facts: dict[str, str | int | float] = {
        "run": run_dir.name,
        "run_id": run_id,
        "task": card.task,
        "digest": card.digest,
    }
    noted = {**provenance, **card.provenance}
    facts |= {key: value for key, value in noted.items() if isinstance(value, str | int | float) and value != ""}
    return {f"crossgate.{key}": str(value)[:5000] for key, value in facts.items() if value != ""}


def _resolved(server: Server, uri: str) -> ModelVersion:
    name, at, alias = uri.removeprefix("models:/").rpartition("@")
    if at:
        return server.client.get_model_version_by_alias(name, alias)
    name, slash, version = uri.removeprefix("models:/").rpartition("/")
    if not (slash and version.isdigit()):
        raise UserError("not a registered model", where=uri, expected="models:/NAME@ALIAS or models:/NAME/VERSION")
    return server.client.get_model_version(name, version)
