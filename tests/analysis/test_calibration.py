"""Calibration metrics: closed forms, other people's code, and a twin that is wrong on purpose."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss, log_loss

from bayeslora.analysis import (
    accuracy,
    area_under_generalized_risk_coverage,
    area_under_risk_coverage,
    brier_score,
    calibration_summary,
    classwise_calibration_error,
    expected_calibration_error,
    negative_log_likelihood,
    overconfidence,
    predictive_entropy,
    reliability_curve,
    smooth_calibration_error,
)
from bayeslora.errors import InputError

METRICS = [accuracy, negative_log_likelihood, brier_score, expected_calibration_error]
PROBS = np.array([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.3, 0.7]])
LABELS = np.array([0, 1, 1, 1])


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def forecast(num_examples: int, num_classes: int, *, seed: int, temperature: float = 1.0):
    """Labels drawn from the softmax of some logits; the forecast is calibrated at temperature 1 only."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(num_examples, num_classes))
    thresholds = softmax(logits).cumsum(axis=1)
    labels = (rng.random((num_examples, 1)) > thresholds[:, :-1]).sum(axis=1)
    return softmax(logits / temperature), labels


def test_closed_form():
    assert accuracy(PROBS, LABELS) == 0.75
    assert negative_log_likelihood(PROBS, LABELS) == pytest.approx(-np.log([0.8, 0.4, 0.9, 0.7]).mean())
    assert brier_score(PROBS, LABELS) == pytest.approx(2 * np.mean([0.04, 0.36, 0.01, 0.09]))
    # Four bins of one example each: gaps 0.2, 0.6, 0.1 and 0.3.
    assert expected_calibration_error(PROBS, LABELS, num_bins=20) == pytest.approx(1.2 / 4)
    # One bin: mean confidence 0.75, accuracy 0.75.
    assert expected_calibration_error(PROBS, LABELS, num_bins=1) == pytest.approx(0.0, abs=1e-15)


def test_perfect_and_hopeless_forecasts_reach_the_ends_of_the_ranges():
    certain = np.eye(3)[[0, 1, 2]]
    right, wrong = np.array([0, 1, 2]), np.array([1, 2, 0])
    perfect = {"accuracy": 1.0, "nll": 0.0, "ece": 0.0, "brier": 0.0, "aurc": 0.0, "overconfidence": 0.0}
    perfect |= {"smooth_ece": 0.0, "classwise_ece": 0.0, "augrc": 0.0}
    assert calibration_summary(certain, right) == perfect
    hopeless = calibration_summary(certain, wrong)
    assert (hopeless["accuracy"], hopeless["ece"], hopeless["brier"]) == (0.0, 1.0, 2.0)
    assert (hopeless["aurc"], hopeless["overconfidence"], hopeless["augrc"]) == (1.0, 1.0, 0.5)
    assert hopeless["smooth_ece"] == pytest.approx(1.0, abs=2e-4)


def test_likelihood_is_clipped_only_at_the_smallest_float():
    assert negative_log_likelihood([[1.0, 1e-300]], [1]) == pytest.approx(300 * np.log(10))
    assert negative_log_likelihood([[1.0, 0.0]], [1]) == pytest.approx(1074 * np.log(2))


def test_overconfidence_has_a_sign():
    sure, unsure = [[0.9, 0.1], [0.8, 0.2]], [[0.6, 0.4], [0.55, 0.45]]
    assert overconfidence(sure, [0, 1]) == pytest.approx(0.85 - 0.5)
    assert overconfidence(unsure, [0, 0]) == pytest.approx(0.575 - 1.0)


def test_summary_holds_every_metric():
    probs, labels = forecast(200, 4, seed=0)
    assert calibration_summary(probs, labels) == {
        "accuracy": accuracy(probs, labels),
        "nll": negative_log_likelihood(probs, labels),
        "ece": expected_calibration_error(probs, labels, num_bins=15),
        "brier": brier_score(probs, labels),
        "aurc": area_under_risk_coverage(predictive_entropy(probs), probs.argmax(1) != labels),
        "overconfidence": overconfidence(probs, labels),
        "smooth_ece": smooth_calibration_error(probs, labels),
        "classwise_ece": classwise_calibration_error(probs, labels).mean(),
        "augrc": area_under_generalized_risk_coverage(predictive_entropy(probs), probs.argmax(1) != labels),
    }


