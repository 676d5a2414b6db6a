r"""Is inference right on average? Simulation-based calibration, as numbers.

Draw a truth θ from the prior, data from the model at θ, and S draws from what inference says the posterior is. If it is
right, the rank of θ among the draws is uniform on 0..S, whatever the data. Draws that are too narrow make the extreme
ranks frequent, a shifted mean one end of them.

References:
    Talts, Betancourt, Simpson, Vehtari, Gelman (2018), *Validating Bayesian Inference Algorithms with Simulation-Based
    Calibration*.
    Säilynoja, Bürkner, Vehtari (2022), *Graphical Test for Discrete Uniformity and Its Applications in
    Goodness-of-Fit Evaluation and Multiple Sample Comparison*.
"""

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import beta, binom, chi2

from bayeslora.analysis.metrics.checks import check_level
from bayeslora.errors import InputError


class Coverage(NamedTuple):
    """How often central credible intervals hold the truth, each field of shape ``(levels,)``.

    ``nominal`` is the level that ranks can express, next to the one asked for; ``lower`` and ``upper`` bound the share
    in the long run (Clopper-Pearson, 95 %).
    """

    nominal: np.ndarray
    share: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


class RankECDF(NamedTuple):
    """Share of ranks up to each value minus the uniform share, at ``z`` = (k + 1)/(S + 1), and where it may lie.

    ``lower`` and ``upper`` hold the whole curve with the probability that was asked for, if ranks are uniform.
    """

    z: np.ndarray
    difference: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def ranks(truth: ArrayLike, draws: ArrayLike) -> np.ndarray:
    """How many draws lie below the truth.

    Args:
        truth: Shape ``(simulations, ...)``.
        draws: S of them, independent, shape ``(simulations, S, ...)``.

    Returns:
        Integers from 0 to S, shape ``(simulations, ...)``.

    Raises:
        InputError: The shapes do not fit, or a value is NaN.
    """
    truth, draws = np.asarray(truth), np.asarray(draws)
    if draws.ndim < 2 or (draws.shape[:1] + draws.shape[2:]) != truth.shape:
        raise InputError(
            f"draws must have shape (simulations, draws, ...) with truth's dimensions around draws: truth has "
            f"{truth.shape}, draws {draws.shape}"
        )
    if np.isnan(truth).any() or np.isnan(draws).any():
        raise InputError("truth or draws hold NaN, which has no rank")
    return (draws < np.expand_dims(truth, 1)).sum(axis=1)


def chi_square_test(ranks: ArrayLike, num_draws: int, *, bins: int = 10) -> float:
    """p-value of Pearson's χ² test that ranks are uniform, in equal bins; it sees any shape, none especially well.

    Args:
        ranks: Of independent simulations, 0 to ``num_draws``, shape ``(simulations,)``; five to a bin at least.
        num_draws: S; ``bins`` must divide S + 1.

    Raises:
        InputError: Ranks out of range, too few of them, or bins of unequal size.

    Example:
        >>> uniform, narrow = np.arange(100), np.repeat([0, 99], 50)
        >>> chi_square_test(uniform, 99)
        1.0
        >>> chi_square_test(narrow, 99) < 1e-6
        True
    """
    values = _check(ranks, num_draws)
    if (num_draws + 1) % bins:
        raise InputError(f"{bins} bins do not divide the {num_draws + 1} possible ranks: change bins or num_draws")
    expected = len(values) / bins
    if expected < 5:
        raise InputError(f"{len(values)} ranks are too few for {bins} bins: five to a bin at least")
    counts = np.bincount(values * bins // (num_draws + 1), minlength=bins)
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), bins - 1))


def ecdf_test(ranks: ArrayLike, num_draws: int, *, repeats: int = 2000, seed: int = 0) -> float:
    """p-value of the test that ranks are uniform, by the point where their ECDF is least likely.

    Its distribution is that of ``repeats`` simulated sets of uniform ranks, so no p-value is below 1/(repeats + 1).

    Args:
        ranks: Of independent simulations, 0 to ``num_draws``, shape ``(simulations,)``.
        num_draws: S.
        repeats: Simulated sets of ranks.
        seed: Decides them.

    Raises:
        InputError: Ranks that are no integers, none, or out of range.

    Example:
        >>> uniform, narrow = np.arange(100), np.repeat([0, 99], 50)
        >>> ecdf_test(uniform, 99) > 0.9, ecdf_test(narrow, 99) < 0.001
        (True, True)

    References:
        Säilynoja et al. (2022), algorithm 2.
    """
    values = _check(ranks, num_draws)
    observed = _least_likely(_cumulative(values[None], num_draws), len(values))
    return float((1 + (_simulated(len(values), num_draws, repeats, seed) <= observed).sum()) / (repeats + 1))


