"""Starts the ranks of a parity test: 2, then 4 processes that compute the same global batch together."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Solve = Callable[[int, int], Any]


def start(solve: Solve, output: Path) -> None:
    """Runs ``solve(rank, ranks)`` on 2 and then on 4 ranks and leaves RANKS-RANK.pt in the folder.

    The ranks are forked, so that the imports are paid once.
    """
    torch.set_num_threads(1)
    for ranks in (2, 4):
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=_rank, args=(solve, rank, ranks, output)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(f"a rank of {ranks} failed")


def _rank(solve: Solve, rank: int, ranks: int, output: Path) -> None:
    rendezvous = f"file://{output / f'rendezvous-{ranks}'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    torch.save(solve(rank, ranks), output / f"{ranks}-{rank}.pt")
    dist.destroy_process_group()
