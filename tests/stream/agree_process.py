"""Two ranks over gloo, of which each meets other bad clips; prints what each believes, and how it ends.

python agree_process.py INDEX FOLDER LIMIT ...

Leaves RANK-LIMIT in the folder for each limit of bad clips.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import torch.distributed as dist
from stub_codec import number_tensors

from crossgate.config import ClipConfig, DataConfig
from crossgate.errors import UserError
from crossgate.stream.collate import BadClip
from crossgate.stream.index import Index
from crossgate.stream.loader import ClipLoader, agreed_skips, sequential

CLIP = ClipConfig(modalities=("rgb", "audio"), frames=1, size=16, seconds=0.3, mels=8)
RANKS = 2


def rank_main(rank: int, url: str, folder: str, limit: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{limit}", rank=rank, world_size=RANKS)
    data = DataConfig(clip=CLIP, global_batch=4, max_bad_clips=limit)
    loader = ClipLoader(Index.load(url), ["train"], data, seed=0, rank=rank, ranks=RANKS, decode=number_tensors)
    steps, ending = 0, "end"
    try:
        for batch in loader:
            steps += 1
            assert len(batch) == 2
            if steps % 3 == 0:  # a whole epoch: every bad clip was met by one rank or the other
                loader.settle(gather)
            if steps == 6:
                break
    except UserError as error:
        ending = str(error)
    Path(folder, f"{rank}-{limit}-measured").write_text(measured(Index.load(url), data, rank))
    bad = sorted(clip.key for clip in loader.bad_clips)
    Path(folder, f"{rank}-{limit}").write_text(f"{steps}|{bad}|{loader.state_dict()['bad_clips']}|{ending}")
    dist.destroy_process_group()


def measured(index: Index, data: DataConfig, rank: int) -> str:
    """Reads every clip once, as evaluation does; returns how many both ranks skipped, or how it ends."""
    skipped: list[BadClip] = []
    for _ in sequential(
        index, ["train"], data, batch_size=2, rank=rank, ranks=RANKS, decode=number_tensors, skipped=skipped
    ):
        pass
    try:
        return f"{len(skipped)} of {agreed_skips(skipped, data, gather)}"
    except UserError as error:
        return str(error)


def gather(item: object) -> list[object]:
    items: list[object] = [None] * RANKS
    dist.all_gather_object(items, item)
    return items


def main() -> None:
    url, folder, *limits = sys.argv[1:]
    context = multiprocessing.get_context("fork")  # so that the imports are paid once
    for limit in map(int, limits):
        processes = [context.Process(target=rank_main, args=(rank, url, folder, limit)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(f"a rank failed with limit {limit}")


if __name__ == "__main__":
    main()
