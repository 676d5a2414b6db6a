"""The draws of the adapters: eigenvalues, mixture balance, contraction, and how many draws are enough."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import entr

from bayeslora.analysis.draws.adapter_names import network_order, short_names
from bayeslora.analysis.metrics.bootstrap import resample_counts
from bayeslora.analysis.metrics.checks import check_level
from bayeslora.errors import InputError


def effective_components(mixture_weights: ArrayLike) -> np.ndarray:
    r"""How many of the N components carry the mixture: :math:`1 / \sum_k \pi_k^2`, from 1 to N.

    Args:
        mixture_weights: π, shape ``(..., N)``, non-negative, summing to one over the last axis.

    Raises:
        InputError: The array does not fit that description.

    Example:
        >>> effective_components([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]])
        array([4., 2.])
    """
    return 1.0 / np.square(_check_weights(mixture_weights)).sum(axis=-1)


def mixture_entropy(mixture_weights: ArrayLike) -> np.ndarray:
    r"""Entropy of the mixture weights in nats: :math:`-\sum_k \pi_k \log \pi_k`, from 0 to log N.

    Args:
        mixture_weights: π, shape ``(..., N)``, non-negative, summing to one over the last axis.

    Raises:
        InputError: The array does not fit that description.

    Example:
        >>> mixture_entropy([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]).round(4)  # log 4, and none
        array([1.3863, 0.    ])
    """
    return entr(_check_weights(mixture_weights)).sum(axis=-1)


def eigenvalues(covariance: ArrayLike) -> np.ndarray:
    """Eigenvalues of Σ, largest first.

    Args:
        covariance: Shape ``(..., r, r)``, symmetric. Adapters of smaller rank are padded with NaN, as in ArviZ data.

    Returns:
        Shape ``(..., r)``, with NaN at the end where there was padding.

    Raises:
        InputError: The array does not fit that description.

    Example:
        >>> eigenvalues([[2.0, 1.0], [1.0, 2.0]])
        array([3., 1.])
    """
    matrices = np.asarray(covariance, dtype=np.float64)
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2] or not matrices.size:
        raise InputError(f"covariance must have shape (..., r, r), but has shape {matrices.shape}")
    missing = np.isnan(np.diagonal(matrices, axis1=-2, axis2=-1))  # (..., r)
    padded = missing[..., :, None] | missing[..., None, :]
    kept = np.where(padded, 0.0, matrices)
    if not np.isfinite(kept).all() or not np.allclose(kept, np.swapaxes(kept, -1, -2), rtol=1e-4):
        raise InputError("covariance must be finite and symmetric, but for rows and columns of NaN at the end")
    ascending = np.linalg.eigvalsh(kept)  # a padded row adds an eigenvalue of zero, below all others
    rank = (~missing).sum(axis=-1, keepdims=True)
    return np.where(np.arange(missing.shape[-1]) < rank, ascending[..., ::-1], np.nan)


def contraction(posterior: ArrayLike, prior: ArrayLike) -> np.ndarray:
    r"""How much the data narrowed a parameter: :math:`1 - \mathrm{Var}(\text{posterior}) / \mathrm{Var}(\text{prior})`.

    Args:
        posterior: Draws, shape ``(draws, ...)``.
        prior: Draws, shape ``(other draws, ...)``.

    Returns:
        Shape ``(...)``: near 1 where the data decide, 0 where they said nothing about the width, negative where the
        posterior is wider than the prior; NaN where the prior has no variance.

    Raises:
        InputError: The shapes differ beyond the first axis, or one has fewer than two draws.

    Example:
        >>> contraction(posterior=[[1.0], [2.0], [3.0]], prior=[[0.0], [2.0], [4.0]])  # variances 1 and 4
        array([0.75])

    References:
        Betancourt (2018), *Towards A Principled Bayesian Workflow* (posterior contraction).
    """
    after, before = np.asarray(posterior, dtype=np.float64), np.asarray(prior, dtype=np.float64)
    if after.ndim == 0 or before.ndim == 0 or after.shape[1:] != before.shape[1:] or min(len(after), len(before)) < 2:
        raise InputError(
            "posterior and prior must have shapes (draws, ...) that agree but for two or more draws each; "
            f"they are {after.shape} and {before.shape}"
        )
    width = before.var(axis=0, ddof=1)
    return 1.0 - after.var(axis=0, ddof=1) / np.where(width > 0, width, np.nan)


def noise_contraction(posterior_scale: ArrayLike, prior_scale: ArrayLike) -> np.ndarray:
    r"""`contraction` of the entries of A, averaged over them, from the scale of the noise.

    The mean of A is μ under prior and posterior, whatever π and Σ are, so the variance of an entry is the mean square
    of ``noise_scale`` over their draws:

    .. math:: 1 - \frac{E_q[\mathrm{scale}^2]}{E_p[\mathrm{scale}^2]}

    Args:
        posterior_scale: ``noise_scale`` of the posterior's draws, shape ``(draws, adapters)``.
        prior_scale: The same of the prior's, shape ``(other draws, adapters)``.

    Returns:
        Shape ``(adapters,)``.

    Raises:
        InputError: The shapes are not those.

    Example:
        >>> noise_contraction([[0.1], [0.1]], [[0.2], [0.2]])  # half the scale, a quarter of the variance
        array([0.75])
    """
    after, before = np.asarray(posterior_scale, dtype=np.float64), np.asarray(prior_scale, dtype=np.float64)
    if after.ndim != 2 or before.ndim != 2 or after.shape[1] != before.shape[1] or not len(after) or not len(before):
        raise InputError(
            "posterior_scale and prior_scale must have shapes (draws, adapters) with the same adapters; "
            f"they are {after.shape} and {before.shape}"
        )
    return 1.0 - np.square(after).mean(axis=0) / np.square(before).mean(axis=0)


def adapter_table(data: Any) -> pd.DataFrame:
    """One row per adapter, in network order: how wide its posterior is, and what its mixture looks like.

    Args:
        data: What `to_arviz` returned.

    Returns:
        Indexed by the adapter's name. ``layer`` (missing outside the stack) and ``kind`` of projection;
        ``mean_scale`` and ``noise_scale``, the root mean squares of μ and of the noise on A; ``noise_to_signal``, the
        second over the first; ``effective_components`` of N; ``mixture_entropy`` in nats; ``largest_eigenvalue`` and
        ``condition`` (largest over smallest) of Σ. Means over the draws, but ``noise_scale`` is a root mean square
        and ``condition`` a median.

    Raises:
        InputError: The data hold no draws over adapters.

    Example:
        >>> table = adapter_table(to_arviz(bayes, num_samples=8))
        >>> table[["layer", "kind"]].head(2).to_dict("records")
        [{'layer': 0, 'kind': 'query'}, {'layer': 0, 'kind': 'key'}]
        >>> bool(table["effective_components"].between(1, 4).all())
        True
    """
    names = [str(name) for name in data["posterior"]["adapter"].values]
    order = network_order(names)
    short = short_names(names)
    noise = np.sqrt(np.square(adapter_draws(data, "noise_scale")).mean(axis=0))
    mean = data["constant_data"]["mean_scale"].values
    weights = adapter_draws(data, "mixture_weights")
    spectrum = eigenvalues(adapter_draws(data, "covariance"))  # (S, K, r)
    table = pd.DataFrame(
        {
            "layer": pd.array([name.layer for name in short], dtype="Int64"),
            "kind": [name.kind for name in short],
            "mean_scale": mean,
            "noise_scale": noise,
            "noise_to_signal": noise / np.where(mean > 0, mean, np.nan),
            "effective_components": effective_components(weights).mean(axis=0),
            "mixture_entropy": mixture_entropy(weights).mean(axis=0),
            "largest_eigenvalue": spectrum[..., 0].mean(axis=0),
            "condition": np.median(spectrum[..., 0] / np.nanmin(spectrum, axis=-1), axis=0),
        },
        index=pd.Index(names, name="adapter"),
    )
    return table.iloc[order]


def adapter_draws(data: Any, variable: str) -> np.ndarray:
    """A variable of the posterior with the chains one after the other: ``(draws, adapters, ...)``.

    Raises:
        InputError: There is no such variable over adapters.
    """
    posterior = data["posterior"]
    fitting = [name for name, values in posterior.data_vars.items() if "adapter" in values.dims]
    if variable not in fitting:
        raise InputError(f"the posterior has no variable {variable!r} over adapters; it has {', '.join(fitting)}")
    values = posterior[variable].transpose("chain", "draw", "adapter", ...).values
    return values.reshape(-1, *values.shape[2:])


class VarianceShares(NamedTuple):
    """Shares of the variance of the logits, see `variance_shares`.

    Attributes:
        parts: Names of the P parts.
        estimate: ``(P + 1,)``: each part's variance over the total, and last the remainder, one minus their sum.
        lower, upper: ``(P + 1,)``, ends of the intervals.
        level: Their coverage.
        num_draws: How many draws they are from.
    """

    parts: list[str]
    estimate: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    level: float
    num_draws: int


def variance_shares(
    parts: Sequence[str],
    deviations: ArrayLike,
    *,
    level: float = 0.9,
    num_resamples: int = 1000,
    seed: int = 0,
) -> VarianceShares:
    """Which part of the network causes how much of the uncertainty, with a bootstrap interval over the draws.

    Args:
        parts: Names of the P parts, as :func:`bayeslora.inference.attribution.attribute_variance` returns them.
        deviations: Its squared deviations, shape ``(draws, P + 1)``, the last column for all parts together.
        level: Coverage of the intervals.
        num_resamples: Sets of draws to take.
        seed: Decides them.

    Returns:
        Shares without a unit, and the ends of their intervals. A share may be negative: parts can cancel.

    Raises:
        InputError: The shapes do not fit, the total is zero, or an option is out of range.

    Example:
        >>> shares = variance_shares(["query", "value"], [[1.0, 2.0, 4.0], [2.0, 4.0, 8.0]])
        >>> shares.estimate  # the two, and what they leave
        array([0.25, 0.5 , 0.25])
    """
    check_level(level)
    squares = np.asarray(deviations, dtype=np.float64)
    if squares.ndim != 2 or squares.shape[1] != len(parts) + 1 or len(squares) < 2:
        raise InputError(
            f"deviations must have shape (draws, {len(parts) + 1}) with two draws or more, but is {squares.shape}"
        )
    if not squares[:, -1].sum() > 0:
        raise InputError("the draws do not differ: there is no variance to share out")
    counts = np.concatenate(list(resample_counts(len(squares), num_resamples, seed)()))
    ends = np.quantile(_shares(counts @ squares), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return VarianceShares(list(parts), _shares(squares.sum(axis=0)), ends[0], ends[1], level, len(squares))


def _shares(sums: np.ndarray) -> np.ndarray:
    shares = sums[..., :-1] / sums[..., -1:]
    return np.concatenate([shares, 1 - shares.sum(axis=-1, keepdims=True)], axis=-1)


class DrawsNeeded(NamedTuple):
    """How the error of an average over draws falls with their number; see `draws_needed`.

    Attributes:
        enough: The smallest number of draws with an error of at most ``tolerance``.
        tolerance: What was asked for, in the units of the values.
        deviation: Standard deviation of one draw around the mean, root mean square over the values.
        num_draws: Numbers of draws 1, 2, 4, ... up to half of those given.
        measured: What means of that many draws differ by in fact: the standard deviation between the means of
            disjoint blocks, root mean square over the values.
    """

    enough: int
    tolerance: float
    deviation: float
    num_draws: np.ndarray
    measured: np.ndarray

    def error(self, num_draws: ArrayLike) -> np.ndarray:
        """Standard error of the mean of so many independent draws: ``deviation / sqrt(num_draws)``."""
        return self.deviation / np.sqrt(np.asarray(num_draws, dtype=np.float64))


def draws_needed(sample_values: ArrayLike, *, tolerance: float = 0.01) -> DrawsNeeded:
    r"""How many draws of the posterior are enough for their average?

    The mean of S independent draws is off by :math:`\sigma / \sqrt S`, so the answer is
    :math:`\lceil (\sigma / \text{tolerance})^2 \rceil`, with σ² the variance over draws, averaged over examples and
    classes. Example by example the error may be larger. ``measured`` shows whether the law holds.

    Args:
        sample_values: What is averaged, such as the probabilities of each draw; shape ``(draws, ...)``.
        tolerance: Standard error that will do, in the values' units (0.01 is a percentage point of probability).

    Raises:
        InputError: Fewer than four draws, values that are not finite, or a tolerance that is not positive.

    Example:
        >>> needed = draws_needed([[0.4], [0.6], [0.4], [0.6]] * 25, tolerance=0.01)
        >>> needed.enough, round(needed.deviation, 4)
        (102, 0.1005)
    """
    values = np.asarray(sample_values, dtype=np.float64)
    if values.ndim == 0 or len(values) < 4 or not values.size:
        raise InputError(f"sample_values must have shape (draws, ...) with four draws or more, but is {values.shape}")
    if not np.isfinite(values).all():
        raise InputError("sample_values holds NaN or infinite values")
    if not tolerance > 0:
        raise InputError(f"tolerance must be greater than 0, but is {tolerance!r}")
    sizes = 2 ** np.arange(int(np.log2(len(values))))
    measured = np.array([_between_blocks(values, int(size)) for size in sizes])
    variance = float(measured[0] ** 2)
    enough = max(1, int(np.ceil(variance / tolerance**2 - 1e-9)))
    return DrawsNeeded(enough, float(tolerance), float(measured[0]), sizes, measured)


def _between_blocks(values: np.ndarray, size: int) -> float:
    """Root mean square, over the values, of the standard deviation between means of blocks of ``size`` draws."""
    blocks = len(values) // size
    means = values[: blocks * size].reshape(blocks, size, *values.shape[1:]).mean(axis=1)
    return float(np.sqrt(means.var(axis=0, ddof=1).mean()))


def _check_weights(mixture_weights: ArrayLike) -> np.ndarray:
    weights = np.asarray(mixture_weights, dtype=np.float64)
    if weights.ndim == 0 or not weights.size or (weights < 0).any() or not np.allclose(weights.sum(-1), 1, atol=1e-3):
        raise InputError("mixture_weights must have shape (..., N), non-negative and summing to one over the last axis")
    return weights
