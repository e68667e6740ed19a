"""MLflow runs: what happened, kept even when the server is away. See docs/tracking.md."""

from crossgate.tracking.server import Server, connect, pinned, tracking_uri
from crossgate.tracking.tracker import (
    MlflowTracker,
    NullTracker,
    Status,
    Tracker,
    conclude,
    deliver,
    known_run,
    open_tracker,
)

__all__ = [
    "MlflowTracker",
    "NullTracker",
    "Server",
    "Status",
    "Tracker",
    "conclude",
    "connect",
    "deliver",
    "known_run",
    "open_tracker",
    "pinned",
    "tracking_uri",
]
