"""Starts a run: in this process, as one of torchrun's ranks, or on the workers of Ray Train."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from crossgate import environment
from crossgate.cluster.meters import shown_to_prometheus
from crossgate.cluster.paths import with_absolute_paths
from crossgate.cluster.session import ray_session, use_reserved, workers_need
from crossgate.config import Recipe
from crossgate.errors import Passing, UserError
from crossgate.recipe import parse_recipe
from crossgate.training.durable import write_atomically
from crossgate.training.requests import Preempted


def launch(
    recipe: Recipe,
    entry: str = "",
    arguments: Mapping[str, Any] | None = None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Runs a recipe and returns what its entry returned on rank 0.

    Args:
        recipe: `cluster` says how many ranks, and where.
        entry: ``module:function`` of ``function(recipe) -> dict``, called on every rank (empty: the recipe's kind in
            `crossgate.runs`). A name and not a function, so that Ray's workers import it themselves.
        arguments: further keyword arguments of the entry.
        stop: when it is set, workers on Ray save and stop as after SIGTERM.

    Raises:
        UserError: from the run, wherever it was raised, or when Ray cannot be had.
        Preempted: after SIGTERM, Ctrl-C or `stop`, when everything is saved.
    """
    recipe = with_absolute_paths(recipe)
    entry = entry or f"crossgate.runs.{recipe.kind}:run"
    if _here(recipe):
        _check_gpu(recipe)
        return resolve(entry)(recipe, **(arguments or {}))
    with _Mail.fresh(recipe) as mail, _passed_on(stop, mail) if stop is not None else nullcontext():
        return _fit_on_ray(recipe, entry, arguments or {}, mail)


def _here(recipe: Recipe) -> bool:
    """Whether this process is itself a rank."""
    if environment.torchrun_world() is not None:
        return True
    if recipe.cluster.launcher == "auto":  # a job's driver runs on the head, which may have no GPU and few cores
        return recipe.cluster.workers == 1 and not environment.in_ray_job()
    return recipe.cluster.launcher == "local"


def _check_gpu(recipe: Recipe) -> None:
    import torch

    if recipe.cluster.gpus_per_worker and not torch.cuda.is_available():
        raise UserError(
            "the recipe wants a GPU and torch sees none",
            where="cluster.gpus_per_worker",
            cure="install a CUDA build of torch, or set it to 0 to compute on the CPU",
        )


def resolve(entry: str) -> Callable[..., dict[str, Any]]:
    """Returns the function that ``module:function`` names."""
    module, _, function = entry.partition(":")
    return getattr(importlib.import_module(module), function)


# ---- Ray Train -------------------------------------------------------------------------------------------------


