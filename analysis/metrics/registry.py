"""The metrics of results tables: what :data:`METRICS` lists is in scores, comparisons, summaries and reports."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.analysis.metrics.bins import bin_scores
from bayeslora.analysis.metrics.calibration import (
    accuracy,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
)
from bayeslora.analysis.metrics.checks import check_probs_and_labels

Reweighted = Callable[[np.ndarray], np.ndarray]  # from weights (R, n), each row summing to n, to the metric (R,)


@dataclass(frozen=True)
class Metric:
    """A number that class probabilities have, given the labels.

    Attributes:
        name: In files, and in the columns of tables.
        title: In headers.
        function: Of probabilities ``(examples, classes)`` and labels ``(examples,)``.
        higher_is_better: Else lower is.
        unit: What one is to know of the number, for readers.
        percent: Shown in percent, with one decimal; else with three.
        over_grid: Whether the summary of a study shows it over the settings of the grid too.
        reweighted: From checked probabilities and labels to the metric of reweighted examples, for the bootstrap; by
            default ``function`` of the repeated examples, which takes longer.
    """

    name: str
    title: str
    function: Callable[[ArrayLike, ArrayLike], float]
    higher_is_better: bool = False
    unit: str = ""
    percent: bool = False
    over_grid: bool = True
    reweighted: Callable[[np.ndarray, np.ndarray], Reweighted] | None = None

    @property
    def factor(self) -> float:
        return 100.0 if self.percent else 1.0

    @property
    def decimals(self) -> int:
        return 1 if self.percent else 3

    @property
    def header(self) -> str:
        """The title, with a percent sign where it belongs."""
        return f"{self.title} (%)" if self.percent else self.title

    @property
    def axis(self) -> str:
        """The title for an axis, with the unit."""
        return f"{self.title} ({self.unit})" if self.unit and not self.percent else self.header

    @property
    def hint(self) -> str:
        """Unit and direction."""
        direction = f"{'higher' if self.higher_is_better else 'lower'} is better"
        return ", ".join(part for part in ("%" if self.percent else "", self.unit, direction) if part)

    def of_reweighted(self, probs: ArrayLike, labels: ArrayLike) -> Reweighted:
        """The metric of the examples that a bootstrap draws, from how often it draws each."""
        checked = check_probs_and_labels(probs, labels)
        if self.reweighted is not None:
            return self.reweighted(*checked)
        rows = np.arange(len(checked[1]))

        def repeated(weights: np.ndarray) -> np.ndarray:
            drawn = (np.repeat(rows, counts.astype(int)) for counts in weights)
            return np.array([self.function(checked[0][chosen], checked[1][chosen]) for chosen in drawn])

        return repeated


def _mean_of(values: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[np.ndarray, np.ndarray], Reweighted]:
    """A metric that is the mean of a number of each example."""

    def reweighted(probs: np.ndarray, labels: np.ndarray) -> Reweighted:
        each = values(probs, labels)
        return lambda weights: weights @ each / len(each)

    return reweighted


def _surprise(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(probs[np.arange(len(labels)), labels], np.nextafter(0.0, 1.0)))


def _reweighted_calibration_error(probs: np.ndarray, labels: np.ndarray) -> Reweighted:
    confidence = probs.max(1)
    bins = bin_scores(confidence, 15)
    gaps = np.zeros((len(labels), len(bins.size)))
    gaps[np.arange(len(labels)), bins.members] = (probs.argmax(1) == labels) - confidence
    return lambda weights: np.abs(weights @ gaps).sum(1) / len(labels)


_RIGHT = _mean_of(lambda probs, labels: (probs.argmax(1) == labels).astype(np.float64))
_DISTANCE = _mean_of(lambda probs, labels: np.square(probs - np.eye(probs.shape[1])[labels]).sum(1))

METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy", accuracy, True, percent=True, reweighted=_RIGHT),
        Metric("nll", "NLL", negative_log_likelihood, unit="nats per example", reweighted=_mean_of(_surprise)),
        Metric(
            "ece",
            "ECE",
            expected_calibration_error,
            unit="15 bins of equal width",
            percent=True,
            reweighted=_reweighted_calibration_error,
        ),
        Metric("brier", "Brier", brier_score, over_grid=False, reweighted=_DISTANCE),
    )
}


def calibration_summary(probs: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """The numbers of a results table, each over the whole set.

    Args:
        probs: Predictive probabilities, shape ``(examples, classes)``, rows summing to one.
        labels: Class indices, shape ``(examples,)``.

    Returns:
        ``accuracy`` and ``ece`` (15 bins) as shares in ``[0, 1]``, ``nll`` in nats per example, ``brier`` in
        ``[0, 2]``.

    Raises:
        InputError: The arrays do not fit that description.

    Example:
        >>> probs, labels = [[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]], [0, 1, 1, 1]
        >>> {name: round(value, 3) for name, value in calibration_summary(probs, labels).items()}
        {'accuracy': 0.75, 'nll': 0.511, 'ece': 0.35, 'brier': 0.35}
    """
    return {name: metric.function(probs, labels) for name, metric in METRICS.items()}
