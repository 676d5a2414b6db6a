"""Is the model unsure where people disagree?"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import entr
from scipy.stats import rankdata

from bayeslora.analysis.metrics.bootstrap import Interval, bootstrap_interval
from bayeslora.analysis.metrics.checks import check_examples
from bayeslora.errors import InputError


def vote_entropy(share: ArrayLike) -> np.ndarray:
    """Disagreement of people who vote on two classes, in nats: 0 where all agree, log 2 where they split evenly.

    Args:
        share: Share of the votes for one class, in ``[0, 1]``, shape ``(examples,)``.

    Raises:
        InputError: The array does not fit that description.

    Example:
        >>> vote_entropy([0.0, 0.5, 0.9]).round(4)
        array([0.    , 0.6931, 0.3251])
    """
    votes = check_examples(share, name="share")
    if votes.min() < 0 or votes.max() > 1:
        raise InputError("share must lie between 0 and 1")
    return entr(votes) + entr(1 - votes)


def rank_correlation(
    uncertainty: ArrayLike, disagreement: ArrayLike, *, num_resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Spearman's correlation with its percentile bootstrap interval over examples.

    Args:
        uncertainty: Of the model, such as its predictive entropy; shape ``(examples,)``. With several runs,
            ``(examples, runs)``: the correlation is then the mean of theirs.
        disagreement: Of people on the same examples, such as the standard deviation of their ratings.
        num_resamples, level, seed: As for `bootstrap_interval`.

    Returns:
        Estimate and interval in ``[-1, 1]``; NaN where either side is constant.

    Raises:
        InputError: The arrays do not fit that description.

    Example:
        >>> rank_correlation([0.1, 0.2, 0.3, 0.4], [1, 2, 4, 3]).estimate
        0.8
    """
    theirs = check_examples(disagreement, name="disagreement")
    runs = np.asarray(uncertainty)
    runs = runs[:, None] if runs.ndim == 1 else runs
    ours = np.stack([check_examples(run, name="uncertainty", size=len(theirs)) for run in runs.T], axis=1)
    return bootstrap_interval(_spearman, ours, theirs, num_resamples=num_resamples, level=level, seed=seed)


def _spearman(runs: np.ndarray, other: np.ndarray) -> float:
    """Mean over runs ``(examples, runs)``; NaN if either side is constant, without the warning."""
    if np.ptp(runs, axis=0).min() == 0 or np.ptp(other) == 0:
        return float("nan")
    ranks, order = rankdata(runs, axis=0), rankdata(other)
    ranks, order = ranks - ranks.mean(axis=0), order - order.mean()
    return float(np.mean(order @ ranks / np.sqrt(np.square(ranks).sum(axis=0) * np.square(order).sum())))
