"""The only place where environment variables are read or set."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def tracking_uri() -> str | None:
    """The MLflow server named by the environment, if any."""
    return os.environ.get("MLFLOW_TRACKING_URI")


def cache_dir() -> Path:
    """Where downloaded shards and made indexes of read-only stores are kept (``CROSSGATE_CACHE``)."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "crossgate"
    return Path(os.environ.get("CROSSGATE_CACHE", default))


def torchrun_world() -> tuple[int, int, int] | None:
    """``(rank, local_rank, ranks)`` as torchrun sets them, or None outside torchrun."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank = int(os.environ["RANK"])
    return rank, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ["WORLD_SIZE"])


def calm_mlflow() -> None:
    """Turns MLflow's telemetry and progress bars off and shortens its patience, unless the user has decided.

    By default a call to a dead server retries for four minutes; `tracking` keeps and resends by itself.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")


def calm_threads() -> None:
    """Lets idle threads of OpenMP sleep, unless the user has decided. Call before torch is imported.

    By default they spin: on cores that others use, a small network on two threads took sixty times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def home() -> Path | None:
    """Where relative run folders of cluster jobs live (``CROSSGATE_HOME``), if the user has decided."""
    value = os.environ.get("CROSSGATE_HOME")
    return Path(value) if value else None


def usable_cores() -> int:
    """Cores that this process may use: those of the machine where the system keeps no list of them (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_ray_job() -> bool:
    """Whether this process was started by `ray job submit`, in a working folder that is thrown away."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def ray_address() -> str | None:
    """The Ray cluster named by the environment, if any."""
    return os.environ.get("RAY_ADDRESS")


def prepare_deepspeed(local_rank: int, cpu: bool) -> None:
    """Sets what DeepSpeed insists on reading here; naming the accelerator also keeps it from guessing aloud."""
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if cpu else "cuda")


def calm_ray(poll_seconds: float = 0.2) -> None:
    """Ray's chatter off, its Train controller quick; the user's own settings win.

    Ray Train looks at its workers every two seconds by default, which a short run feels at every start and end.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(poll_seconds))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it shows every line twice
    os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")  # ranks of a dead group cannot say goodbye
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # it holds back progress lines, since they resemble one another
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a trial that fails at once has measured nothing
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one speaks even when told not to


def expect_nodes_to_go(patience_s: float = 30.0) -> None:
    """For workers that come and go: Ray waits so long for one on a node that has just died before it counts anew."""
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(patience_s))


def hide_gpus() -> None:
    """For a process that was given no GPU: those of the machine belong to others. Call before torch looks for them."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def expect_no_preemption() -> None:
    """For a private cluster, whose only machine nobody takes away: Ray need not watch for that."""
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


def worker_environment(source_root: Path) -> dict[str, str]:
    """What Ray's workers need to import this package, installed there or not.

    They also cache shards where we do, and let idle threads wait as we do.
    """
    paths = [str(source_root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    kept = {name: os.environ[name] for name in ("CROSSGATE_CACHE", "OMP_WAIT_POLICY") if name in os.environ}
    # A trial that Tune stops ends its MLflow run and its uploads first; by default the next one in its process fails
    # where that takes more than two seconds.
    patience = {"TUNE_FUNCTION_THREAD_TIMEOUT_S": "600"}
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), **kept, **patience}


def snapshot() -> dict[str, str]:
    """The environment as it is now, for a worker process whose parent was started earlier."""
    return dict(os.environ)


def restore(values: dict[str, str]) -> None:
    """Makes the environment of this process that of `snapshot`: credentials and endpoints set since are seen here."""
    os.environ.update(values)
