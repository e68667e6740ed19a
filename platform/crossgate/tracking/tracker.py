"""What a run says about itself while it runs. Every call returns at once; `delivery` brings it to MLflow."""

from __future__ import annotations

import logging
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from crossgate.config import Recipe, TrackingConfig
from crossgate.errors import Unreachable, UserError, first_line, writing
from crossgate.recipe import dump_recipe, flat_recipe, redacted
from crossgate.tracking.delivery import Delivery
from crossgate.tracking.provenance import code_version, machine
from crossgate.tracking.server import Server, connect, make_client, tracking_uri
from crossgate.tracking.spool import Record, Spool, has_journal
from crossgate.tracking.system import PREFIX, Sampler

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

log = logging.getLogger("crossgate.tracking")

Status = Literal["FINISHED", "FAILED", "KILLED"]
_KEY_TAG = "crossgate.run_key"
_FORBIDDEN = re.compile(r"[^\w\-./: ]", re.ASCII)
_LONGEST_PARAM = 6000
_LONGEST_TAG = 5000


class Tracker(ABC):
    """The interface that the rest of crossgate logs to; a context manager that finishes by how its body ended."""

    @property
    def run_id(self) -> str:
        """MLflow's id of the run (empty: not tracked, or nested and made once its server is back)."""
        return ""

    @property
    def away(self) -> bool:
        """Whether the server does not take data just now, so that what is logged piles up on disk."""
        return False

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Notes values at a step; a step that a metric has reached before (a resumed run repeats some) is ignored."""

    @abstractmethod
    def log_params(self, params: Mapping[str, object]) -> None:
        """Notes settings; one that an earlier start noted differently stays, the new value becomes a tag."""

    @abstractmethod
    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Notes facts that may change."""

    @abstractmethod
    def log_dataset(self, name: str, digest: str, source: str, context: str, profile: Mapping[str, object]) -> None:
        """Notes clips that the run reads, as an input in MLflow's sense; the same ones twice are noted once.

        Args:
            name: what a person calls them.
            digest: of their content.
            source: where they are.
            context: what for: train, val or test.
            profile: counts and the like.
        """

    @abstractmethod
    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Keeps a file or folder with the run. One in the run directory is read when it is sent, others are copied."""

    @abstractmethod
    def log_text(self, text: str, name: str) -> None:
        """Keeps a text as the artifact ``name`` (may have folders)."""

    @abstractmethod
    def log_figure(self, figure: Figure, name: str) -> None:
        """Keeps a matplotlib figure as the artifact ``name``, whose suffix says the format."""

    @abstractmethod
    def finish(self, status: Status = "FINISHED", timeout: float = 60.0) -> None:
        """Ends the run, waiting at most ``timeout`` seconds for the server; what is not sent by then stays on disk."""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED", timeout=10.0)


class NullTracker(Tracker):
    """Ranks above 0, and runs with tracking off."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_params(self, params: Mapping[str, object]) -> None: ...

    def set_tags(self, tags: Mapping[str, object]) -> None: ...

    def log_dataset(self, name: str, digest: str, source: str, context: str, profile: Mapping[str, object]) -> None: ...

    def log_artifact(self, path: str | Path, folder: str = "") -> None: ...

    def log_text(self, text: str, name: str) -> None: ...

    def log_figure(self, figure: Figure, name: str) -> None: ...

    def finish(self, status: Status = "FINISHED", timeout: float = 60.0) -> None: ...


