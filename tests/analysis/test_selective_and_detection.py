"""Risk against coverage, detection of foreign inputs, and agreement with people: by hand and by other people's code."""

from itertools import permutations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, spearmanr

from bayeslora.analysis import (
    area_under_generalized_risk_coverage,
    area_under_risk_coverage,
    detection_curve,
    detection_scores,
    excess_area_under_risk_coverage,
    rank_correlation,
    risk_coverage,
    vote_entropy,
)
from bayeslora.errors import InputError

# --- risk and coverage ----------------------------------------------------------------------------


def test_curve_by_hand():
    curve = risk_coverage([0.3, 0.1, 0.4, 0.2], [True, False, False, True])
    np.testing.assert_allclose(curve.coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(curve.risk, [0, 1 / 2, 2 / 3, 2 / 4])
    assert area_under_risk_coverage([0.3, 0.1, 0.4, 0.2], [1, 0, 0, 1]) == pytest.approx((1 / 2 + 2 / 3 + 1 / 2) / 4)


def test_ties_are_the_mean_over_their_orders():
    uncertainty, wrong = np.array([0.5, 0.1, 0.5, 0.5]), np.array([1, 0, 0, 1])
    tied = np.flatnonzero(uncertainty == 0.5)
    orders = [[1, *order] for order in permutations(tied)]
    by_order = [wrong[order].cumsum() / np.arange(1, 5) for order in orders]
    np.testing.assert_allclose(risk_coverage(uncertainty, wrong).risk, np.mean(by_order, axis=0))


def test_area_from_the_best_order_to_the_worst():
    wrong = np.repeat([0, 1], [60, 40])
    assert excess_area_under_risk_coverage(wrong, wrong) == 0
    random = [area_under_risk_coverage(np.random.default_rng(s).random(100), wrong) for s in range(200)]
    standard_error = np.std(random) / np.sqrt(200)
    assert np.mean(random) == pytest.approx(0.4, abs=4 * standard_error)  # a useless order errs at its rate everywhere
    assert area_under_risk_coverage(np.zeros(100), wrong) == pytest.approx(0.4)
    assert area_under_risk_coverage(-wrong, wrong) > 0.6 > area_under_risk_coverage(wrong, wrong)


def test_excess_is_measured_from_the_exact_optimum():
    """n examples of which m are wrong: the best curve is 0 up to n - m, then (k - n + m) / k."""
    n, m = 50, 15
    rng = np.random.default_rng(1)
    wrong, uncertainty = rng.permutation(np.arange(n) < m), rng.random(n)
    k = np.arange(1, n + 1)
    best = np.maximum(0, k - n + m) / k
    expected = area_under_risk_coverage(uncertainty, wrong) - best.mean()
    assert excess_area_under_risk_coverage(uncertainty, wrong) == pytest.approx(expected)


def test_full_coverage_is_the_error_rate_whatever_the_order_of_the_data():
    rng = np.random.default_rng(2)
    uncertainty, wrong = rng.integers(5, size=80) / 5, rng.random(80) < 0.3
    curve = risk_coverage(uncertainty, wrong)
    assert curve.risk[-1] == pytest.approx(wrong.mean())
    shuffled = rng.permutation(80)
    np.testing.assert_allclose(risk_coverage(uncertainty[shuffled], wrong[shuffled]).risk, curve.risk)


@pytest.mark.parametrize(
    ("uncertainty", "wrong", "message"),
    [
        ([[0.1]], [0], r"uncertainty must have shape \(examples,\), but has shape \(1, 1\)"),
        ([], [], "uncertainty is empty"),
        ([0.1, np.nan], [0, 1], "uncertainty holds NaN"),
        ([0.1, 0.2], [0], r"wrong must have shape \(2,\), but has shape \(1,\)"),
        ([0.1], [2], "wrong must hold booleans or losses between 0 and 1"),
    ],
)
def test_wrong_risk_is_named(uncertainty, wrong, message):
    with pytest.raises(InputError, match=message):
        risk_coverage(uncertainty, wrong)


# --- detection ------------------------------------------------------------------------------------


def test_detection_by_hand():
    perfect = detection_scores([0.1, 0.2, 0.3], [0.4, 0.5])
    assert perfect == (1, 1, 0)
    backwards = detection_scores([0.4, 0.5], [0.1, 0.2])
    assert (backwards.auroc, backwards.fpr95) == (0, 1)
    blind = detection_scores([0.3] * 6, [0.3] * 2)
    assert blind == pytest.approx((0.5, 0.25, 1))


def test_passing_share_by_hand():
    inside = np.arange(20) / 20  # the threshold that lets 19 of 20 pass lies at 0.9
    outside = [0.4, 0.89, 0.92, 0.99]
    assert detection_scores(inside, outside).fpr95 == 0.5
    assert detection_scores(inside, outside, passing=0.5).fpr95 == 0.25  # ten of twenty are above 0.45


@pytest.mark.parametrize("decimals", [1, 8])
def test_areas_agree_with_torchmetrics_and_mann_whitney(decimals):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchmetrics.functional.classification")
    rng = np.random.default_rng(3)
    inside, outside = rng.beta(2, 4, 300).round(decimals), rng.beta(3, 3, 120).round(decimals)
    ours = detection_scores(inside, outside)
    assert ours.auroc == pytest.approx(mannwhitneyu(outside, inside).statistic / (300 * 120))
    scores = torch.tensor(np.concatenate([inside, outside]))
    foreign = torch.tensor(np.repeat([0, 1], [300, 120]))
    assert ours.auroc == pytest.approx(float(functional.binary_auroc(scores, foreign)), abs=1e-6)
    assert ours.aupr == pytest.approx(float(functional.binary_average_precision(scores, foreign)), abs=1e-6)


def test_curve_is_the_shares_above_each_threshold():
    rng = np.random.default_rng(4)
    inside, outside = rng.random(30), rng.random(20) + 0.3
    curve = detection_curve(inside, outside)
    assert (curve.flagged_inside[0], curve.flagged_outside[0]) == (0, 0)
    assert (curve.flagged_inside[-1], curve.flagged_outside[-1]) == (1, 1)
    thresholds = np.sort(np.concatenate([inside, outside]))[::-1]
    np.testing.assert_allclose(curve.flagged_inside[1:], [(inside >= t).mean() for t in thresholds])
    np.testing.assert_allclose(curve.flagged_outside[1:], [(outside >= t).mean() for t in thresholds])


def test_wrong_detection_is_named():
    with pytest.raises(InputError, match="outside is empty"):
        detection_scores([0.1], [])
    with pytest.raises(InputError, match="passing must lie between 0 and 1"):
        detection_scores([0.1], [0.2], passing=95)


# --- people ---------------------------------------------------------------------------------------


def test_votes():
    np.testing.assert_allclose(vote_entropy([0, 0.5, 1, 0.25]), [0, np.log(2), 0, 0.5623351446])
    with pytest.raises(InputError, match="share must lie between 0 and 1"):
        vote_entropy([1.2])


def test_rank_correlation_and_its_interval():
    """For a bivariate normal, Fisher's interval of Spearman's correlation (Bonett and Wright 2000)."""
    rng = np.random.default_rng(5)
    first = rng.normal(size=600)
    second = first + rng.normal(size=600)
    tied = second.round()
    assert rank_correlation(first, tied, num_resamples=1).estimate == pytest.approx(spearmanr(first, tied).statistic)
    found = rank_correlation(first, np.exp(second))
    assert found.estimate == pytest.approx(spearmanr(first, second).statistic)
    half = 1.96 * np.sqrt((1 + found.estimate**2 / 2) / 597)
    fisher = np.tanh(np.arctanh(found.estimate) + np.array([-half, half]))
    np.testing.assert_allclose([found.lower, found.upper], fisher, atol=0.02)


def test_several_runs_have_the_mean_of_their_correlations():
    rng = np.random.default_rng(6)
    people = rng.random(100)
    runs = people[:, None] + rng.normal(size=(100, 3)) * [0.2, 0.5, 2]
    found = rank_correlation(runs, people, num_resamples=300)
    one_by_one = [rank_correlation(run, people, num_resamples=300) for run in runs.T]
    assert found.estimate == pytest.approx(np.mean([run.estimate for run in one_by_one]))
    assert found.lower < found.estimate < found.upper


def test_nothing_correlates_with_a_constant():
    assert np.isnan(rank_correlation(np.ones(20), np.arange(20))).all()
    with pytest.raises(InputError, match=r"uncertainty must have shape \(2,\), but has shape \(3,\)"):
        rank_correlation([1, 2, 3], [1, 2])


# --- generalized risk -----------------------------------------------------------------------------


def test_augrc_is_accuracy_and_auroc():
    """The closed form with the ranks of other people's code, ties included."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        wrong = rng.random(50) < 0.3
        uncertainty = np.round(rng.normal(size=50) + wrong, seed % 3)
        auroc = mannwhitneyu(uncertainty[wrong], uncertainty[~wrong]).statistic / (wrong.sum() * (~wrong).sum())
        acc = 1 - wrong.mean()
        expected = acc * (1 - acc) * (1 - auroc) + (1 - acc) ** 2 / 2
        assert area_under_generalized_risk_coverage(uncertainty, wrong) == pytest.approx(expected)


def test_augrc_is_the_area_under_risk_times_coverage():
    rng = np.random.default_rng(0)
    uncertainty, losses = rng.normal(size=40), rng.random(40)
    curve = risk_coverage(uncertainty, losses)
    area = np.trapezoid(np.append(0, curve.risk * curve.coverage), np.append(0, curve.coverage))
    assert area_under_generalized_risk_coverage(uncertainty, losses) == pytest.approx(area)
