"""Pictures of calibration. Numbers and perhaps an Axes in, the Axes out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.analysis.metrics.bootstrap import check_resamples
from bayeslora.analysis.metrics.brier import BrierParts, brier_decomposition
from bayeslora.analysis.metrics.calibration import expected_calibration_error
from bayeslora.analysis.metrics.checks import check_probs_and_labels
from bayeslora.analysis.metrics.regression import interval_coverage, regression_summary
from bayeslora.analysis.metrics.reliability import ReliabilityCurve, reliability_curve
from bayeslora.analysis.plots.style import BAND, SMALL_TEXT_SIZE, frame, legend_above, name_rows, new_axes, style
from bayeslora.errors import InputError

FEW_EXAMPLES = 10  # a bin with fewer says little: its 95 % interval spans at least 0.3

STRIP = (0.0, 1.03, 1.0, 0.19)  # left, bottom, width, height, in units of the diagram below it

PARTS = {
    "reliability": "reliability\n(lower is better)",
    "resolution": "resolution\n(higher is better)",
    "uncertainty": "uncertainty\n(of the labels)",
}


def plot_calibration(
    predictions: Mapping[str, tuple[ArrayLike, ArrayLike]],
    ax: Any = None,
    *,
    num_bins: int = 10,
    level: float = 0.95,
    binning: str = "width",
    interval: str = "exact",
) -> Any:
    """Reliability diagram: accuracy against confidence per bin, with what chance alone would allow.

    Bars are intervals at ``level``: Clopper and Pearson's, or the bootstrap's. Bins with fewer than 10 examples are
    hollow, light markers without bar or line. The strip on top shows which share of the examples falls in each bin of
    equal width. The ECE in the legend is `expected_calibration_error` at its default number of bins, as in the tables.

    Args:
        predictions: Name of a method to ``(probs, labels)``: shapes ``(examples, classes)``, ``(examples,)``.
        ax: Where to draw; a new figure by default. The strip is drawn on top of it.
        num_bins: Number of bins.
        level: Coverage of the bars.
        binning: ``"width"`` for bins of equal width over ``[0, 1]``, ``"mass"`` for equal numbers of examples.
        interval: ``"exact"`` or ``"bootstrap"``, see `reliability_curve`.

    Returns:
        The Axes of the diagram; the strip is its only child Axes.

    Raises:
        InputError: No predictions, or arrays that do not fit the description.

    Example:
        >>> ax = plot_calibration({"LoRA": ([[0.9, 0.1]] * 20, [0] * 15 + [1] * 5)})
        >>> ax.get_xlabel()
        'confidence (largest probability)'
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['perfect calibration', 'LoRA (ECE 15.0 %)']
    """
    if not predictions:
        raise InputError("predictions is empty: give at least one method as {name: (probs, labels)}")
    curves = {
        name: reliability_curve(probs, labels, num_bins=num_bins, level=level, binning=binning, interval=interval)
        for name, (probs, labels) in predictions.items()
    }
    ax = new_axes(ax, height=3.8)
    shares = {name: reliability_curve(*pair, num_bins=num_bins) for name, pair in predictions.items()}
    strip = ax.inset_axes(STRIP)
    ax.plot((0, 1), (0, 1), "--", color="0.45", linewidth=0.9, label="perfect calibration", zorder=1)
    for number, (name, curve) in enumerate(curves.items()):
        error = expected_calibration_error(*predictions[name])
        colour, marker = style(number)
        _draw_curve(ax, curve, colour, marker, label=f"{name} (ECE {100 * error:.1f} %)")
        _draw_counts(strip, shares[name], colour)
    _frame_calibration(ax, list(curves.values()), level)
    _frame_strip(strip, ax, list(shares.values()))
    return ax


def plot_brier_parts(
    predictions: Mapping[str, tuple[ArrayLike, ArrayLike]],
    ax: Any = None,
    *,
    num_bins: int = 15,
    num_resamples: int = 200,
    seed: int = 0,
) -> Any:
    """Reliability, resolution and uncertainty of each method's Brier score, with their standard errors.

    Bars are 1.96 bootstrap standard errors to either side; a percentile interval would lie off to the right, since
    sets drawn with replacement look less calibrated than they are.

    Args:
        predictions: Name of a method to ``(probs, labels)``: shapes ``(examples, classes)``, ``(examples,)``.
        ax: Where to draw; a new figure by default.
        num_bins: Bins for each class, see `brier_decomposition`.
        num_resamples: Sets the bootstrap draws.
        seed: Decides them.

    Returns:
        The Axes.

    Raises:
        InputError: No predictions, or arrays that do not fit the description.

    Example:
        >>> ax = plot_brier_parts({"LoRA": ([[0.9, 0.1]] * 20, [0] * 15 + [1] * 5)})
        >>> ax.get_xlabel()
        'part of the Brier score (± 1.96 standard errors)'
    """
    if not predictions:
        raise InputError("predictions is empty: give at least one method as {name: (probs, labels)}")
    check_resamples(num_resamples)
    ax = new_axes(ax, height=2.3)
    rows = np.arange(len(PARTS))
    for number, (name, pair) in enumerate(predictions.items()):
        probs, labels = check_probs_and_labels(*pair)
        whole = brier_decomposition(probs, labels, num_bins=num_bins)
        error = _standard_errors(probs, labels, num_bins, num_resamples, seed)
        colour, marker = style(number)
        place = rows + 0.16 * (number - (len(predictions) - 1) / 2)
        label = f"{name} (Brier {whole.brier:.3f})"
        ax.errorbar(
            _three(whole), place, xerr=1.96 * error, fmt=marker, color=colour, markersize=4, elinewidth=1.2, label=label
        )
    name_rows(ax, list(PARTS.values()))
    ax.set_xlim(left=min(0.0, ax.get_xlim()[0]))
    ax.set_xlabel("part of the Brier score (± 1.96 standard errors)", fontsize=SMALL_TEXT_SIZE)
    legend_above(ax)
    return ax


def plot_interval_coverage(predictions: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]], ax: Any = None) -> Any:
    """Calibration of predicted numbers: how often central intervals hold the label, against how often they should.

    Above the diagonal the intervals are wider than they need to be, below it too narrow. Bands are 95 % intervals
    (Clopper and Pearson's) of the coverage at each level, over as many examples. The CRPS in the legend is that of
    normal predictions.

    Args:
        predictions: Name of a method to ``(labels, mean, std)``, each of shape ``(examples,)``.
        ax: Where to draw; a new figure by default.

    Returns:
        The Axes.

    Raises:
        InputError: No predictions, or arrays that do not fit the description.

    Example:
        >>> ax = plot_interval_coverage({"LoRA": (np.linspace(-2, 2, 40), np.zeros(40), np.ones(40))})
        >>> ax.get_legend().get_texts()[1].get_text()
        'LoRA (CRPS 0.703)'

    References:
        Kuleshov, Fenner and Ermon (2018), *Accurate Uncertainties for Deep Learning Using Calibrated Regression*,
        Figure 1.
    """
    if not predictions:
        raise InputError("predictions is empty: give at least one method as {name: (labels, mean, std)}")
    ax = new_axes(ax, height=3.3)
    ax.plot((0, 100), (0, 100), "--", color="0.45", linewidth=0.9, label="perfect calibration", zorder=1)
    for number, (name, arrays) in enumerate(predictions.items()):
        curve = interval_coverage(*arrays, levels=np.linspace(0.01, 0.99, 99))
        colour, _ = style(number)
        label = f"{name} (CRPS {regression_summary(*arrays)['crps']:.3f})"
        ax.plot(100 * curve.level, 100 * curve.coverage, color=colour, linewidth=1.2, label=label)
        ends = 100 * curve.lower, 100 * curve.upper
        ax.fill_between(100 * curve.level, *ends, color=colour, alpha=BAND, linewidth=0)
    ax.set_xlim(0, 100)
    ax.set_ylim(0, 100)
    ax.set_aspect("equal")
    frame(ax, x="level of the interval  (%)", y="labels inside  (%, 95 % band)")
    legend_above(ax)
    return ax


def _three(parts: BrierParts) -> np.ndarray:
    return np.array([getattr(parts, name) for name in PARTS])


def _standard_errors(probs: np.ndarray, labels: np.ndarray, num_bins: int, num_resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = (rng.integers(len(labels), size=len(labels)) for _ in range(num_resamples))
    parts = [_three(brier_decomposition(probs[chosen], labels[chosen], num_bins=num_bins)) for chosen in rows]
    return np.std(parts, axis=0)


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


def _frame_calibration(ax: Any, curves: list[ReliabilityCurve], level: float) -> None:
    """Labels, and limits that leave out the confidences nobody has, such as those below 1/classes, and what is beyond
    all intervals."""
    left = min(curve.lower_edge[curve.count > 0].min() for curve in curves)
    right = max(curve.upper_edge[curve.count > 0].max() for curve in curves)
    ends = np.array([_ends(curve) for curve in curves])
    ax.set_xlim(left, right)
    ax.set_ylim(min(left, ends[:, 0].min()) - 0.02, max(right, ends[:, 1].max()) + 0.02)
    frame(ax, x="confidence (largest probability)", y=f"accuracy, {100 * level:g} % interval")
    legend_above(ax, height=STRIP[1] + STRIP[3])


def _frame_strip(strip: Any, ax: Any, shares: list[ReliabilityCurve]) -> None:
    strip.set_xlim(ax.get_xlim())
    strip.set_ylim(0.0, 105.0 * max((curve.count / curve.count.sum()).max() for curve in shares))
    strip.set_ylabel("% of\nexamples", fontsize=SMALL_TEXT_SIZE)
    strip.tick_params(labelsize=SMALL_TEXT_SIZE, labelbottom=False)
    strip.spines[["top", "right"]].set_visible(False)


def _ends(curve: ReliabilityCurve) -> tuple[float, float]:
    """The lowest and the highest point of one method's picture: a bar's end, or a marker that has no bar."""
    barred = curve.count >= FEW_EXAMPLES
    lows, highs = np.where(barred, curve.lower, curve.accuracy), np.where(barred, curve.upper, curve.accuracy)
    return float(np.nanmin(lows)), float(np.nanmax(highs))
