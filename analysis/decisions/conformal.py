r"""Sets of labels, and intervals of numbers, that hold the truth as often as asked for: split conformal prediction.

The guarantee is of new examples that are exchangeable with those of the calibration, on average over both; it is not of
any one group of them, nor of inputs from elsewhere, where coverage is to be measured.

Written out, as it is one order statistic of scores that are saved: MAPIE takes an estimator and predicts with it again,
as do crepes and TorchCP; with an estimator that hands saved probabilities on, MAPIE 1.6 has the same LAC and APS sets.

References:
    Vovk, Gammerman & Shafer (2005), *Algorithmic Learning in a Random World*; Sadinle, Lei & Wasserman (2019), *Least
    Ambiguous Set-Valued Classifiers with Bounded Error Levels* (LAC); Romano, Sesia & Candès (2020), *Classification
    with Valid and Adaptive Coverage* (APS); Angelopoulos et al. (2021), *Uncertainty Sets for Image Classifiers using
    Conformal Prediction* (RAPS); Lei et al. (2018), *Distribution-Free Predictive Inference for Regression*, section
    5.2 (intervals in units of a predicted spread); Angelopoulos & Bates (2023), *Conformal Prediction: A Gentle
    Introduction*, sections 1 and 2.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.analysis.metrics.checks import check_examples, check_probs
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
    rank = _rank(len(probs), coverage)
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


def conformal_quantile(scores: ArrayLike, coverage: float = 0.9) -> float:
    r"""The k-th smallest of n scores, :math:`k = \lceil (n + 1)\,c \rceil`; infinite where n is too small for that.

    What scores no more belongs to the set of a new example, which then holds the truth with probability c at least.

    Args:
        scores: Of n held-out examples with their true label, larger where it fits less, shape ``(n,)``; such as its
            entry in `adaptive_scores`, or :math:`|y - m| / s` of a number with predicted mean and standard deviation:
            the interval is then :math:`m \pm q s`.
        coverage: c, between 0 and 1.

    Raises:
        InputError: there is no score, one is not finite, or the coverage is out of range.

    Example:
        >>> conformal_quantile([0.3, 1.2, 0.1, 0.7, 2.0], coverage=0.5)  # the third smallest of five
        0.7
    """
    values = check_examples(scores, name="scores")
    rank = _rank(len(values), coverage)
    return float(np.sort(values)[rank - 1]) if rank <= len(values) else math.inf


def adaptive_scores(
    probs: ArrayLike, *, penalty: float = 0.0, free: int = 1, uniform: ArrayLike | None = None
) -> np.ndarray:
    r"""How much probability is at least as large as each label's: the scores of APS, and of RAPS with a penalty.

    .. math:: s_{ic} = \sum_{c'} p_{ic'} [p_{ic'} > p_{ic}] + u_i\, p_{ic} + \lambda\, (\mathrm{rank}_{ic} - f)_+

    The set of an example is the labels with a score of at most `conformal_quantile` of the true labels' scores. It is
    larger where the example is harder; the penalty keeps long tails of improbable labels out. Labels of equal
    probability come in the order of the classes.

    Args:
        probs: Class probabilities, shape ``(examples, classes)``.
        penalty: λ, at least 0; 0 for APS.
        free: f, how many labels have no penalty.
        uniform: u in [0, 1], shape ``(examples,)``, drawn at random for coverage that is no larger than asked; 1 for
            all if None, with larger sets, none of which is empty.

    Returns:
        Shape ``(examples, classes)``.

    Raises:
        InputError: The arrays do not fit that description, or an option is out of range.

    Example:
        >>> adaptive_scores([[0.5, 0.2, 0.3]])
        array([[0.5, 1. , 0.8]])
        >>> adaptive_scores([[0.5, 0.2, 0.3]], penalty=0.1)
        array([[0.5, 1.2, 0.9]])
    """
    checked = check_probs(probs)
    if penalty < 0 or free < 0:
        raise InputError(f"penalty and free must be at least 0, got {penalty!r} and {free!r}")
    share = np.ones(len(checked)) if uniform is None else check_examples(uniform, name="uniform", size=len(checked))
    if share.min() < 0 or share.max() > 1:
        raise InputError("uniform must lie between 0 and 1")
    order = np.argsort(-checked, axis=1, kind="stable")
    sorted_probs = np.take_along_axis(checked, order, 1)
    scores = sorted_probs.cumsum(1) - (1 - share[:, None]) * sorted_probs
    scores += penalty * np.maximum(np.arange(1, checked.shape[1] + 1) - free, 0)
    found = np.empty_like(scores)
    np.put_along_axis(found, order, scores, 1)
    return found


def _rank(size: int, coverage: float) -> int:
    if not 0 < coverage < 1:
        raise InputError(f"coverage must lie between 0 and 1, got {coverage!r}")
    return math.ceil(round((size + 1) * coverage, 9))
