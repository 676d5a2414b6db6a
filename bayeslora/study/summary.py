"""What a study says, in Markdown, with its figures."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bayeslora.analysis import comparison_table, to_markdown
from bayeslora.analysis.metrics.registry import METRICS
from bayeslora.analysis.plots import study as plots
from bayeslora.analysis.tables.comparison import layout
from bayeslora.analysis.tables.cost import cost_table, steps_to_reach
from bayeslora.analysis.tables.rates import spread_around_best
from bayeslora.analysis.tables.study import SETTING, known_metrics, robustness_table
from bayeslora.study.differences import at_best, differences, grid_differences, references, shown_metrics
from bayeslora.study.spec import Study, slug

FIGURES = "figures"
GRID_METRICS = [name for name, metric in METRICS.items() if metric.over_grid and metric.in_summary]


def write_summary(
    study: Study, results: pd.DataFrame, curves: pd.DataFrame, failures: pd.DataFrame, output_dir: Path
) -> str:
    """Write ``summary.md`` and ``figures/``; returns the summary."""
    parts = [f"# {', '.join(task.name for task in study.tasks)}, {study.model}"]
    if len(results):
        against = references(study, results)
        for task in results["task"].unique():
            parts += _task_parts(study, str(task), results[results["task"] == task], against, curves, output_dir)
        parts.append(f"Versions: {results['versions'].iloc[0]}.")
    if len(failures):
        parts += [
            "## Failed",
            *(f"- {_describe(row)}: {' '.join(row['error'].split())[:500]}" for row in failures.to_dict("records")),
        ]
    text = "\n\n".join(parts) + "\n"
    (output_dir / "summary.md").write_text(text, encoding="utf-8")
    return text


def headline(results: pd.DataFrame) -> pd.DataFrame:
    """Mean and deviation over seeds of every method, as :func:`bayeslora.analysis.comparison_table` has them, at its
    own best setting on validation where it has several; validation itself is left out."""
    tested = at_best(results)
    if (tested["split"] != "validation").any():
        tested = tested[tested["split"] != "validation"]
    metrics = [name for name in known_metrics(tested) if name in shown_metrics()]
    return comparison_table(tested[["method", "split", "seed", *metrics]].to_dict("records"))


def _task_parts(
    study: Study, task: str, results: pd.DataFrame, references: list[str], curves: pd.DataFrame, output_dir: Path
) -> Iterator[str]:
    splits = [split for split in results["split"].unique() if split != "validation"] or ["validation"]
    split = "test" if "test" in splits else splits[0]
    several = len(results.drop_duplicates(SETTING)) > 1
    methods = [*results["method"].unique()]
    against = [name for name in references if name in methods] or methods[:1]
    selected = several and "validation" in set(results["split"]) and splits != ["validation"]
    yield f"## {task}"
    if not several or selected:
        chosen = ", each at the setting with its lowest mean NLL on validation" if selected else ""
        yield f"Mean ± standard deviation over seeds{chosen}. A star: tuned on validation labels."
        yield to_markdown(headline(results))
        for one, name in itertools.product(splits, against):
            compared = differences(study, results, output_dir, one, name)
            if len(compared):
                yield (
                    f"Differences from {name} on {one}, in pairs, with 95 % bootstrap intervals over "
                    f"{compared['examples'].iloc[0]} examples, and over seeds where both have several:"
                )
                yield _difference_table(compared)
    if several:
        yield f"Over all settings of the grid, on {split} (means over seeds first; spread is best − worst):"
        yield _robustness_markdown(robustness_table(results, split=split))
        for statistic, name in itertools.product(("median", "spread"), against):
            compared = grid_differences(study, results, output_dir, split, statistic, name)
            if len(compared):
                yield (
                    f"Differences from {name} in the {statistic} over the settings that both "
                    "have finished, with 95 % bootstrap intervals over examples and seeds:"
                )
                yield _difference_table(compared)
        if selected and results["learning_rate"].nunique() > 2:
            yield (
                "Around each method's own best learning rate, chosen by its NLL on validation: largest − smallest over "
                "that rate and the next below and above, at its best batch size and rank. Two rates: the best is at an "
                "end of the grid, or a neighbour is missing."
            )
            yield _around_best_markdown(spread_around_best(results, split=split))
    if not selected and several:
        yield "There is no labelled validation split to choose a setting by; hold_out takes one from the training set."
    reached = _speed(results, curves[curves["task"] == task] if len(curves) else curves)
    if reached:
        yield reached
    yield _cost_words(results)
    yield _cost_markdown(cost_table(results, split=split, reference=against[0]))
    yield from _figures(task, results, split, several, output_dir)


def _difference_table(table: pd.DataFrame) -> str:
    rows = []
    for record in table.to_dict("records"):
        cells = [record["method"]]
        for metric in shown_metrics():
            factor, decimals = METRICS[metric].factor, METRICS[metric].decimals
            low, middle, high = (factor * record[f"{metric}{end}"] for end in ("_lower", "", "_upper"))
            cells.append(
                f"{middle:+.{decimals}f} [{low:+.{decimals}f}, {high:+.{decimals}f}] {record[f'{metric}_verdict']}"
            )
        rows.append(cells)
    return _markdown(["method", *(METRICS[metric].header for metric in shown_metrics())], rows)


def _robustness_markdown(table: pd.DataFrame) -> str:
    columns = [(metric, part) for metric in GRID_METRICS for part in ("best", "median", "worst", "spread")]
    columns += [(metric, "median") for metric in shown_metrics() if metric not in GRID_METRICS and metric in table]
    header = ["method", "settings", *(f"{METRICS[metric].header} {part}" for metric, part in columns)]
    rows = []
    for (_, method), row in table.iterrows():
        numbers = [METRICS[metric].shown(row[metric, part]) for metric, part in columns]
        rows.append([method, str(int(row["settings", "count"])), *numbers])
    return _markdown(header, rows)


def _around_best_markdown(table: pd.DataFrame) -> str:
    metrics = [metric for metric in GRID_METRICS if metric in table]
    header = ["method", "learning rate", "rates", *(f"{METRICS[metric].header} spread" for metric in metrics)]
    rows = [
        [
            method,
            f"{row['learning_rate']:g}",
            str(int(row["rates"])),
            *(METRICS[metric].shown(row[metric]) for metric in metrics),
        ]
        for (_, method), row in table.iterrows()
    ]
    return _markdown(header, rows)


def _cost_words(results: pd.DataFrame) -> str:
    machines, workers = results["host"].nunique(), results["workers"]
    where = results["host"].iloc[0] if machines == 1 else f"{machines} machines"
    known = "unknown" if workers.isna().any() else f"{workers.max()} at most"
    return (
        f"Cost, in means over all runs ({where}, {results['processors'].iloc[0]} processors; workers at once: {known}),"
        " by the clock and in processor time. Ratios are of processor time, in pairs of runs at one setting and seed, "
        "with as many workers beside them:"
    )


def _cost_markdown(table: pd.DataFrame) -> str:
    columns = {
        "training (s)": ("train_seconds", 1),
        "of processors (s)": ("train_cpu_seconds", 1),
        "ratio": ("train_ratio", 2),
        "prediction (s per 1000)": ("predict_seconds", 2),
        "of processors (s per 1000)": ("predict_cpu_seconds", 2),
        "peak memory (MB)": ("peak_memory_mb", 0),
    }
    rows = [
        [key[1], *("-" if pd.isna(row[name]) else f"{row[name]:.{decimals}f}" for name, decimals in columns.values())]
        for key, row in table.iterrows()
    ]
    return _markdown(["method", *columns], rows)


def _speed(results: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Steps until the validation loss that the first method's curves reach at their lowest mean."""
    if not len(curves):
        return ""
    curves = curves.rename(columns={"method": "trained"})
    means = curves.groupby(["trained", *SETTING, "step"], sort=False)["loss"].mean().reset_index()
    reference = results["trained"].iloc[0]
    target = means[means["trained"] == reference]["loss"].min()
    rows = []
    for name, points in means.groupby("trained", sort=False):
        per_setting = {
            setting: steps_to_reach(rows_of.to_dict("records"), target)
            for setting, rows_of in points.groupby(SETTING, sort=False)
        }
        reached = [steps for steps in per_setting.values() if not np.isnan(steps)]
        rows.append(
            [
                str(name),
                f"{min(reached):.0f}" if reached else "-",
                f"{len(reached)} of {len(per_setting)}",
                f"{points['loss'].min():.3f}",
            ]
        )
    return (
        f"Steps to a validation loss of {target:.3f}, the lowest of {reference} (at the mean, over seeds):\n\n"
        + _markdown(["method", "fewest steps", "settings that reach it", "lowest loss"], rows)
    )


