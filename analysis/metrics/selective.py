"""Selective prediction: answer only where the model is sure. How many errors are left?"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.analysis.metrics.checks import check_examples
from bayeslora.errors import InputError


class RiskCoverage(NamedTuple):
    """Error rate among the k surest of n examples, for k = 1 .. n; each of shape ``(n,)``.

    Attributes:
        coverage: k / n, the share of examples that are answered.
        risk: Share of those answers that are wrong, in ``[0, 1]``.
    """

    coverage: np.ndarray
    risk: np.ndarray


def risk_coverage(uncertainty: ArrayLike, wrong: ArrayLike) -> RiskCoverage:
    r"""Risk as a function of coverage when the most certain examples are answered first.

    .. math:: \mathrm{risk}(k / n) = \frac{1}{k} \sum_{i \le k} \mathrm{wrong}_{(i)}

    in order of rising uncertainty. Examples of equal uncertainty come in random order, and the risk is the mean over
    it: the order of the data does not matter.

    Args:
        uncertainty: Larger is less sure, such as the predictive entropy; shape ``(examples,)``.
        wrong: Whether the prediction is wrong (or a loss in ``[0, 1]``), shape ``(examples,)``.

    Raises:
        InputError: The arrays do not fit that description.

    Example:
        >>> curve = risk_coverage([0.1, 0.2, 0.3, 0.4], [False, False, True, True])
        >>> curve.coverage, curve.risk.round(3)
        (array([0.25, 0.5 , 0.75, 1.  ]), array([0.   , 0.   , 0.333, 0.5  ]))

    References:
        El-Yaniv and Wiener (2010), *On the Foundations of Noise-free Selective Classification*.
    """
    scores, losses = _check(uncertainty, wrong)
    _, tie, size = np.unique(scores, return_inverse=True, return_counts=True)
    expected = (np.bincount(tie, weights=losses) / size)[np.sort(tie)]  # each example's share of its ties' losses
    answered = np.arange(1, len(scores) + 1)
    return RiskCoverage(answered / len(scores), np.cumsum(expected) / answered)


def area_under_risk_coverage(uncertainty: ArrayLike, wrong: ArrayLike) -> float:
    r"""AURC: the mean of `risk_coverage` over all coverages, in ``[0, 1]``; lower is better.

    It falls with the error rate as well as with the order; `excess_area_under_risk_coverage` sees the order alone.

    Args:
        uncertainty, wrong: As for `risk_coverage`.

    Raises:
        InputError: The arrays do not fit that description.

    Example:
        >>> round(area_under_risk_coverage([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]), 4)  # (0 + 0 + 1/3 + 1/2) / 4
        0.2083

    References:
        Geifman, Uziel and El-Yaniv (2019), *Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers*.
    """
    return float(risk_coverage(uncertainty, wrong).risk.mean())


def reweighted_area(uncertainty: np.ndarray, wrong: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    r"""`area_under_risk_coverage` of examples that are repeated, from how often each is: ``(R, n)`` to ``(R,)``.

    A group of s examples of equal uncertainty and mean loss m, behind C surer ones with L errors in sum, adds

    .. math:: \sum_{j=1}^{s} \frac{L + j m}{C + j} = s m + (L - C m) (H_{C+s} - H_C)

    with the harmonic numbers H; copies of an example are such a group.
    """
    order = np.argsort(uncertainty, kind="stable")
    _, first = np.unique(uncertainty[order], return_index=True)
    losses = np.asarray(wrong, dtype=np.float64)[order]

    def areas(weights: np.ndarray) -> np.ndarray:
        counts = weights[:, order]
        sizes, errors = (np.add.reduceat(of, first, axis=1) for of in (counts, counts * losses))
        mean = errors / np.maximum(sizes, 1)
        upto = np.cumsum(sizes, axis=1)
        before = np.cumsum(errors, axis=1) - errors - (upto - sizes) * mean
        last = np.rint(upto).astype(np.int64)
        harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, last.max() + 1))])
        at = np.concatenate([np.zeros((len(last), 1)), harmonic[last]], axis=1)
        return (errors + before * np.diff(at, axis=1)).sum(axis=1) / upto[:, -1]

    at_once = max(1, 2**15 // len(order))  # in a processor's cache
    return lambda weights: np.concatenate(
        [areas(weights[start : start + at_once]) for start in range(0, len(weights), at_once)]
    )


def area_under_generalized_risk_coverage(uncertainty: ArrayLike, wrong: ArrayLike) -> float:
    r"""AUGRC: how probable it is that an example is answered and wrong, averaged over coverages; lower is better.

    .. math:: \int_0^1 P(\text{answered at coverage } c,\ \text{wrong})\, dc
        = \mathrm{acc}\,(1 - \mathrm{acc})\,(1 - \mathrm{AUROC}) + \tfrac12 (1 - \mathrm{acc})^2

    by the trapezoidal rule, with the accuracy and the AUROC of finding the wrong answers; the second form is for a
    ``wrong`` of booleans. AURC divides by the coverage, so that its value hangs on the few surest examples; this one
    counts every wrong answer by the share of coverages at which it is given.

    Args:
        uncertainty, wrong: As for `risk_coverage`.

    Returns:
        A float in ``[0, 1/2]``.

    Raises:
        InputError: The arrays do not fit that description.

    Example:
        >>> area_under_generalized_risk_coverage([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1])  # wrong ones last: (1/2)² / 2
        0.125

    References:
        Traub et al. (2024), *Overcoming Common Flaws in the Evaluation of Selective Classification Systems*, Eq. 4-6.
    """
    scores, losses = _check(uncertainty, wrong)
    return float(reweighted_generalized_area(scores, losses)(np.ones((1, len(scores))))[0])


def reweighted_generalized_area(uncertainty: np.ndarray, wrong: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """`area_under_generalized_risk_coverage` of examples that are repeated: ``(R, n)`` to ``(R,)``."""
    order = np.argsort(uncertainty, kind="stable")
    _, first = np.unique(uncertainty[order], return_index=True)
    losses = np.asarray(wrong, dtype=np.float64)[order]

    def areas(weights: np.ndarray) -> np.ndarray:
        counts = weights[:, order]
        sizes, errors = (np.add.reduceat(of, first, axis=1) for of in (counts, counts * losses))
        upto = np.cumsum(sizes, axis=1)
        return (errors * (upto[:, -1:] - upto + sizes / 2)).sum(axis=1) / upto[:, -1] ** 2

    return areas


def excess_area_under_risk_coverage(uncertainty: ArrayLike, wrong: ArrayLike) -> float:
    """AURC above that of the best order, which puts every wrong answer last; 0 is perfect.

    Args:
        uncertainty, wrong: As for `risk_coverage`.

    Raises:
        InputError: The arrays do not fit that description.

    Example:
        >>> excess_area_under_risk_coverage([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1])
        0.0
        >>> round(excess_area_under_risk_coverage([0.4, 0.3, 0.2, 0.1], [0, 0, 1, 1]), 4)  # the worst order
        0.5833

    References:
        Geifman, Uziel and El-Yaniv (2019), section 3 (E-AURC, here with the exact optimum instead of its limit).
    """
    scores, losses = _check(uncertainty, wrong)
    return area_under_risk_coverage(scores, losses) - area_under_risk_coverage(losses, losses)


def _check(uncertainty: ArrayLike, wrong: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    scores = check_examples(uncertainty, name="uncertainty")
    losses = check_examples(wrong, name="wrong", size=len(scores))
    if losses.min() < 0 or losses.max() > 1:
        raise InputError("wrong must hold booleans or losses between 0 and 1")
    return scores, losses
