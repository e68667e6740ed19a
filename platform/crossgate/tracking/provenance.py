"""Where a run's numbers come from: code version, machine, user."""

from __future__ import annotations

import getpass
import socket
import subprocess
from pathlib import Path

from crossgate._version import __version__

_PACKAGE = Path(__file__).resolve().parents[1]


def code_version() -> dict[str, str]:
    """Returns version tags: the release and, where the package lies in a repository, its commit."""
    tags = {"crossgate.version": __version__}
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "__init__.py") else ""
    if commit:
        tags["mlflow.source.git.commit"] = commit
        if _git("status", "--porcelain", "--untracked-files=no", "."):
            tags["crossgate.uncommitted"] = "true"
    return tags


def machine() -> dict[str, str]:
    """Returns tags of host and user."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        user = "unknown"
    return {"crossgate.host": socket.gethostname(), "mlflow.user": user}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(_PACKAGE), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
