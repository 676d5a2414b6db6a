"""Pictures of the posterior and of calibration. Numbers and perhaps an Axes in, the Axes out.

Nothing is shown or saved and no global setting is touched: text sizes are given to each element, for a column
of 3.4 inches. pyplot is used only to make a figure where no Axes is given.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.analysis.adapter_names import ShortName, network_order, short_names
from bayeslora.analysis.checks import check_level
from bayeslora.analysis.reliability import (
    ReliabilityCurve,
    expected_calibration_error,
    reliability_curve,
)
from bayeslora.errors import InputError

COLUMN_WIDTH = 3.4  # inches
TEXT_SIZE = 8.0  # points
SMALL_TEXT_SIZE = 7.0

# Okabe and Ito (2008), without yellow, which is too light for thin lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

FEW_EXAMPLES = 10  # a bin with fewer says little: its 95 % interval spans at least 0.3

STRIP = (0.0, 1.03, 1.0, 0.19)  # left, bottom, width, height, in units of the diagram below it

QUANTITIES = {
    "noise_to_signal": "noise / mean of A  (ratio of RMS)",
    "noise_scale": "RMS noise on A  (units of A)",
}


def plot_posterior_spread(idata: Any, ax: Any = None, *, variable: str = "noise_to_signal", level: float = 0.9) -> Any:
    """Per adapter, the median and an equal-tailed interval of one number over the posterior draws.

    Adapters run from the top down in network order, coloured by kind of projection. Each row says its kind,
    so there is no legend; ``ax.legend()`` adds one.

    Args:
        idata: What `to_arviz` returned.
        ax: Where to draw; a new figure as high as the number of adapters asks by default.
        variable: A variable of the ``posterior`` group with the one dimension ``adapter``.
        level: Share of the draws within the interval.

    Returns:
        The Axes.

    Raises:
        InputError: There is no such variable, or ``level`` is out of range.
    """
    check_level(level)
    names, draws = _adapter_draws(idata, variable)
    order = network_order(names)
    short = short_names([names[i] for i in order])
    tails = [(1.0 - level) / 2.0, 0.5, (1.0 + level) / 2.0]
    lower, median, upper = np.quantile(draws[:, order], tails, axis=0)  # each (adapters,)
    if ax is None:
        ax = _new_axes(height=0.55 + 0.15 * len(names))
    _shade_layers(ax, short)
    for number, kind in enumerate(dict.fromkeys(name.kind for name in short)):
        rows = np.array([row for row, name in enumerate(short) if name.kind == kind])
        colour, marker = _style(number)
        ax.hlines(rows, lower[rows], upper[rows], color=colour, linewidth=1.4)
        ax.plot(median[rows], rows, marker, color=colour, markersize=3.6, label=kind)
    _name_rows(ax, short)
    quantity = QUANTITIES.get(variable, variable)
    ax.set_xlabel(f"{quantity}\nmedian and {100 * level:g} % interval of {len(draws)} draws", fontsize=SMALL_TEXT_SIZE)
    return ax


def plot_calibration(
    predictions: Mapping[str, tuple[ArrayLike, ArrayLike]],
    ax: Any = None,
    *,
    num_bins: int = 10,
    level: float = 0.95,
) -> Any:
    """Reliability diagram: accuracy against confidence per bin, with what chance alone would allow.

    Bars are Clopper-Pearson intervals at ``level``. Bins with fewer than 10 examples are hollow, light
    markers without bar or line. The strip on top shows which share of the examples falls in each bin. The
    ECE in the legend is `expected_calibration_error` at its default number of bins, as in the tables.

    Args:
        predictions: Name of a method to ``(probs, labels)``: shapes ``(examples, classes)``, ``(examples,)``.
        ax: Where to draw; a new figure by default. The strip is drawn on top of it.
        num_bins: Equal-width bins over ``[0, 1]``.
        level: Coverage of the bars.

    Returns:
        The Axes of the diagram; the strip is its only child Axes.

    Raises:
        InputError: No predictions, or arrays that do not fit the description.
    """
    if not predictions:
        raise InputError("predictions is empty: give at least one method as {name: (probs, labels)}")
    curves = {
        name: reliability_curve(probs, labels, num_bins=num_bins, level=level)
        for name, (probs, labels) in predictions.items()
    }
    if ax is None:
        ax = _new_axes(height=3.8)
    strip = ax.inset_axes(STRIP)
    ax.plot((0, 1), (0, 1), "--", color="0.45", linewidth=0.9, label="perfect calibration", zorder=1)
    for number, (name, curve) in enumerate(curves.items()):
        error = expected_calibration_error(*predictions[name])
        colour, marker = _style(number)
        _draw_curve(ax, curve, colour, marker, label=f"{name} (ECE {100 * error:.1f} %)")
        _draw_counts(strip, curve, colour)
    _frame_calibration(ax, strip, list(curves.values()), level)
    return ax


def _new_axes(*, height: float) -> Any:
    """An Axes in a new figure of column width, known to pyplot so that a notebook shows it."""
    from matplotlib import pyplot

    _, ax = pyplot.subplots(figsize=(COLUMN_WIDTH, height), layout="constrained")
    return ax


def _style(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def _adapter_draws(idata: Any, variable: str) -> tuple[list[str], np.ndarray]:
    """Names of the adapters, and the draws of one number for each: ``(draws, adapters)``."""
    posterior = idata["posterior"]
    fitting = [name for name, values in posterior.data_vars.items() if _is_per_adapter(values)]
    if variable not in fitting:
        raise InputError(
            f"the posterior has no variable {variable!r} with one number per adapter; "
            f"it has {', '.join(fitting) or 'none'}"
        )
    values = posterior[variable].transpose("chain", "draw", "adapter").values
    names = [str(name) for name in posterior["adapter"].values]
    return names, values.reshape(-1, len(names))


def _is_per_adapter(values: Any) -> bool:
    return set(values.dims) == {"chain", "draw", "adapter"}


def _shade_layers(ax: Any, names: list[ShortName]) -> None:
    """A light band behind every other layer, to guide the eye along the rows."""
    for row, name in enumerate(names):
        if name.layer is not None and name.layer % 2 == 1:
            ax.axhspan(row - 0.5, row + 0.5, color="0.94", linewidth=0, zorder=0)


def _name_rows(ax: Any, names: list[ShortName]) -> None:
    ax.set_yticks(range(len(names)), [name.label for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0, labelsize=SMALL_TEXT_SIZE)
    ax.tick_params(axis="x", labelsize=SMALL_TEXT_SIZE)
    ax.locator_params(axis="x", nbins=5)
    ax.grid(axis="x", color="0.85", linewidth=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)


def _draw_curve(ax: Any, curve: ReliabilityCurve, colour: str, marker: str, *, label: str) -> None:
    """One method: a line with bars through its well-filled bins, the sparse ones as hollow, light markers."""
    many = curve.count >= FEW_EXAMPLES
    few = (curve.count > 0) & ~many
    ax.vlines(curve.confidence[many], curve.lower[many], curve.upper[many], color=colour, linewidth=1.0)
    ax.plot(
        curve.confidence[many],
        curve.accuracy[many],
        marker=marker,
        markersize=4.0,
        color=colour,
        linewidth=1.2,
        label=label,
    )
    ax.plot(
        curve.confidence[few],
        curve.accuracy[few],
        linestyle="none",
        marker=marker,
        markersize=4.0,
        color=colour,
        markerfacecolor="white",
        alpha=0.5,
    )


def _draw_counts(strip: Any, curve: ReliabilityCurve, colour: str) -> None:
    """Share of the examples in each bin, as an outline."""
    edges = np.append(curve.lower_edge, curve.upper_edge[-1])
    strip.stairs(100.0 * curve.count / curve.count.sum(), edges, color=colour, linewidth=1.2)


def _frame_calibration(ax: Any, strip: Any, curves: list[ReliabilityCurve], level: float) -> None:
    """Limits that leave out the confidences nobody has (below 1/classes), labels, and the strip's frame."""
    left = min(curve.lower_edge[curve.count > 0].min() for curve in curves)
    ax.set_xlim(left, 1.0)
    ax.set_ylim(min(left, *(_lowest(curve) for curve in curves)) - 0.02, 1.02)
    ax.set_xlabel("confidence (largest probability)", fontsize=TEXT_SIZE)
    ax.set_ylabel(f"accuracy, {100 * level:g} % interval", fontsize=TEXT_SIZE)
    ax.tick_params(labelsize=SMALL_TEXT_SIZE)
    _legend_above_strip(ax)
    ax.spines[["top", "right"]].set_visible(False)
    strip.set_xlim(left, 1.0)
    strip.set_ylim(0.0, 105.0 * max((curve.count / curve.count.sum()).max() for curve in curves))
    strip.set_ylabel("% of\nexamples", fontsize=SMALL_TEXT_SIZE)
    strip.tick_params(labelsize=SMALL_TEXT_SIZE, labelbottom=False)
    strip.spines[["top", "right"]].set_visible(False)


def _legend_above_strip(ax: Any) -> None:
    """Outside the diagram, where no bar can hide behind it; in two columns if the names are short enough."""
    handles, names = ax.get_legend_handles_labels()
    ax.legend(
        handles,
        names,
        loc="lower center",
        bbox_to_anchor=(0.5, STRIP[1] + STRIP[3]),
        ncols=2 if max(map(len, names)) <= 24 else 1,
        fontsize=SMALL_TEXT_SIZE,
        frameon=False,
        columnspacing=1.0,
    )


def _lowest(curve: ReliabilityCurve) -> float:
    """The lowest point of one method's picture: a bar's end, or a marker that has no bar."""
    return float(np.nanmin(np.where(curve.count >= FEW_EXAMPLES, curve.lower, curve.accuracy)))
