"""Sets of labels that hold the truth as often as asked for: split conformal prediction with the least ambiguous sets.

Written out, as it is one order statistic: the libraries for it (MAPIE, crepes, TorchCP) wrap an estimator of their own.

References:
    Vovk, Gammerman & Shafer (2005), *Algorithmic Learning in a Random World*; Sadinle, Lei & Wasserman (2019), *Least
    Ambiguous Set-Valued Classifiers with Bounded Error Levels* (LAC); Angelopoulos & Bates (2023), *Conformal
    Prediction: A Gentle Introduction*, section 1.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.errors import InputError


def conformal_threshold(label_probs: ArrayLike, coverage: float = 0.9) -> float:
    r"""The least probability with which a label belongs to the set: the k-th largest of the truths' probabilities.

    .. math:: k = \lceil (n + 1)\,c \rceil

    With exchangeable examples the sets then hold the truth of a new one with probability c at least, on average over
    calibration sets. Where n is too small for that, k is above n and the threshold 0: every label is in the set.

    Args:
        label_probs: Of n held-out examples, the probability that was predicted of the true label, shape ``(n,)``.
        coverage: c, between 0 and 1.

    Returns:
        A probability.

    Raises:
        InputError: there is no example, one is no probability, or the coverage is out of range.

    Example:
        >>> conformal_threshold([0.9, 0.8, 0.7, 0.6, 0.2], coverage=0.5)  # the third largest of five
        0.7
    """
    probs = np.asarray(label_probs, dtype=np.float64)
    if probs.ndim != 1 or not len(probs) or not ((probs >= 0) & (probs <= 1 + 1e-9)).all():
        raise InputError("label_probs must be one probability for each of at least one example")
    if not 0 < coverage < 1:
        raise InputError(f"coverage must lie between 0 and 1, got {coverage!r}")
    rank = math.ceil(round((len(probs) + 1) * coverage, 9))
    return float(np.sort(probs)[-rank]) if rank <= len(probs) else 0.0


def conformal_sets(probs: ArrayLike, threshold: float) -> np.ndarray:
    """Which labels are in the set of each example: those that are at least as probable as the threshold.

    A set can be empty, where no label is: the example is unlike those of the calibration.

    Args:
        probs: Class probabilities, shape ``(examples, classes)``.
        threshold: From :func:`conformal_threshold`.

    Returns:
        Booleans, shape ``(examples, classes)``.

    Example:
        >>> conformal_sets([[0.5, 0.3, 0.2], [0.9, 0.06, 0.04]], 0.3)
        array([[ True,  True, False],
               [ True, False, False]])
    """
    return np.asarray(probs) >= threshold
