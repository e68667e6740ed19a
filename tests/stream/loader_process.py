"""One rank of a training run, as far as its loader: prints a line a step with digests of the decoded clips.

python loader_process.py INDEX RANK RANKS STATE.json|- LAST_STEP PAUSE

Rank 0 keeps the loader's state of every step in STATE.json, beside and renamed. Steps are counted over epochs.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from stub_codec import number_tensors

from crossgate.batch import ClipBatch
from crossgate.config import ClipConfig, DataConfig
from crossgate.stream.index import Index
from crossgate.stream.loader import ClipLoader

CLIP = ClipConfig(modalities=("rgb", "audio"), frames=1, size=16, seconds=0.3, mels=8)


def digests(batch: ClipBatch) -> list[str]:
    """Returns a digest a clip, of every tensor that holds something of it."""
    found = []
    for row, key in enumerate(batch.keys):
        digest = hashlib.sha256(key.encode())
        for tensor in (*batch.streams.values(), *batch.labels.values(), batch.present, batch.group, batch.clip):
            digest.update(tensor[row].numpy().tobytes())
        found.append(digest.hexdigest()[:12])
    return found


def make(url: str, rank: int, ranks: int) -> ClipLoader:
    """Returns the loader of a rank."""
    workers = 1 if rank == 0 and ranks > 1 else 0  # ranks need not be alike
    data = DataConfig(clip=CLIP, global_batch=12, tail="wrap", loader_workers=workers)
    return ClipLoader(Index.load(url), ["train"], data, seed=7, rank=rank, ranks=ranks, decode=number_tensors)


def main() -> None:
    url, rank, ranks, state, last, pause = sys.argv[1:]
    loader = make(url, int(rank), int(ranks))
    if Path(state).exists():
        loader.load_state_dict(json.loads(Path(state).read_text()))
    for batch in loader:
        now = loader.state_dict()
        step = now["epoch"] * loader.steps_per_epoch + now["step"]
        print(step, *digests(batch), flush=True)
        if int(rank) == 0:
            beside = Path(f"{state}.partial")
            beside.write_text(json.dumps(now))
            os.replace(beside, state)
        if step >= int(last):
            return
        time.sleep(float(pause))


if __name__ == "__main__":
    main()
