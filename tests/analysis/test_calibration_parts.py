"""Calibration beyond one number: bins, Brier's parts, bootstrap bands; closed forms and other people's code."""

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binom, norm

from bayeslora.analysis import (
    bootstrap_interval,
    brier_decomposition,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    reliability_curve,
    sharpness,
    smooth_calibration_error,
)
from bayeslora.analysis.metrics.bins import bin_scores
from bayeslora.analysis.metrics.bootstrap import resample_counts
from bayeslora.errors import InputError

PROBS = np.array([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.3, 0.7]])
LABELS = np.array([0, 1, 1, 1])


def forecast(num_examples: int, num_classes: int, *, seed: int, temperature: float = 1.0):
    """Labels drawn from the softmax of some logits; the forecast is calibrated at temperature 1 only."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(num_examples, num_classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    powers = np.exp(logits / temperature)
    return powers / powers.sum(axis=1, keepdims=True), labels


# --- bins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "num_bins"), [(10, 5), (11, 4), (3, 8), (257, 15)])
def test_equal_mass_means_equal_numbers(size, num_bins):
    scores = np.random.default_rng(0).random(size)
    bins = bin_scores(scores, num_bins, "mass")
    assert len(bins.size) == min(size, num_bins)
    assert bins.size.sum() == size
    assert np.ptp(bins.size) <= 1
    assert (bins.edges[0], bins.edges[-1]) == (scores.min(), scores.max())


def test_equal_scores_share_a_bin_whatever_their_order():
    bins = bin_scores(np.array([0.9, 0.5, 0.9, 0.9, 0.7, 0.9]), 3, "mass")
    np.testing.assert_array_equal(bins.members, [1, 0, 1, 1, 0, 1])
    np.testing.assert_array_equal(bin_scores(np.full(4, 0.5), 3, "mass").size, [4])


def test_kind_of_bins_is_checked():
    with pytest.raises(InputError, match="binning must be one of width, mass, but is 'quantile'"):
        expected_calibration_error(PROBS, LABELS, binning="quantile")


# --- errors ---------------------------------------------------------------------------------------


def test_errors_by_hand():
    # two bins of equal mass over confidences 0.6, 0.7 | 0.8, 0.9, of which the first is wrong
    assert expected_calibration_error(PROBS, LABELS, num_bins=2, binning="mass") == pytest.approx(0.15)
    assert maximum_calibration_error(PROBS, LABELS, num_bins=2, binning="mass") == pytest.approx(0.15)
    assert maximum_calibration_error(PROBS, LABELS, num_bins=20) == pytest.approx(0.6)
    # one bin: mean P(class 1) is 0.55 and the class occurs in 0.75
    np.testing.assert_allclose(classwise_calibration_error(PROBS, LABELS, num_bins=1), [0.2, 0.2])


@pytest.mark.parametrize("num_bins", [1, 10, 15])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_errors_agree_with_torchmetrics(num_classes, num_bins):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchmetrics.functional.classification")
    probs, labels = forecast(500, num_classes, seed=2, temperature=0.6)
    theirs = functional.multiclass_calibration_error(
        torch.tensor(probs), torch.tensor(labels), num_classes=num_classes, n_bins=num_bins, norm="max"
    )
    assert maximum_calibration_error(probs, labels, num_bins=num_bins) == pytest.approx(float(theirs), abs=1e-6)
    per_class = [
        functional.binary_calibration_error(torch.tensor(column), torch.tensor(labels == index).int(), n_bins=num_bins)
        for index, column in enumerate(probs.T)
    ]
    ours = classwise_calibration_error(probs, labels, num_bins=num_bins)
    np.testing.assert_allclose(ours, [float(error) for error in per_class], atol=1e-6)


@pytest.mark.parametrize("error", [maximum_calibration_error, classwise_calibration_error, brier_decomposition])
@pytest.mark.parametrize("binning", ["width", "mass"])
def test_order_of_examples_does_not_matter(error, binning):
    probs, labels = forecast(257, 3, seed=3)
    probs = np.random.default_rng(0).multinomial(10, probs) / 10  # with many ties
    shuffled = np.random.default_rng(4).permutation(257)
    first, second = error(probs, labels, binning=binning), error(probs[shuffled], labels[shuffled], binning=binning)
    np.testing.assert_allclose(first, second, rtol=1e-12, atol=1e-15)


def test_sharpness_from_uniform_to_certain():
    assert sharpness(np.full((3, 4), 0.25)) == pytest.approx(0.25)
    assert sharpness(np.eye(3)) == 1.0
    # a forecast that is right about itself has the Brier score it expects: 1 - sharpness
    probs, labels = forecast(20_000, 3, seed=5)
    squares = np.square(probs - np.eye(3)[labels]).sum(axis=1)
    assert brier_score(probs, labels) == pytest.approx(1 - sharpness(probs), abs=4 * squares.std() / np.sqrt(20_000))


# --- Brier's parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("binning", ["width", "mass"])
@pytest.mark.parametrize("num_bins", [1, 4, 15])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_parts_add_up_exactly(num_classes, num_bins, binning):
    probs, labels = forecast(300, num_classes, seed=6, temperature=0.5)
    parts = brier_decomposition(probs, labels, num_bins=num_bins, binning=binning)
    assert parts.brier == pytest.approx(brier_score(probs, labels), rel=1e-12)
    assert min(parts.reliability, parts.resolution, parts.uncertainty, parts.within_bin_variance) >= 0


def test_murphys_three_terms_are_enough_where_forecasts_repeat():
    """Forecasts 0.2 (10 times, 1 event) and 0.6 (10 times, 8 events), by Murphy's formula by hand."""
    event = np.repeat([0.2, 0.6], 10)
    labels = np.repeat([1, 0, 1, 0], [1, 9, 8, 2])
    parts = brier_decomposition(np.stack([1 - event, event], axis=1), labels, num_bins=10)
    both = 2  # classes, each with the same terms
    assert parts.reliability == pytest.approx(both * (0.5 * 0.1**2 + 0.5 * 0.2**2))
    assert parts.resolution == pytest.approx(both * 0.35**2)
    assert parts.uncertainty == pytest.approx(both * 0.45 * 0.55)
    assert (parts.within_bin_variance, parts.within_bin_covariance) == (pytest.approx(0), pytest.approx(0))


