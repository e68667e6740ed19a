"""What a rank holds of each parameter, whatever the ZeRO stage: its fp32 value and Adam's moments, as live views.

DeepSpeed keeps these in flat tensors that are cut by rank. A piece says which elements of which parameter a stretch of
such a tensor is, so that checkpoints can be written and read in terms of the parameters alone: without a word about
ranks or stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crossgate.training.world import World

VALUE = "value"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """A stretch of one parameter or buffer, seen flat."""

    name: str
    """In the task's `state_dict`."""
    start: int
    """First element."""
    views: dict[str, Tensor]
    """Kind (`VALUE`, and `MOMENTS` of what trains) -> ``(n,)`` view of this rank's own memory."""

    @property
    def trains(self) -> bool:
        """Whether the optimiser changes it."""
        return len(self.views) > 1

    def part(self, rank: int, ranks: int) -> Piece:
        """Returns the rank's share of a stretch that every rank holds."""
        length = len(self.views[VALUE])
        first, last = length * rank // ranks, length * (rank + 1) // ranks
        return Piece(self.name, self.start + first, {kind: view[first:last] for kind, view in self.views.items()})


def own_pieces(engine: Any, world: World) -> list[Piece]:
    """Returns pieces that over all ranks make up everything once: what this rank writes."""
    return [piece.part(world.rank, world.ranks) if shared else piece for piece, shared in _held(engine, world)]


def held_pieces(engine: Any, world: World) -> list[Piece]:
    """Returns everything that this rank holds, of which other ranks may hold copies: what it must read."""
    return [piece for piece, _ in _held(engine, world)]


def adam_steps(engine: Any) -> int:
    """Returns how many steps the optimiser has taken."""
    states = _adam(engine).state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def begin_moments(engine: Any, steps: int) -> None:
    """Gives every flat tensor moments of zero, as after so many steps: a fresh optimiser has none to read into."""
    optimizer = _adam(engine)
    for flat in _flat_tensors(engine):
        device = flat.device if optimizer.defaults.get("fused") or optimizer.defaults.get("capturable") else "cpu"
        optimizer.state[flat] = {"step": torch.tensor(float(steps), device=device)}
        optimizer.state[flat] |= {kind: torch.zeros_like(flat) for kind in MOMENTS}


def publish_values(engine: Any) -> None:
    """Brings the weights that the forward pass uses up to the fp32 values, on every rank. Every rank calls it."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # lets go of small weights, which every rank keeps whole between steps
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # gathers them again
    elif stage > 0:
        optimizer.update_lp_params()


# ---- where DeepSpeed keeps things ------------------------------------------------------------------------------


def _held(engine: Any, world: World) -> Iterator[tuple[Piece, bool]]:
    """Yields this rank's pieces, and whether every other rank holds the same."""
    stage = engine.zero_optimization_stage()
    for name, value in engine.module.task.state_dict(keep_vars=True).items():
        if hasattr(value, "ds_id"):
            yield _sharded(engine, name, value, world.rank), False
        elif not value.requires_grad:
            yield Piece(name, 0, {VALUE: value.detach().reshape(-1)}), True
        elif stage == 0:
            yield _whole(engine, name, value), True
        elif value._hp_mapping is not None:
            yield _mapped(engine, name, value), False


def _whole(engine: Any, name: str, value: Tensor) -> Piece:
    """Stage 0: plain AdamW over the parameters themselves."""
    state = engine.optimizer.state.get(value, {})
    moments = {kind: state.get(kind, torch.zeros_like(value)).view(-1) for kind in MOMENTS}
    return Piece(name, 0, {VALUE: value.detach().view(-1), **moments})


def _mapped(engine: Any, name: str, value: Any) -> Piece:
    """Stages 1 and 2: a parameter may begin on one rank and end on the next."""
    mapping = value._hp_mapping
    flat = _adam(engine).param_groups[mapping.param_group_index]["params"][0]
    at, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
    state = _adam(engine).state[flat]
    views = {VALUE: flat.detach(), **{kind: state[kind] for kind in MOMENTS}}
    return Piece(name, mapping.lp_fragment_address.start, {kind: v.narrow(0, at, length) for kind, v in views.items()})


def _sharded(engine: Any, name: str, value: Any, rank: int) -> Piece:
    """Stage 3: every parameter is cut into equal parts, the last one padded."""
    share = value.partition_numel()
    start = share * rank
    length = max(0, min(share, value.ds_numel - start))
    if not value.requires_grad:
        return Piece(name, start, {VALUE: value.ds_tensor.detach().narrow(0, 0, length)})
    optimizer = engine.optimizer
    group, at, _ = optimizer.grad_position[optimizer.get_param_id(value)]
    flat = optimizer.fp32_partitioned_groups_flat[group]
    state = optimizer.optimizer.state[flat]
    views = {VALUE: flat.detach(), **{kind: state[kind] for kind in MOMENTS}}
    return Piece(name, start, {kind: view.narrow(0, at, length) for kind, view in views.items()})


def _adam(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def _flat_tensors(engine: Any) -> list[Tensor]:
    if engine.zero_optimization_stage() == 3:  # which hands its tensors to AdamW one at a time, for a step only
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [flat for group in _adam(engine).param_groups for flat in group["params"]]
