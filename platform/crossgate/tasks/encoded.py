"""What a model makes of some clips, apart from what an objective makes of it: the two halves of a cached contrast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Encoded:
    """Everything that an objective needs of B clips.

    Attributes:
        rows: name -> ``(B, ...)`` with gradient, a row a clip.
        scalars: name -> tensor with gradient that all clips share, such as a temperature.
        facts: name -> ``(B, ...)`` without gradient.
    """

    rows: dict[str, Tensor]
    scalars: dict[str, Tensor]
    facts: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.facts.values())))

    @classmethod
    def joined(cls, parts: Sequence[Encoded]) -> Encoded:
        """Returns several micro-batches as one: leaves of their own that collect gradients."""
        first = parts[0]
        return cls(
            {name: _leaf(torch.cat([part.rows[name] for part in parts])) for name in first.rows},
            {name: _leaf(value) for name, value in first.scalars.items()},
            {name: torch.cat([part.facts[name] for part in parts]) for name in first.facts},
        )

    def surrogate(self, whole: Encoded, start: int, parts: int) -> Tensor:
        """Returns a scalar whose gradient is what this micro-batch contributes to that of the whole batch's loss.

        Linear in everything here, with the gradients that the loss left at the whole batch's leaves as factors
        (Gao et al. 2021, arXiv 2101.06983, eq. 5): the chain rule, cut where the encoders end.

        Args:
            whole: of `joined`, after its loss went backward.
            start: first row of this micro-batch there.
            parts: micro-batches in all, over which what they share is spread.
        """
        terms = []
        for name, rows in self.rows.items():
            slope = whole.rows[name].grad
            if slope is not None:
                terms.append((_exact(rows) * _exact(slope[start : start + len(rows)])).sum())
        for name, value in self.scalars.items():
            slope = whole.scalars[name].grad
            if slope is not None and value.requires_grad:
                terms.append((_exact(value) * _exact(slope)).sum() / parts)
        return torch.stack(terms).sum()


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def _exact(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
