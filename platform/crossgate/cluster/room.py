"""Whether a cluster has room for what a run needs at least: waits while it may grow, and refuses what can never start.

Counted is what nodes have, not what is free on them: a cluster that others use is busy, not too small.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from crossgate.errors import UserError

log = logging.getLogger(__name__)

Share = tuple[float, float]
"""CPUs and GPUs: of a node, or those that must be on one node together."""

LOOK_S = 2.0
_ROUNDING = 1e-6  # ten tenths of a CPU are one


@dataclass(frozen=True)
class Need:
    """What must fit into a cluster at once."""

    what: str
    """For people, such as ``a trial``."""
    shares: tuple[Share, ...]
    """Each may be on another node."""
    keys: str
    """Settings that ask for it."""

    @property
    def words(self) -> str:
        """CPUs and GPUs of each share, as people read them."""
        alike = {share: self.shares.count(share) for share in self.shares}
        said = [f"{count} x {_words(share)}" if count > 1 else _words(share) for share, count in alike.items()]
        return " and ".join(said)


def fits(nodes: Sequence[Share], shares: Sequence[Share]) -> bool:
    """Whether every share finds room on some node, larger ones first."""
    left = [list(node) for node in nodes]
    for cpus, gpus in sorted(shares, key=lambda share: (share[1], share[0]), reverse=True):
        node = next((one for one in left if one[0] >= cpus - _ROUNDING and one[1] >= gpus - _ROUNDING), None)
        if node is None:
            return False
        node[0] -= cpus
        node[1] -= gpus
    return True


def wait_for_room(
    need: Need,
    nodes: Callable[[], list[Share]],
    patience_s: float,
    ask: Callable[[Sequence[Share]], None],
) -> None:
    """Returns when the cluster has room.

    Args:
        need: what must fit.
        nodes: returns what each living node has in all.
        patience_s: seconds that it may take to grow.
        ask: tells the cluster what is waited for, since one that grows does so on demand only.

    Raises:
        UserError: when it is too small for longer than that.
    """
    if fits(nodes(), need.shares):
        return
    until = time.monotonic() + patience_s
    if patience_s:
        log.warning("%s needs %s, Ray has %s: waiting until it grows", need.what, need.words, _all(nodes()))
        ask(need.shares)
    try:
        while not fits(nodes(), need.shares):
            if time.monotonic() >= until:
                raise _too_small(need, nodes(), patience_s)
            time.sleep(min(LOOK_S, patience_s))
    finally:
        if patience_s:
            ask(())


def _too_small(need: Need, nodes: list[Share], patience_s: float) -> UserError:
    waited = f" after {patience_s:g} s (cluster.wait_s)" if patience_s else ""
    return UserError(
        f"{need.what} needs {need.words}, and Ray has no room for it{waited}",
        where=need.keys,
        expected=f"at most what there is: {_all(nodes)}",
        cure="make them smaller, or the cluster larger",
    )


def _all(nodes: list[Share]) -> str:
    alike = {node: nodes.count(node) for node in sorted(nodes, reverse=True)}
    return (
        ", ".join(f"{count} node{'s' * (count > 1)} with {_words(node)}" for node, count in alike.items()) or "no node"
    )


def _words(share: Share) -> str:
    cpus, gpus = share
    return f"{cpus:g} CPU{'s' * (cpus != 1)}" + (f" and {gpus:g} GPU{'s' * (gpus != 1)}" if gpus else "")
