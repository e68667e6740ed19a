"""The only place where environment variables are read or set."""

from __future__ import annotations

import os
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


def set_single_process_world(port: int) -> None:
    """Describes a world of one process, which DeepSpeed reads from the environment."""
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def calm_mlflow() -> None:
    """Turns MLflow's telemetry off and shortens its patience, where the user has not decided otherwise.

    By default a call to a dead server retries for four minutes; `tracking` keeps and resends by itself.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")


def home() -> Path | None:
    """Where relative run folders of cluster jobs live (``CROSSGATE_HOME``), if the user has decided."""
    value = os.environ.get("CROSSGATE_HOME")
    return Path(value) if value else None


def in_ray_job() -> bool:
    """Whether this process was started by `ray job submit`, in a working folder that is thrown away."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def ray_address() -> str | None:
    """The Ray cluster named by the environment, if any."""
    return os.environ.get("RAY_ADDRESS")


def calm_deepspeed(cpu: bool) -> None:
    """Names the accelerator, so that DeepSpeed does not guess aloud, where the user has not decided otherwise."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if cpu else "cuda")


def calm_ray(poll_seconds: float = 0.2) -> None:
    """Ray's chatter off, its Train controller quick; the user's own settings win.

    Ray Train looks at its workers every two seconds by default, which a short run feels at every start and end.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(poll_seconds))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")


def worker_environment(source_root: Path) -> dict[str, str]:
    """What Ray's workers need to import this package, whether it is installed there or not."""
    paths = [str(source_root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def snapshot() -> dict[str, str]:
    """The environment as it is now, for a worker process whose parent was started earlier."""
    return dict(os.environ)


def restore(values: dict[str, str]) -> None:
    """Makes the environment of this process that of `snapshot`: credentials and endpoints set since are seen here."""
    os.environ.update(values)
