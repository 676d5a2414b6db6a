"""Scores of predicted numbers against numerical integrals, simulated forecasts, and what minimises them."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from bayeslora.analysis import (
    continuous_ranked_probability_score,
    interval_coverage,
    interval_score,
    plot_interval_coverage,
    regression_summary,
)
from bayeslora.analysis.report.page import RunResults, SplitResults, report_html
from bayeslora.errors import InputError
from bayeslora.prediction import NumberPrediction


@pytest.mark.parametrize("draws", [1, 2, 7])
def test_crps_is_the_integral_of_the_squared_gap_of_distribution_functions(draws):
    rng = np.random.default_rng(draws)
    means, labels, sigma = rng.normal(size=(draws, 5)), 2 * rng.normal(size=5), 0.6

    def gap(t, of, truth):
        return (norm.cdf((t - of) / sigma).mean() - (t >= truth)) ** 2

    whole = [
        sum(quad(gap, *ends, args=(of, truth), epsabs=1e-10)[0] for ends in ((-12, truth), (truth, 12)))
        for of, truth in zip(means.T, labels, strict=True)
    ]
    assert continuous_ranked_probability_score(labels, means, sigma) == pytest.approx(np.mean(whole), abs=1e-8)


def test_crps_of_a_sure_prediction_is_the_absolute_error():
    assert continuous_ranked_probability_score([1.0, -2.0], [0.0, 0.0], 1e-9) == pytest.approx(1.5, abs=1e-8)


def test_the_true_scale_has_the_lowest_scores():
    """In expectation; over 20000 labels a wrong scale by a third is found by many standard errors."""
    labels = np.random.default_rng(0).normal(size=20_000)
    for name in ("crps", "interval_score"):
        right, *wrong = (
            regression_summary(labels, np.zeros(20_000), np.full(20_000, scale))[name] for scale in (1.0, 0.75, 1.33)
        )
        assert right < min(wrong)


def test_the_interval_score_by_hand():
    assert interval_score([5.0], [1.0], [2.0], level=0.5) == 1 + 4 * 3.0
    assert interval_score([0.0], [1.0], [2.0], level=0.8) == pytest.approx(1 + 10 * 1.0)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, (0.5, 0.9)), (0.5, (0.264, 0.589)), (2.0, (0.823, 0.999))])
def test_coverage_of_normal_labels_is_that_of_the_normal(scale, expected):
    """Its own 95 % interval is four standard errors wide, so twice as far is 8e-5 of all cases."""
    labels = np.random.default_rng(1).normal(size=4000)
    found = interval_coverage(labels, np.zeros(4000), np.full(4000, scale), levels=[0.5, 0.9])
    deviation = np.sqrt(np.array(expected) * (1 - np.array(expected)) / 4000)
    assert (np.abs(found.coverage - expected) <= 4 * deviation + 1e-3).all()
    assert (found.lower < found.coverage).all()
    assert (found.coverage < found.upper).all()


def test_a_predictions_scores_are_those_of_its_mixture():
    class Heights:
        def score(self, mean, labels):
            return {"rmse": 1.0}

    means, labels = np.array([[-1.0, 0.0], [1.0, 0.0]]), np.array([0.5, 0.5])
    whole = NumberPrediction(labels, means.mean(0), np.sqrt(means.var(0) + 0.25), 0.5, means)
    scores = whole.scores(Heights())
    assert scores["crps"] == continuous_ranked_probability_score(labels, means, 0.5)
    density = (norm.pdf(labels, means[0], 0.5) + norm.pdf(labels, means[1], 0.5)) / 2
    assert scores["nll"] == pytest.approx(-np.log(density).mean())
    normal = NumberPrediction(labels, whole.mean, whole.std, 0.5).scores(Heights())
    assert normal["crps"] == continuous_ranked_probability_score(labels, whole.mean, whole.std)
    assert "nll" not in normal


def test_the_picture_and_the_page_have_them():
    labels = np.random.default_rng(2).normal(size=200)
    mean, std = np.zeros(200), np.ones(200)
    ax = plot_interval_coverage({"narrow": (labels, mean, std / 2), "right": (labels, mean, std)})
    narrow, right = (line.get_ydata() for line in ax.lines[1:])
    assert (narrow <= right).all()
    assert abs(right[49] - 50) < 15
    plt.close(ax.figure)
    page = report_html([RunResults("run", {}, {"test": SplitResults(labels, mean=mean, std=std)})])
    assert "labels within intervals of each level" in page
    assert f"{regression_summary(labels, mean, std)['interval_score']:.3f}" in page


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: continuous_ranked_probability_score([0.0], [[0.0, 1.0]], 1.0), "shape"),
        (lambda: continuous_ranked_probability_score([0.0], [0.0], 0.0), "positive"),
        (lambda: interval_score([0.0], [1.0], [0.0]), "lower end"),
        (lambda: interval_coverage([0.0], [0.0], [1.0], levels=[1.0]), "between 0 and 1"),
        (lambda: plot_interval_coverage({}), "empty"),
    ],
)
def test_what_does_not_fit_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()
