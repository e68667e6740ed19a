"""Batches copied beside the steps: what waits for what. A recorder stands for CUDA where there is no GPU."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from crossgate.batch import ClipBatch
from crossgate.training.feed import Feed


class Recorder:
    """Stands for CUDA and for a batch: notes what is asked of them, in order."""

    def __init__(self, monkeypatch):
        self.said, self.now = [], "compute"
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "copies")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "stream", self.inside)

    @contextmanager
    def inside(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before

    def wait_stream(self, stream):
        self.said.append(f"compute waits for {stream}")

    def record_event(self):
        recorder, number = self, sum("event" in line for line in self.said)
        self.said.append(f"event {number}")

        class Event:
            def synchronize(self):
                recorder.said.append(f"host waits for {number}")

        return Event()

    def pin_memory(self):
        return self

    def to(self, device):
        self.said.append(f"copy in {self.now} to {device}")
        return self

    def used_by(self, stream):
        assert stream is self
        self.said.append("kept for compute")


def test_copies_run_beside_the_steps_and_the_host_stays_two_batches_ahead(monkeypatch):
    cuda = Recorder(monkeypatch)
    feed = Feed(torch.device("cuda", 0))
    feed.to_device(cuda)
    assert cuda.said == ["copy in copies to cuda:0", "compute waits for copies", "kept for compute"]
    cuda.said.clear()
    for _ in range(4):
        feed.keep_pace()
    assert cuda.said == ["event 0", "event 1", "event 2", "host waits for 0", "event 3", "host waits for 1"]


def test_on_a_cpu_the_batch_is_the_batch():
    feed, batch = Feed(torch.device("cpu")), object()
    feed.keep_pace()
    assert feed.to_device(batch) is batch


@pytest.mark.gpu
def test_on_a_gpu_every_batch_arrives_whole_while_the_device_is_busy():
    device = torch.device("cuda")
    feed, totals = Feed(device), []
    load = torch.randn(2048, 2048, device=device)
    for number in range(20):
        feed.keep_pace()
        batch = ClipBatch(
            modalities=("rgb",),
            streams={"rgb": torch.full((8, 8, 3, 128, 128), number, dtype=torch.uint8)},
            present=torch.ones(8, 1, dtype=torch.bool),
            group=torch.arange(8),
            labels={},
            degraded=torch.zeros(8, 1),
            clip=torch.arange(8),
        )
        moved = feed.to_device(batch)
        for _ in range(10):
            load = torch.tanh(load @ load)
        totals.append(moved.streams["rgb"].float().mean())
        del moved
    assert torch.stack(totals).tolist() == [float(number) for number in range(20)]