def _figures(task: str, results: pd.DataFrame, split: str, several: bool, output_dir: Path) -> Iterator[str]:
    from matplotlib import pyplot

    pictures: dict[str, Callable[[], Any]] = {
        "accuracy-calibration": partial(plots.plot_accuracy_calibration, results, split=split),
        "cost": partial(plots.plot_cost, results, split=split),
        "pareto": partial(plots.plot_pareto, results, split=split),
    }
    if several:
        for metric in GRID_METRICS:
            pictures[f"grid-{metric}"] = partial(plots.plot_grid_spread, results, metric=metric, split=split)
    if results["learning_rate"].nunique() > 1:
        for metric in ("accuracy", "nll"):
            pictures[f"rates-{metric}"] = partial(plots.plot_learning_rates, results, metric=metric, split=split)
    folder = output_dir / FIGURES
    folder.mkdir(exist_ok=True)
    for name, draw in pictures.items():
        ax = draw()
        file = folder / f"{slug(task)}-{name}.png"
        ax.figure.savefig(file, dpi=160, bbox_inches="tight")
        pyplot.close(ax.figure)
        yield f"![{name}]({FIGURES}/{file.name})"


def _describe(row: dict) -> str:
    return (
        f"{row['method']} ({row['task']}, learning rate {row['learning_rate']:g}, batch {row['batch_size']}, "
        f"rank {row['rank']}, seed {row['seed']})"
    )


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return layout(header, rows, num_text_columns=1)