def test_parts_tell_what_is_wrong():
    calibrated, labels = forecast(3000, 3, seed=7)
    overconfident, _ = forecast(3000, 3, seed=7, temperature=0.3)
    useless = np.full((3000, 3), np.bincount(labels) / 3000)
    assert brier_decomposition(overconfident, labels).reliability > 10 * brier_decomposition(calibrated, labels)[0]
    assert brier_decomposition(useless, labels)[:3] == pytest.approx((0, 0, brier_score(useless, labels)), abs=1e-12)
    assert brier_decomposition(calibrated, labels).resolution > 0.1


# --- bootstrap ------------------------------------------------------------------------------------


def test_bootstrap_band_is_the_binomials():
    """With one bin, the accuracy of a resampled set is Binomial(n, accuracy) / n."""
    probs, labels = forecast(200, 3, seed=8)
    curve = reliability_curve(probs, labels, num_bins=1, interval="bootstrap", num_resamples=4000)
    exact = binom(200, curve.accuracy[0]).ppf([0.025, 0.975]) / 200
    np.testing.assert_allclose([curve.lower[0], curve.upper[0]], exact, atol=1.5 / 200)


def test_bootstrap_band_covers_the_truth_as_often_as_it_says():
    """Of 200 sets of 300 calibrated examples, the 90 % band of a well-filled bin holds the confidence."""
    hits = []
    for seed in range(200):
        probs, labels = forecast(300, 3, seed=100 + seed)
        band = reliability_curve(probs, labels, num_bins=2, level=0.9, interval="bootstrap", num_resamples=200)
        hits.append(band.lower[1] <= band.confidence[1] <= band.upper[1])
    deviation = np.sqrt(0.9 * 0.1 / 200)
    assert abs(np.mean(hits) - 0.9) < 4 * deviation


def test_bootstrap_band_is_of_the_bin_that_was_drawn():
    """Where all answers are right (or wrong) they are so in every resampled set, however many of them it has."""
    probs = np.repeat([[0.9, 0.1], [0.6, 0.4]], 6, axis=0)
    curve = reliability_curve(probs, np.repeat([0, 1], 6), num_bins=4, interval="bootstrap")
    np.testing.assert_array_equal([curve.lower[2:], curve.upper[2:]], [[0, 1], [0, 1]])


def test_empty_bins_have_no_band_and_the_seed_decides():
    curve = reliability_curve(PROBS, LABELS, num_bins=4, interval="bootstrap", seed=1)
    np.testing.assert_array_equal(np.isnan(curve.lower), [True, True, False, False])
    again = reliability_curve(PROBS, LABELS, num_bins=4, interval="bootstrap", seed=1)
    np.testing.assert_array_equal(curve, again)
    with pytest.raises(InputError, match="interval must be 'exact' or 'bootstrap', but is 'wald'"):
        reliability_curve(PROBS, LABELS, interval="wald")


def test_interval_of_a_mean_is_that_of_the_normal():
    values = np.random.default_rng(9).normal(size=400)
    found = bootstrap_interval(np.mean, values, num_resamples=4000)
    assert found.estimate == values.mean()
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose([found.lower, found.upper], values.mean() + np.array([-half, half]), atol=0.1 * half)


