"""Gates on kept features: scores out of fold, selection on validation, weights that follow what is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from crossgate.config import FusionConfig, OptimConfig, StudyConfig
from crossgate.errors import UserError
from crossgate.tasks.gates import (
    Clips,
    Gate,
    Setting,
    folds_of,
    frozen_random,
    out_of_fold,
    scored,
    train_gate,
    train_heads,
)
from crossgate.tasks.task import decaying_parameters

NAMES = ("rgb", "audio")
SETTING = Setting(
    StudyConfig(steps=80, batch=64, eval_every=10, folds=3), OptimConfig(lr=0.02), FusionConfig(hidden=16), classes=3
)


def clips(count: int, seed: int, *, spoiled: float = 0.5) -> Clips:
    """Two streams that name the class; in a spoiled clip one of them is louder and says nothing."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=rng)
    features = torch.randn(count, 2, 8, generator=rng) * 0.4
    features[:, :, :3] += 2 * torch.nn.functional.one_hot(labels, 3).unsqueeze(1)
    bad = torch.rand(count, generator=rng) < spoiled
    which = torch.randint(2, (count,), generator=rng)
    rows = torch.nonzero(bad).squeeze(1)
    features[rows, which[rows]] = torch.randn(len(rows), 8, generator=rng) * 0.4
    features[rows, which[rows], 7] += 3  # the sign by which a gate can know
    present = torch.ones(count, 2, dtype=torch.bool)
    return Clips(features, present, labels, torch.arange(count) // 4)


def accuracy(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    return float((probabilities.argmax(-1) == labels).float().mean())


def test_folds_keep_groups_whole_and_even() -> None:
    group = torch.arange(40) // 4
    part = folds_of(group, 4, seed=1)
    assert all(len(part[group == g].unique()) == 1 for g in group.unique())
    assert sorted(torch.bincount(part).tolist()) == [8, 8, 12, 12]
    assert not torch.equal(part, folds_of(group, 4, seed=2))
    assert folds_of(torch.tensor([5, 5, 9]), 4, seed=0).max() == 1, "two groups make no four folds"


def test_one_group_alone_leaves_nothing_to_train_on() -> None:
    one = clips(8, 0)
    one.group[:] = 7
    with pytest.raises(UserError, match=r"^data\.train: 8 labelled .* one group.*expected clips of two groups or more"):
        out_of_fold(one, one, SETTING, seed=0)


def test_scores_out_of_fold_know_nothing_of_their_own_labels() -> None:
    rng = torch.Generator().manual_seed(0)
    labels, present = torch.randint(3, (240,), generator=rng), torch.ones(240, 2, dtype=torch.bool)
    noise = Clips(torch.randn(240, 2, 128, generator=rng), present, labels, torch.arange(240) // 4)
    folded = out_of_fold(noise, noise, SETTING, seed=0)
    learnt = scored(train_heads(noise, noise, SETTING, seed=0), noise)
    assert folded.scores is not None and learnt.scores is not None
    assert accuracy(learnt.scores, labels.unsqueeze(1)) > 0.8, "heads can learn these labels by heart"
    assert accuracy(folded.scores, labels.unsqueeze(1)) < 0.5


def test_a_gate_turns_away_from_the_stream_that_is_spoiled_and_beats_the_mean() -> None:
    train, val, test = clips(400, 0), clips(200, 1), clips(400, 2)
    heads = train_heads(train, val, SETTING, seed=0)
    folded, val, test = out_of_fold(train, val, SETTING, seed=0), scored(heads, val), scored(heads, test)
    gate = train_gate("softmax_probabilities", NAMES, folded, val, SETTING, seed=0)
    mean = train_gate("average_probabilities", NAMES, folded, val, SETTING, seed=0)
    with torch.no_grad():
        gated, weights, _ = gate(test)
        plain = mean(test)[0]
    assert weights is not None
    loud = test.features[:, 0, 7] > 1.5
    assert float(weights[loud, 0].mean()) < 0.2 < 0.45 < float(weights[~loud, 0].mean())
    nll = [float(torch.nn.functional.cross_entropy(one, test.labels)) for one in (gated, plain)]
    assert nll[0] < nll[1] - 0.1
    alone = test.without(torch.tensor([False, True]))
    with torch.no_grad():
        left = gate(alone)[1]
    assert left is not None and torch.allclose(left, torch.tensor([[1.0, 0.0]]).expand_as(left))


def test_training_depends_on_its_seed_alone_and_leaves_the_callers_random_numbers() -> None:
    train, val = clips(80, 0), clips(40, 1)
    state = torch.random.get_rng_state()
    heads = [train_heads(train, val, SETTING, seed) for seed in (3, 3, 4)]
    assert torch.equal(state, torch.random.get_rng_state())
    one, two, other = (scored(each, val).scores for each in heads)
    assert one is not None and two is not None and other is not None
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_what_validation_liked_best_is_kept() -> None:
    train, val = clips(40, 0), clips(80, 1)
    wrong = replace(train, labels=(train.labels + torch.arange(40) % 3) % 3)  # the more is learnt, the worse
    val = scored(train_heads(train, val, SETTING, 0), val)
    folded = out_of_fold(wrong, val, SETTING, seed=0)
    gate = train_gate("concat", NAMES, folded, val, SETTING, seed=0)
    last = train_gate("concat", NAMES, folded, folded, SETTING, seed=0)  # selected on what it learns from
    with torch.no_grad():
        losses = [float(torch.nn.functional.cross_entropy(one(val)[0], val.labels)) for one in (gate, last)]
    assert losses[0] < losses[1]


def test_of_what_a_gate_is_trained_with_validation_keeps_the_best() -> None:
    train, val = clips(48, 0), clips(200, 1)
    folded, val = out_of_fold(train, val, SETTING, 0), scored(train_heads(train, val, SETTING, 0), val)

    def trained(name: str, **tried: tuple[float, ...]) -> tuple[Gate, float]:
        setting = replace(SETTING, study=SETTING.study.model_copy(update=tried))
        gate = train_gate(name, NAMES, folded, val, setting, seed=0)
        with torch.no_grad():
            return gate, float(torch.nn.functional.cross_entropy(gate(val)[0], val.labels))

    strengths = [(dropout, entropy) for dropout in (0.0, 0.5) for entropy in (0.0, 3.0)]
    each = {one: trained("softmax", dropout=one[:1], entropy=one[1:])[1] for one in strengths}
    gate, loss = trained("softmax", dropout=(0.0, 0.5), entropy=(0.0, 3.0))
    best = min(each, key=lambda one: each[one])
    assert len(set(each.values())) == 4, "each strength makes another gate"
    assert (gate.config.modality_dropout, gate.config.entropy) == best and loss == pytest.approx(each[best])
    plain, _ = trained("mean", dropout=(0.0,), entropy=(0.0, 3.0))
    assert plain.config.entropy == 0, "its weights do not learn: nothing to push"


def test_learned_tokens_and_biases_of_gates_do_not_decay() -> None:
    gate = Gate(FusionConfig(name="lowrank"), NAMES, dim=8, classes=3)
    decaying = decaying_parameters(gate)
    assert "head.linear.weight" in decaying and "fusion.ones" not in decaying
    assert decaying_parameters(gate.fusion) == {name.removeprefix("fusion.") for name in decaying} - {
        "head.linear.weight"
    }


def test_an_untrained_gate_has_weights_that_vary_and_mean_nothing() -> None:
    test = clips(400, 2)
    test = scored(train_heads(test, test, SETTING, 0), test)
    with torch.no_grad():
        _, weights, _ = frozen_random(NAMES, 8, SETTING, seed=0)(test)
    assert weights is not None and float(weights[:, 0].std()) > 0.05


def test_a_fusion_that_does_not_suit_is_refused_in_one_line() -> None:
    train = clips(40, 0)
    with pytest.raises(UserError, match="made for"):
        train_gate("flow_gate", NAMES, train, train, SETTING, seed=0)
    assert np.isfinite(train.features.numpy()).all()
