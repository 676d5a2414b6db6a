"""One answer from several samples: votes, plain or weighted by likelihood."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.errors import InputError


class Vote(NamedTuple):
    """Answers with the most weight, and that share of it, each of n questions.

    Attributes:
        answers: None where no sample answered.
        confidence: Share of all samples' weight that the answer has, ``(n,)`` in [0, 1]; its complement orders
            questions for abstention (`bayeslora.analysis.risk_coverage`).
    """

    answers: list[Hashable | None]
    confidence: np.ndarray


def vote(answers: Sequence[Sequence[Hashable | None]], log_weights: ArrayLike | None = None) -> Vote:
    r"""The answer a with the largest share :math:`\sum_{s: a_s = a} w_s / \sum_s w_s` of the samples' weights.

    Of equal shares the answer that came first wins.

    Args:
        answers: For each of n questions, S answers; None is no answer and gets no vote, but counts in the total.
        log_weights: log w, shape ``(n, S)``, such as the log-likelihood of each sample (a likelihood-weighted vote), or
            that over its length; equal if None.

    Raises:
        InputError: The shapes do not fit, or a weight is NaN or infinite.

    Example:
        >>> vote([["B", "A", "A", None]])
        Vote(answers=['A'], confidence=array([0.5]))
        >>> vote([["B", "A"]], log_weights=np.log([[3.0, 1.0]]))
        Vote(answers=['B'], confidence=array([0.75]))

    References:
        Wang et al. (2023), *Self-Consistency Improves Chain of Thought Reasoning in Language Models*.
    """
    sizes = {len(samples) for samples in answers}
    if len(sizes) != 1 or sizes == {0}:
        raise InputError("expected at least one question, each with the same number of answers, at least one")
    shape = (len(answers), sizes.pop())
    logs = np.zeros(shape) if log_weights is None else np.asarray(log_weights, dtype=float)
    if logs.shape != shape or not np.isfinite(logs).all():
        raise InputError(f"log_weights must be finite numbers of shape {shape}, got shape {logs.shape}")
    weights = np.exp(logs - logs.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    winners: list[Hashable | None] = []
    confidence = np.zeros(len(answers))
    for row, (samples, shares) in enumerate(zip(answers, weights, strict=True)):
        totals: dict[Hashable, float] = {}
        for answer, share in zip(samples, shares, strict=True):
            if answer is not None:
                totals[answer] = totals.get(answer, 0.0) + float(share)
        winner = max(totals, key=lambda answer: round(totals[answer], 12), default=None)
        winners.append(winner)
        confidence[row] = totals.get(winner, 0.0)
    return Vote(winners, confidence)
