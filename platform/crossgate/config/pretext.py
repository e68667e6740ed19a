"""Settings of the pretext tasks: what pretraining may ask of a clip besides which clip it is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from crossgate.config.base import Config

PretextName = Literal["rotation", "flip", "channels", "arrow", "speed", "order", "synchrony"]


class PretextConfig(Config):
    """Pretext tasks, their losses mixed by a gate and added to the contrast."""

    tasks: tuple[PretextName, ...] = ()
    """Tasks to solve (empty: none). Of pictures: `rotation` (which quadrant was turned, how far), `flip`, `channels`
    (order of rgb's colours). Of time: `arrow` (forwards or backwards), `speed` (played once or twice as fast), `order`
    (of three parts), `synchrony` (of sound and pictures)."""
    weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the mixed losses, each divided by that of guessing."""
    weighting: Literal["gate", "uniform", "random"] = "gate"
    """How tasks are mixed: by a gate that learns, in equal parts, or by a random gate that never learns (a control)."""
    entropy: Annotated[float, Field(gt=0)] = 0.5
    """Weight of the penalty on uneven weights of the gate that learns: no task counts more than exp(1 / entropy)
    times what a task counts that is guessed."""

    @field_validator("tasks")
    @classmethod
    def _once(cls, tasks: tuple[PretextName, ...]) -> tuple[PretextName, ...]:
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task is named twice")
        return tasks