@pytest.mark.parametrize("size", [20, 100, 400])
def test_an_interval_holds_its_estimate_where_the_statistic_is_biased(size):
    """The calibration error of calibrated probabilities: on resampled sets it is larger than on the examples."""
    rng = np.random.default_rng(size)
    for _ in range(20):
        chance = rng.uniform(0.5, 1, size)
        probs, labels = np.stack([chance, 1 - chance], 1), (rng.random(size) > chance).astype(int)
        found = bootstrap_interval(expected_calibration_error, probs, labels, num_resamples=100)
        assert found.lower <= found.estimate <= found.upper
        assert found.lower < found.upper


def test_a_biased_statistic_is_corrected():
    """The largest of many exponentials falls short on every resampled set; percentiles would lie below it."""
    values = np.random.default_rng(3).exponential(size=50)
    found = bootstrap_interval(lambda x: x.var() + 5 / len(np.unique(x)), values)
    resampled = np.random.default_rng(0)
    plain = [(lambda x: x.var() + 5 / len(np.unique(x)))(values[resampled.integers(50, size=50)]) for _ in range(1000)]
    assert found.upper < np.quantile(plain, 0.975)
    assert found.lower < np.quantile(plain, 0.025)


def test_arrays_are_resampled_together():
    first = np.arange(50.0)
    assert bootstrap_interval(lambda a, b: np.abs(a - b).max(), first, first) == (0, 0, 0)


def test_undefined_resamples_are_left_out():
    found = bootstrap_interval(lambda x: np.nan if x.all() else x.mean(), np.array([1, 1, 1, 0]), num_resamples=500)
    assert 0 <= found.lower < 0.75 <= found.upper < 1
    assert np.isnan(bootstrap_interval(lambda x: np.nan, np.ones(3)).upper)


def test_resample_counts_add_up():
    parts = list(resample_counts(2**21, 5, seed=0)())
    assert [part.shape for part in parts] == [(2, 2**21), (2, 2**21), (1, 2**21)]
    assert {int(total) for part in parts for total in part.sum(axis=1)} == {2**21}


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ((), {}, "shapes: none"),
        (([],), {}, r"shapes: \(0,\)"),
        (([1, 2], [1]), {}, r"one row per example, equally many and at least one; shapes: \(2,\), \(1,\)"),
        (([1, 2],), {"num_resamples": 0}, "num_resamples must be an integer of at least 1, but is 0"),
        (([1, 2],), {"level": 95}, "level must lie between 0 and 1.* is 95"),
    ],
)
def test_wrong_input_is_named(arrays, options, message):
    with pytest.raises(InputError, match=message):
        bootstrap_interval(np.mean, *arrays, **options)


# --- smooth calibration error ---------------------------------------------------------------------


def smoothed_by_quadrature(probs, labels, width):
    """The definition, written out: images of the kernel beyond both ends, integrated over 20001 points."""
    confidence, right = probs.max(1), probs.argmax(1) == labels
    t = np.linspace(0, 1, 20_001)[:, None]
    images = [sign * confidence + 2 * k for sign in (1, -1) for k in range(-3, 4)]
    kernel = sum(norm.pdf(t, image, width) for image in images)
    return np.trapezoid(np.abs((kernel * (right - confidence)).mean(1)), t[:, 0])


@pytest.mark.parametrize(("power", "classes"), [(1.0, 2), (2.5, 2), (0.4, 4)])
def test_smooth_error_is_the_width_that_it_has_at_that_width(power, classes):
    rng = np.random.default_rng(classes)
    odds = rng.dirichlet(np.ones(classes), size=60)
    labels = (odds.cumsum(1) < rng.random((60, 1))).sum(1)
    probs = odds**power / (odds**power).sum(1, keepdims=True)
    found = smooth_calibration_error(probs, labels)
    expected = brentq(lambda width: smoothed_by_quadrature(probs, labels, width) - width, 1e-3, 1, xtol=1e-6)
    assert found == pytest.approx(expected, abs=4e-4)  # of the halvings, and of cells of 1e-3


def test_smooth_error_moves_little_where_bins_jump():
    """At an edge of the bins, right answers to its left and wrong ones to its right, or all on one side."""
    labels = np.repeat([0, 1], 50)
    apart, together = (
        np.stack([confidence, 1 - confidence], 1)
        for confidence in (np.repeat([0.6 - 1e-6, 0.6 + 1e-6], 50), np.full(100, 0.6 + 1e-6))
    )
    jump = expected_calibration_error(apart, labels) - expected_calibration_error(together, labels)
    assert jump == pytest.approx(0.4, abs=1e-5)
    assert smooth_calibration_error(apart, labels) == pytest.approx(
        smooth_calibration_error(together, labels), abs=1e-5
    )


def test_smooth_error_of_one_gap_is_the_gap():
    probs = np.repeat([[1.0, 0.0]], 10, axis=0)  # at the end of the grid
    assert smooth_calibration_error(probs, np.repeat([0, 1], [7, 3])) == pytest.approx(0.3, abs=3e-4)
