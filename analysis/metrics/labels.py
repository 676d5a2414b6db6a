"""Scores of several labels of which each applies or does not, label by label; scikit-learn's, over whole sets."""

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.errors import InputError


def mean_average_precision(probs: ArrayLike, labels: ArrayLike) -> float:
    """mAP: the mean over labels of the average precision; NaN where no label applies to any example.

    A label that never applies has no average precision, and is left out.

    Args:
        probs: That a label applies, ``(examples, labels)``.
        labels: Whether it does, 0 or 1, the same shape; NaN where it is not known, which is left out.

    Example:
        >>> mean_average_precision([[0.9, 0.2], [0.1, 0.4], [0.8, 0.3]], [[1, 0], [0, 0], [0, 1]])
        0.75

    References:
        Everingham et al. (2010), *The Pascal Visual Object Classes (VOC) Challenge*, section 4.2; the average precision
        without interpolation.
    """
    from sklearn.metrics import average_precision_score

    said, known = _check(probs, labels)
    each = [
        average_precision_score(truth[of], scores[of])
        for scores, truth in zip(said.T, known.T, strict=True)
        if (of := ~np.isnan(truth)).any() and truth[of].any()
    ]
    return float(np.mean(each)) if each else float("nan")


def f1_micro(probs: ArrayLike, labels: ArrayLike, thresholds: ArrayLike = 0.5) -> float:
    """F1 over all decisions together, whether a label applies; 0 where none applies and none is said to.

    Args:
        probs, labels: As for :func:`mean_average_precision`.
        thresholds: From which probability on a label is said to apply: one, or one for each label.
    """
    found, said, true = _counts(probs, labels, thresholds).sum(1)
    return float(2 * found / max(said + true, 1))


def f1_macro(probs: ArrayLike, labels: ArrayLike, thresholds: ArrayLike = 0.5) -> float:
    """The mean of the labels' F1, each 0 where it neither applies nor is said to; arguments as for :func:`f1_micro`."""
    found, said, true = _counts(probs, labels, thresholds)
    return float(np.mean(2 * found / np.maximum(said + true, 1)))


def best_thresholds(probs: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """For each label the threshold of the best F1, ``(labels,)``: halfway between two probabilities that were seen.

    Choose them on examples that are not scored: on the same ones F1 is too good. 0.5 for a label that never applies.

    Args:
        probs, labels: As for :func:`mean_average_precision`.

    Example:
        >>> best_thresholds([[0.2], [0.3], [0.4], [0.1]], [[0], [1], [1], [0]]).round(3)
        array([0.25])

    References:
        Lipton, Elkan and Naryanaswamy (2014), *Optimal Thresholding of Classifiers to Maximize F1 Measure*.
    """
    said, known = _check(probs, labels)
    return np.array([_best_threshold(*pair) for pair in zip(said.T, known.T, strict=True)])


def _best_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    scores, truth = scores[~np.isnan(truth)], truth[~np.isnan(truth)]
    if not truth.any():
        return 0.5
    values = np.unique(scores)
    order = np.argsort(scores)
    below = np.searchsorted(scores[order], values)  # how many lie below each value
    positives = truth.sum() - np.concatenate([[0.0], np.cumsum(truth[order])])[below]
    f1 = 2 * positives / (len(scores) - below + truth.sum())
    best = int(f1.argmax())
    return float((values[best] + values[best - 1]) / 2) if best else float(values[0])


def _counts(probs: ArrayLike, labels: ArrayLike, thresholds: ArrayLike) -> np.ndarray:
    """Of each label, how often it is rightly said to apply, is said to, and does: ``(3, labels)``."""
    said, known = _check(probs, labels)
    applies = (said >= np.asarray(thresholds)) & ~np.isnan(known)
    return np.stack([(applies & (known == 1)).sum(0), applies.sum(0), (known == 1).sum(0)])


def _check(probs: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    said, known = np.asarray(probs, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if said.shape != known.shape or said.ndim != 2 or not said.size:
        raise InputError(f"probs and labels are (examples, labels), got {said.shape} and {known.shape}")
    if not np.isin(known[~np.isnan(known)], (0, 1)).all():
        raise InputError("whether a label applies is 0 or 1, or NaN where it is not known")
    return said, known
