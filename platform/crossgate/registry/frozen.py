"""The evaluation set of a name: pinned with its first release, so that every later one is judged on the same clips."""

from __future__ import annotations

import logging
from collections.abc import Callable

from crossgate.errors import UserError
from crossgate.registry.aliases import NOT_THERE
from crossgate.tracking import Server

log = logging.getLogger("crossgate.registry")

TAG = "crossgate.evaluation_set"
RENEW = "--new-evaluation-set"

Frozen = Callable[[], str]
"""Says which clips a run would be judged on: the digest of their shards, and how many."""


def check_frozen(server: Server, name: str, frozen: Frozen, renew: bool) -> str:
    """Returns the note that a decision on a new set needs; empty where the set is the one that is pinned.

    Args:
        server: of the registry.
        name: registered model.
        frozen: set that the run would be judged on.
        renew: another set than the pinned one is meant.

    Raises:
        UserError: the run would be judged on other clips than all before it, and nobody said so.
    """
    kept = _pinned(server, name)
    now = frozen()
    if kept in ("", now):
        return ""
    if not renew:
        raise UserError(
            f"would be judged on another evaluation set ({now}) than the releases before ({kept})",
            where=f"models:/{name}",
            cure=f"set release.index to the frozen set, or say {RENEW} to judge on this one from now on",
        )
    return f"ok      note: a new evaluation set from now on, {now}; before: {kept}"


def pin(server: Server, name: str, frozen: Frozen, renew: bool) -> None:
    """Keeps with the name which clips its releases are judged on, where none are kept or others are meant.

    A first release is judged by nobody: it passes where its clips are out of reach, and the next one pins them.
    """
    if _pinned(server, name) and not renew:
        return
    try:
        now = frozen()
    except UserError as error:
        log.warning("the evaluation set of %s is not pinned yet: %s", name, error)
        return
    server.client.set_registered_model_tag(name, TAG, now)


def _pinned(server: Server, name: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return str(server.client.get_registered_model(name).tags.get(TAG, ""))
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        return ""
