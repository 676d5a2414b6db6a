"""How much a method asks of its learning rate, where it would be used: near its own best one."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from bayeslora.analysis.tables.study import SETTING, best_settings, first_seen, known_metrics, rows_of_split


def spread_around_best(
    results: pd.DataFrame, *, split: str = "test", metrics: Iterable[str] | None = None, chosen_by: str = "nll"
) -> pd.DataFrame:
    """The spread of each method over its own best learning rate and the next rates below and above.

    The spread over a whole grid (:func:`~bayeslora.analysis.tables.study.robustness_table`) is large for a method whose
    best rate lies at one of its ends. This one asks what a wrong guess by one step of the grid costs. Batch size and
    rank are those of the best setting; means over seeds are taken first.

    Args:
        results: A study's tidy table, with three learning rates or more.
        split: Of which split the spread is.
        metrics: Columns of the table, in their own units; by default all that the results have.
        chosen_by: The metric on validation by which the best setting is chosen.

    Returns:
        Indexed by ``(task, method)``; ``learning_rate``, the best; ``rates``, how many the spread is over: 2 where the
        best lies at an end of the grid, or a neighbour is missing; and a column of spreads, largest − smallest, for
        each metric.

    Raises:
        InputError: no rows of that split, or none of validation.

    Example:
        >>> spread_around_best(results)["nll"].round(2).to_dict()
        {('reviews', 'LoRA'): 0.2, ('reviews', 'MonteCLoRA'): 0.1}
    """
    rows = rows_of_split(results, split)
    metrics = known_metrics(results) if metrics is None else list(metrics)
    means = rows.groupby(["task", "method", *SETTING], sort=False)[[*metrics]].mean().reset_index()
    best = best_settings(results, metric=chosen_by)
    found = []
    for task, method in (pair for pair in first_seen(rows, ["task", "method"]) if pair in best.index):
        rate, batch_size, rank = best.loc[(task, method), SETTING]
        grid = np.unique(results.loc[results["task"] == task, "learning_rate"])
        place = int(np.searchsorted(grid, rate))
        near = grid[max(place - 1, 0) : place + 2]
        same = (means["task"] == task) & (means["method"] == method)
        same &= (means["batch_size"] == batch_size) & (means["rank"] == rank) & means["learning_rate"].isin(near)
        values = means.loc[same, metrics]
        spreads = values.max() - values.min()
        found.append({"task": task, "method": method, "learning_rate": rate, "rates": len(values), **spreads})
    return pd.DataFrame(found, columns=["task", "method", "learning_rate", "rates", *metrics]).set_index(
        ["task", "method"]
    )
