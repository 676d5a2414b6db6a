"""What training and predicting cost in a study."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from bayeslora.analysis.tables.study import first_seen, rows_of_split


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

    Args:
        results: A study's tidy table.
        split: Whose predictions are timed.
        reference: The method that others' seconds of training are compared with.

    Returns:
        Indexed by ``(task, method)``: ``train_seconds``; ``train_ratio``, to the reference's; ``predict_seconds`` of
        the split per 1000 examples; ``peak_memory_mb``.

    Raises:
        InputError: no rows of that split.

    Example:
        >>> cost_table(results)["train_ratio"].to_dict()
        {('reviews', 'LoRA'): 1.0, ('reviews', 'MonteCLoRA'): 1.2}
    """
    chosen = rows_of_split(results, split).copy()
    chosen["predict_seconds"] = 1000 * chosen["predict_seconds"] / chosen["examples"]
    chosen["peak_memory_mb"] = pd.to_numeric(chosen["peak_memory_mb"])
    columns = ["train_seconds", "predict_seconds", "peak_memory_mb"]
    table = chosen.groupby(["task", "method"], sort=False)[columns].mean()
    known = reference in set(chosen["method"])
    base = table["train_seconds"].xs(reference, level="method") if known else None
    ratio = (
        np.nan if base is None else table["train_seconds"] / table.index.get_level_values("task").map(base).to_numpy()
    )
    table.insert(1, "train_ratio", ratio)
    return table.loc[first_seen(chosen, ["task", "method"])]
