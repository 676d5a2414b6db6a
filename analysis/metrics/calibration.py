"""Do the probabilities mean what they say? Metrics over the whole set, as numbers.

Every function takes the predictive probabilities of all examples at once. An average of per-batch values is
something else: it counts a short last batch too much, and for calibration error it is biased upwards. Every error over
bins depends on them: state their number and kind with it.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.fft import dct, idct
from scipy.sparse import csr_array

from bayeslora.analysis.metrics.bins import Bins, bin_scores
from bayeslora.analysis.metrics.checks import check_probs, check_probs_and_labels

CELLS = 1000  # of the grid over [0, 1]: a confidence is shared by the two nearest midpoints
HALVINGS = 12  # of the width, to 2e-4


def accuracy(probs: ArrayLike, labels: ArrayLike) -> float:
    """Share of examples whose most probable class is the label; the first class wins a tie.

    Args:
        probs: Predictive probabilities, shape ``(examples, classes)``, rows summing to one.
        labels: Class indices, shape ``(examples,)``.

    Returns:
        A float in ``[0, 1]``; higher is better.

    Raises:
        InputError: The arrays do not fit that description.

    Example:
        >>> probs, labels = [[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]], [0, 1, 1, 1]
        >>> accuracy(probs, labels)  # three of four
        0.75
    """
    probs, labels = check_probs_and_labels(probs, labels)
    return float((probs.argmax(axis=1) == labels).mean())


def overconfidence(probs: ArrayLike, labels: ArrayLike) -> float:
    r"""Mean confidence minus accuracy: above 0 where answers are surer than they are right, below 0 where less so.

    Unlike a calibration error it has a sign and no bins; 0 does not say that every confidence is right.

    Args:
        probs: Predictive probabilities, shape ``(examples, classes)``, rows summing to one.
        labels: Class indices, shape ``(examples,)``.

    Returns:
        A float in ``[-1, 1]``.

    Raises:
        InputError: The arrays do not fit that description.

    Example:
        >>> round(overconfidence([[0.9, 0.1], [0.8, 0.2]], [0, 1]), 4)  # 0.85 sure, 0.5 right
        0.35
    """
    probs, labels = check_probs_and_labels(probs, labels)
    return float(probs.max(axis=1).mean() - (probs.argmax(axis=1) == labels).mean())


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

    Example:
        >>> round(negative_log_likelihood([[0.5, 0.5], [0.25, 0.75]], [0, 1]), 4)  # (log 2 + log 4/3) / 2
        0.4904
    """
    probs, labels = check_probs_and_labels(probs, labels)
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

    Example:
        >>> round(brier_score([[0.9, 0.1], [0.4, 0.6]], [0, 1]), 4)  # (2 · 0.1² + 2 · 0.4²) / 2
        0.17

    References:
        Brier (1950), *Verification of forecasts expressed in terms of probability*.
    """
    probs, labels = check_probs_and_labels(probs, labels)
    truth = np.eye(probs.shape[1])[labels]  # (n, C)
    return float(np.square(probs - truth).sum(axis=1).mean())


def sharpness(probs: ArrayLike) -> float:
    r"""How concentrated the forecasts are, whatever the truth: the Brier score that they expect of themselves is
    one minus this.

    .. math:: \frac{1}{n} \sum_i \sum_c p_{ic}^2

    Args:
        probs: Predictive probabilities, shape ``(examples, classes)``, rows summing to one.

    Returns:
        A float from ``1 / classes`` (uniform) to 1 (certain); higher is better among equally calibrated forecasts.

    Raises:
        InputError: The array does not fit that description.

    Example:
        >>> sharpness([[0.5, 0.5], [1.0, 0.0]])
        0.75

    References:
        Gneiting, Balabdaoui and Raftery (2007), *Probabilistic forecasts, calibration and sharpness*.
    """
    return float(np.square(check_probs(probs)).sum(axis=1).mean())


def expected_calibration_error(
    probs: ArrayLike, labels: ArrayLike, *, num_bins: int = 15, binning: str = "width"
) -> float:
    r"""Mean gap between confidence and accuracy, weighted by bin size.

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{n} \lvert \mathrm{acc}_b - \mathrm{conf}_b \rvert

    Confidence is the largest probability. Small sets inflate the value: n_b coin flips miss their own mean by
    about 1/sqrt(n_b), so a perfect forecaster does not score 0.

    Args:
        probs: Predictive probabilities, shape ``(examples, classes)``, rows summing to one.
        labels: Class indices, shape ``(examples,)``.
        num_bins: Number of bins.
        binning: ``"width"`` for equal widths over ``[0, 1]``, ``"mass"`` for equal numbers of examples.

    Returns:
        A float in ``[0, 1]``; lower is better.

    Raises:
        InputError: The arrays do not fit that description, or an option is out of range.

    Example:
        >>> probs, labels = [[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]], [0, 1, 0, 1]
        >>> round(expected_calibration_error(probs, labels), 4)  # half: sure by 0.9, right by 0.5; half: by 0.6, by 1
        0.4

    References:
        Naeini et al. (2015), *Obtaining Well Calibrated Probabilities Using Bayesian Binning* (equal mass).
        Guo et al. (2017), *On Calibration of Modern Neural Networks*, Eq. 3 (equal width).
    """
    bins, confidence, correct = confidence_bins(probs, labels, num_bins, binning)
    return float(np.abs(bins.sums(correct - confidence)).sum() / len(correct))


def smooth_calibration_error(probs: ArrayLike, labels: ArrayLike) -> float:
    r"""Smooth ECE: the mean absolute gap between confidence and accuracy after smoothing, with no bins to choose.

    With confidence :math:`f_i`, the largest probability, :math:`y_i` whether its class is right, and
    :math:`K_\sigma` the Gaussian kernel that is reflected at 0 and 1,

    .. math:: \mathrm{smECE}_\sigma = \int_0^1 \Bigl|\frac1n \sum_i K_\sigma(t, f_i) (y_i - f_i)\Bigr|\, dt

    and the smooth ECE is the one with :math:`\mathrm{smECE}_\sigma = \sigma`. It moves little when the confidences do,
    which an error over bins does not. It is found on a grid of 1000 cells, where the kernel is diagonal in cosines.

    Args:
        probs: Predictive probabilities, shape ``(examples, classes)``, rows summing to one.
        labels: Class indices, shape ``(examples,)``.

    Returns:
        A float in ``[0, 1]``; lower is better.

    Raises:
        InputError: The arrays do not fit that description.

    Example:
        >>> probs, labels = [[0.9, 0.1]] * 10, [0] * 5 + [1] * 5  # sure by 0.9, right by 0.5: one gap, however smoothed
        >>> round(smooth_calibration_error(probs, labels), 3)
        0.4

    References:
        Błasiok and Nakkiran (2023), *Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing*, definition 3.
    """
    checked = check_probs_and_labels(probs, labels)
    return float(reweighted_smooth_error(*checked)(np.ones((1, len(checked[1]))))[0])


def reweighted_smooth_error(probs: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """`smooth_calibration_error` of examples that are repeated, from how often each is: ``(R, n)`` to ``(R,)``."""
    confidence, size = probs.max(1), len(labels)
    gaps = (probs.argmax(1) == labels) - confidence
    place = np.clip(confidence * CELLS - 0.5, 0, CELLS - 1)  # among the midpoints
    left = np.minimum(place.astype(int), CELLS - 2)
    share = place - left
    cells = np.concatenate([left, left + 1])
    rows = np.tile(np.arange(size), 2)
    onto = csr_array((np.concatenate([gaps * (1 - share), gaps * share]), (cells, rows)), shape=(CELLS, size))
    frequencies = np.pi * np.arange(CELLS)

    def errors(weights: np.ndarray) -> np.ndarray:
        waves = dct((onto @ weights.T).T / size, axis=1)  # (R, CELLS)
        width = np.full(len(weights), 0.5)
        for step in 0.5 ** np.arange(2, HALVINGS + 2):  # the error falls with the width
            error = np.abs(idct(waves * np.exp(-((width[:, None] * frequencies) ** 2) / 2), axis=1)).sum(1)
            width += np.where(error > width, step, -step)
        return np.minimum(width, error)  # 0 where there is no gap at all

    at_once = 256  # rows of weights, as some MiB of waves
    return lambda weights: np.concatenate(
        [errors(weights[start : start + at_once]) for start in range(0, len(weights), at_once)]
    )


def maximum_calibration_error(
    probs: ArrayLike, labels: ArrayLike, *, num_bins: int = 15, binning: str = "width"
) -> float:
    r"""Largest gap between confidence and accuracy in any bin.

    .. math:: \mathrm{MCE} = \max_b \lvert \mathrm{acc}_b - \mathrm{conf}_b \rvert

    With bins of equal width it is often the gap of a bin with one or two examples; ``binning="mass"`` avoids that.

    Args:
        probs, labels, num_bins, binning: As for `expected_calibration_error`.

    Returns:
        A float in ``[0, 1]``; lower is better.

    Raises:
        InputError: The arrays do not fit that description, or an option is out of range.

    Example:
        >>> probs, labels = [[0.9, 0.1], [0.9, 0.1], [0.7, 0.3], [0.3, 0.7]], [0, 1, 0, 1]
        >>> round(maximum_calibration_error(probs, labels), 4)  # of confidence 0.9, half are right
        0.4

    References:
        Naeini et al. (2015), *Obtaining Well Calibrated Probabilities Using Bayesian Binning*.
    """
    bins, confidence, correct = confidence_bins(probs, labels, num_bins, binning)
    return float(np.nanmax(np.abs(bins.means(correct - confidence))))


def classwise_calibration_error(
    probs: ArrayLike, labels: ArrayLike, *, num_bins: int = 15, binning: str = "width"
) -> np.ndarray:
    r"""Calibration error of each class's own probability, against how often the class occurs.

    .. math:: \mathrm{ECE}_c = \sum_b \frac{n_{bc}}{n} \lvert \mathrm{freq}_{bc} - \bar p_{bc} \rvert

    with the examples binned by :math:`p_{ic}` for each class. The mean over classes is the class-wise ECE.

    Args:
        probs, labels, num_bins, binning: As for `expected_calibration_error`.

    Returns:
        Shape ``(classes,)``, in ``[0, 1]``; lower is better.

    Raises:
        InputError: The arrays do not fit that description, or an option is out of range.

    Example:
        >>> probs, labels = [[0.8, 0.2, 0.0], [0.8, 0.2, 0.0], [0.0, 0.0, 1.0]], [0, 0, 2]
        >>> classwise_calibration_error(probs, labels).round(4)
        array([0.1333, 0.1333, 0.    ])

    References:
        Kull et al. (2019), *Beyond temperature scaling*, Eq. 4.
    """
    probs, labels = check_probs_and_labels(probs, labels)
    errors = []
    for index, column in enumerate(probs.T):
        gaps = bin_scores(column, num_bins, binning).sums((labels == index) - column)
        errors.append(np.abs(gaps).sum() / len(labels))
    return np.array(errors)


def confidence_bins(
    probs: ArrayLike, labels: ArrayLike, num_bins: int, binning: str
) -> tuple[Bins, np.ndarray, np.ndarray]:
    """Examples binned by their largest probability; that, and whether its class is right: each ``(n,)``."""
    probs, labels = check_probs_and_labels(probs, labels)
    confidence = probs.max(axis=1)
    correct = (probs.argmax(axis=1) == labels).astype(np.float64)
    return bin_scores(confidence, num_bins, binning), confidence, correct
