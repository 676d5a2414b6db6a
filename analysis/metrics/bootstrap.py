"""How far would a number move with another set of examples? The bias-corrected percentile bootstrap.

``scipy.stats.bootstrap`` takes arrays of one dimension, would need the same handling of NaN around it, and its BCa
evaluates the statistic once more for each example.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm

from bayeslora.analysis.metrics.checks import check_level
from bayeslora.errors import InputError


class Interval(NamedTuple):
    """A number with its interval: ``estimate``, ``lower``, ``upper``."""

    estimate: float
    lower: float
    upper: float


def bootstrap_interval(
    statistic: Callable[..., float],
    *arrays: ArrayLike,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> Interval:
    """Bias-corrected percentile interval of a statistic over examples drawn with replacement, all arrays together.

    A calibration error is larger on a resampled set than on the examples themselves, and its plain percentiles can lie
    above the estimate. Here the quantiles are shifted by how much of the sets lies below it; where the bias is so
    large that they still leave it out, the interval is widened to it.

    Args:
        statistic: A function of the arrays, such as :func:`bayeslora.analysis.brier_score`.
        arrays: Each with the examples along its first axis.
        num_resamples: Sets to draw.
        level: Coverage aimed at.
        seed: Decides them; two methods with one seed see the same examples.
        groups: Which rows belong together, one number a row: whole groups are drawn then, as the words of a sentence
            are, which tell less than as many words of different sentences.

    Returns:
        The statistic of the examples themselves, and the ends, between which it lies. Sets where it is NaN are left
        out; with fewer than half of them left the ends are NaN.

    Raises:
        InputError: No arrays, arrays of unequal or no length, or an option out of range.

    Example:
        >>> interval = bootstrap_interval(np.mean, [1.0, 2.0, 3.0, 4.0])
        >>> interval.estimate, interval.lower, interval.upper
        (2.5, 1.5, 3.5)

    References:
        Efron (1981), *Nonparametric standard errors and confidence intervals*, section 7; Efron and Tibshirani (1993),
        *An Introduction to the Bootstrap*, sections 13.3 and 14.3.
    """
    check_level(level)
    values = [np.asarray(array) for array in arrays]
    lengths = {len(array) if array.ndim else 0 for array in values}
    if len(lengths) != 1 or 0 in lengths:
        shapes = ", ".join(str(array.shape) for array in values) or "none"
        raise InputError(f"the arrays must have one row per example, equally many and at least one; shapes: {shapes}")
    (size,) = lengths
    check_resamples(num_resamples)
    rng = np.random.default_rng(seed)
    members = None if groups is None else _members(np.asarray(groups), size)
    count = size if members is None else len(members)
    chosen_each = (rng.integers(count, size=count) for _ in range(num_resamples))
    rows = (c if members is None else np.concatenate([members[i] for i in c]) for c in chosen_each)
    resampled = np.array([statistic(*(array[chosen] for array in values)) for chosen in rows], dtype=np.float64)
    kept = resampled[~np.isnan(resampled)]
    estimate = float(statistic(*values))
    if 2 * len(kept) < num_resamples or math.isnan(estimate):
        return Interval(estimate, math.nan, math.nan)
    below = (np.mean(kept < estimate) + np.mean(kept <= estimate)) / 2
    tails = norm.ppf([(1 - level) / 2, (1 + level) / 2])
    ends = np.quantile(kept, norm.cdf(2 * norm.ppf(below) + tails)) if 0 < below < 1 else [kept.min(), kept.max()]
    return Interval(estimate, min(float(ends[0]), estimate), max(float(ends[1]), estimate))


def _members(groups: np.ndarray, size: int) -> list[np.ndarray]:
    """The rows of each group."""
    if groups.shape != (size,):
        raise InputError(f"groups have one number for each of the {size} rows; their shape is {groups.shape}")
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def resample_counts(size: int, num_resamples: int, seed: int) -> Callable[[], Iterator[np.ndarray]]:
    """How often each of ``size`` examples occurs in each resampled set, in parts ``(some sets, size)``.

    Each call of what is returned goes through the same sets.

    Raises:
        InputError: ``num_resamples`` is not a positive integer.
    """
    check_resamples(num_resamples)
    at_once = max(1, 2**22 // size)

    def parts() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        for start in range(0, num_resamples, at_once):
            yield rng.multinomial(size, np.full(size, 1.0 / size), size=min(at_once, num_resamples - start))

    return parts


def check_resamples(num_resamples: int) -> int:
    """A positive number of resampled sets."""
    if not isinstance(num_resamples, (int, np.integer)) or num_resamples < 1:
        raise InputError(f"num_resamples must be an integer of at least 1, but is {num_resamples!r}")
    return num_resamples
