"""kNN and linear probe: golden values, learning from train alone, missing modalities, no peeking."""

from __future__ import annotations

import numpy as np
import pytest

from crossgate.evaluation.probes import STRENGTHS, Samples, knn, linear_probe


def samples(features, labels, group=None, known=None):
    n = len(labels)
    return Samples(
        np.asarray(features, dtype=np.float32),
        np.asarray(labels),
        np.arange(n) if group is None else np.asarray(group),
        np.ones(n, dtype=bool) if known is None else np.asarray(known),
    )


def blobs(n, seed, spread=1.0, classes=3, dim=6):
    draws = np.random.default_rng(seed)
    centres = 3 * np.random.default_rng(99).normal(size=(classes, dim))
    labels = draws.integers(classes, size=n)
    return samples(centres[labels] + spread * draws.normal(size=(n, dim)), labels, np.arange(n) // 4)


def slow_knn(train, test, classes, k):
    centre = train.features.astype(float).mean(axis=0)
    answers = []
    for x in test.features.astype(float) - centre:
        cosines = [x @ b / np.linalg.norm(x) / np.linalg.norm(b) for b in train.features.astype(float) - centre]
        votes = np.zeros(classes)
        for i in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]:
            votes[train.labels[i]] += np.exp(cosines[i] / 0.07)
        answers.append(votes / votes.sum())
    return np.array(answers)


@pytest.mark.parametrize("k", [1, 5, 1000])
def test_knn_equals_the_slow_loop(k):
    train, test = blobs(60, 1, spread=3), blobs(25, 2, spread=3)
    np.testing.assert_allclose(knn(train, test, 3, k, tile=7), slow_knn(train, test, 3, min(k, 60)), atol=1e-9)


def test_knn_does_not_see_a_large_common_direction():
    train, test = blobs(200, 1), blobs(50, 2)
    train.features += 1000
    test.features += 1000
    assert (knn(train, test, 3, 20).argmax(axis=1) == test.labels).mean() > 0.9


def test_clips_without_the_modality_get_the_training_frequencies():
    train, test = blobs(80, 1), blobs(20, 2)
    train.known[:30] = False
    train.features[:30] = np.nan
    test.known[:5] = False
    test.features[:5] = np.nan
    prior = np.bincount(train.labels, minlength=3) / 80
    for answer in (knn(train, test, 3, 5), linear_probe(train, test, 3, blobs(30, 3)).probabilities):
        np.testing.assert_allclose(answer[:5], np.tile(prior, (5, 1)))
        np.testing.assert_allclose(answer.sum(axis=1), 1)
        assert (answer[5:].argmax(axis=1) == test.labels[5:]).mean() > 0.8


def test_linear_probe_learns_what_is_linear_and_nothing_from_noise():
    train, val, test = blobs(200, 1), blobs(60, 2), blobs(100, 3)
    assert (linear_probe(train, test, 3, val).probabilities.argmax(axis=1) == test.labels).mean() > 0.9
    draws = np.random.default_rng(5)
    for one in (train, val, test):
        one.features = draws.normal(size=one.features.shape).astype(np.float32)
    probe = linear_probe(train, test, 3, val)
    assert probe.strength == min(STRENGTHS)  # noise asks for the strongest regularisation
    assert (probe.probabilities.argmax(axis=1) == test.labels).mean() < 0.5


def test_strength_is_chosen_on_validation_and_never_on_test():
    train, val, test = blobs(60, 1, spread=4), blobs(60, 2, spread=4), blobs(60, 3, spread=4)
    chosen = linear_probe(train, test, 3, val)
    test.labels[:] = 0  # whatever the test labels are, nothing changes
    again = linear_probe(train, test, 3, val)
    assert again.strength == chosen.strength
    np.testing.assert_array_equal(again.probabilities, chosen.probabilities)


def test_without_validation_groups_of_train_are_held_out():
    draws = np.random.default_rng(0)
    # the group's own direction gives its label away: only folds by group notice that it does not generalise
    group = np.arange(160) // 8
    labels = draws.integers(2, size=20)[group]
    train = samples(draws.normal(size=(20, 40))[group] + 0.01 * draws.normal(size=(160, 40)), labels, group)
    assert linear_probe(train, train, 2).strength == min(STRENGTHS)
    train.group = np.arange(160)  # siblings in both folds: the same features now look perfect
    assert linear_probe(train, train, 2).strength == max(STRENGTHS)


def test_a_class_without_training_clips_and_a_single_class():
    train, val, test = blobs(60, 1), blobs(30, 2), blobs(30, 3)
    keep = train.labels != 2
    train = samples(train.features[keep], train.labels[keep])
    answer = linear_probe(train, test, 4, val).probabilities
    assert answer.shape == (30, 4)
    assert (answer[:, 2:] == 0).all()
    train.labels[:] = 1
    assert (linear_probe(train, test, 4, val).probabilities.argmax(axis=1) == 1).all()


def test_nothing_to_learn_from():
    train = blobs(10, 1)
    train.known[:] = False
    with pytest.raises(ValueError, match="no training clip"):
        linear_probe(train, blobs(5, 2), 3)
    np.testing.assert_allclose(knn(train, blobs(5, 2), 3, 5)[0], np.bincount(train.labels, minlength=3) / 10)
