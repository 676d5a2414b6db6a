"""Results of several methods and seeds as one table."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from bayeslora.analysis.metrics.registry import METRICS, Metric
from bayeslora.errors import InputError

RUN = ("split", "method", "seed")


def comparison_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Mean and sample standard deviation over seeds, for each split and method.

    Args:
        rows: One mapping per run: ``method``, ``split``, ``seed`` (None for what combines all seeds), and a number
            under each metric's name.

    Returns:
        Indexed by ``(split, method)`` in the order in which splits and methods first appear. Columns are
        pairs: ``(metric, "mean")``, ``(metric, "std")`` and ``("seeds", "count")``. With one seed the
        standard deviation is NaN; a metric that is missing or NaN in any of the runs makes both NaN, so that
        a diverged run is not averaged away.

    Raises:
        InputError: No rows, a row without method, split or seed, the same run twice, a metric that is not a
            number, or no metric at all.

    Example:
        >>> rows = [{"method": "LoRA", "split": "test", "seed": seed, "nll": 0.4 + 0.2 * seed} for seed in (0, 1)]
        >>> comparison_table(rows)["nll"].round(3).to_dict("records")
        [{'mean': 0.5, 'std': 0.141}]
    """
    runs = [dict(row) for row in rows]
    frame = pd.DataFrame(runs)
    metrics = _check_runs(runs, frame)
    groups = frame.groupby(["split", "method"], sort=False)
    columns: dict[tuple[str, str], pd.Series] = {}
    for metric in metrics:
        columns[metric, "mean"] = groups[metric].agg(lambda values: values.mean(skipna=False))
        columns[metric, "std"] = groups[metric].agg(lambda values: values.std(ddof=1, skipna=False))
    columns["seeds", "count"] = groups.size()
    return pd.DataFrame(columns).loc[_first_seen(frame)]


def to_markdown(table: pd.DataFrame, *, metrics: Sequence[str] | None = None) -> str:
    """A `comparison_table` as GitHub Markdown whose columns also line up in a terminal.

    Cells read ``mean ± standard deviation``, or the mean alone with one seed, or ``-`` where there is no
    number. Shares, such as accuracy, are in percent with one decimal, all else has three.

    Args:
        table: What `comparison_table` returned.
        metrics: Which metrics, in which order; all by default.

    Returns:
        The table's lines, without a trailing newline.

    Raises:
        InputError: The table has no such metric.

    Example:
        >>> rows = [{"method": "LoRA", "split": "test", "seed": seed, "nll": 0.4 + 0.2 * seed} for seed in (0, 1)]
        >>> print(to_markdown(comparison_table(rows)))
        | split | method | seeds |           NLL |
        | ----- | ------ | ----: | ------------: |
        | test  | LoRA   |     2 | 0.500 ± 0.141 |
    """
    header, body = table_cells(table, metrics=metrics)
    return layout(header, [[cell.replace("|", "\\|") for cell in row] for row in body], num_text_columns=2)


def table_cells(table: pd.DataFrame, *, metrics: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """The header and the rows that :func:`to_markdown` lays out."""
    known = [name for name, part in table.columns if part == "mean"]
    chosen = known if metrics is None else list(metrics)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InputError(f"the table has no metric {unknown[0]!r}; it has {', '.join(known)}")
    header = ["split", "method", "seeds", *(_metric(name).header for name in chosen)]
    body = [_cells(key, row, chosen) for key, row in table.iterrows()]
    return header, body


def _check_runs(runs: list[dict[str, Any]], frame: pd.DataFrame) -> list[str]:
    """Names of the metrics, in the order in which they first appear."""
    if frame.empty:
        raise InputError("rows is empty: a comparison needs at least one run")
    for name in RUN:
        if any(name not in run for run in runs) or (name != "seed" and frame[name].isna().any()):
            raise InputError(f"every row needs a {name!r}; its keys are method, split, seed and the metrics")
    repeated = frame[frame.duplicated(list(RUN))]
    if len(repeated):
        run = ", ".join(f"{name}={repeated.iloc[0][name]}" for name in RUN)
        raise InputError(f"the run {run} is given twice; each seed counts once")
    metrics = [name for name in frame if name not in RUN]
    if not metrics:
        raise InputError("rows hold no metric, only method, split and seed")
    for name in metrics:
        if not pd.api.types.is_numeric_dtype(frame[name]):
            raise InputError(f"metric {name!r} must be a number in every row, but one is not")
    return metrics


def _first_seen(frame: pd.DataFrame) -> list[tuple[Any, Any]]:
    """Pairs that occur: splits in order of appearance, and within each the methods likewise."""
    occurring = set(zip(frame["split"], frame["method"], strict=True))
    pairs = ((split, method) for split in frame["split"].unique() for method in frame["method"].unique())
    return [pair for pair in pairs if pair in occurring]


def _cells(key: tuple[Any, Any], row: pd.Series, metrics: Sequence[str]) -> list[str]:
    split, method = map(str, key)
    numbers = [_number(metric, row[metric, "mean"], row[metric, "std"]) for metric in metrics]
    return [split, method, str(int(row["seeds", "count"])), *numbers]


def _number(name: str, mean: float, deviation: float) -> str:
    metric = _metric(name)
    if pd.isna(mean):
        return "-"
    text = metric.shown(mean)
    return text if pd.isna(deviation) else f"{text} ± {metric.factor * deviation:.{metric.decimals}f}"


def _metric(name: str) -> Metric:
    """One that nobody registered is shown as it is."""
    return METRICS.get(name) or Metric(name, name, lambda probs, labels: float("nan"))


def layout(header: list[str], body: list[list[str]], *, num_text_columns: int) -> str:
    """Pad each column to its widest cell: text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if i < num_text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < num_text_columns else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, body)])
