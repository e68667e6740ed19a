"""Collecting predictions: tensors of any type, None fields, alignment by key."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crossgate.batch import ClipBatch
from crossgate.evaluation import collect, concatenate


def pair(size, start=0, dtype=torch.float32, weights=True, labels=("action",)):
    batch = ClipBatch(
        modalities=("rgb", "audio"),
        streams={},
        present=torch.ones(size, 2, dtype=torch.bool),
        group=torch.full((size,), 2**62 + start),
        labels={task: torch.arange(size) for task in labels},
        degraded=torch.full((size, 2), float("nan")),
        clip=torch.arange(start, start + size),
        keys=[f"clip{start + i}" for i in range(size)],
    )
    prediction = SimpleNamespace(
        features=torch.randn(size, 2, 3, dtype=dtype, requires_grad=True),
        embeddings=None,
        fused=torch.randn(size, 3, dtype=dtype),
        weights=torch.rand(size, 2, dtype=dtype) if weights else None,
        logits=torch.randn(size, 4, dtype=dtype),
        unimodal_logits=torch.randn(size, 2, 4, dtype=dtype),
    )
    return batch, prediction


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ragged_batches_of_any_float_type(dtype):
    pairs = [pair(4, 0, dtype), pair(4, 4, dtype), pair(1, 8, dtype)]
    got = collect(iter(pairs))
    assert len(got) == 9
    assert got.features.shape == (9, 2, 3)
    assert got.features.dtype == np.float32
    assert got.embeddings is None
    assert got.group.dtype == np.int64
    assert got.group[-1] == 2**62 + 8, "63-bit group names must not pass through floats"
    np.testing.assert_array_equal(got.fused[4:8], pairs[1][1].fused.float().numpy())
    assert got.keys[8] == "clip8"


def test_keys_are_made_from_ordinals_where_there_are_none():
    batch, prediction = pair(2, 5)
    batch.keys = []
    assert collect([(batch, prediction)]).keys == ["clip-5", "clip-6"]


def test_nothing_to_collect():
    with pytest.raises(ValueError, match="no clips"):
        collect([])


def test_parts_with_different_tasks_and_modalities():
    a, b = collect([pair(2, labels=("action",))]), collect([pair(3, 2, labels=("violence",))])
    joined = concatenate([a, b])
    np.testing.assert_array_equal(joined.labels["action"], [0, 1, -1, -1, -1])
    np.testing.assert_array_equal(joined.labels["violence"], [-1, -1, 0, 1, 2])
    assert joined.labelled("violence").keys == ["clip2", "clip3", "clip4"]
    assert len(joined.labelled("no such task")) == 0
    b.modalities = ("rgb", "flow")
    with pytest.raises(ValueError, match="different modalities"):
        concatenate([a, b])


def test_a_field_that_one_part_lacks_is_left_out():
    assert collect([pair(2), pair(2, 2, weights=False)]).weights is None


def test_select_and_align(simulated):
    got = simulated(20, 1)
    some = got.select(got.present[:, 2])
    assert len(some) == got.present[:, 2].sum()
    assert some.present[:, 2].all()
    mixed = got.select(np.random.default_rng(0).permutation(20))
    again = mixed.aligned(got.keys)
    np.testing.assert_array_equal(again.features, got.features)
    np.testing.assert_array_equal(again.labels["action"], got.labels["action"])
    with pytest.raises(ValueError, match="'nobody'"):
        got.aligned(["nobody"])