@contextmanager
def _passed_on(stop: threading.Event, mail: _Mail) -> Iterator[None]:
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            if stop.wait(0.5):
                mail.ask_to_stop(signal.SIGTERM)
                return

    threading.Thread(target=watch, name="pass-on-stop", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _fit_on_ray(recipe: Recipe, entry: str, arguments: Mapping[str, Any], mail: _Mail) -> dict[str, Any]:
    cluster = recipe.cluster
    fewest = cluster.fewest_workers
    if fewest < cluster.workers:
        environment.expect_nodes_to_go()
    with ray_session(cluster, fewest * cluster.cpus_per_worker, workers_need(cluster, fewest)):
        from ray.train import FailureConfig, RunConfig
        from ray.train.v2.api.config import LoggingConfig, ScalingConfig
        from ray.train.v2.api.exceptions import TrainingFailedError

        from crossgate.cluster.elastic import HeedfulTorchConfig, Trainer

        trainer = Trainer(
            _work,
            recipe=recipe,
            ask_to_stop=mail.ask_to_stop,
            train_loop_config={
                "recipe": recipe.model_dump(mode="json"),
                "entry": entry,
                "arguments": dict(arguments),
                "mail": str(mail.folder),
            },
            torch_config=HeedfulTorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=(fewest, cluster.workers) if fewest < cluster.workers else cluster.workers,
                elastic_resize_monitor_interval_s=cluster.regrow_s,
                use_gpu=cluster.gpus_per_worker > 0,
                resources_per_worker={"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker},
            ),
            run_config=RunConfig(  # type: ignore[call-arg]  # ray.train is typed as its first version
                name=recipe.run.name,
                storage_path=str(Path(recipe.run.output) / ".ray"),
                failure_config=FailureConfig(max_failures=cluster.max_failures),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            mail.raise_complaint()
            raise _given_up(error, recipe) from None
    mail.raise_complaint()
    result = mail.result()
    if not result and mail.asked_to_stop():
        raise Preempted(128 + mail.asked_to_stop())
    return result


def _work(config: dict[str, Any]) -> None:
    """One rank on Ray. Progress lives in the run directory, so a restart is simply a start."""
    import ray.train

    from crossgate.cluster.elastic import watch_for_preemption, watch_for_stop

    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    mail = _Mail(Path(config["mail"]))
    if mail.complaints() or mail.asked_to_stop():
        return  # restarted because some rank complained, or stopped: no use in trying again
    recipe = parse_recipe(config["recipe"])
    watch_for_preemption()
    if rank == 0:  # what one rank is asked all heed
        watch_for_stop(mail.asked_to_stop)
    use_reserved(recipe.cluster.cpus_per_worker, recipe.cluster.gpus_per_worker)
    meters = shown_to_prometheus(Path(recipe.run.output) / recipe.run.name) if rank == 0 else nullcontext()
    try:
        with meters:
            result = resolve(config["entry"])(recipe, **config["arguments"])
    except Preempted:
        if not mail.asked_to_stop():
            raise
        return
    except Passing:
        raise  # Ray starts the ranks anew, `max_failures` times
    except UserError as error:
        mail.complain(rank, error)
        if not mail.all_complain(ranks):
            raise  # others may wait for this rank in a collective: only Ray can end them
        return
    if rank == 0:
        mail.deliver(result)


def _given_up(error: Exception, recipe: Recipe) -> Exception:
    """Returns the user's error inside Ray's, if it is one."""
    for failure in getattr(error, "worker_failures", {}).values():
        if isinstance(failure, UserError):
            return failure
    reason = str(error).strip().splitlines()[-1]
    return UserError(
        f"the run failed and was restarted {recipe.cluster.max_failures} times in vain ({reason})",
        where=recipe.run.name,
        cure="see the workers' messages above; starting it again resumes from its last checkpoint",
    )


class _Mail:
    """Messages between the ranks and the one who launched them, in a folder of the run that all of them see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    @contextmanager
    def fresh(cls, recipe: Recipe) -> Iterator[_Mail]:
        """Gives an empty folder for one launch; another of the same run, should it go on, keeps its own."""
        root = Path(recipe.run.output) / recipe.run.name / ".launch"
        try:
            folder = root / uuid.uuid4().hex[:12]
            folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot be written ({error.strerror})", where=root, cure="set run.output") from None
        try:
            yield cls(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # not empty: somebody else's letters
                root.rmdir()

    def complain(self, rank: int, error: UserError) -> None:
        """Notes a user error of a rank."""
        fields = {"what": error.what, "where": error.where, "expected": error.expected, "cure": error.cure}
        self._write(
            f"complaint-{rank:05d}", {key: None if value is None else str(value) for key, value in fields.items()}
        )

    def complaints(self) -> list[dict[str, str | None]]:
        """Returns the user errors so far, in the order of ranks."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("complaint-*.json"))]

    def all_complain(self, ranks: int, patience_s: float = 5.0) -> bool:
        """Returns whether every rank has complained, after waiting a little for the slow ones."""
        until = time.monotonic() + patience_s
        while len(self.complaints()) < ranks:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    def raise_complaint(self) -> None:
        """Raises the first rank's user error, if there is one."""
        for complaint in self.complaints():
            raise UserError(
                str(complaint["what"]),
                where=complaint["where"],
                expected=complaint["expected"],
                cure=complaint["cure"],
            )

    def ask_to_stop(self, signum: int) -> None:
        """Asks the ranks to save and stop, since the launching process got a signal."""
        with suppress(OSError):  # in a signal's handler nothing may be raised; a second signal ends the run at once
            self._write("stop", {"signal": int(signum)})

    def asked_to_stop(self) -> int:
        """Returns the signal by which the ranks are to stop, or 0."""
        path = self.folder / "stop.json"
        return int(json.loads(path.read_text())["signal"]) if path.exists() else 0

    def deliver(self, result: dict[str, Any]) -> None:
        """Hands in what the entry returned on rank 0."""
        self._write("result", result)

    def result(self) -> dict[str, Any]:
        """Returns what rank 0 handed in."""
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.folder / f"{name}.json", json.dumps(content, default=str))
