"""Pictures of a study's grid. The tidy table and perhaps an Axes in, the Axes out."""

from typing import Any

import numpy as np
import pandas as pd

from bayeslora.analysis.metrics.registry import METRICS
from bayeslora.analysis.plots.style import (
    BAND,
    COLOURS,
    frame,
    legend_above,
    name_rows,
    new_axes,
    size_below_legend,
    size_beside_names,
    style,
)
from bayeslora.analysis.tables.study import SETTING, at_best_settings
from bayeslora.errors import InputError


def plot_grid_spread(results: pd.DataFrame, ax: Any = None, *, metric: str = "accuracy", split: str = "test") -> Any:
    """A box for each method over the settings of the grid, each setting's mean over seeds taken first.

    Args:
        results: A study's tidy table, of one task.
        ax: Where to draw; a new figure by default.
        metric: Of :data:`bayeslora.analysis.metrics.registry.METRICS`.
        split: Of which split.

    Returns:
        The Axes: median, quartiles and the whole range, and a dot for each setting.

    Raises:
        InputError: no rows of that split, or several tasks.

    Example:
        >>> plot_grid_spread(results, metric="nll").get_xlabel()
        'NLL (nats per example)'
    """
    chosen = _one_task(results, split)
    means = chosen.groupby(["method", *SETTING], sort=False)[metric].mean()
    title, factor = METRICS[metric].axis, METRICS[metric].factor
    names = list(dict.fromkeys(means.index.get_level_values("method")))
    values = [factor * means.xs(name, level="method").dropna().to_numpy() for name in names]
    ax = new_axes(ax, **size_beside_names(names))
    rows = np.arange(len(names))
    ax.boxplot(
        values,
        positions=rows,
        orientation="horizontal",
        whis=(0, 100),
        widths=0.55,
        showfliers=False,
        medianprops={"color": COLOURS[1], "linewidth": 1.4},
        boxprops={"linewidth": 0.8},
        whiskerprops={"linewidth": 0.8},
        capprops={"linewidth": 0.8},
    )
    for row, found in zip(rows, values, strict=True):
        ax.plot(found, np.full(len(found), row), ".", color=COLOURS[0], markersize=3, alpha=0.6, zorder=3)
    frame(ax, x=title, y="")
    name_rows(ax, names)
    return ax


def plot_learning_rates(results: pd.DataFrame, ax: Any = None, *, metric: str = "nll", split: str = "test") -> Any:
    """A metric against the learning rate, for each method: the mean over batch sizes, ranks and seeds, and their range.

    Args:
        results: A study's tidy table, of one task.
        ax: Where to draw; a new figure by default.
        metric: ``"accuracy"``, ``"nll"``, ``"ece"`` or ``"brier"``.
        split: Of which split.

    Returns:
        The Axes.

    Raises:
        InputError: no rows of that split, or several tasks.

    Example:
        >>> ax = plot_learning_rates(results, metric="nll")
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('learning rate', 'NLL (nats per example)')
    """
    chosen = _one_task(results, split)
    title, factor = METRICS[metric].axis, METRICS[metric].factor
    ax = new_axes(ax, **size_below_legend(chosen["method"].unique()))
    for number, (name, rows) in enumerate(chosen.groupby("method", sort=False)):
        colour, marker = style(number)
        groups = factor * rows.groupby("learning_rate")[metric].agg(["mean", "min", "max"])
        ax.plot(groups.index, groups["mean"], color=colour, marker=marker, markersize=3.5, linewidth=1.2, label=name)
        ax.fill_between(groups.index, groups["min"], groups["max"], color=colour, alpha=BAND, linewidth=0)
    ax.set_xscale("log")
    frame(ax, x="learning rate", y=title)
    legend_above(ax)
    return ax


def plot_accuracy_calibration(
    results: pd.DataFrame, ax: Any = None, *, metric: str = "ece", split: str = "test"
) -> Any:
    """Accuracy against calibration, a point for each method at its own best setting on validation.

    Bars are the standard deviation over seeds; best is the lower right corner.

    Args:
        results: A study's tidy table, of one task.
        ax: Where to draw; a new figure by default.
        metric: ``"accuracy"``, ``"nll"``, ``"ece"`` or ``"brier"``.
        split: Of which split.

    Returns:
        The Axes.

    Raises:
        InputError: no rows of that split, or several tasks.

    Example:
        >>> ax = plot_accuracy_calibration(results)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('accuracy (%)', 'ECE (%)')
    """
    chosen = _one_task(_at_best(results), split)
    title, factor = METRICS[metric].axis, METRICS[metric].factor
    ax = new_axes(ax, **size_below_legend(chosen["method"].unique()))
    for number, (name, rows) in enumerate(chosen.groupby("method", sort=False)):
        colour, marker = style(number)
        x, y = 100 * rows["accuracy"], factor * rows[metric]
        bars = {"xerr": x.std(), "yerr": y.std()} if len(rows) > 1 else {}
        ax.errorbar(
            x.mean(),
            y.mean(),
            **bars,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=0.8,
            linestyle="none",
            label=name,
        )
    frame(ax, x="accuracy (%)", y=title)
    legend_above(ax)
    return ax


