"""The Brier score taken apart: calibrated, informative, or merely an easy question?"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.analysis.metrics.bins import bin_scores
from bayeslora.analysis.metrics.checks import check_probs_and_labels


class BrierParts(NamedTuple):
    """Parts of the Brier score, each summed over classes; see `brier_decomposition`.

    Attributes:
        reliability: Calibration error, at least 0; lower is better.
        resolution: How much the outcomes differ between bins, at least 0; higher is better.
        uncertainty: Brier score of always forecasting the class frequencies; of the labels alone.
        within_bin_variance: Spread of the forecasts within their bins, at least 0.
        within_bin_covariance: Twice the covariance of forecast and outcome within bins: what the bins hide.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within_bin_variance: float
    within_bin_covariance: float

    @property
    def brier(self) -> float:
        """The Brier score, exactly."""
        within = self.within_bin_variance - self.within_bin_covariance
        return self.reliability - self.resolution + self.uncertainty + within


def brier_decomposition(
    probs: ArrayLike, labels: ArrayLike, *, num_bins: int = 15, binning: str = "width"
) -> BrierParts:
    r"""Reliability, resolution and uncertainty, with the within-bin terms that make them add up exactly.

    For the event "class c" with forecasts :math:`p_i`, outcomes :math:`o_i`, bin means :math:`\bar p_b, \bar o_b` and
    the frequency :math:`\bar o`,

    .. math::
        \mathrm{Brier} = \underbrace{\sum_b \tfrac{n_b}{n} (\bar p_b - \bar o_b)^2}_\text{reliability}
        - \underbrace{\sum_b \tfrac{n_b}{n} (\bar o_b - \bar o)^2}_\text{resolution}
        + \underbrace{\bar o (1 - \bar o)}_\text{uncertainty}
        + \underbrace{\tfrac1n \sum_i (p_i - \bar p_{b(i)})^2}_\text{within-bin variance}
        - \underbrace{\tfrac2n \sum_i (p_i - \bar p_{b(i)}) (o_i - \bar o_{b(i)})}_\text{within-bin covariance}

    summed over the classes, each with its own bins. Murphy's three terms alone add up only if all forecasts of a bin
    are equal.

    Args:
        probs: Predictive probabilities, shape ``(examples, classes)``, rows summing to one.
        labels: Class indices, shape ``(examples,)``.
        num_bins: Bins for each class.
        binning: ``"width"`` or ``"mass"``, as for `expected_calibration_error`.

    Returns:
        The five parts, without a unit, each summed over classes; `BrierParts.brier` is the Brier score.

    Raises:
        InputError: The arrays do not fit that description, or an option is out of range.

    Example:
        >>> parts = brier_decomposition([[0.8, 0.2]] * 4 + [[0.2, 0.8]] * 4, [0, 0, 0, 1, 1, 1, 1, 0])
        >>> round(parts.reliability, 4), round(parts.resolution, 4), round(parts.uncertainty, 4)
        (0.005, 0.125, 0.5)
        >>> round(parts.brier, 4)
        0.38

    References:
        Stephenson, Coelho and Jolliffe (2008), *Two Extra Components in the Brier Score Decomposition*, Eq. 8.
    """
    probs, labels = check_probs_and_labels(probs, labels)
    per_class = [_parts(column, labels == index, num_bins, binning) for index, column in enumerate(probs.T)]
    return BrierParts(*(float(part) for part in np.sum(per_class, axis=0)))


def _parts(forecast: np.ndarray, outcome: np.ndarray, num_bins: int, binning: str) -> tuple[float, ...]:
    bins = bin_scores(forecast, num_bins, binning)
    forecast_mean, outcome_mean = bins.means(forecast)[bins.members], bins.means(outcome)[bins.members]  # (n,) each
    frequency = outcome.mean()
    off_forecast, off_outcome = forecast - forecast_mean, outcome - outcome_mean
    return (
        np.square(forecast_mean - outcome_mean).mean(),
        np.square(outcome_mean - frequency).mean(),
        frequency * (1 - frequency),
        np.square(off_forecast).mean(),
        2 * (off_forecast * off_outcome).mean(),
    )
