r"""Scores of predicted numbers: sharp and honest at once, in the labels' unit.

The posterior predictive of a number is a mixture of normals, one for each of S draws, with the likelihood's σ; at its
mean, or where the draws were not kept, one normal. Intervals are those of the normal with its mean and variance.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import beta, norm

from bayeslora.analysis.metrics.checks import check_examples, check_level
from bayeslora.errors import InputError

LEVEL = 0.9  # of the interval in tables


def continuous_ranked_probability_score(labels: ArrayLike, means: ArrayLike, scale: ArrayLike) -> float:
    r"""CRPS of an equal mixture of S normals: the mean absolute error, for a prediction that is a distribution.

    .. math::
        \mathrm{CRPS} = \int (F(t) - [t \ge y])^2 dt
        = \frac1S \sum_s A(y - m_s, \sigma^2) - \frac{1}{2 S^2} \sum_{s, t} A(m_s - m_t, 2 \sigma^2)

    with :math:`A(d, v) = d\,(2 \Phi(d / \sqrt v) - 1) + 2 \sqrt v\, \varphi(d / \sqrt v)`,
    the mean of :math:`|x|` for x of N(d, v).
    Averaged over examples.

    Args:
        labels: Numbers, shape ``(examples,)``.
        means: Of every draw, shape ``(draws, examples)``; of one normal, ``(examples,)``.
        scale: σ of every normal, greater than 0; one for all, or ``(examples,)``.

    Returns:
        A float of at least 0 in the labels' unit; lower is better.

    Raises:
        InputError: The arrays do not fit that description.

    Example:
        >>> round(continuous_ranked_probability_score([0.0], [0.0], 1.0), 4)  # (√2 − 1) / √π
        0.2337

    References:
        Gneiting and Raftery (2007), *Strictly Proper Scoring Rules, Prediction, and Estimation*, Eq. 20-21; Grimit et
        al. (2006), *The continuous ranked probability score for circular variables*, Eq. 5, for the mixture.
    """
    truth = check_examples(labels, name="labels")
    draws = np.atleast_2d(np.asarray(means, dtype=np.float64))
    if draws.ndim != 2 or draws.shape[1] != len(truth) or not draws.size or not np.isfinite(draws).all():
        raise InputError(
            f"means must be finite numbers of shape (draws, {len(truth)}) or ({len(truth)},), but have shape "
            f"{np.shape(means)}"
        )
    sigma = _check_scale(scale, len(truth))
    to_truth = _mean_distance(truth - draws, sigma).mean(0)
    apart = np.mean([_mean_distance(draws - draw, np.sqrt(2) * sigma).mean(0) for draw in draws], axis=0)
    return float((to_truth - apart / 2).mean())


def interval_score(labels: ArrayLike, lower: ArrayLike, upper: ArrayLike, *, level: float = LEVEL) -> float:
    r"""Winkler's score of central intervals: their width, and a fine for every label outside.

    .. math:: (u - l) + \frac{2}{\alpha} (l - y)_+ + \frac{2}{\alpha} (y - u)_+, \quad \alpha = 1 - \text{level}

    averaged over examples. The true quantiles have the lowest expected score.

    Args:
        labels: Numbers, shape ``(examples,)``.
        lower, upper: Ends of the intervals, in the labels' unit, shape ``(examples,)``.
        level: The share of labels that they are to hold.

    Returns:
        A float of at least 0 in the labels' unit; lower is better.

    Raises:
        InputError: The arrays do not fit that description, or an end lies beyond the other.

    Example:
        >>> round(interval_score([0.0, 3.0], [-1.0, -1.0], [1.0, 1.0], level=0.9), 4)  # 2, and 2 + 2 · 20
        22.0

    References:
        Gneiting and Raftery (2007), *Strictly Proper Scoring Rules, Prediction, and Estimation*, Eq. 43.
    """
    truth = check_examples(labels, name="labels")
    low = check_examples(lower, name="lower", size=len(truth))
    high = check_examples(upper, name="upper", size=len(truth))
    if (low > high).any():
        raise InputError("every lower end must lie at or below the upper one")
    outside = np.maximum(low - truth, 0) + np.maximum(truth - high, 0)
    return float((high - low + 2 / (1 - check_level(level)) * outside).mean())


class IntervalCoverage(NamedTuple):
    """How often central intervals hold the label; each of shape ``(levels,)``.

    Attributes:
        level: The share that is asked for.
        coverage: The share that there is.
        lower: Lower end of the coverage's 95 % interval (Clopper and Pearson).
        upper: Upper end of it.
    """

    level: np.ndarray
    coverage: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def interval_coverage(
    labels: ArrayLike, mean: ArrayLike, std: ArrayLike, *, levels: ArrayLike = (0.5, 0.8, 0.9)
) -> IntervalCoverage:
    """Observed against nominal coverage of the central intervals of normal predictions.

    Args:
        labels: Numbers, shape ``(examples,)``.
        mean, std: Of the predictive, in the labels' unit, shape ``(examples,)``.
        levels: Shares asked for, shape ``(levels,)``.

    Raises:
        InputError: The arrays do not fit that description, or a level is no share.

    Example:
        >>> interval_coverage([0.0, 1.0, 2.0, -3.0], np.zeros(4), np.ones(4), levels=[0.5, 0.95]).coverage
        array([0.25, 0.5 ])

    References:
        Kuleshov, Fenner and Ermon (2018), *Accurate Uncertainties for Deep Learning Using Calibrated Regression*,
        section 3.
    """
    standard = np.abs(_standardized(labels, mean, std))
    asked = np.array([check_level(level) for level in np.atleast_1d(np.asarray(levels, dtype=np.float64))])
    inside = (standard <= norm.ppf((1 + asked) / 2)[:, None]).sum(1)
    outside = len(standard) - inside
    lower = np.where(inside > 0, beta.ppf(0.025, np.maximum(inside, 1), outside + 1), 0.0)
    upper = np.where(outside > 0, beta.ppf(0.975, inside + 1, np.maximum(outside, 1)), 1.0)
    return IntervalCoverage(asked, inside / len(standard), lower, upper)


def regression_summary(
    labels: ArrayLike,
    mean: ArrayLike,
    std: ArrayLike,
    *,
    sample_means: ArrayLike | None = None,
    noise_scale: float | None = None,
) -> dict[str, float]:
    """The numbers that tell how honest predicted numbers are.

    Args:
        labels: Numbers, shape ``(examples,)``.
        mean, std: Of the predictive, in the labels' unit, shape ``(examples,)``.
        sample_means: Of every draw, ``(draws, examples)``, and with them ``noise_scale``, the likelihood's σ: the CRPS
            is then that of their mixture, and else that of one normal.

    Returns:
        ``crps`` and ``interval_score`` (of 90 % intervals) in the labels' unit, lower is better; ``coverage`` of these
        intervals, where 0.9 is right.

    Raises:
        InputError: The arrays do not fit that description.

    Example:
        >>> {name: round(value, 3) for name, value in regression_summary([0.0, 2.0], [0.0, 0.0], [1.0, 1.0]).items()}
        {'crps': 0.843, 'interval_score': 6.841, 'coverage': 0.5}
    """
    standard = _standardized(labels, mean, std)
    middle, deviation = np.asarray(mean, dtype=np.float64), np.asarray(std, dtype=np.float64)
    half = norm.ppf((1 + LEVEL) / 2)
    drawn = sample_means is not None and noise_scale is not None
    mixture = (sample_means, noise_scale) if drawn else (middle, deviation)
    return {
        "crps": continuous_ranked_probability_score(labels, *mixture),
        "interval_score": interval_score(labels, middle - half * deviation, middle + half * deviation),
        "coverage": float((np.abs(standard) <= half).mean()),
    }


def _standardized(labels: ArrayLike, mean: ArrayLike, std: ArrayLike) -> np.ndarray:
    truth = check_examples(labels, name="labels")
    return (truth - check_examples(mean, name="mean", size=len(truth))) / _check_scale(std, len(truth), name="std")


def _check_scale(scale: ArrayLike, size: int, *, name: str = "scale") -> np.ndarray:
    sigma = np.asarray(scale, dtype=np.float64)
    if sigma.shape not in ((), (size,)) or not (np.isfinite(sigma) & (sigma > 0)).all():
        raise InputError(f"{name} must be positive, one number or ({size},), but has shape {sigma.shape}")
    return sigma


def _mean_distance(difference: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Mean of |N(difference, deviation²)|."""
    standard = difference / deviation
    return difference * (2 * norm.cdf(standard) - 1) + 2 * deviation * norm.pdf(standard)