class MlflowTracker(Tracker):
    """Writes to the run's journal; a thread delivers it, another notes how busy the machine is.

    Args:
        spool: bound to the MLflow run, or to its server only.
        client: makes the client, and binds the spool to its run where it is not.
        interval: seconds that values gather before they are sent together.
    """

    def __init__(self, spool: Spool, client: Callable[[], MlflowClient], interval: float = 5.0) -> None:
        self._spool = spool
        self._noting = threading.Lock()
        self._last_step: dict[str, int] = {}
        self._params: dict[str, str] = {}
        self._datasets: list[dict[str, object]] = []
        for record in spool.records():
            self._remember(record)
        self._lost = self._finished = False
        self._delivery = Delivery(spool, client, interval)
        self._delivery.start()
        sampled = [step for key, step in self._last_step.items() if key.startswith(PREFIX)]
        self._sampler = Sampler(self.log_metrics, max(sampled, default=-1) + 1)
        self._sampler.start()

    @property
    def run_id(self) -> str:
        return self._spool.run_id

    @property
    def away(self) -> bool:
        return self._delivery.down

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        named = {_FORBIDDEN.sub("_", key): float(value) for key, value in metrics.items()}
        fresh = {key: value for key, value in named.items() if step > self._last_step.get(key, -1)}
        if fresh:
            self._note({"lane": "values", "metrics": fresh, "step": step})

    def log_params(self, params: Mapping[str, object]) -> None:
        named = {_FORBIDDEN.sub("_", key): str(value)[:_LONGEST_PARAM] for key, value in params.items()}
        fresh = {key: value for key, value in named.items() if key not in self._params}
        changed = {
            f"crossgate.changed.{key}": value for key, value in named.items() if self._params.get(key, value) != value
        }
        if fresh:
            self._note({"lane": "values", "params": fresh})
        if changed:
            self.set_tags(changed)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        self._note({"lane": "values", "tags": {key: str(value)[:_LONGEST_TAG] for key, value in tags.items()}})

    def log_dataset(self, name: str, digest: str, source: str, context: str, profile: Mapping[str, object]) -> None:
        found = {
            "name": name,
            "digest": digest,
            "source": redacted(source),
            "context": context,
            "profile": dict(profile),
        }
        if found not in self._datasets:
            self._note({"lane": "values", "dataset": found})

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        try:
            self._note({"lane": "files", "artifact": self._spool.keep(Path(path)), "folder": folder})
        except OSError as error:
            log.warning("%s is not kept as an artifact: %s", path, error)

    def log_text(self, text: str, name: str) -> None:
        where = PurePosixPath(name)
        self._log_made(where, lambda file: file.write_text(text))

    def log_figure(self, figure: Figure, name: str) -> None:
        where = PurePosixPath(name)
        self._log_made(where, lambda file: figure.savefig(file))

    def finish(self, status: Status = "FINISHED", timeout: float = 60.0) -> None:
        if self._finished:
            return
        self._finished = True
        self._sampler.close()
        self._note({"lane": "values", "status": status})
        if not self._delivery.close(timeout):
            log.warning(
                "MLflow at %s has not taken everything: %d records wait in %s until the run is started or released",
                redacted(self._spool.target),
                self._spool.waiting(),
                self._spool.folder,
            )
        self._spool.close()

    def _log_made(self, where: PurePosixPath, write) -> None:
        try:
            file = self._spool.new_outbox_file(where.name)
            write(file)
        except OSError as error:
            log.warning("%s is not kept as an artifact: %s", where, error)
            return
        self.log_artifact(file, "" if str(where.parent) == "." else str(where.parent))

    def _note(self, record: Record) -> None:
        with self._noting:
            record["time"] = int(time.time() * 1000)
            self._remember(record)
            try:
                self._spool.append(record)
            except OSError as error:  # a full disk stops the checkpoints loudly; a metric is no reason to
                if not self._lost:
                    log.warning("metrics are lost to MLflow from here on: %s: %s", self._spool.folder, error)
                self._lost = True

    def _remember(self, record: Record) -> None:
        for key in record.get("metrics", ()):
            self._last_step[key] = max(self._last_step.get(key, -1), record["step"])
        for key, value in record.get("params", {}).items():
            self._params.setdefault(key, value)
        if "dataset" in record:
            self._datasets.append(record["dataset"])


