"""Peak memory and time of the contrast over a global batch: tiles against full matrices, in one run.

    python benchmarks/contrastive_memory.py [--batch 4096 --batch 16384 ...] [--dim 512] [--tile 2048] [--repeats 2]

One pair of views, every clip its own group, loss and gradients in fp32. The competitors, in alternating order in one
run:

- tiles: `infonce` with `--tile`;
- full: `infonce` without tiles, two matrices, one a direction;
- full, shared: symmetric cross entropy on one matrix and its transpose, as CLIP's pseudocode: no masks;
- open_clip: the loss of open_clip with `local_loss` and gathered gradients, where it is installed
  (`pip install --no-deps open_clip_torch ftfy`).

Time is the best of the repeats: on a CPU, the CPU time of one thread, which other work on the machine disturbs least.
Memory is the peak above what inputs and their gradients hold: of the allocator on a GPU; on a CPU, of the resident
memory of a fresh process. A loss whose matrices would not fit into the memory that is free is left out, and its row
says so. The last line is JSON with the ratios at 16,384 clips: memory of full over tiles, time of tiles over full.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from crossgate.objectives.infonce import Views, infonce

JUDGED = 16384
MIB = 1 << 20
Loss = Callable[[Tensor, Tensor], Tensor]


def ours(tile: int) -> Loss:
    def loss(embeddings: Tensor, scale: Tensor) -> Tensor:
        clips = len(embeddings)
        present = torch.ones(clips, 2, dtype=torch.bool, device=embeddings.device)
        views = Views(embeddings, present, torch.arange(clips, device=embeddings.device))
        return infonce(views, views, [(0, 1)], scale, tile=tile).loss

    return loss


def shared(embeddings: Tensor, scale: Tensor) -> Tensor:
    similarity = scale * embeddings[:, 0] @ embeddings[:, 1].T
    own = torch.arange(len(embeddings), device=embeddings.device)
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(similarity, own) + cross_entropy(similarity.T, own)) / 2


def open_clip() -> Loss | None:
    try:
        from open_clip.loss import ClipLoss  # type: ignore[import-not-found]
    except ImportError:
        return None
    loss = ClipLoss(local_loss=True, gather_with_grad=True)
    return lambda embeddings, scale: loss(embeddings[:, 0], embeddings[:, 1], scale)


MATRICES = {"full": 9, "full, shared": 5, "open_clip": 5}
"""Squares of the global batch, in fp32, that are held at once, rounded up."""


def fits(name: str, clips: int, device: str) -> bool:
    """Whether a loss may be measured on this machine without driving it out of memory."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    return 4 * clips**2 * MATRICES.get(name, 0) < 0.9 * free


def competitors(tile: int) -> dict[str, Loss]:
    found: dict[str, Loss] = {"tiles": ours(tile), "full": ours(0), "full, shared": shared}
    other = open_clip()
    return found | ({"open_clip": other} if other else {})


def inputs(clips: int, dim: int, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(clips, 2, dim, device=device), dim=-1)
    return embeddings.requires_grad_(), torch.tensor(14.0, device=device, requires_grad=True)


def step(loss: Loss, embeddings: Tensor, scale: Tensor) -> None:
    embeddings.grad = scale.grad = None
    loss(embeddings, scale).backward()
    if embeddings.is_cuda:
        torch.cuda.synchronize()


def resident(key: str = "VmRSS") -> int:
    """Returns the process's resident bytes now, or their peak (`VmHWM`), as Linux keeps them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def memory(name: str, tile: int, clips: int, dim: int, device: str, answer: Any = None) -> int:
    """Returns (or puts) bytes of the peak above inputs and their gradients."""
    torch.set_num_threads(1)
    loss = competitors(tile)[name]
    step(loss, *inputs(256, dim, device))  # libraries load and threads start
    embeddings, scale = inputs(clips, dim, device)
    embeddings.grad = torch.ones_like(embeddings)  # touched, so that it counts as resident
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, embeddings, scale)
        found = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident()
        step(loss, embeddings, scale)
        found = resident("VmHWM") - before
    if answer is not None:
        answer.put(found)
    return found


def memory_apart(*given: Any) -> int:
    """The same in a fresh process."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=memory, args=(*given, answer))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"measuring the memory of {given[0]} failed")
    return answer.get()


def times(losses: dict[str, Loss], clips: int, dim: int, device: str, repeats: int) -> dict[str, float]:
    for loss in losses.values():
        step(loss, *inputs(256, dim, device))
    clock = time.perf_counter if device == "cuda" else time.process_time
    embeddings, scale = inputs(clips, dim, device)
    found = dict.fromkeys(losses, float("inf"))
    for _ in range(repeats):
        for name, loss in losses.items():
            start = clock()
            step(loss, embeddings, scale)
            found[name] = min(found[name], clock() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, action="append", help="global batch; may be given several times")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--tile", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "contrastive_memory.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    lines = [
        f"{datetime.date.today()}, {where}, one thread, PyTorch {torch.__version__}, fp32, "
        f"width {options.dim}, tiles of {options.tile}, best of {options.repeats}",
        "",
        "| clips | loss | peak, MiB | times that of tiles | seconds | times that of tiles |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    summary: dict[str, float] = {}
    for clips in options.batch or [4096, JUDGED]:
        every = competitors(options.tile)
        losses = {name: loss for name, loss in every.items() if fits(name, clips, device)}
        seconds = times(losses, clips, options.dim, device, options.repeats)
        peaks = {name: memory_apart(name, options.tile, clips, options.dim, device) for name in losses}
        for name in losses:
            peak, second = peaks[name] / peaks["tiles"], seconds[name] / seconds["tiles"]
            lines.append(
                f"| {clips:,} | {name} | {peaks[name] / MIB:,.0f} | {peak:.1f} | {seconds[name]:.2f} | {second:.2f} |"
            )
        lines += [f"| {clips:,} | {name} | does not fit | | | |" for name in every if name not in losses]
        if clips == JUDGED:
            summary = {
                "peak_ratio_16k": round(peaks["full"] / peaks["tiles"], 2),
                "time_ratio_16k": round(seconds["tiles"] / seconds["full"], 3),
                "peak_ratio_16k_shared": round(peaks["full, shared"] / peaks["tiles"], 2),
                "time_ratio_16k_shared": round(seconds["tiles"] / seconds["full, shared"], 3),
            }
    table = "\n".join(lines) + "\n"
    Path(options.out).write_text(table)
    print(table)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
