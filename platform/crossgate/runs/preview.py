"""A contact sheet of a few clips of an index."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from crossgate.clips.preview import contact_sheet
from crossgate.stream.index import Index
from crossgate.stream.reader import read_clips


def preview(url: str, out: Path, *, clips: int = 6, split: str = "", seed: int = 0) -> Path:
    """Draws clips of a split (empty: train where there is one, else the first) and returns the picture's path.

    Raises:
        UserError: for a missing index or an unknown split.
    """
    index = Index.load(url)
    shown = split or ("train" if "train" in index.splits else next(iter(index.splits)))
    selection = index.select([shown])
    order = np.random.default_rng(seed).choice(selection.total, size=min(clips, selection.total), replace=False)
    contact_sheet(read_clips(index, selection, order), out)
    return out
