"""How far would a number move with another set of examples? The percentile bootstrap.

``scipy.stats.bootstrap`` takes arrays of one dimension, would need the same handling of NaN around it, and its BCa
evaluates the statistic once more for each example.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

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
) -> Interval:
    """Percentile interval of a statistic over examples drawn with replacement, all arrays together.

    Args:
        statistic: A function of the arrays, such as :func:`bayeslora.analysis.brier_score`.
        arrays: Each with the examples along its first axis.
        num_resamples: Sets to draw.
        level: Coverage aimed at.
        seed: Decides them; two methods with one seed see the same examples.

    Returns:
        The statistic of the examples themselves and the quantiles over the sets. Sets where it is NaN are left out;
        with fewer than half of them left the ends are NaN.

    Raises:
        InputError: No arrays, arrays of unequal or no length, or an option out of range.

    Example:
        >>> interval = bootstrap_interval(np.mean, [1.0, 2.0, 3.0, 4.0])
        >>> interval.estimate, interval.lower, interval.upper
        (2.5, 1.5, 3.5)

    References:
        Efron and Tibshirani (1993), *An Introduction to the Bootstrap*, section 13.3.
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
    rows = (rng.integers(size, size=size) for _ in range(num_resamples))
    resampled = np.array([statistic(*(array[chosen] for array in values)) for chosen in rows], dtype=np.float64)
    kept = resampled[~np.isnan(resampled)]
    ends = np.array([np.nan, np.nan])
    if 2 * len(kept) >= num_resamples:
        ends = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(*values)), float(ends[0]), float(ends[1]))


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
