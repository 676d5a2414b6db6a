r"""What to answer when errors cost differently, and which examples to hand to a person.

A matrix says what each answer costs under each truth; the probabilities then say what an answer is expected to cost,
and the cheapest is given. Where a person's look has a price, whatever is expected to cost more is handed over: that
price is the threshold, and no labels are needed to find it. Where a person has time for some share only, the dearest
are handed over first.

References:
    Chow (1970), *On Optimum Recognition Error and Reject Tradeoff*; Elkan (2001), *The Foundations of Cost-Sensitive
    Learning*, Eq. 1.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.analysis.metrics.checks import check_labels, check_probs
from bayeslora.errors import InputError


class Decisions(NamedTuple):
    """What :func:`decide` finds, each of shape ``(examples,)``.

    Attributes:
        answer: The class whose answer is expected to cost least; the first of equals.
        expected_cost: What it is expected to cost.
        hand_over: Whether a person is cheaper.
    """

    answer: np.ndarray
    expected_cost: np.ndarray
    hand_over: np.ndarray


class DeferralCurve(NamedTuple):
    """Mean cost where k of n examples are handed over, for k = 0 .. n; each of shape ``(n + 1,)``.

    Attributes:
        share: k / n.
        cost: Mean over the examples: a person's price for k of them, what the answers did cost for the others.
        threshold: Those are handed over that are expected to cost as much or more; infinite for none.
    """

    share: np.ndarray
    cost: np.ndarray
    threshold: np.ndarray


def decide(probs: ArrayLike, costs: ArrayLike, *, person: float = float("inf")) -> Decisions:
    r"""The answer with the least expected cost, and whether to hand over instead.

    .. math:: a_i = \arg\min_a \sum_c p_{ic}\, K_{ca}

    Args:
        probs: Class probabilities, shape ``(examples, classes)``.
        costs: K, shape ``(classes, classes)``: rows are truths, columns answers; any unit, usually 0 on the diagonal.
        person: What it costs to hand an example over, in the same unit.

    Raises:
        InputError: The arrays do not fit that description.

    Example:
        >>> found = decide([[0.7, 0.3], [0.9, 0.1], [0.99, 0.01]], [[0, 1], [5, 0]], person=0.4)
        >>> found.answer, found.hand_over  # to miss class 1 costs five times as much
        (array([1, 0, 0]), array([ True,  True, False]))
    """
    checked = check_probs(probs)
    expected = checked @ check_costs(costs, checked.shape[1])  # (n, answers)
    answer = expected.argmin(1)
    least = expected[np.arange(len(answer)), answer]
    return Decisions(answer, least, least > check_price(person))


def realized_costs(probs: ArrayLike, labels: ArrayLike, costs: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """What the cheapest answers were expected to cost, and what they did cost, ``(examples,)`` each."""
    found = decide(probs, costs)
    matrix = np.asarray(costs, dtype=np.float64)
    truth = check_labels(labels, num_examples=len(found.answer), num_classes=len(matrix))
    return found.expected_cost, matrix[truth, found.answer]


def deferral_curve(probs: ArrayLike, labels: ArrayLike, costs: ArrayLike, *, person: float = 0.0) -> DeferralCurve:
    """Cost against the share of examples that a person takes, those first whose answer is expected to cost most.

    Examples that are expected to cost the same are handed over in random order, and the cost is the mean over it.

    Args:
        probs, costs: As for `decide`.
        labels: Class indices, shape ``(examples,)``.
        person: What it costs to hand an example over; a person is taken to be right.

    Raises:
        InputError: The arrays do not fit that description.

    Example:
        >>> curve = deferral_curve([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], [0, 1, 1], [[0, 1], [1, 0]], person=0.3)
        >>> curve.cost.round(2), curve.threshold.round(2)  # without anybody's help one of three is wrong
        (array([0.33, 0.1 , 0.2 , 0.3 ]), array([inf, 0.4, 0.2, 0.1]))
    """
    return curve_of_costs(*realized_costs(probs, labels, costs), person)


def curve_of_costs(expected: np.ndarray, realized: np.ndarray, person: float) -> DeferralCurve:
    """:func:`deferral_curve` from :func:`realized_costs`."""
    price = check_price(person)
    if not np.isfinite(price):
        raise InputError("what a person costs must be finite where some examples are handed over")
    levels, tie, size = np.unique(-expected, return_inverse=True, return_counts=True)
    handed = (np.bincount(tie, weights=realized) / size)[np.sort(tie)]  # the dearest first
    count = np.arange(len(expected) + 1)
    left = realized.sum() - np.append(0.0, np.cumsum(handed))
    threshold = np.append(np.inf, -levels[np.sort(tie)])
    return DeferralCurve(count / len(expected), (left + count * price) / len(expected), threshold)


def check_costs(costs: ArrayLike, classes: int) -> np.ndarray:
    """A finite matrix of shape ``(classes, classes)``."""
    matrix = np.asarray(costs, dtype=np.float64)
    if matrix.shape != (classes, classes) or not np.isfinite(matrix).all():
        raise InputError(
            f"costs must be finite numbers of shape ({classes}, {classes}), a row for each truth and a column for each "
            f"answer, but have shape {matrix.shape}"
        )
    return matrix


def check_price(person: float) -> float:
    """What a person costs: a number, perhaps infinite."""
    if np.isnan(person):
        raise InputError("what a person costs must be a number, but is NaN")
    return float(person)
