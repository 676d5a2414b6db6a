"""Calibration error without bins: gaps between confidence and accuracy, smoothed as widely as they are large."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.fft import dct, idct
from scipy.sparse import csr_array

from bayeslora.analysis.metrics.checks import check_probs_and_labels

CELLS = 1000  # of the grid over [0, 1]: a confidence is shared by the two nearest midpoints
HALVINGS = 12  # of the width, to 2e-4


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
