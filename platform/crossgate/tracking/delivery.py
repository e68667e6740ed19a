"""Carries the journal to MLflow in batches, from one background thread, through any outage."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossgate.errors import first_line
from crossgate.recipe import redacted
from crossgate.tracking.spool import LANES, Lane, Record, Spool

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("crossgate.tracking")

# MLflow's bounds on one log_batch call.
_BATCH = {"metrics": 1000, "params": 100, "tags": 100}
_BATCH_TOTAL = 1000
_LONGEST_PAUSE = 30.0
_LONGEST_DIGEST = 36
# Codes by which a server says that this very item will never be accepted; all else may pass by itself.
_HOPELESS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "MALFORMED_REQUEST"}


class Delivery:
    """Sends what a spool holds to its MLflow run.

    Args:
        spool: bound to a run, at the latest by `client`.
        client: makes the client; called at the first delivery, again after it raised.
        interval: seconds that values gather before they are sent together.
    """

    def __init__(self, spool: Spool, client: Callable[[], MlflowClient], interval: float = 5.0) -> None:
        self._spool, self._make_client, self._interval = spool, client, interval
        self._client: MlflowClient | None = None
        self._wake, self._closing, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="crossgate-tracking", daemon=True)
        self._down = False

    @property
    def down(self) -> bool:
        """Whether the server did not take what it was sent last."""
        return self._down

    def start(self) -> None:
        """Begins to deliver."""
        self._thread.start()

    def close(self, timeout: float) -> bool:
        """Delivers what is left, waiting at most ``timeout`` seconds; returns whether everything arrived."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout)
        self._abandoned.set()
        self._wake.set()
        return not self._thread.is_alive() and self._finished()

    def _run(self) -> None:
        failures = 0
        while not self._abandoned.is_set():
            pause = self._interval if failures == 0 else min(_LONGEST_PAUSE, self._interval * 2**failures)
            self._wake.wait(min(pause, 1.0) if self._closing.is_set() else pause)
            self._wake.clear()
            if self._abandoned.is_set():
                return
            try:
                self.deliver()
                failures = 0
            except Exception as error:  # nothing that happens to the server may reach the training thread
                if self._abandoned.is_set():
                    return
                failures = min(failures + 1, 8)
                self._say_down(error)
                if self._closing.is_set():
                    self._abandoned.wait(0.5)
                continue
            if self._abandoned.is_set() and not self._finished():
                return  # what was left was not tried
            self._say_up()
            if self._closing.is_set() and self._finished():
                return

    def deliver(self) -> None:
        """Sends everything that waits, values before files.

        Raises:
            Exception: whatever the client raised; what was sent until then is acknowledged.
        """
        if self._finished():
            return
        if self._client is None:
            self._client = self._make_client()
        trouble: Exception | None = None
        for lane in LANES:
            try:
                self._deliver_lane(lane)
            except Exception as error:
                trouble = trouble or error
        if trouble is not None:
            raise trouble

    def _deliver_lane(self, lane: Lane) -> None:
        send = self._send_values if lane == "values" else self._send_files
        while not self._spool.drained(lane) and not self._abandoned.is_set():
            records, offset = self._spool.pending(lane)
            if offset == self._spool.offset(lane):
                return  # another process is in the middle of writing a line
            send(records)
            self._spool.acknowledge(lane, offset)

    def _finished(self) -> bool:
        return all(self._spool.drained(lane) for lane in LANES)

    def _send_values(self, records: list[Record]) -> None:
        batch: dict[str, list[Any]] = {kind: [] for kind in _BATCH}
        for record in records:
            for kind, item in _items(record):
                if len(batch[kind]) == _BATCH[kind] or sum(map(len, batch.values())) == _BATCH_TOTAL:
                    self._send_batch(batch)
                    batch = {kind: [] for kind in _BATCH}
                batch[kind].append(item)
            if "status" in record or "dataset" in record:
                self._send_batch(batch)
                batch = {kind: [] for kind in _BATCH}
                self._send_status(record) if "status" in record else self._send_dataset(record["dataset"])
        self._send_batch(batch)

    def _send_batch(self, batch: dict[str, list[Any]]) -> None:
        """Sends one batch; where the server refuses it for good, halves it until only the bad item is lost."""
        from mlflow.exceptions import MlflowException

        assert self._client is not None
        items = [(kind, item) for kind in _BATCH for item in batch[kind]]
        if not items:
            return
        try:
            self._client.log_batch(self._spool.run_id, batch["metrics"], batch["params"], batch["tags"])
        except MlflowException as error:
            if error.error_code not in _HOPELESS or not self._run_is_active():
                raise
            if len(items) == 1:
                log.warning("MLflow refused %s and it is left out: %s", items[0][1].key, first_line(error)[:160])
                return
            for half in (items[: len(items) // 2], items[len(items) // 2 :]):
                self._send_batch({kind: [item for its, item in half if its == kind] for kind in _BATCH})

    def _send_status(self, record: Record) -> None:
        assert self._client is not None
        if record["status"] == "RUNNING":
            self._client.update_run(self._spool.run_id, status="RUNNING")
        else:
            self._client.set_terminated(self._spool.run_id, record["status"], end_time=record["time"])

    def _send_dataset(self, found: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        assert self._client is not None
        source, profile = json.dumps({"uri": found["source"]}), json.dumps(found["profile"])
        entity = Dataset(
            found["name"][:500], found["digest"][:_LONGEST_DIGEST], "crossgate_index", source, None, profile
        )
        tags = [InputTag("mlflow.data.context", found["context"])]
        for attempt in (1, 2):  # a run beside this one may make the same data set between MLflow's look and its insert
            try:
                self._client.log_inputs(self._spool.run_id, [DatasetInput(entity, tags)])
                return
            except MlflowException as error:
                if error.error_code not in _HOPELESS or not self._run_is_active():
                    raise
                if attempt == 2:
                    reason = first_line(error)[:160]
                    log.warning("MLflow refused the dataset %s and it is left out: %s", found["name"], reason)

    def _run_is_active(self) -> bool:
        assert self._client is not None
        return self._client.get_run(self._spool.run_id).info.lifecycle_stage == "active"

    def _send_files(self, records: list[Record]) -> None:
        assert self._client is not None
        for record in records:
            path = self._spool.run_dir / record["artifact"]
            if not path.exists():
                if not record["artifact"].startswith("tracking/outbox/"):  # else: sent before, mark not yet written
                    log.warning("%s was removed before MLflow got it", path)
                continue
            folder = record["folder"] or None
            if path.is_dir():
                self._client.log_artifacts(self._spool.run_id, str(path), folder)
            else:
                self._client.log_artifact(self._spool.run_id, str(path), folder)
            self._spool.discard(path)

    def _say_down(self, error: Exception) -> None:
        if not self._down:
            self._down = True
            where, kept = redacted(self._spool.target), Path(self._spool.folder)
            log.warning(
                "MLflow at %s does not take data (%s); kept in %s, sent later", where, first_line(error)[:160], kept
            )

    def _say_up(self) -> None:
        if self._down:
            self._down = False
            log.warning("MLflow at %s is back; everything kept has been sent", redacted(self._spool.target))


def _items(record: Record) -> list[tuple[str, Any]]:
    """Turns a record into MLflow's entities, with the time at which it was logged: sent twice, it is stored once."""
    from mlflow.entities import Metric, Param, RunTag

    step, now = record.get("step", 0), record.get("time", int(time.time() * 1000))
    items: list[tuple[str, Any]] = [("metrics", Metric(k, v, now, step)) for k, v in record.get("metrics", {}).items()]
    items += [("params", Param(k, v)) for k, v in record.get("params", {}).items()]
    items += [("tags", RunTag(k, v)) for k, v in record.get("tags", {}).items()]
    return items
