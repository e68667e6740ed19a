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
