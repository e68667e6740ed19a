"""Units of work as Ray tasks: a few more under way than there is room for, results as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from crossgate.errors import UserError

Unit = TypeVar("Unit")


def done_by_tasks(
    ray: Any, units: Iterable[Unit], start: Callable[[Unit], Any], cpus: float, died: UserError
) -> Iterator[tuple[Unit, Any]]:
    """Yields each unit with what its task returned, in the order in which they end.

    Args:
        ray: the module, connected.
        units: what is to be done.
        start: submits the task of a unit and returns Ray's reference.
        cpus: that Ray reserves for one task.
        died: raised when a worker was killed.

    Raises:
        UserError: of a task, or `died`.
    """
    left = iter(units)
    running: dict[Any, Unit] = {}
    try:
        while True:
            # More than there is room for, so that a cluster that can grow sees a reason to.
            room = 2 * max(1, int(ray.cluster_resources().get("CPU", 1) / cpus)) - len(running)
            running |= {start(unit): unit for unit in islice(left, max(0, room))}
            if not running:
                return
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            unit = running.pop(ready)
            yield unit, ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
        raise died from None
    finally:
        if running:  # waited for, not cancelled: Ray (2.60) aborts where a task ends just as it is being cancelled
            ray.wait(list(running), num_returns=len(running))
