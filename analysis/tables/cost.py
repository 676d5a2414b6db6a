"""What training and predicting cost in a study."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from bayeslora.analysis.tables.study import SETTING, first_seen, rows_of_split

COLUMNS = ("train_seconds", "train_cpu_seconds", "predict_seconds", "predict_cpu_seconds", "peak_memory_mb")


def steps_to_reach(curve: Sequence[Mapping[str, float]], loss: float) -> float:
    """The first recorded step at which the validation loss is at most ``loss``; NaN if there is none.

    Args:
        curve: ``{"step", "loss"}`` along training.
        loss: In nats per example.

    Returns:
        Steps of the optimizer.

    Example:
        >>> curve = [{"step": 10, "loss": 0.7}, {"step": 20, "loss": 0.5}, {"step": 30, "loss": 0.4}]
        >>> steps_to_reach(curve, 0.5), steps_to_reach(curve, 0.3)
        (20.0, nan)
    """
    return next(
        (float(point["step"]) for point in sorted(curve, key=lambda p: p["step"]) if point["loss"] <= loss),
        float("nan"),
    )


def cost_table(results: pd.DataFrame, *, split: str = "test", reference: str = "LoRA") -> pd.DataFrame:
    """Means over all runs of what a method costs.

    A clock on the wall goes on while others have the machine; processor time does so less. Ratios are therefore of
    processor time, and of pairs alone: a run and the reference's run of the same setting and seed, on one machine with
    as many workers. Where there is no such pair there is no ratio.

    Args:
        results: A study's tidy table.
        split: Whose predictions are timed.
        reference: The method that others' training is compared with.

    Returns:
        Indexed by ``(task, method)``: seconds of training, ``train_seconds`` by the clock and ``train_cpu_seconds`` of
        processor time; ``train_ratio``, the mean of the pairs' ratios; ``predict_seconds`` and ``predict_cpu_seconds``
        of the split per 1000 examples; ``peak_memory_mb``. NaN is what a table does not have.

    Raises:
        InputError: no rows of that split.

    Example:
        >>> cost_table(results)["train_ratio"].to_dict()
        {('reviews', 'LoRA'): 1.0, ('reviews', 'MonteCLoRA'): 1.2}
    """
    chosen = rows_of_split(results, split).copy()
    for name in (*COLUMNS, "host", "workers"):
        chosen[name] = chosen.get(name, np.nan)
    chosen[[*COLUMNS]] = chosen[[*COLUMNS]].apply(pd.to_numeric)
    for name in ("predict_seconds", "predict_cpu_seconds"):
        chosen[name] = 1000 * chosen[name] / chosen["examples"]
    table = chosen.groupby(["task", "method"], sort=False)[[*COLUMNS]].mean()
    table.insert(2, "train_ratio", _ratios(chosen, reference).reindex(table.index))
    return table.loc[first_seen(chosen, ["task", "method"])]


def _ratios(rows: pd.DataFrame, reference: str) -> pd.Series:
    """The mean over pairs of runs, by task and method."""
    known = rows[rows["seed"].notna()]
    same = ["task", *SETTING, "seed", "host", "workers"]
    pairs = known.merge(known.loc[known["method"] == reference, [*same, "train_cpu_seconds"]], on=same)
    pairs["ratio"] = pairs["train_cpu_seconds_x"] / pairs["train_cpu_seconds_y"]
    return pairs.groupby(["task", "method"])["ratio"].mean()
