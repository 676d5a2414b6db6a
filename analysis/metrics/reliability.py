"""Confidence against accuracy, bin by bin, with the uncertainty of each."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import beta

from bayeslora.analysis.metrics.bins import Bins
from bayeslora.analysis.metrics.bootstrap import resample_counts
from bayeslora.analysis.metrics.calibration import confidence_bins
from bayeslora.analysis.metrics.checks import check_level
from bayeslora.errors import InputError


class ReliabilityCurve(NamedTuple):
    """One row per bin of confidence, each field of shape ``(bins,)``; NaN where a bin is empty.

    Attributes:
        lower_edge: Where the bin starts (inclusive).
        upper_edge: Where it ends (exclusive, but for the last).
        confidence: Mean of the largest probability in the bin.
        accuracy: Share of the bin's examples that are right.
        lower: Lower end of the accuracy's interval.
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


def reliability_curve(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    num_bins: int = 10,
    level: float = 0.95,
    binning: str = "width",
    interval: str = "exact",
    num_resamples: int = 1000,
    seed: int = 0,
) -> ReliabilityCurve:
    r"""Accuracy as a function of confidence, with the uncertainty that the bin's size leaves.

    ``interval="exact"`` is Clopper and Pearson's, for k right answers among n:

    .. math:: \left[ B_{\alpha/2}(k, n-k+1),\ B_{1-\alpha/2}(k+1, n-k) \right]

    with B the quantile of the Beta distribution and alpha = 1 - ``level``. It covers at least ``level`` for
    every n, so a calibrated model leaves the band of any one bin with probability at most ``1 - level``.
    ``interval="bootstrap"`` draws whole sets of examples with replacement and takes quantiles of the bin's
    accuracy. It collapses to a point where every answer in a bin is right.

    Args:
        probs: Predictive probabilities, shape ``(examples, classes)``, rows summing to one.
        labels: Class indices, shape ``(examples,)``.
        num_bins: Number of bins.
        level: Coverage of the band, per bin.
        binning: ``"width"`` or ``"mass"``, as for `expected_calibration_error`.
        interval: ``"exact"`` or ``"bootstrap"``.
        num_resamples: Sets the bootstrap draws.
        seed: Decides them.

    Returns:
        A `ReliabilityCurve` of ``num_bins`` rows (fewer with ``"mass"`` where confidences are equal).

    Raises:
        InputError: The arrays do not fit that description, or an option is out of range.

    Example:
        >>> curve = reliability_curve([[0.9, 0.1]] * 10, [0] * 8 + [1] * 2, num_bins=2)
        >>> curve.accuracy, curve.count
        (array([nan, 0.8]), array([ 0, 10]))
        >>> curve.lower.round(3), curve.upper.round(3)
        (array([  nan, 0.444]), array([  nan, 0.975]))

    References:
        Clopper and Pearson (1934), *The use of confidence or fiducial limits illustrated in the case of the
        binomial*. Efron and Tibshirani (1993), *An Introduction to the Bootstrap*, section 13.3.
    """
    check_level(level)
    bins, confidence, correct = confidence_bins(probs, labels, num_bins, binning)
    if interval == "exact":
        lower, upper = _clopper_pearson(bins.sums(correct), np.where(bins.size > 0, bins.size, np.nan), level)
    elif interval == "bootstrap":
        lower, upper = _bootstrap(bins, correct, level, num_resamples, seed)
    else:
        raise InputError(f"interval must be 'exact' or 'bootstrap', but is {interval!r}")
    edges = bins.edges
    means = bins.means(confidence), bins.means(correct)
    return ReliabilityCurve(edges[:-1], edges[1:], *means, lower, upper, bins.size)


def _clopper_pearson(correct: np.ndarray, size: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Exact binomial interval; NaN where ``size`` is NaN. Beta(0, .) and Beta(., 0) stand for 0 and 1."""
    tail = (1.0 - level) / 2.0
    wrong = size - correct
    lower = np.where(correct == 0, 0.0, beta.ppf(tail, correct, wrong + 1))
    upper = np.where(wrong == 0, 1.0, beta.ppf(1.0 - tail, correct + 1, wrong))
    empty = np.isnan(size)
    return np.where(empty, np.nan, lower), np.where(empty, np.nan, upper)


def _bootstrap(
    bins: Bins, correct: np.ndarray, level: float, num_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles of each bin's accuracy over resampled sets in which the bin is not empty."""
    membership = np.eye(len(bins.size))[bins.members]  # (n, bins)
    counts = resample_counts(len(correct), num_resamples, seed)
    sizes = np.concatenate([part @ membership for part in counts()])  # (resamples, bins)
    right = np.concatenate([part @ (membership * correct[:, None]) for part in counts()])
    ends = np.full((2, len(bins.size)), np.nan)
    for index, (of_bin, hits) in enumerate(zip(sizes.T, right.T, strict=True)):
        filled = of_bin > 0
        if filled.any():
            ends[:, index] = np.quantile(hits[filled] / of_bin[filled], [(1 - level) / 2, (1 + level) / 2])
    return ends[0], ends[1]
