"""Sets that hold the truth, and batches for people to label: against closed forms, and a second way to compute them."""

import itertools

import numpy as np
import pytest
from scipy.stats import entropy

from bayeslora.analysis import (
    adaptive_scores,
    conformal_quantile,
    conformal_sets,
    conformal_threshold,
    select_batchbald,
)
from bayeslora.analysis.decisions import batchbald
from bayeslora.analysis.report.page import RunResults, SplitResults, report_html
from bayeslora.analysis.report.sets import set_measures
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


# --- APS, RAPS, intervals ---------------------------------------------------------------------------


def test_adaptive_scores_by_adding_up():
    random = np.random.default_rng(3)
    probs, uniform = random.dirichlet([1, 1, 1, 1], 20), random.random(20)
    for penalty in (0.0, 0.2):
        found = adaptive_scores(probs, penalty=penalty, free=2, uniform=uniform)
        for row, u, scores in zip(probs, uniform, found, strict=True):
            for label, p in enumerate(row):
                rank = 1 + (row > p).sum()
                expected = row[row > p].sum() + u * p + penalty * max(rank - 2, 0)
                assert scores[label] == pytest.approx(expected)


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_adaptive_sets_cover_exactly_k_of_n_plus_one(penalty):
    """As LAC's do: with drawn scores there are no ties, and each rank of the new example's is as likely."""
    random, calibration, hits = np.random.default_rng(4), 39, []
    for _ in range(4000):
        probs = random.dirichlet([2, 1, 1], calibration + 1)
        labels = (probs.cumsum(1) < random.random((calibration + 1, 1))).sum(1)
        scores = adaptive_scores(probs, penalty=penalty, uniform=random.random(calibration + 1))
        of_truth = scores[np.arange(calibration + 1), labels]
        hits.append(of_truth[-1] <= conformal_quantile(of_truth[:-1], 0.9))
    assert abs(np.mean(hits) - 0.9) < 4 * np.sqrt(0.09 / len(hits))


def test_intervals_cover_whatever_the_predicted_spread():
    """Standard deviations that are a third of what they should be: the quantile makes up for it."""
    random, hits = np.random.default_rng(5), []
    for _ in range(4000):
        spread = random.uniform(0.5, 2, size=40)
        scores = np.abs(random.normal(size=40) * spread) / (spread / 3)
        hits.append(scores[-1] <= conformal_quantile(scores[:-1], 0.9))
    assert abs(np.mean(hits) - 0.9) < 4 * np.sqrt(0.09 / len(hits))


def test_too_few_scores_for_a_coverage_leave_everything_in():
    assert conformal_quantile(np.arange(8), 0.9) == np.inf
    assert conformal_quantile(np.arange(9), 0.9) == 8


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_the_page_has_coverage_and_size_of_every_split(kind):
    random = np.random.default_rng(6)

    def split(size, wrong=1.0):
        if kind == "numbers":
            return SplitResults(wrong * random.normal(size=size), mean=np.zeros(size), std=np.ones(size))
        probs = random.dirichlet([0.5, 0.5, 0.5], size)
        labels = (probs.cumsum(1) < random.random((size, 1))).sum(1)
        return SplitResults(labels, (), probs, np.zeros(size), np.zeros(size))

    splits = {"test": split(400), "tweets": split(400, wrong=3.0)}
    names = ("a", "b", "c") if kind == "classes" else ()
    page = report_html([RunResults("run", {}, splits, names, calibration=split(400))])
    assert f"Conformal {'sets' if kind == 'classes' else 'intervals'}" in page
    assert "only as often as the table says" in page
    assert 'id="sets"' not in report_html([RunResults("run", {}, splits, names)])
    measures = {column.title: values.mean() for column, values in set_measures(split(4000), splits["test"])}
    coverages = [value for title, value in measures.items() if "coverage" in title]
    assert len(coverages) == (3 if kind == "classes" else 1)
    assert np.abs(np.array(coverages) - 0.9).max() < 4 * np.sqrt(0.09 / 400 + 0.09 / 4000)
    if kind == "numbers":
        shifted = set_measures(split(4000), splits["tweets"])[0][1].mean()
        assert shifted < 0.6  # of intervals for a third of the spread, 0.42


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: adaptive_scores([[0.5, 0.5]], penalty=-1.0),
        lambda: adaptive_scores([[0.5, 0.5]], uniform=[2.0]),
        lambda: conformal_quantile([np.nan]),
        lambda: conformal_quantile([1.0], 1.5),
    ],
)
def test_scores_that_do_not_fit_are_refused(wrong):
    with pytest.raises(InputError):
        wrong()
