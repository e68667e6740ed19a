"""What clip number i of a seed is: its group, action, degradations and split, by arithmetic and seeded draws alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

import numpy as np

from crossgate.clips.synth.actions import ACTIONS, Action
from crossgate.clips.synth.degrade import Degradation, draw_degradations

SPLITS = ("test", "val", "unlabelled")
"""What is dealt out, in this order; `train` gets the rest."""

_SCENE, _ORDER, _SPOIL, _CLIP, _SPLIT = range(5)  # separate streams of random numbers


@dataclass(frozen=True)
class ClipPlan:
    """One clip, before it is rendered."""

    index: int
    group: int
    action: Action
    degradations: tuple[Degradation, ...]

    @property
    def name(self) -> str:
        """The file stem; it does not betray the label."""
        return f"clip_{self.index:06d}"


def stream(seed: int, kind: int, number: int) -> np.random.Generator:
    """Returns the random numbers of one purpose."""
    return np.random.default_rng([seed, kind, number])


def scene_stream(seed: int, group: int) -> np.random.Generator:
    """Returns the random numbers that draw a group's scene."""
    return stream(seed, _SCENE, group)


def clip_stream(seed: int, index: int) -> np.random.Generator:
    """Returns the random numbers that a clip is performed with."""
    return stream(seed, _CLIP, index)


def plan_clip(seed: int, index: int, clips_per_group: int, degraded: float) -> ClipPlan:
    """Returns clip ``index``. Every run of twelve clips shows each action once, neighbours in `ACTIONS` together."""
    block, place = divmod(index, len(ACTIONS))
    pairs = stream(seed, _ORDER, block).permutation(len(ACTIONS) // 2)
    action = ACTIONS[2 * int(pairs[place // 2]) + place % 2]
    spoiled = draw_degradations(stream(seed, _SPOIL, index), degraded)
    return ClipPlan(index, index // clips_per_group, action, spoiled)


def plan_splits(seed: int, clips: int, clips_per_group: int, fractions: dict[str, float]) -> list[str]:
    """Returns the split of each clip. No group is cut; with a cohort for each, every split covers every action.

    A cohort is the fewest whole groups that together show every action equally often. With fewer cohorts than splits
    (three, or four with unlabelled clips), single groups are dealt out: train first, then test, val and unlabelled.
    """
    cohort = lcm(clips_per_group, len(ACTIONS))
    needed = 4 if fractions.get("unlabelled") else 3
    unit = cohort if clips >= needed * cohort else clips_per_group
    count = -(-clips // unit)
    whole = clips // unit  # an unfinished last unit goes to train, where a gap in the classes hurts least
    order = [int(i) for i in stream(seed, _SPLIT, 0).permutation(whole)] + list(range(whole, count))
    of_unit = ["train"] * count
    first = 0
    for place, name in enumerate(SPLITS):
        wanted = fractions.get(name, 0.0)
        size = max(1, round(wanted * count)) if wanted > 0 and whole > place + 1 else 0
        for i in order[first : first + size]:
            of_unit[i] = name
        first += size
    return [of_unit[index // unit] for index in range(clips)]
