"""Ports for the servers and ranks that tests start."""

from __future__ import annotations

import itertools
import os
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

_FIRST, _EACH, _PARTS = 20_000, 1_000, 10


def free_port() -> int:
    """Returns a port of this machine that nobody listens on."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Returns so many, all different.

    A server takes seconds to open its port. Until then none but tests may come upon it: so it lies below those that
    Linux gives to connections, above those of Ray's workers, and each process of `pytest -n` has a part of its own.
    """
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            with suppress(OSError):  # somebody listens there
                found.append(held.enter_context(socket.create_server(("127.0.0.1", next(_order)))).getsockname()[1])
    return found


def _in_turn() -> Iterator[int]:
    """Yields this process's ports for ever, each again only after all others; where it begins is drawn."""
    part = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PARTS
    own = range(_FIRST + part * _EACH, _FIRST + (part + 1) * _EACH)
    return itertools.cycle(random.SystemRandom().sample(own, _EACH))


_order = _in_turn()
