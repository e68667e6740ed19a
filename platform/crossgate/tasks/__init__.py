"""Pretraining and fine-tuning: a model and its objective behind one interface."""

from crossgate.tasks.build import build_task
from crossgate.tasks.task import Prediction, Task

__all__ = ["Prediction", "Task", "build_task"]