def rank_ecdf(ranks: ArrayLike, num_draws: int, *, level: float = 0.95, repeats: int = 2000, seed: int = 0) -> RankECDF:
    """The ECDF of ranks against the uniform one, with a simultaneous band.

    Args:
        ranks: Of independent simulations, 0 to ``num_draws``, shape ``(simulations,)``.
        num_draws: S.
        level: Probability with which uniform ranks stay within the band all along.
        repeats: Simulated sets of ranks behind the band.
        seed: Decides them.

    Returns:
        A curve of S points; all of its fields are shares in ``[-1, 1]``, shape ``(S,)``.

    Raises:
        InputError: Ranks that are no integers, none, or out of range, or a level that is no share.

    Example:
        >>> curve = rank_ecdf(np.repeat([0, 9], 50), 9)
        >>> curve.difference.round(2)  # half of the ranks are 0, where a tenth should be
        array([ 0.4,  0.3,  0.2,  0.1,  0. , -0.1, -0.2, -0.3, -0.4])
        >>> bool((curve.difference > curve.upper).any())
        True
    """
    values = _check(ranks, num_draws)
    gamma = np.quantile(_simulated(len(values), num_draws, repeats, seed), 1 - check_level(level))
    z = np.arange(1, num_draws + 1) / (num_draws + 1)
    count = len(values)
    lower, upper = (binom.ppf(tail, count, z) / count - z for tail in (gamma / 2, 1 - gamma / 2))
    return RankECDF(z, _cumulative(values[None], num_draws)[0] / count - z, lower, upper)


def coverage(ranks: ArrayLike, num_draws: int, *, levels: ArrayLike = (0.5, 0.8, 0.9)) -> Coverage:
    """Share of simulations whose truth lies in the central interval of the draws.

    Args:
        ranks: Of independent simulations, 0 to ``num_draws``, shape ``(simulations,)``.
        num_draws: S.
        levels: Levels asked for, shape ``(levels,)``.
    """
    values = _check(ranks, num_draws)
    tails = (1 - np.array([check_level(level) for level in np.atleast_1d(np.asarray(levels))])) / 2
    out = np.round(tails * (num_draws + 1)).astype(int)  # ranks left out at each end
    inside = ((values >= out[:, None]) & (values <= num_draws - out[:, None])).sum(axis=1)
    outside = len(values) - inside
    lower = np.where(inside > 0, beta.ppf(0.025, np.maximum(inside, 1), outside + 1), 0.0)
    upper = np.where(outside > 0, beta.ppf(0.975, inside + 1, np.maximum(outside, 1)), 1.0)
    return Coverage((num_draws + 1 - 2 * out) / (num_draws + 1), inside / len(values), lower, upper)


def _check(ranks: ArrayLike, num_draws: int) -> np.ndarray:
    values = np.asarray(ranks)
    if values.ndim != 1 or len(values) == 0 or not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"ranks must be integers of shape (simulations,), got {values.dtype} of shape {values.shape}")
    if values.min() < 0 or values.max() > num_draws:
        raise InputError(f"ranks must lie in 0..{num_draws}, but are {values.min()} to {values.max()}")
    return values


def _cumulative(ranks: np.ndarray, num_draws: int) -> np.ndarray:
    """Ranks up to 0, 1, ..., S − 1 in each set: ``(sets, simulations)`` to ``(sets, S)``."""
    sets = np.arange(len(ranks))[:, None] * (num_draws + 1)
    counts = np.bincount((ranks + sets).ravel(), minlength=len(ranks) * (num_draws + 1))
    return counts.reshape(len(ranks), -1).cumsum(axis=1)[:, :-1]


def _least_likely(cumulative: np.ndarray, count: int) -> np.ndarray:
    """Twice the smaller tail probability at the least likely point of each ECDF, shape ``(sets,)``."""
    z = np.arange(1, cumulative.shape[1] + 1) / (cumulative.shape[1] + 1)
    tails = np.minimum(binom.cdf(cumulative, count, z), binom.sf(cumulative - 1, count, z))
    return 2 * tails.min(axis=1)


@functools.lru_cache(maxsize=16)
def _simulated(count: int, num_draws: int, repeats: int, seed: int) -> np.ndarray:
    uniform = np.random.default_rng(seed).integers(num_draws + 1, size=(repeats, count))
    return _least_likely(_cumulative(uniform, num_draws), count)
