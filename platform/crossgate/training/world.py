"""The ranks of a run: who am I, how many are we, which device is mine."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from crossgate import environment
from crossgate.errors import UserError

CONTROL_S = 6 * 3600.0
"""Patience of the other ranks with what rank 0 does alone, such as fetching a checkpoint; a rank that dies is noticed
at once all the same, and one that hangs in training by the watchdog."""

T = TypeVar("T")
_control: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class World:
    """The place of this process among the ranks of its run."""

    rank: int
    local_rank: int
    ranks: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this rank does what is done once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until every rank has come here."""
        if self.ranks > 1:
            dist.barrier(group=_control)

    def gather(self, item: Any) -> list[Any]:
        """Returns every rank's item, in the order of ranks, on every rank (host side, small things only)."""
        if self.ranks == 1:
            return [item]
        items: list[Any] = [None] * self.ranks
        dist.all_gather_object(items, item, group=_control)
        return items

    def to_leader(self, item: Any) -> list[Any] | None:
        """Returns every rank's item, in the order of ranks, on rank 0; None elsewhere."""
        if self.ranks == 1:
            return [item]
        items: list[Any] | None = [None] * self.ranks if self.leads else None
        dist.gather_object(item, items, dst=0, group=_control)
        return items

    def from_leader(self, item: Any) -> Any:
        """Returns rank 0's item on every rank."""
        if self.ranks == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0, group=_control)
        return box[0]

    def led(self, call: Callable[[], T]) -> T:
        """Returns on every rank what rank 0's call returns.

        Raises:
            UserError: on every rank, when it raised one there; else the others would wait for rank 0 to be gone.
        """
        found: Any = None
        refused: UserError | None = None
        if self.leads:
            try:
                found = call()
            except UserError as error:
                refused = error
        found, refused = self.from_leader((found, refused))
        if refused is not None:
            raise refused
        return found


class Flag:
    """Agreement of all ranks on the largest number that any of them raises, without waiting for one another.

    Each call hands in this rank's number and returns the largest of those that the ranks had handed in at the call
    before. The exchange runs on the host while the step computes, so it costs the device nothing.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[torch.Tensor, Any] | None = None

    def __call__(self, raised: int) -> int:
        if self._world.ranks == 1:
            return raised
        before = self._pending
        answer = torch.tensor([raised])
        self._pending = answer, dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=_control, async_op=True)
        if before is None:
            return 0
        before[1].wait()
        return int(before[0].item())


def current_world(timeout_s: float = 1800.0) -> World:
    """Returns this process's world, joining it on the first call.

    The world is torchrun's (or Ray Train's, which sets the same variables), else one process. Collectives use nccl
    where there are GPUs and gloo elsewhere.

    Raises:
        UserError: when a machine has fewer GPUs than ranks.
    """
    global _control
    described = environment.torchrun_world()
    rank, local_rank, ranks = described or (0, 0, 1)
    device = _device(local_rank)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Alone, no port is needed, and no variable is left behind for child processes to stumble over.
        store = None if described else dist.HashStore()
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
        atexit.register(leave_world)
    if ranks > 1 and _control is None:
        _control = dist.new_group(backend="gloo", timeout=timedelta(seconds=CONTROL_S))
    return World(rank, local_rank, ranks, device)


def leave_world() -> None:
    """Leaves the process group for good: DeepSpeed remembers its groups, so a process joins one world only."""
    global _control
    _control = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} of this machine has no GPU ({torch.cuda.device_count()} seen)",
            where="cluster.workers",
            cure="start at most one rank a GPU",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
