"""What to do about steps whose loss or gradient is not finite: leave them out, go back, stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from crossgate.errors import UserError

_NAMED = 16  # clips in a message


@dataclass(frozen=True)
class BadStep:
    """A step that was left out: no weight was changed by it."""

    step: int
    keys: tuple[str, ...]
    """The clips whose loss is not finite; all of the step where only the gradient is not."""

    @property
    def named(self) -> str:
        """Its clips, or the first of them, for people."""
        more = f" and {len(self.keys) - _NAMED} more" if len(self.keys) > _NAMED else ""
        return ", ".join(self.keys[:_NAMED]) + more


class Verdict(Enum):
    """What comes next."""

    GO_ON = 0
    ROLL_BACK = 1


class NonFinitePolicy:
    """Leaves out a few, then goes back to the last checkpoint, then stops. All ranks judge the same steps alike.

    Args:
        skips: steps that may be left out between two checkpoints.
        rollbacks: times that the run may go back.
    """

    def __init__(self, skips: int, rollbacks: int) -> None:
        self._skips, self._rollbacks = skips, rollbacks
        self._since_saved = 0
        self.left_out = 0
        """Steps left out by this start of the run."""

    def judge(self, bad: Sequence[BadStep]) -> Verdict:
        """Says what to do after some steps that were left out.

        Raises:
            UserError: naming the clips of the first one, when nothing is left to try.
        """
        self.left_out += len(bad)
        self._since_saved += len(bad)
        if self._since_saved <= self._skips:
            return Verdict.GO_ON
        if not self._rollbacks:
            raise self.refusal(bad)
        self._rollbacks -= 1
        return Verdict.ROLL_BACK

    def refusal(self, bad: Sequence[BadStep]) -> UserError:
        """Returns the error that ends the run."""
        return UserError(
            f"loss is not finite at step {bad[0].step}",
            where=f"clips {bad[0].named}",
            cure="look at these clips with `crossgate preview`, lower optim.lr, or set training.nonfinite_skips; the "
            "last checkpoint is from before",
        )

    def saved(self) -> None:
        """Notes a checkpoint."""
        self._since_saved = 0
