"""Do the probabilities mean what they say? Metrics over the whole set, as numbers.

Every function takes the predictive probabilities of all examples at once. An average of per-batch values is
something else: it counts a short last batch too much, and for calibration error it is biased upwards.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import beta
from sklearn.metrics import accuracy_score

from bayeslora.analysis.checks import check_labels, check_level, check_probs
from bayeslora.errors import InputError


class ReliabilityCurve(NamedTuple):
    """One row per bin of confidence, each field of shape ``(bins,)``; NaN where a bin is empty.

    Attributes:
        lower_edge: Where the bin starts (inclusive).
        upper_edge: Where it ends (exclusive, but for the last).
        confidence: Mean of the largest probability in the bin.
        accuracy: Share of the bin's examples that are right.
        lower: Lower end of the Clopper-Pearson interval of the accuracy.
        upper: Upper end of it.
        count: Number of examples (0 where empty, never NaN).
    """

    lower_edge: np.ndarray
    upper_edge: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    count: np.ndarray  # type: ignore[assignment]  # the name hides tuple.count, which an array of bins can spare


def accuracy(probs: ArrayLike, labels: ArrayLike) -> float:
    """Share of examples whose most probable class is the label; the first class wins a tie.

    Args:
        probs: Predictive probabilities, shape ``(examples, classes)``, rows summing to one.
        labels: Class indices, shape ``(examples,)``.

    Returns:
        A float in ``[0, 1]``; higher is better.

    Raises:
        InputError: The arrays do not fit that description.
    """
    probs, labels = _check(probs, labels)
    return float(accuracy_score(labels, probs.argmax(axis=1)))


def negative_log_likelihood(probs: ArrayLike, labels: ArrayLike) -> float:
    r"""Mean surprise at the labels, in nats per example.

    .. math:: \mathrm{NLL} = -\frac{1}{n} \sum_i \log p_i(y_i)

    Probabilities are clipped only at the smallest positive float64 (5e-324), so the answer is finite and one
    impossible label costs 744 nats. (``sklearn.metrics.log_loss`` clips at 2.2e-16, which hides all
    overconfidence beyond 36 nats.)

    Args:
        probs: Predictive probabilities, shape ``(examples, classes)``, rows summing to one.
        labels: Class indices, shape ``(examples,)``.

    Returns:
        A float, at least 0; lower is better.

    Raises:
        InputError: The arrays do not fit that description.
    """
    probs, labels = _check(probs, labels)
    at_label = probs[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(at_label, np.nextafter(0.0, 1.0))).mean())


def brier_score(probs: ArrayLike, labels: ArrayLike) -> float:
    r"""Squared distance between the probabilities and the truth, summed over classes.

    .. math:: \mathrm{Brier} = \frac{1}{n} \sum_i \sum_c (p_{ic} - [y_i = c])^2

    Args:
        probs: Predictive probabilities, shape ``(examples, classes)``, rows summing to one.
        labels: Class indices, shape ``(examples,)``.

    Returns:
        A float in ``[0, 2]``; lower is better. For two classes it is twice the one-column score.

    Raises:
        InputError: The arrays do not fit that description.

    References:
        Brier (1950), *Verification of forecasts expressed in terms of probability*.
    """
    probs, labels = _check(probs, labels)
    truth = np.eye(probs.shape[1])[labels]  # (n, C)
    return float(np.square(probs - truth).sum(axis=1).mean())


def expected_calibration_error(probs: ArrayLike, labels: ArrayLike, *, num_bins: int = 15) -> float:
    r"""Mean gap between confidence and accuracy, weighted by bin size.

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{n} \lvert \mathrm{acc}_b - \mathrm{conf}_b \rvert

    Confidence is the largest probability. Small sets inflate the value: n_b coin flips miss their own mean by
    about 1/sqrt(n_b), so a perfect forecaster does not score 0.

    Args:
        probs: Predictive probabilities, shape ``(examples, classes)``, rows summing to one.
        labels: Class indices, shape ``(examples,)``.
        num_bins: Equal-width bins over ``[0, 1]``.

    Returns:
        A float in ``[0, 1]``; lower is better.

    Raises:
        InputError: The arrays do not fit that description, or ``num_bins`` is not a positive integer.

    References:
        Naeini et al. (2015), *Obtaining Well Calibrated Probabilities Using Bayesian Binning*.
        Guo et al. (2017), *On Calibration of Modern Neural Networks*, Eq. 3.
    """
    count, confidence, correct = _bin_sums(probs, labels, num_bins)
    return float(np.abs(correct - confidence).sum() / count.sum())


def reliability_curve(
    probs: ArrayLike, labels: ArrayLike, *, num_bins: int = 10, level: float = 0.95
) -> ReliabilityCurve:
    r"""Accuracy as a function of confidence, with the uncertainty that the bin's size leaves.

    The band is the Clopper-Pearson interval, for k right answers among n:

    .. math:: \left[ B_{\alpha/2}(k, n-k+1),\ B_{1-\alpha/2}(k+1, n-k) \right]

    with B the quantile of the Beta distribution and alpha = 1 - ``level``. It covers at least ``level`` for
    every n, so a calibrated model leaves the band of any one bin with probability at most ``1 - level``.

    Args:
        probs: Predictive probabilities, shape ``(examples, classes)``, rows summing to one.
        labels: Class indices, shape ``(examples,)``.
        num_bins: Equal-width bins over ``[0, 1]``.
        level: Coverage of the band, per bin.

    Returns:
        A `ReliabilityCurve` of ``num_bins`` rows; an empty bin is NaN with count 0.

    Raises:
        InputError: The arrays do not fit that description, or an option is out of range.

    References:
        Clopper and Pearson (1934), *The use of confidence or fiducial limits illustrated in the case of the
        binomial*.
    """
    check_level(level)
    count, confidence, correct = _bin_sums(probs, labels, num_bins)
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    size = np.where(count > 0, count, np.nan)
    lower, upper = _clopper_pearson(correct, size, level)
    return ReliabilityCurve(edges[:-1], edges[1:], confidence / size, correct / size, lower, upper, count)


def calibration_summary(probs: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """The four numbers of a results table, each over the whole set.

    Args:
        probs: Predictive probabilities, shape ``(examples, classes)``, rows summing to one.
        labels: Class indices, shape ``(examples,)``.

    Returns:
        ``accuracy`` and ``ece`` (15 bins) as shares in ``[0, 1]``, ``nll`` in nats per example, ``brier`` in
        ``[0, 2]``.

    Raises:
        InputError: The arrays do not fit that description.
    """
    return {
        "accuracy": accuracy(probs, labels),
        "nll": negative_log_likelihood(probs, labels),
        "ece": expected_calibration_error(probs, labels),
        "brier": brier_score(probs, labels),
    }


def _check(probs: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    values = check_probs(probs)
    num_examples, num_classes = values.shape
    return values, check_labels(labels, num_examples=num_examples, num_classes=num_classes)


def _bin_sums(probs: ArrayLike, labels: ArrayLike, num_bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per bin: number of examples, sum of their confidences, number that are right; each ``(num_bins,)``.

    Bins are ``[lower, upper)``; the last includes 1.
    """
    if not isinstance(num_bins, (int, np.integer)) or num_bins < 1:
        raise InputError(f"num_bins must be an integer of at least 1, but is {num_bins!r}")
    probs, labels = _check(probs, labels)
    confidence = probs.max(axis=1)
    correct = probs.argmax(axis=1) == labels
    inner_edges = np.linspace(0.0, 1.0, num_bins + 1)[1:-1]
    index = np.digitize(confidence, inner_edges)
    count = np.bincount(index, minlength=num_bins)
    total_confidence = np.bincount(index, weights=confidence, minlength=num_bins)
    total_correct = np.bincount(index, weights=correct, minlength=num_bins)
    return count, total_confidence, total_correct


def _clopper_pearson(correct: np.ndarray, size: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Exact binomial interval; NaN where ``size`` is NaN. Beta(0, .) and Beta(., 0) stand for 0 and 1."""
    tail = (1.0 - level) / 2.0
    wrong = size - correct
    lower = np.where(correct == 0, 0.0, beta.ppf(tail, correct, wrong + 1))
    upper = np.where(wrong == 0, 1.0, beta.ppf(1.0 - tail, correct + 1, wrong))
    empty = np.isnan(size)
    return np.where(empty, np.nan, lower), np.where(empty, np.nan, upper)
