"""What a grid of runs says: robustness over settings, paired differences with verdicts, speed and cost.

Every function takes the tidy table of a study: one row for each run and split, with ``task``, ``method``, ``split``,
``learning_rate``, ``batch_size``, ``rank``, ``seed`` and the metrics. A *setting* is a learning rate, batch size and
rank.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from bayeslora.analysis.metrics.bootstrap import Interval, check_resamples
from bayeslora.analysis.metrics.checks import check_level
from bayeslora.analysis.metrics.registry import METRICS
from bayeslora.errors import InputError

SETTING = ["learning_rate", "batch_size", "rank"]
BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference seen"
HIGHER, LOWER = "higher", "lower"  # of a number with a sign, which is to be near 0


class Difference(NamedTuple):
    """A paired difference ``estimate``, method minus reference, with its interval and the ``verdict`` in words."""

    estimate: float
    lower: float
    upper: float
    verdict: str


def robustness_table(
    results: pd.DataFrame, *, split: str = "test", metrics: Iterable[str] | None = None
) -> pd.DataFrame:
    """Best, median, worst and spread over the settings, each setting's mean over seeds taken first.

    Spread is best − worst, and robustness the median, as in the MonteCLoRA paper. A run that failed counts for nothing:
    compare the numbers of ``settings``.

    Args:
        results: A study's tidy table.
        split: Of which split.
        metrics: Columns of the table, in their own units; by default all that the results have.

    Returns:
        Indexed by ``(task, method)``; columns ``(metric, "best" | "median" | "worst" | "spread")`` and
        ``("settings", "count")``. Spread is never negative. Of a number with a sign there is no best or worst.

    Raises:
        InputError: no rows of that split.

    Example:
        >>> robustness_table(results)["nll"]["spread"].round(2).to_dict()
        {('reviews', 'LoRA'): 0.2, ('reviews', 'MonteCLoRA'): 0.1}
    """
    chosen = rows_of_split(results, split)
    order = first_seen(chosen, ["task", "method"])
    metrics = known_metrics(results) if metrics is None else list(metrics)
    means = chosen.groupby(["task", "method", *SETTING], sort=False)[[*metrics]].mean()
    groups = means.groupby(["task", "method"], sort=False)
    columns: dict[tuple[str, str], pd.Series] = {}
    for metric in metrics:
        low, high = groups[metric].min(), groups[metric].max()
        best, worst = (high, low) if _is_higher_better(metric) else (low, high)
        parts = {"best": best, "median": groups[metric].median(), "worst": worst, "spread": high - low}
        directed = metric not in METRICS or METRICS[metric].higher_is_better is not None
        columns |= {(metric, part): parts[part] for part in (parts if directed else ("median", "spread"))}
    columns["settings", "count"] = groups.size()
    return pd.DataFrame(columns).loc[order]


def best_settings(results: pd.DataFrame, *, split: str = "validation", metric: str = "nll") -> pd.DataFrame:
    """The setting of each task and method that is best on validation, in the mean over seeds.

    Args:
        results: A study's tidy table.
        split: Where the settings are compared.
        metric: By which column; the accuracy is better where it is higher, all others where they are lower.

    Returns:
        Indexed by ``(task, method)``; columns ``learning_rate``, ``batch_size``, ``rank`` and the metric. The first of
        equally good settings.

    Raises:
        InputError: no rows of that split.

    Example:
        >>> best_settings(results)["learning_rate"].to_dict()
        {('reviews', 'LoRA'): 0.001, ('reviews', 'MonteCLoRA'): 0.001}
    """
    chosen = rows_of_split(results, split)
    means = chosen.groupby(["task", "method", *SETTING], sort=False)[metric].mean().reset_index()
    means = means[means[metric].notna()]
    means = means.sort_values(metric, ascending=not _is_higher_better(metric), kind="stable")
    order = [
        pair
        for pair in first_seen(chosen, ["task", "method"])
        if pair in set(zip(means["task"], means["method"], strict=True))
    ]
    return means.drop_duplicates(["task", "method"]).set_index(["task", "method"]).loc[order]


def at_best_settings(results: pd.DataFrame, *, split: str = "validation", metric: str = "nll") -> pd.DataFrame:
    """The rows at each method's own :func:`best_settings`, methods in the order of ``results``; all rows where every
    method has one setting only.

    Args:
        results: A study's tidy table.
        split, metric: As in :func:`best_settings`.

    Raises:
        InputError: no rows of that split.

    Example:
        >>> len(results), len(at_best_settings(results))  # each method at the better of two learning rates
        (16, 8)
    """
    if len(results.drop_duplicates(SETTING)) == 1:
        return results
    settings = best_settings(results, split=split, metric=metric)[SETTING].reset_index()
    best = results.merge(settings, on=["task", "method", *SETTING], how="inner")
    order = {method: number for number, method in enumerate(results["method"].unique())}
    return best.sort_values("method", key=lambda names: names.map(order), kind="stable", ignore_index=True)


def paired_difference(
    method: ArrayLike,
    reference: ArrayLike,
    labels: ArrayLike,
    *,
    metric: str = "nll",
    num_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """How much a metric differs between two methods on the same examples, with a bootstrap interval and a verdict.

    Test examples are drawn with replacement, the same for both methods; and so are seeds, in pairs, where there are
    equally many of both and more than one. As few seeds show too little of their spread, deviations are then widened
    by √(S/(S−1)).

    Args:
        method, reference: Probabilities, shapes ``(seeds, examples, classes)`` with the seeds in the same order. With
            different numbers of seeds, the means over seeds are compared and no seed is drawn.
        labels: Class indices, shape ``(examples,)``.
        metric: Of :data:`bayeslora.analysis.metrics.registry.METRICS`.
        num_resamples: Sets the bootstrap draws.
        level: Coverage of the interval.
        seed: Decides the sets.

    Returns:
        Method − reference. The verdict is "better" or "worse" where the interval leaves out 0 ("higher" or "lower" for
        a number with a sign, which is to be near 0), else "no difference seen", which does not say that there is none.

    Raises:
        InputError: shapes that do not fit, an unknown metric, or an option out of range.

    Example:
        >>> sure, unsure = [[[0.9, 0.1], [0.1, 0.9]]], [[[0.6, 0.4], [0.4, 0.6]]]
        >>> difference = paired_difference(sure, unsure, [0, 1], metric="brier")
        >>> round(difference.estimate, 4), difference.verdict
        (-0.3, 'better')
    """
    ours, theirs = np.asarray(method, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if ours.ndim != 3 or theirs.ndim != 3 or ours.shape[1:] != theirs.shape[1:]:
        raise InputError(
            f"probabilities must have shape (seeds, examples, classes), with the same examples and "
            f"classes; got {ours.shape} and {theirs.shape}"
        )
    resampling = _Resampling(num_resamples, level, seed)
    return _compare(ours[None], theirs[None], labels, metric, "median", resampling)


def paired_robustness(
    method: ArrayLike,
    reference: ArrayLike,
    labels: ArrayLike,
    *,
    statistic: str = "median",
    metric: str = "nll",
    num_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """How much two methods differ over a grid of settings: in the median, say, or in the spread.

    Each setting's mean over seeds is taken first, then the statistic over the settings, as in
    :func:`robustness_table`. What is drawn is as in :func:`paired_difference`: the same examples and seeds for both
    methods and at every setting. The settings are not drawn: they are the grid.

    Args:
        method, reference: Probabilities, shapes ``(settings, seeds, examples, classes)`` with the settings and the
            seeds in the same order; numbers of seeds may differ as in :func:`paired_difference`.
        labels: Class indices, shape ``(examples,)``.
        statistic: ``"best"``, ``"median"``, ``"worst"`` or ``"spread"`` (best − worst, as a positive number).
        metric, num_resamples, level, seed: As in :func:`paired_difference`.

    Returns:
        Method − reference; less spread is better, whatever the metric.

    Raises:
        InputError: shapes that do not fit, an unknown metric or statistic, or an option out of range.

    Example:
        >>> flat = np.tile([[0.8, 0.2], [0.2, 0.8]], (2, 1, 1, 1))  # (settings, seeds, examples, classes)
        >>> steep = np.stack([flat[0], 0.5 * flat[0] + 0.25])
        >>> difference = paired_robustness(flat, steep, [0, 1], statistic="spread", metric="brier")
        >>> round(difference.estimate, 4), difference.verdict
        (-0.165, 'better')
    """
    if statistic not in STATISTICS:
        raise InputError(f"statistic must be one of {', '.join(STATISTICS)}, but is {statistic!r}")
    if metric in METRICS and METRICS[metric].higher_is_better is None and statistic in ("best", "worst"):
        raise InputError(f"no end of {metric} is the better one: take the median or the spread in place of {statistic}")
    ours, theirs = np.asarray(method, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    same = ours.ndim == theirs.ndim == 4 and np.delete(ours.shape, 1).tolist() == np.delete(theirs.shape, 1).tolist()
    if not same:
        raise InputError(
            f"probabilities must have shape (settings, seeds, examples, classes), with the same settings, "
            f"examples and classes; got {ours.shape} and {theirs.shape}"
        )
    return _compare(ours, theirs, labels, metric, statistic, _Resampling(num_resamples, level, seed))


class _Resampling(NamedTuple):
    num_resamples: int
    level: float
    seed: int


def _compare(
    ours: np.ndarray, theirs: np.ndarray, labels: ArrayLike, metric: str, statistic: str, resampling: _Resampling
) -> Difference:
    """Of probabilities (settings, seeds, examples, classes); the numbers of seeds may differ."""
    num_resamples, level, seed = resampling
    check_level(level)
    check_resamples(num_resamples)
    if metric not in METRICS:
        raise InputError(f"metric must be one of {', '.join(METRICS)}, but is {metric!r}")
    higher = METRICS[metric].higher_is_better
    rng = np.random.default_rng(seed)
    n = ours.shape[2]
    weights = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), size=num_resamples)])
    seeds = ours.shape[1] if ours.shape[1] == theirs.shape[1] else 1
    found = []
    for array in (ours, theirs):
        scores = np.array(
            [[METRICS[metric].of_reweighted(probs, labels)(weights) for probs in setting] for setting in array]
        )
        found.append(scores if seeds > 1 else scores.mean(1, keepdims=True))  # (settings, S, 1 + R)
    drawn = np.ones((1, 1 + num_resamples))
    if seeds > 1:
        drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=num_resamples).T / seeds
        drawn = np.hstack([np.full((seeds, 1), 1 / seeds), drawn])
    summarize = STATISTICS[statistic]
    one, other = (summarize((scores * drawn).sum(1), bool(higher)) for scores in found)
    estimate, *resampled = one - other
    widening = np.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0
    ends = estimate + widening * (np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2]) - estimate)
    interval = Interval(float(estimate), float(ends[0]), float(ends[1]))
    return Difference(*interval, verdict(interval, higher_is_better=False if statistic == "spread" else higher))


def _best(scores: np.ndarray, higher: bool) -> np.ndarray:
    return scores.max(0) if higher else scores.min(0)


# over settings, the first dimension
STATISTICS: dict[str, Callable[[np.ndarray, bool], np.ndarray]] = {
    "best": _best,
    "median": lambda scores, higher: np.median(scores, 0),
    "worst": lambda scores, higher: _best(scores, not higher),
    "spread": lambda scores, higher: np.ptp(scores, 0),
}


def verdict(interval: Interval, *, higher_is_better: bool | None) -> str:
    """What an interval of a difference says, in plain words; of what is to be near 0, only which is higher."""
    if interval.lower > 0 or interval.upper < 0:
        if higher_is_better is None:
            return HIGHER if interval.lower > 0 else LOWER
        return BETTER if (interval.lower > 0) == higher_is_better else WORSE
    return NO_DIFFERENCE


def known_metrics(results: pd.DataFrame) -> list[str]:
    """The metrics that the table has: one of an older version lacks the newest."""
    return [name for name in METRICS if name in results]


def _is_higher_better(metric: str) -> bool:
    """Lower is better for a column that nobody registered."""
    return metric in METRICS and bool(METRICS[metric].higher_is_better)


def rows_of_split(results: pd.DataFrame, split: str) -> pd.DataFrame:
    found = results[results["split"] == split]
    if found.empty:
        raise InputError(
            f"the results hold no rows of split {split!r}; there are {', '.join(results['split'].unique())}"
        )
    return found


def first_seen(frame: pd.DataFrame, columns: list[str]) -> list[Any]:
    return [tuple(row) for row in frame[columns].drop_duplicates().itertuples(index=False)]