@pytest.mark.parametrize("num_classes", [2, 5])
def test_agreement_with_scikit_learn(num_classes):
    probs, labels = forecast(300, num_classes, seed=1)
    classes = np.arange(num_classes)
    assert negative_log_likelihood(probs, labels) == pytest.approx(log_loss(labels, probs, labels=classes))
    theirs = brier_score_loss(labels, probs, labels=classes, scale_by_half=False)
    assert brier_score(probs, labels) == pytest.approx(theirs)


@pytest.mark.parametrize("num_bins", [1, 10, 15, 40])
@pytest.mark.parametrize("num_classes", [2, 5])
def test_calibration_error_agrees_with_torchmetrics(num_classes, num_bins):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchmetrics.functional.classification")
    probs, labels = forecast(500, num_classes, seed=2, temperature=0.6)
    theirs = functional.multiclass_calibration_error(
        torch.tensor(probs), torch.tensor(labels), num_classes=num_classes, n_bins=num_bins, norm="l1"
    )
    ours = expected_calibration_error(probs, labels, num_bins=num_bins)
    assert ours == pytest.approx(float(theirs), abs=1e-6)  # torchmetrics works in float32


@pytest.mark.parametrize("metric", METRICS)
def test_order_of_examples_and_of_classes_does_not_matter(metric):
    probs, labels = forecast(257, 4, seed=3)
    examples = np.random.default_rng(4).permutation(257)
    classes = np.array([2, 0, 3, 1])
    expected = metric(probs, labels)
    assert metric(probs[examples], labels[examples]) == pytest.approx(expected, rel=1e-12)
    assert metric(probs[:, classes], np.argsort(classes)[labels]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("batch_size", [7, 32, 96])
def test_whole_set_for_any_batch_size(metric, batch_size):
    """Predicting in batches changes nothing; averaging the batches' values would (a short last batch)."""
    probs, labels = forecast(100, 3, seed=5)
    starts = range(0, 100, batch_size)
    batches = [(probs[i : i + batch_size], labels[i : i + batch_size]) for i in starts]
    gathered = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    whole = metric(probs, labels)
    assert metric(*gathered) == whole
    assert np.mean([metric(*batch) for batch in batches]) != pytest.approx(whole, rel=1e-3)


def test_mean_of_batches_overstates_calibration_error():
    probs, labels = forecast(1000, 3, seed=6)
    per_batch = [expected_calibration_error(probs[i : i + 20], labels[i : i + 20]) for i in range(0, 1000, 20)]
    assert np.mean(per_batch) > 3 * expected_calibration_error(probs, labels)


def chance_bound(probs, labels, *, num_bins: int = 15) -> float:
    """What calibration error a calibrated forecast stays below: mean plus four standard errors.

    A bin of n examples has ``E|acc - conf| <= 1 / (2 sqrt(n))`` and a variance of at most ``1 / (4 n)``.
    """
    count = reliability_curve(probs, labels, num_bins=num_bins).count
    return (np.sqrt(count).sum() + 4 * np.sqrt(count.sum())) / (2 * count.sum())


def bins_off_the_diagonal(probs, labels) -> int:
    """Bins whose band excludes their confidence; at level 1 - 1e-5, one false alarm in 10,000 curves."""
    curve = reliability_curve(probs, labels, level=1 - 1e-5)
    return int(((curve.confidence < curve.lower) | (curve.confidence > curve.upper)).sum())


@pytest.mark.parametrize("num_classes", [2, 4])
def test_calibrated_forecast_passes(num_classes):
    probs, labels = forecast(2000, num_classes, seed=7)
    assert expected_calibration_error(probs, labels) < chance_bound(probs, labels)
    assert bins_off_the_diagonal(probs, labels) == 0


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("temperature", [0.4, 2.5])
def test_miscalibrated_twin_is_flagged(num_classes, temperature):
    calibrated, labels = forecast(2000, num_classes, seed=7)
    twin, same_labels = forecast(2000, num_classes, seed=7, temperature=temperature)
    np.testing.assert_array_equal(labels, same_labels)
    assert accuracy(twin, labels) == accuracy(calibrated, labels)
    error = expected_calibration_error(twin, labels)
    assert error > chance_bound(twin, labels)
    assert error > 2 * expected_calibration_error(calibrated, labels)
    assert bins_off_the_diagonal(twin, labels) >= 2


def test_overconfidence_lies_below_the_diagonal():
    curve = reliability_curve(*forecast(2000, 3, seed=8, temperature=0.4))
    filled = curve.count > 50
    assert (curve.accuracy < curve.confidence)[filled].all()


def test_curve_rows_by_hand():
    curve = reliability_curve(PROBS, LABELS, num_bins=4)  # confidences 0.8, 0.6, 0.9, 0.7
    np.testing.assert_array_equal(curve.count, [0, 0, 2, 2])
    np.testing.assert_allclose(curve.lower_edge, [0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(curve.upper_edge, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(curve.confidence, [np.nan, np.nan, 0.65, 0.85])
    np.testing.assert_allclose(curve.accuracy, [np.nan, np.nan, 0.5, 1.0])
    np.testing.assert_array_equal(np.isnan(curve.lower), [True, True, False, False])
    np.testing.assert_array_equal(np.isnan(curve.upper), [True, True, False, False])


def test_bins_hold_their_lower_edge_and_the_last_holds_one():
    curve = reliability_curve([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]], [0, 0, 0], num_bins=4)
    np.testing.assert_array_equal(curve.count, [0, 0, 1, 2])


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_band_is_the_exact_binomial_interval(level):
    curve = reliability_curve(*forecast(150, 3, seed=9), level=level)
    filled = np.flatnonzero(curve.count)
    assert len(filled) >= 5
    for row in filled:
        right = round(curve.accuracy[row] * curve.count[row])
        exact = binomtest(right, int(curve.count[row])).proportion_ci(level, method="exact")
        assert (curve.lower[row], curve.upper[row]) == pytest.approx((exact.low, exact.high))


def test_curve_and_error_tell_the_same_story():
    probs, labels = forecast(400, 3, seed=10, temperature=0.5)
    curve = reliability_curve(probs, labels, num_bins=15)
    gaps = np.nan_to_num(np.abs(curve.accuracy - curve.confidence))
    assert (curve.count * gaps).sum() / 400 == pytest.approx(expected_calibration_error(probs, labels))


def test_single_precision_probabilities_are_accepted():
    probs, labels = forecast(1000, 50, seed=11)
    expected = calibration_summary(probs, labels)
    assert calibration_summary(probs.astype(np.float32), labels) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("metric", [*METRICS, reliability_curve, calibration_summary])
@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        ([0.5, 0.5], [0], r"probs must have shape \(examples, classes\), but has shape \(2,\)"),
        (np.empty((0, 2)), [], "probs is empty: no examples"),
        ([[1.0], [1.0]], [0, 0], "probs has one class"),
        ([[2.0, -1.0]], [0], "probs holds negative values"),
        ([[np.nan, 1.0]], [0], "probs holds NaN"),
        ([[0.5, 0.5], [0.9, 0.2]], [0, 0], r"sum to one in each row, but row 1 sums to 1\.1; apply softmax"),
        (PROBS, [0, 1, 1], r"labels must have shape \(4,\).* but has shape \(3,\)"),
        (PROBS, [0, 1, 1, 2], r"labels must lie in 0 \.\. 1 for 2 classes, but 1 do not \(the first is 2\)"),
        (PROBS, [-1, -1, -1, -1], r"4 do not \(the first is -1\); leave unlabelled examples out"),
        (PROBS, [0.0, 1.0, 1.0, 1.0], "labels must be class indices .integers., but their dtype is float64"),
    ],
)
def test_wrong_input_is_named(metric, probs, labels, message):
    with pytest.raises(InputError, match=message):
        metric(probs, labels)


@pytest.mark.parametrize("num_bins", [0, -3, 2.5])
@pytest.mark.parametrize("metric", [expected_calibration_error, reliability_curve])
def test_number_of_bins_must_be_a_positive_integer(metric, num_bins):
    with pytest.raises(InputError, match=f"num_bins must be an integer of at least 1, but is {num_bins}"):
        metric(PROBS, LABELS, num_bins=num_bins)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_level_must_be_a_share(level):
    with pytest.raises(InputError, match=f"level must lie between 0 and 1.* is {level}"):
        reliability_curve(PROBS, LABELS, level=level)