def open_tracker(
    recipe: Recipe,
    run_dir: str | Path,
    rank: int = 0,
    *,
    tags: Mapping[str, object] | None = None,
    parent: str = "",
    interval: float = 5.0,
) -> Tracker:
    """Returns the tracker of a run directory; a resumed run continues its MLflow run.

    Args:
        recipe: logged as parameters, and as ``recipe.yaml``.
        run_dir: holds the journal, which says which MLflow run this is.
        rank: only rank 0 tracks.
        tags: more facts, such as the index's digest.
        parent: MLflow id of the run that this one is nested in.
        interval: seconds that values gather before they are sent together.

    Raises:
        UserError: when the server cannot be reached at a run's first start. Later starts go on without it; so does a
            nested run from the first, since its parent has shown that the address is right.
    """
    if rank != 0 or not recipe.tracking.enabled:
        return NullTracker()
    run_dir = Path(run_dir)
    uri = tracking_uri(recipe.tracking, run_dir.absolute().parent)
    spool = Spool(run_dir)
    facts = _facts(recipe, run_dir, parent)

    def binding_client() -> MlflowClient:
        server = connect(recipe.tracking, run_dir.absolute().parent)
        if spool.closed:  # whoever ends the run after this process has given up makes it: two would be one too many
            raise Unreachable("it answered too late", where=f"tracking.uri {server.label}")
        _bind(spool, server, run_dir.name, facts)
        return server.client

    try:
        binding_client()
    except UserError as error:
        if spool.target != redacted(uri):
            if not (parent and isinstance(error, Unreachable)):
                spool.close()
                # Not `Unreachable`: an address that has never answered is not tried again, its user is told at once.
                raise UserError(error.what, where=error.where, expected=error.expected, cure=error.cure) from None
            spool.bind(redacted(uri), "")
        log.warning("%s; the run goes on and keeps its metrics in %s", error.what, spool.folder)
    first = not any(True for _ in spool.records())
    tracker = MlflowTracker(spool, lambda: make_client(uri) if spool.run_id else binding_client(), interval)
    if not first:
        tracker._note({"lane": "values", "status": "RUNNING"})
    tracker.log_params(flat_recipe(recipe))
    tracker.set_tags({**facts, **(tags or {})})
    if first:
        tracker.log_text(dump_recipe(recipe), "recipe.yaml")
    return tracker


def deliver(run_dir: str | Path, config: TrackingConfig) -> int:
    """Sends what a run could not send while it ran; returns the number of records that still wait.

    Raises:
        Unreachable: when the server does not answer; what waits is kept.
        UserError: when its address or experiment is wrong.
    """
    if not has_journal(run_dir):
        return 0
    run_dir = Path(run_dir)
    spool = Spool(run_dir)
    try:
        if any(not spool.drained(lane) for lane in ("values", "files")):
            server = connect(config, run_dir.absolute().parent)
            _bind(spool, server, run_dir.name, {"crossgate.run_dir": str(run_dir.absolute())})
            delivery = Delivery(spool, lambda: server.client)
            try:
                delivery.deliver()
            except Exception as error:
                log.warning("MLflow at %s does not take data: %s", server.label, error)
        return spool.waiting()
    finally:
        spool.close()


def conclude(run_dir: str | Path, config: TrackingConfig, status: Status) -> None:
    """Ends the MLflow run of a process that was killed and could not say so, and sends what waits of it.

    To one that has ended it only sends.

    Raises:
        Unreachable: when the server does not answer; the end is in the journal and is sent with the rest.
        UserError: when its address or experiment is wrong, or the journal cannot be written.
    """
    if not has_journal(run_dir):
        return
    with writing("the run's journal", run_dir):
        spool = Spool(run_dir)
        try:
            said = [record["status"] for record in spool.records() if "status" in record]
            if not said or said[-1] == "RUNNING":
                spool.append({"lane": "values", "status": status, "time": int(time.time() * 1000)})
        finally:
            spool.close()
        deliver(run_dir, config)


def known_run(run_dir: str | Path) -> str:
    """Returns the MLflow id of a run directory's run, or an empty string where there is none (yet)."""
    if not has_journal(run_dir):
        return ""
    spool = Spool(run_dir)
    spool.close()
    return spool.run_id


def _facts(recipe: Recipe, run_dir: Path, parent: str) -> dict[str, str]:
    facts = {
        "crossgate.kind": recipe.kind,
        "crossgate.run": run_dir.name,
        "crossgate.run_dir": str(run_dir.absolute()),
        "mlflow.source.name": f"crossgate {recipe.kind}",
        "mlflow.source.type": "LOCAL",
    }
    if parent:
        facts["mlflow.parentRunId"] = parent
    return {**facts, **code_version(), **machine()}


def _bind(spool: Spool, server: Server, name: str, facts: Mapping[str, str]) -> None:
    """Finds the MLflow run that carries this directory's key, or makes it.

    Raises:
        Unreachable: when the server fails in the middle of it.
    """
    began = next((record.get("time") for record in spool.records()), None)  # of a run that is made after the fact
    try:
        found = server.client.search_runs([server.experiment_id], f"tags.`{_KEY_TAG}` = '{spool.key}'", max_results=1)
        run = (
            found[0]
            if found
            else server.client.create_run(
                server.experiment_id, start_time=began, run_name=name, tags={**facts, _KEY_TAG: spool.key}
            )
        )
    except Exception as error:
        raise Unreachable(
            f"the tracking server failed ({first_line(error)[:160]})", where=f"tracking.uri {server.label}"
        ) from None
    spool.bind(server.label, run.info.run_id)
