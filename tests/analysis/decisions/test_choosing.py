"""Sets that hold the truth, and batches for people to label: against closed forms, and a second way to compute them."""

import itertools

import numpy as np
import pytest
from scipy.stats import entropy

from bayeslora.analysis import conformal_sets, conformal_threshold, select_batchbald
from bayeslora.analysis.decisions import batchbald
from bayeslora.errors import InputError


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_coverage_is_exactly_k_of_n_plus_one(coverage):
    """Of exchangeable examples each rank is as likely: the truth is in the set with probability k / (n + 1)."""
    random, calibration, hits = np.random.default_rng(0), 39, []
    for _ in range(4000):
        probs = random.dirichlet([2, 1, 1], calibration + 1)
        labels = np.array([random.choice(3, p=row) for row in probs])
        chosen = probs[np.arange(calibration + 1), labels]
        threshold = conformal_threshold(chosen[:-1], coverage)
        hits.append(conformal_sets(probs[-1:], threshold)[0, labels[-1]])
    exact = np.ceil(round(coverage * (calibration + 1), 9)) / (calibration + 1)
    error = np.sqrt(exact * (1 - exact) / len(hits))
    assert abs(np.mean(hits) - exact) < 4 * error


def test_too_few_examples_for_a_coverage_leave_every_label_in():
    assert conformal_threshold(np.full(9, 0.9), 0.9) == 0.9  # 9 of 10
    assert conformal_threshold(np.full(8, 0.9), 0.9) == 0.0
    assert conformal_sets([[0.999, 0.001]], 0.0).all()


@pytest.mark.parametrize(("probs", "coverage"), [([], 0.9), ([0.5, 1.5], 0.9), ([[0.5]], 0.9), ([0.5], 1.0)])
def test_what_is_no_calibration_is_refused(probs, coverage):
    with pytest.raises(InputError):
        conformal_threshold(probs, coverage)


def pool(draws=5, examples=7, classes=3, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(classes, 0.4), (draws, examples))


def joint_information(probs):
    """I(labels; draw) of all examples together, configuration by configuration."""
    _, examples, classes = probs.shape
    joint = [
        np.prod([probs[:, i, label] for i, label in enumerate(labels)], axis=0)
        for labels in itertools.product(range(classes), repeat=examples)
    ]
    return entropy(np.mean(joint, axis=1)) - entropy(probs, axis=-1).mean(0).sum()


def test_greedy_gains_are_those_of_the_definition():
    probs = pool()
    found = select_batchbald(probs, 4)
    taken = []
    for index, gain in zip(found.indices, found.gains, strict=True):
        of_all = [joint_information(probs[:, [*taken, i]]) if i not in taken else -1 for i in range(probs.shape[1])]
        assert index == np.argmax(of_all)
        before = joint_information(probs[:, taken]) if taken else 0
        np.testing.assert_allclose(gain, of_all[index] - before, atol=1e-12)
        taken.append(int(index))


def test_drawn_configurations_estimate_the_same(monkeypatch):
    """Twelve labels of three classes: summed over all of them, and drawn."""
    probs = pool(draws=4, examples=12)
    drawn = select_batchbald(probs, 12)
    monkeypatch.setattr(batchbald, "MOST_CONFIGURATIONS", 3**12)
    exact = select_batchbald(probs, 12)
    assert drawn.indices[:7].tolist() == exact.indices[:7].tolist()  # 3^7 are still summed
    np.testing.assert_allclose(drawn.gains.sum(), exact.gains.sum(), atol=0.03)  # log 4 at most
    assert exact.gains.sum() <= np.log(4)


def test_copies_are_not_taken_twice():
    one, other = pool(examples=2).transpose(1, 0, 2)
    copies = np.stack([one, one, one, other], axis=1)
    assert set(select_batchbald(copies, 2).indices.tolist()) & {3} == {3}


def test_counts_out_of_range():
    with pytest.raises(InputError, match="between 1 and the number of examples, 7, but is 8"):
        select_batchbald(pool(), 8)
