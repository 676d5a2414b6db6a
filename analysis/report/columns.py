"""The columns of a page's table of scores."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bayeslora.analysis.metrics.labels import f1_macro, f1_micro, mean_average_precision
from bayeslora.analysis.metrics.registry import METRICS
from bayeslora.analysis.metrics.regression import LEVEL, regression_summary
from bayeslora.analysis.tagging.entities import entity_f1


@dataclass(frozen=True)
class Column:
    """A number per split and method: ``function`` of the arrays of :class:`SplitResults` named in ``of``."""

    title: str
    hint: str
    function: Callable[..., float]
    of: tuple[str, ...] = ("probs", "labels")
    factor: float = 1.0
    decimals: int = 3


CLASSIFICATION = tuple(
    Column(m.title, m.hint, m.function, factor=m.factor, decimals=m.decimals) for m in METRICS.values()
)
ENTITIES = (
    Column(
        "entity F1",
        "% of whole entities, their words and type right, higher is better",
        entity_f1,
        ("entity_counts",),
        factor=100.0,
        decimals=1,
    ),
)
_OF_LABELS = ("label_probs", "label_truth")
LABELS = (
    Column("mAP", "%, mean over labels, higher is better", mean_average_precision, _OF_LABELS, 100.0, 1),
    Column("F1 micro", "% of all decisions, at 1/2, higher is better", f1_micro, _OF_LABELS, 100.0, 1),
    Column("F1 macro", "%, mean over labels, at 1/2, higher is better", f1_macro, _OF_LABELS, 100.0, 1),
)


def _of_numbers(name: str) -> Callable[..., float]:
    return lambda mean, std, labels: regression_summary(labels, mean, std)[name]


REGRESSION = (
    Column(
        "RMSE",
        "in the labels' unit, lower is better",
        lambda m, y: float(np.sqrt(np.mean((m - y) ** 2))),
        ("mean", "labels"),
    ),
    Column(
        "NLL",
        "nats per example, normal predictive, lower is better",
        lambda m, s, y: float(np.mean(((y - m) / s) ** 2 / 2 + np.log(s) + np.log(2 * np.pi) / 2)),
        ("mean", "std", "labels"),
    ),
    Column(
        "CRPS",
        "in the labels' unit, normal predictive, lower is better",
        _of_numbers("crps"),
        ("mean", "std", "labels"),
    ),
    Column(
        "interval score",
        f"of {100 * LEVEL:g} % intervals, in the labels' unit, lower is better",
        _of_numbers("interval_score"),
        ("mean", "std", "labels"),
    ),
    Column(
        "coverage",
        f"% of labels within the central {100 * LEVEL:g} % interval; {100 * LEVEL:g} is right",
        _of_numbers("coverage"),
        ("mean", "std", "labels"),
        factor=100.0,
        decimals=1,
    ),
)
