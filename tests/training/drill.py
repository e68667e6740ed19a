"""The fault drill: everything that may go wrong in a run is made to, and the run must end as if nothing had.

    python tests/training/drill.py            every drill, against a real MLflow server and a real S3 server
    python tests/training/drill.py --short    those that need no server, for CI
    python tests/training/drill.py --ray      besides, on Ray: SIGTERM, nodes that go and come, driver and head killed

Two ranks at ZeRO 2, with dropout, saving and uploading every 4 of 12 steps. After each drill the run is started again
until it ends. It passes when its losses are those of the undisturbed run (2e-6), when MLflow has exactly one run of it,
finished, with every step once, and when what is particular to the drill came true. Prints a table of them; the
last line is one JSON object: `drills`, `passed`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "stream"), str(HERE.parent / "tracking"), str(HERE.parent)]

from free_ports import free_port  # noqa: E402
from tiny_run import TinyLoader, TinyTask, losses, tiny_recipe, validate  # noqa: E402

from crossgate import environment  # noqa: E402
from crossgate.config import Recipe  # noqa: E402
from crossgate.errors import UserError  # noqa: E402
from crossgate.stream import storage  # noqa: E402
from crossgate.tracking import connect, open_tracker  # noqa: E402
from crossgate.training import checkpoint as checkpoints  # noqa: E402
from crossgate.training.checkpoint import newest_whole  # noqa: E402
from crossgate.training.loop import Selection, fit  # noqa: E402
from crossgate.training.upload import Uploader, checkpoint_store, stored_checkpoints  # noqa: E402
from crossgate.training.watchdog import EXIT_STUCK  # noqa: E402
from crossgate.training.world import current_world  # noqa: E402

RANKS, STEPS, GRACE_S, STUCK_S = 2, 12, 30.0, 10.0
SAME = 2e-6  # in every loss: the last bits, since kernels round by where memory lies
USER_ERROR = 2
PIECE, CHANGED = "state/rank-00001.safetensors", "has changed since it was written"
HEAD = [
    "| what goes wrong | the first start ends with | the next one goes on from step | |",
    "| --- | --- | ---: | --- |",
]
SLOW_TO_IMPORT = (  # once, and not in every rank of every start
    "alembic.command",
    "deepspeed.runtime.zero.stage_1_and_2",
    "mlflow.store.tracking.sqlalchemy_store",
    "torch._dynamo",
)


@dataclass
class Drill:
    """One thing that goes wrong."""

    name: str
    fault: str = ""
    """What `break_something` does to the first start."""
    ends: tuple[int, ...] = (0,)
    """How some rank of the first start must end; negative: by that signal."""
    resumes: int = 0
    """Step that the next start must go on from (0: there is none)."""
    between: Callable[[Site, Recipe], None] = lambda site, recipe: None
    """Done between the starts."""
    server: str = ""
    """What goes down while it runs: `mlflow`, `s3`."""
    says: str = ""
    """What the next start must say."""


@dataclass
class Site:
    """Where the drills are held."""

    folder: Path
    tracking: str
    url: str
    stop: dict[str, Callable[[], None]] = field(default_factory=dict)
    start: dict[str, Callable[[], None]] = field(default_factory=dict)

    def recipe(self, name: str, **training: Any) -> Recipe:
        return tiny_recipe(
            self.folder,
            name,
            engine={"zero_stage": 2},
            training={"checkpoint_url": self.url, "keep": 3, **training},
            tracking={"uri": self.tracking},
        )


# ---- one start of a run ----------------------------------------------------------------------------------------


def rank_of_run(recipe: Recipe, rank: int, port: int, fault: str) -> None:
    """A forked process: trains as one of the ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    storage.DEADLINE = 2.0  # a store that is down is given up sooner
    run_dir = Path(recipe.run.output) / recipe.run.name
    sys.stderr = (run_dir.parent / f"{recipe.run.name}-{rank}.log").open("a", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    world = current_world()
    loader = TinyLoader(recipe, world, break_something(fault, rank, run_dir))
    try:
        with open_tracker(recipe, run_dir, rank, interval=0.2) as tracker:
            fit(
                TinyTask(seed=rank, dropout=0.2),
                loader,
                recipe,
                run_dir,
                world,
                tracker=tracker,
                validate=validate,
                selection=Selection("val/accuracy", "higher"),
            )
    except UserError as error:
        print(f"crossgate: {error}", file=sys.stderr)
        os._exit(USER_ERROR)


def break_something(fault: str, rank: int, run_dir: Path) -> Callable[[int], None]:
    """Prepares the fault in this process; returns what is called before each step."""
    last, now = rank == RANKS - 1, {"step": 0}
    forward, write, put = TinyTask.forward, checkpoints.write_pieces, storage.Store.put

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def broken_forward(self: TinyTask, batch: Any) -> Any:
        if fault == "forward" and last and now["step"] == 7:
            die()
        loss, report = forward(self, batch)
        if fault == "backward" and last and now["step"] == 7:
            loss.register_hook(die)
        return loss, report

    def broken_write(path: Path, pieces: Any, steps: int) -> None:
        write(path, pieces, steps)
        if fault == "saving" and last and steps == 8:
            path.write_bytes(path.read_bytes()[:-100])
            die()
        if fault == "disk" and last and steps == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def broken_put(self: Any, name: str, content: Any) -> None:
        if fault == "uploading" and name.startswith("step-00000008.state"):
            die()
        put(self, name, content)

    def before(step: int) -> None:
        now["step"] = step
        if fault == "sigterm" and last and step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        if fault == "crash" and step == 11:
            die()
        if fault == "hang" and last and step == 7:
            time.sleep(600)  # a loader that runs dry; the other rank waits for this one's gradient
        if fault == "server" and step == 6:
            (run_dir / "take-down").touch()
            while not (run_dir / "is-down").exists():
                time.sleep(0.05)

    TinyTask.forward, checkpoints.write_pieces, storage.Store.put = broken_forward, broken_write, broken_put
    return before


def start(recipe: Recipe, fault: str = "", meanwhile: Callable[[], None] = lambda: None) -> list[int]:
    """Starts all ranks and returns how they ended; when one dies the others are ended, as torchrun does."""
    port = free_port()
    # From a clean process: a fork of this one would share, and spoil, what its connections to the store wait on.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *SLOW_TO_IMPORT])
    ranks = [context.Process(target=rank_of_run, args=(recipe, rank, port, fault)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    while any(process.exitcode is None for process in ranks):
        meanwhile()
        if any(process.exitcode not in (None, 0) for process in ranks):
            for process in ranks:
                process.join(GRACE_S)
                process.kill()
        time.sleep(0.05)
    for process in ranks:
        process.join()
    return [process.exitcode or 0 for process in ranks]


# ---- the drills ------------------------------------------------------------------------------------------------


def flip_a_bit(site: Site, recipe: Recipe) -> None:
    """In the newest checkpoint, which was not uploaded any more."""
    newest, _ = newest_whole(Path(recipe.run.output) / recipe.run.name)
    store = checkpoint_store(site.url, recipe.run.name)
    assert newest is not None and store is not None
    store.delete(f"{newest.path.name}.manifest.json")
    victim = newest.path / PIECE
    victim.write_bytes(flipped(victim.read_bytes()))


def flipped(content: bytes) -> bytes:
    damaged = bytearray(content)
    damaged[-5] ^= 4
    return bytes(damaged)


def upload(site: Site, recipe: Recipe, *steps: int) -> storage.Store:
    """Brings checkpoints to the store that may have been overtaken on their way there."""
    store = checkpoint_store(site.url, recipe.run.name)
    assert store is not None
    names = [f"step-{step:08d}" for step in steps]
    for name in names:
        uploader = Uploader(store, print)
        uploader.put(Path(recipe.run.output) / recipe.run.name / "checkpoints" / name, names)
        uploader.finish()
    return store


def damage_the_best(site: Site, recipe: Recipe) -> None:
    """Of which the store has a whole copy."""
    upload(site, recipe, 6, 8)
    victim = Path(recipe.run.output) / recipe.run.name / "checkpoints" / "step-00000006" / PIECE
    victim.write_bytes(flipped(victim.read_bytes()))


def lose_all_but_a_copy(site: Site, recipe: Recipe) -> None:
    """The folder of checkpoints is gone, the newest uploaded one has changed, the one before is whole."""
    store = upload(site, recipe, 6, 8)
    name = f"step-00000008.{PIECE.replace('/', '--')}"
    store.put(name, flipped(store.read(name)))
    shutil.rmtree(Path(recipe.run.output) / recipe.run.name / "checkpoints")


KILLED = (-signal.SIGKILL,)
ALONE = [
    Drill("kill -9 in forward", "forward", KILLED, 6),
    Drill("kill -9 in backward", "backward", KILLED, 6),
    Drill("kill -9 while saving", "saving", KILLED, 6),
    Drill("kill -9 while uploading", "uploading", KILLED, 8),
    Drill("SIGTERM", "sigterm", (143,), 7),
    Drill("a rank hangs", "hang", (EXIT_STUCK, EXIT_STUCK), 6),
    Drill("disk full while saving", "disk", (USER_ERROR,), 6),
    Drill("bit flipped in the newest checkpoint", "crash", KILLED, 6, flip_a_bit, says=CHANGED),
    Drill("bit flipped in the best checkpoint", "crash", KILLED, 8, damage_the_best, says="took the best checkpoint"),
    Drill("all checkpoints lost and the newest copy damaged", "crash", KILLED, 6, lose_all_but_a_copy, says=CHANGED),
]
SERVED = [
    Drill("S3 down while uploading", "server", (0,), server="s3"),
    Drill("MLflow down for part of the run", "server", (0,), server="mlflow"),
]

ON_RAY = {
    "on Ray: SIGTERM, then a lost node, then a new one": ("nothing: Ray starts the ranks anew", "test_elastic.py"),
    "on Ray: kill -9 of the driver, then of the head": ("SIGKILL", "test_killed.py"),
}


def hold(drill: Drill, site: Site, undisturbed: list[float]) -> str:
    """Returns what went wrong with the run, or nothing."""
    name = drill.name.replace(" ", "-")
    recipe = site.recipe(name, watchdog_s=STUCK_S) if drill.fault == "hang" else site.recipe(name)
    run_dir = Path(recipe.run.output) / recipe.run.name

    def take_down() -> None:
        if drill.server and (run_dir / "take-down").exists() and not (run_dir / "is-down").exists():
            site.stop[drill.server]()
            (run_dir / "is-down").touch()

    begun = time.monotonic()
    ends = start(recipe, drill.fault, take_down)
    if not set(drill.ends) <= set(ends):
        return f"the first start ended with {ends}, expected {drill.ends}"
    if drill.fault == "sigterm" and time.monotonic() - begun > 2 * GRACE_S:
        return "it took longer than its grace time"
    drill.between(site, recipe)
    if drill.server:
        site.start[drill.server]()
    ends = start(site.recipe(name))
    if any(ends):
        return f"the second start ended with {ends}"
    return _wrong_place(drill, site, recipe) or _wrong_curve(recipe, undisturbed) or _wrong_tracking(recipe)


def _wrong_place(drill: Drill, site: Site, recipe: Recipe) -> str:
    said = " ".join((site.folder / f"{recipe.run.name}-0.log").read_text().split())
    if drill.resumes and f"step-{drill.resumes:08d}, the newest whole" not in said:
        return f"it did not go on from step {drill.resumes}"
    if drill.says not in said:
        return f"it did not say '{drill.says}'"
    if drill.fault == "hang":
        stacks = (site.folder / recipe.run.name / "hangs" / f"rank-{RANKS - 1:05d}.before.txt").read_text()
        if f"rank {RANKS - 1}: load of step 7" not in said or "in before" not in stacks:
            return "the hang was not named"
    if drill.server == "s3" and "was not uploaded" not in said:
        return "the failed upload was not named"
    store = checkpoint_store(site.url, recipe.run.name)
    assert store is not None
    if not drill.server and f"step-{STEPS:08d}" not in stored_checkpoints(store):
        return "the last checkpoint is not in the store"
    return ""


def _wrong_curve(recipe: Recipe, undisturbed: list[float]) -> str:
    curve = losses(Path(recipe.run.output), recipe.run.name)
    if len(curve) != len(undisturbed):
        return f"{len(curve)} lines of metrics"
    apart = max(abs(a - b) for a, b in zip(curve, undisturbed))
    return "" if apart <= SAME else f"its losses are up to {apart:.2g} apart"


def _wrong_tracking(recipe: Recipe) -> str:
    client = connect(recipe.tracking, Path(recipe.run.output)).client
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = [run for run in client.search_runs(experiments) if run.info.run_name == recipe.run.name]
    if len(runs) != 1 or runs[0].info.status != "FINISHED":
        return f"MLflow has {[run.info.status for run in runs]}"
    steps = [point.step for point in client.get_metric_history(runs[0].info.run_id, "train/loss")]
    return "" if sorted(steps) == list(range(1, STEPS + 1)) else f"MLflow has the steps {steps}"


def on_ray(test: str) -> str:
    """Runs the slow test of a file of `tests/cluster`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow", str(HERE.parent / "cluster" / test)]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout[-400:]


# ---- servers ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[Site]:
    """An MLflow server and an S3 server that can be taken down and brought back."""
    import boto3
    from s3_server import KEY, SECRET, seaweed
    from test_outage import mlflow_server

    port, running = free_port(), ExitStack()
    down: dict[str, ExitStack] = {}

    def begin_mlflow() -> None:
        down["mlflow"] = ExitStack()
        down["mlflow"].enter_context(mlflow_server(folder, port))

    with running:
        (folder / "s3").mkdir()
        s3 = ExitStack()
        endpoint = running.enter_context(s3).enter_context(seaweed(folder / "s3"))
        os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        boto3.client("s3").create_bucket(Bucket="drill")
        begin_mlflow()
        running.callback(lambda: down["mlflow"].close())
        site = Site(folder, f"http://127.0.0.1:{port}", "s3://drill/runs")
        site.stop = {"mlflow": lambda: down["mlflow"].close(), "s3": s3.close}
        site.start = {"mlflow": begin_mlflow, "s3": lambda: None}
        yield site


@contextlib.contextmanager
def no_servers(folder: Path) -> Iterator[Site]:
    """The same in files."""
    yield Site(folder, f"sqlite:///{folder / 'mlflow.db'}", str(folder / "store"))


def show(name: str, ends: str, resumes: int, wrong: str) -> None:
    print(f"| {name} | {ends} | {resumes or ''} | {wrong or 'passed'} |", flush=True)


def _said(end: int) -> str:
    return signal.Signals(-end).name if end < 0 else f"status {end}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="without servers")
    parser.add_argument("--ray", action="store_true", help="also on Ray")
    options = parser.parse_args()
    environment.prepare_deepspeed(0, cpu=True)
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    with tempfile.TemporaryDirectory() as folder, (no_servers if options.short else servers)(Path(folder)) as site:
        calm = site.recipe("undisturbed")
        if any(start(calm)):
            sys.exit((site.folder / "undisturbed-0.log").read_text())
        undisturbed = losses(site.folder, "undisturbed")
        assert len(undisturbed) == STEPS and not any(map(math.isnan, undisturbed))
        found = {}
        print("\n".join(HEAD), flush=True)
        # S3 last: what comes after it would miss it.
        for drill in ALONE if options.short else [*ALONE, *reversed(SERVED)]:
            found[drill.name] = hold(drill, site, undisturbed)
            show(drill.name, " and ".join(map(_said, sorted(set(drill.ends)))), drill.resumes, found[drill.name])
    if options.ray:
        for name, (ends, test) in ON_RAY.items():
            found[name] = on_ray(test)
            show(name, ends, 0, found[name])
    passed = sum(not wrong for wrong in found.values())
    print(json.dumps({"drills": len(found), "passed": passed}))
    sys.exit(passed != len(found))


if __name__ == "__main__":
    main()
