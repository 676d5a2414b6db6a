"""The metrics of results tables: what :data:`METRICS` lists is in scores, comparisons, summaries and reports."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.analysis.metrics.bins import bin_scores
from bayeslora.analysis.metrics.calibration import (
    accuracy,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    negative_log_likelihood,
    overconfidence,
    reweighted_smooth_error,
    smooth_calibration_error,
)
from bayeslora.analysis.metrics.checks import check_probs_and_labels
from bayeslora.analysis.metrics.selective import (
    area_under_generalized_risk_coverage,
    area_under_risk_coverage,
    reweighted_area,
    reweighted_generalized_area,
)
from bayeslora.analysis.metrics.uncertainty import predictive_entropy

Reweighted = Callable[[np.ndarray], np.ndarray]  # from weights (R, n), each row summing to n, to the metric (R,)


@dataclass(frozen=True)
class Metric:
    """A number that class probabilities have, given the labels.

    Attributes:
        name: In files, and in the columns of tables.
        title: In headers.
        function: Of probabilities ``(examples, classes)`` and labels ``(examples,)``.
        higher_is_better: Else lower is; None for a number with a sign, which is to be near 0 from either side.
        unit: What one is to know of the number, for readers.
        percent: Shown in percent, with one decimal; else with three.
        over_grid: Whether the summary of a study shows it over the settings of the grid too.
        in_summary: Whether the summary shows it at all: its tables have no room for what is near to another metric.
            Scores, results in files and reports have every one.
        reweighted: From checked probabilities and labels to the metric of reweighted examples, for the bootstrap; by
            default ``function`` of the repeated examples, which takes longer.
    """

    name: str
    title: str
    function: Callable[[ArrayLike, ArrayLike], float]
    higher_is_better: bool | None = False
    unit: str = ""
    percent: bool = False
    over_grid: bool = True
    in_summary: bool = True
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

    def shown(self, value: float) -> str:
        """As tables have it: in percent where it is, and with its sign where that says something."""
        sign = "+" if self.higher_is_better is None else ""
        return f"{self.factor * value:{sign}.{self.decimals}f}"

    @property
    def hint(self) -> str:
        """Unit and direction."""
        directions = {True: "higher is better", False: "lower is better", None: "0 is neither too sure nor too unsure"}
        direction = directions[self.higher_is_better]
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


def _classwise(probs: ArrayLike, labels: ArrayLike) -> float:
    return float(classwise_calibration_error(probs, labels).mean())


def _reweighted_classwise(probs: np.ndarray, labels: np.ndarray) -> Reweighted:
    gaps = np.zeros((probs.shape[1], len(labels), 15))
    for index, column in enumerate(probs.T):
        gaps[index, np.arange(len(labels)), bin_scores(column, 15).members] = (labels == index) - column
    return lambda weights: np.mean([np.abs(weights @ of).sum(1) for of in gaps], axis=0) / len(labels)


def _area(probs: ArrayLike, labels: ArrayLike) -> float:
    """AURC of examples in order of the entropy of their probabilities."""
    checked, known = check_probs_and_labels(probs, labels)
    return area_under_risk_coverage(predictive_entropy(checked), checked.argmax(1) != known)


def _reweighted_area(probs: np.ndarray, labels: np.ndarray) -> Reweighted:
    return reweighted_area(predictive_entropy(probs), probs.argmax(1) != labels)


def _generalized_area(probs: ArrayLike, labels: ArrayLike) -> float:
    """AUGRC of examples in order of the entropy of their probabilities."""
    checked, known = check_probs_and_labels(probs, labels)
    return area_under_generalized_risk_coverage(predictive_entropy(checked), checked.argmax(1) != known)


def _reweighted_generalized_area(probs: np.ndarray, labels: np.ndarray) -> Reweighted:
    return reweighted_generalized_area(predictive_entropy(probs), probs.argmax(1) != labels)


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
        Metric("aurc", "AURC", _area, unit="by entropy", percent=True, over_grid=False, reweighted=_reweighted_area),
        Metric(
            "overconfidence",
            "confidence − accuracy",
            overconfidence,
            higher_is_better=None,
            percent=True,
            over_grid=False,
            reweighted=_mean_of(lambda probs, labels: probs.max(1) - (probs.argmax(1) == labels)),
        ),
        Metric(
            "smooth_ece",
            "smooth ECE",
            smooth_calibration_error,
            unit="no bins",
            percent=True,
            over_grid=False,
            in_summary=False,
            reweighted=reweighted_smooth_error,
        ),
        Metric(
            "classwise_ece",
            "class-wise ECE",
            _classwise,
            unit="mean over classes, 15 bins each",
            percent=True,
            over_grid=False,
            in_summary=False,
            reweighted=_reweighted_classwise,
        ),
        Metric(
            "augrc",
            "AUGRC",
            _generalized_area,
            unit="by entropy",
            percent=True,
            over_grid=False,
            in_summary=False,
            reweighted=_reweighted_generalized_area,
        ),
    )
}


def calibration_summary(probs: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """The numbers of a results table, each over the whole set.

    Args:
        probs: Predictive probabilities, shape ``(examples, classes)``, rows summing to one.
        labels: Class indices, shape ``(examples,)``.

    Returns:
        ``accuracy``, ``ece`` (15 bins), ``smooth_ece``, ``classwise_ece``, ``aurc`` and ``augrc`` (in order of entropy)
        as shares in ``[0, 1]``, ``nll`` in nats per example, ``brier`` in ``[0, 2]``, and ``overconfidence`` in
        ``[-1, 1]``.

    Raises:
        InputError: The arrays do not fit that description.

    Example:
        >>> probs, labels = [[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]], [0, 1, 1, 1]
        >>> scores = calibration_summary(probs, labels)
        >>> {name: round(scores[name], 3) for name in ("accuracy", "nll", "ece", "brier", "aurc", "augrc")}
        {'accuracy': 0.75, 'nll': 0.511, 'ece': 0.35, 'brier': 0.35, 'aurc': 0.146, 'augrc': 0.094}
    """
    return {name: metric.function(probs, labels) for name, metric in METRICS.items()}