def plot_cost(results: pd.DataFrame, ax: Any = None, *, metric: str = "nll", split: str = "test") -> Any:
    """A metric against what training and prediction cost, a point and a line for each method at its own best setting on
    validation.

    The point is at the seconds of training. The line from it to the right is as long as the prediction of 1000 examples
    takes. Processor time where the results have it, else the time by the clock.

    Args:
        results: A study's tidy table, of one task.
        ax: Where to draw; a new figure by default.
        metric: Of :data:`bayeslora.analysis.metrics.registry.METRICS`.
        split: Of which split.

    Returns:
        The Axes.

    Raises:
        InputError: no rows of that split, or several tasks.

    Example:
        >>> ax = plot_cost(results)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('processor seconds of training, + of 1000 predictions', 'NLL (nats per example)')
    """
    chosen = _one_task(_at_best(results), split)
    title, factor = METRICS[metric].axis, METRICS[metric].factor
    clock, words = _clock(chosen)
    ax = new_axes(ax, **size_below_legend(chosen["method"].unique()))
    ends = []
    for number, (name, rows) in enumerate(chosen.groupby("method", sort=False)):
        colour, marker = style(number)
        trained = rows[f"train_{clock}"].mean()
        ends.append(trained + (1000 * rows[f"predict_{clock}"] / rows["examples"]).mean())
        height = factor * rows[metric].mean()
        ax.plot(trained, height, color=colour, marker=marker, markersize=5, linestyle="none", label=name)
        ax.plot([trained, ends[-1]], [height] * 2, color=colour, linewidth=1.0)
    ax.set_xlim(0, 1.08 * max(ends))
    frame(ax, x=f"{words} of training, + of 1000 predictions", y=title)
    legend_above(ax)
    return ax


def plot_pareto(results: pd.DataFrame, ax: Any = None, *, metric: str = "nll", split: str = "test") -> Any:
    """A metric against what a prediction costs, a point for each method at its own best setting on validation.

    The line joins the methods that no other beats in both: only they have a colour and a name. Others are grey. Points
    are means over seeds, and no interval says how sure the order is.

    Args:
        results: A study's tidy table, of one task.
        ax: Where to draw; a new figure by default.
        metric: Of :data:`bayeslora.analysis.metrics.registry.METRICS`, of those that are to be low or high.
        split: Of which split.

    Returns:
        The Axes; the axis of costs is logarithmic, unless one is 0. Processor time where the results have it, else the
        clock's.

    Raises:
        InputError: no rows of that split, several tasks, or a metric with a sign.

    Example:
        >>> ax = plot_pareto(results)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('processor seconds of 1000 predictions', 'NLL (nats per example)')
    """
    chosen = _one_task(_at_best(results), split)
    title, factor, higher = METRICS[metric].axis, METRICS[metric].factor, METRICS[metric].higher_is_better
    if higher is None:
        raise InputError(f"{metric} has no better end, so that no method is ahead: plot another metric")
    clock, words = _clock(chosen)
    costs = 1000 * chosen[f"predict_{clock}"] / chosen["examples"]
    points = chosen.assign(x=costs, y=factor * chosen[metric]).groupby("method", sort=False)[["x", "y"]].mean()
    front = pareto_front(points["x"].to_numpy(), (-1 if higher else 1) * points["y"].to_numpy())
    names = points.index[front]
    from matplotlib.ticker import LogLocator, NullFormatter

    ax = new_axes(ax, **size_below_legend(names))
    others = points.drop(names)
    ax.plot(others["x"], others["y"], "o", color="0.7", markersize=3.5, zorder=1)
    ahead = points.loc[names]
    ax.step(ahead["x"], ahead["y"], where="post", color="0.4", linewidth=0.8, zorder=1)
    for number, (name, point) in enumerate(ahead.iterrows()):
        colour, marker = style(number)
        ax.plot(point["x"], point["y"], color=colour, marker=marker, markersize=5, linestyle="none", label=name)
    if (points["x"] > 0).all():  # a clock may not see what takes next to no time
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    frame(ax, x=f"{words} of 1000 predictions", y=title)
    legend_above(ax)
    return ax


def pareto_front(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Which points no other point beats in one and equals or beats in the other, cheapest first; of equal points the
    first.

    Example:
        >>> pareto_front(np.array([1.0, 3.0, 2.0, 2.0]), np.array([0.9, 0.2, 0.5, 0.6]))
        array([0, 2, 1])
    """
    front: list[int] = []
    for place in np.lexsort((losses, costs)):
        if not front or losses[place] < losses[front[-1]]:
            front.append(int(place))
    return np.array(front, dtype=int)


def _clock(rows: pd.DataFrame) -> tuple[str, str]:
    """Which seconds the rows have, for a column's name and in words."""
    known = "train_cpu_seconds" in rows and rows["train_cpu_seconds"].notna().all()
    return ("cpu_seconds", "processor seconds") if known else ("seconds", "seconds")


def _at_best(results: pd.DataFrame) -> pd.DataFrame:
    return at_best_settings(results) if "validation" in set(results["split"]) else results


def _one_task(results: pd.DataFrame, split: str) -> pd.DataFrame:
    tasks = results["task"].unique()
    if len(tasks) != 1:
        raise InputError(f"one picture shows one task, but the results have {', '.join(tasks) or 'none'}")
    chosen = results[results["split"] == split]
    if chosen.empty:
        raise InputError(f"the results hold no rows of split {split!r}")
    return chosen
