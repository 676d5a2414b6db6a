"""Pictures of what the uncertainty is good for. Numbers and perhaps an Axes in, the Axes out."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.analysis.decisions.costs import curve_of_costs, realized_costs
from bayeslora.analysis.metrics.agreement import rank_correlation
from bayeslora.analysis.metrics.bins import bin_scores
from bayeslora.analysis.metrics.bootstrap import bootstrap_interval, check_resamples
from bayeslora.analysis.metrics.checks import check_examples, check_level
from bayeslora.analysis.metrics.detection import detection_curve, detection_scores
from bayeslora.analysis.metrics.selective import area_under_risk_coverage, risk_coverage
from bayeslora.analysis.plots.style import BAND, SMALL_TEXT_SIZE, frame, legend_above, name_rows, new_axes, style
from bayeslora.errors import InputError

GRID = np.linspace(0.0, 1.0, 101)  # where bands of curves are computed
FEW_ANSWERS = 20  # the error rate of fewer says little


def plot_risk_coverage(
    methods: Mapping[str, tuple[ArrayLike, ArrayLike]],
    ax: Any = None,
    *,
    level: float = 0.95,
    num_resamples: int = 200,
    seed: int = 0,
) -> Any:
    """Error rate against the share of examples answered, the surest first, with bootstrap bands.

    Args:
        methods: Name to ``(uncertainty, wrong)``, as for `risk_coverage`; each of shape ``(examples,)``.
        ax: Where to draw; a new figure by default.
        level: Coverage of the bands, at each coverage.
        num_resamples: Sets the bootstrap draws.
        seed: Decides them.

    Returns:
        The Axes; curves start at 20 answers. The legend tells the AURC, in percent.

    Raises:
        InputError: No methods, or arrays that do not fit the description.

    Example:
        >>> ax = plot_risk_coverage({"LoRA": (np.arange(40), np.arange(40) >= 30)})
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('coverage  (% of examples answered)', 'wrong answers  (%, 95 % band)')
    """
    _check_methods(methods, "(uncertainty, wrong)")
    check_level(level)
    ax, left = new_axes(ax), 1.0
    for number, (name, (uncertainty, wrong)) in enumerate(methods.items()):
        curve = risk_coverage(uncertainty, wrong)
        area = area_under_risk_coverage(uncertainty, wrong)
        shown = slice(min(FEW_ANSWERS, len(curve.risk)) - 1, None)
        left = min(left, curve.coverage[shown][0])
        colour, _ = style(number)
        label = f"{name} (AURC {100 * area:.1f} %)"
        ax.plot(100 * curve.coverage[shown], 100 * curve.risk[shown], color=colour, linewidth=1.2, label=label)
        pair = np.asarray(uncertainty, dtype=np.float64), np.asarray(wrong, dtype=np.float64)
        grid = GRID[curve.coverage[shown][0] <= GRID]
        lower, upper = _band(partial(_risk, pair, grid), len(pair[0]), level, num_resamples, seed)
        ax.fill_between(100 * grid, 100 * lower, 100 * upper, color=colour, alpha=BAND, linewidth=0)
    ax.set_xlim(100 * min(left, 0.9), 100)
    ax.set_ylim(bottom=0)
    frame(ax, x="coverage  (% of examples answered)", y=f"wrong answers  (%, {100 * level:g} % band)")
    legend_above(ax)
    return ax


def plot_deferral(
    methods: Mapping[str, tuple[ArrayLike, ArrayLike]],
    costs: ArrayLike,
    ax: Any = None,
    *,
    person: float | None = None,
    level: float = 0.95,
    num_resamples: int = 200,
    seed: int = 0,
) -> Any:
    """Mean cost against the share of examples that a person takes, the dearest first, with bootstrap bands.

    Args:
        methods: Name to ``(probs, labels)``: shapes ``(examples, classes)``, ``(examples,)``.
        costs: Of each truth (row) and answer (column), ``(classes, classes)``, see `decide`.
        ax: Where to draw; a new figure by default.
        person: What a person costs; a marker is where a method hands over whatever is expected to cost more. If None,
            the cost of the answers alone is drawn.
        level: Coverage of the bands, at each share.
        num_resamples: Sets the bootstrap draws.
        seed: Decides them.

    Returns:
        The Axes.

    Raises:
        InputError: No methods, or arrays that do not fit the description.

    Example:
        >>> ax = plot_deferral({"LoRA": ([[0.9, 0.1]] * 20, [0] * 15 + [1] * 5)}, [[0, 1], [1, 0]], person=0.2)
        >>> ax.get_xlabel()
        'handed to a person  (% of examples)'
    """
    _check_methods(methods, "(probs, labels)")
    check_level(level)
    ax = new_axes(ax)
    price = 0.0 if person is None else person
    for number, (name, (probs, labels)) in enumerate(methods.items()):
        expected, realized = realized_costs(probs, labels, costs)
        curve = curve_of_costs(expected, realized, price)
        colour, marker = style(number)
        ax.plot(100 * curve.share, curve.cost, color=colour, linewidth=1.2, label=name)

        def cost(rows: np.ndarray, expected: np.ndarray = expected, realized: np.ndarray = realized) -> np.ndarray:
            drawn = curve_of_costs(expected[rows], realized[rows], price)
            return np.interp(GRID, drawn.share, drawn.cost)

        lower, upper = _band(cost, len(expected), level, num_resamples, seed)
        ax.fill_between(100 * GRID, lower, upper, color=colour, alpha=BAND, linewidth=0)
        if person is not None:
            over = int((expected > price).sum())
            ax.plot(100 * curve.share[over], curve.cost[over], marker=marker, color=colour, markersize=6, clip_on=False)
    ax.set_xlim(0, 100)
    ax.set_ylim(bottom=0)
    frame(ax, x="handed to a person  (% of examples)", y=f"mean cost of an example  ({100 * level:g} % band)")
    legend_above(ax)
    return ax


def plot_detection(
    methods: Mapping[str, tuple[ArrayLike, ArrayLike]],
    ax: Any = None,
    *,
    level: float = 0.95,
    num_resamples: int = 200,
    seed: int = 0,
) -> Any:
    """Share of foreign inputs found against false alarms, at every threshold of the uncertainty.

    Args:
        methods: Name to ``(inside, outside)``, as for `detection_scores`: shapes ``(examples,)``,
            ``(other examples,)``.
        ax: Where to draw; a new figure by default.
        level: Coverage of the bootstrap bands, at each rate of false alarms.
        num_resamples: Sets the bootstrap draws.
        seed: Decides them.

    Returns:
        The Axes. The vertical line is where 95 % of the task's own inputs pass.

    Raises:
        InputError: No methods, or arrays that do not fit the description.

    Example:
        >>> ax = plot_detection({"LoRA": ([0.1, 0.2, 0.3, 0.6], [0.5, 0.7])})
        >>> ax.get_legend().get_texts()[0].get_text()
        'LoRA (AUROC 87.5 %)'
    """
    _check_methods(methods, "(inside, outside)")
    check_level(level)
    ax = new_axes(ax, height=3.3)
    ax.plot((0, 100), (0, 100), "--", color="0.45", linewidth=0.9, zorder=1)
    ax.axvline(5, color="0.75", linewidth=0.8, zorder=0)
    for number, (name, (inside, outside)) in enumerate(methods.items()):
        scores, curve = detection_scores(inside, outside), detection_curve(inside, outside)
        colour, _ = style(number)
        label = f"{name} (AUROC {100 * scores.auroc:.1f} %)"
        ax.plot(100 * curve.flagged_inside, 100 * curve.flagged_outside, color=colour, linewidth=1.2, label=label)
        own, other = np.asarray(inside), np.asarray(outside)
        both = np.concatenate([own, other])
        split = len(own)

        def found(rows: np.ndarray, both: np.ndarray = both, split: int = split) -> np.ndarray:
            chosen = both[rows]
            return np.interp(GRID, *detection_curve(chosen[:split], chosen[split:]))

        lower, upper = _band(found, (split, len(other)), level, num_resamples, seed)
        ax.fill_between(100 * GRID, 100 * lower, 100 * upper, color=colour, alpha=BAND, linewidth=0)
    ax.set_xlim(0, 100)
    ax.set_ylim(0, 100)
    ax.set_aspect("equal")
    frame(ax, x="false alarms  (% of the task's own inputs)", y=f"foreign inputs found  (%, {100 * level:g} % band)")
    legend_above(ax)
    return ax


def plot_entropy_parts(
    splits: Mapping[str, tuple[ArrayLike, ArrayLike]],
    ax: Any = None,
    *,
    level: float = 0.95,
    num_resamples: int = 400,
    seed: int = 0,
) -> Any:
    """Mean predictive entropy of each set of inputs, as expected entropy plus mutual information.

    Args:
        splits: Name to ``(expected_entropy, mutual_information)`` in nats, each of shape ``(examples,)``.
        ax: Where to draw; a new figure by default.
        level: Coverage of the bootstrap intervals, over examples, of each part's mean.
        num_resamples: Sets the bootstrap draws.
        seed: Decides them.

    Returns:
        The Axes.

    Raises:
        InputError: No splits, or arrays that do not fit the description.

    Example:
        >>> ax = plot_entropy_parts({"test": ([0.2, 0.3], [0.01, 0.02]), "tweets": ([0.4, 0.5], [0.1, 0.2])})
        >>> ax.get_xlabel()
        'mean entropy  (nats, 95 % intervals)'
    """
    _check_methods(splits, "(expected_entropy, mutual_information)")
    check_level(level)
    ax = new_axes(ax, height=1.0 + 0.3 * len(splits))
    colours = style(0)[0], style(1)[0]
    for row, (expected, information) in enumerate(splits.values()):
        first = check_examples(expected, name="expected_entropy")
        second = check_examples(information, name="mutual_information", size=len(first))
        ends = [
            bootstrap_interval(np.mean, values, num_resamples=num_resamples, level=level, seed=seed)
            for values in (first, second)
        ]
        start = 0.0
        for part, colour, shift in zip(ends, colours, (-0.12, 0.12), strict=True):
            ax.barh(row, part.estimate, left=start, height=0.62, color=colour, alpha=0.75)
            ax.hlines(row + shift, start + part.lower, start + part.upper, color="black", linewidth=1.0)
            start += part.estimate
    for colour, label in zip(colours, ("expected entropy", "mutual information"), strict=True):
        ax.barh(0, 0, color=colour, alpha=0.75, label=label)
    name_rows(ax, list(splits))
    ax.set_xlabel(f"mean entropy  (nats, {100 * level:g} % intervals)", fontsize=SMALL_TEXT_SIZE)
    legend_above(ax)
    return ax


def plot_agreement(
    methods: Mapping[str, ArrayLike],
    disagreement: ArrayLike,
    ax: Any = None,
    *,
    unit: str = "disagreement of the raters",
    quantity: str = "predictive entropy  (nats)",
    num_bins: int = 8,
    level: float = 0.95,
    num_resamples: int = 400,
    seed: int = 0,
) -> Any:
    """Mean uncertainty of each method against what people disagree about, in bins of equally many examples.

    Args:
        methods: Name to the uncertainty of each example: ``(examples,)``, or ``(examples, runs)``, whose mean over
            runs is drawn.
        disagreement: Of people on the same examples, ``(examples,)``.
        ax: Where to draw; a new figure by default.
        unit: What the disagreement is, with its unit.
        quantity: What the uncertainty is, with its unit.
        num_bins: Bins of equal mass; equal disagreements share one.
        level: Coverage of the bars, which are bootstrap intervals of each bin's mean, and of the correlation's.
        num_resamples: Sets the bootstrap draws.
        seed: Decides them.

    Returns:
        The Axes. The legend tells Spearman's correlation over all examples, see `rank_correlation`.

    Raises:
        InputError: No methods, or arrays that do not fit the description.

    Example:
        >>> ax = plot_agreement({"LoRA": np.arange(40) / 40}, np.arange(40) / 10, num_bins=4)
        >>> ax.get_legend().get_texts()[0].get_text()
        'LoRA: ρ = 1.00 (1.00 to 1.00)'
    """
    _check_methods(methods, "uncertainty")
    theirs = check_examples(disagreement, name="disagreement")
    spread = np.ptp(theirs) or 1.0
    bins = bin_scores((theirs - theirs.min()) / spread, num_bins, "mass")
    ax = new_axes(ax)
    options: dict[str, Any] = {"num_resamples": num_resamples, "level": level, "seed": seed}
    for number, (name, uncertainty) in enumerate(methods.items()):
        found = rank_correlation(uncertainty, theirs, **options)
        values = np.asarray(uncertainty, dtype=np.float64)
        values = values if values.ndim == 1 else values.mean(axis=1)
        members = [bins.members == index for index in range(len(bins.size))]
        means = np.array([bootstrap_interval(np.mean, values[chosen], **options) for chosen in members])
        colour, marker = style(number)
        place = bins.means(theirs) + spread * 0.006 * (number - (len(methods) - 1) / 2)  # bars side by side
        label = f"{name}: ρ = {found.estimate:.2f} ({found.lower:.2f} to {found.upper:.2f})"
        ax.vlines(place, means[:, 1], means[:, 2], color=colour, linewidth=1.0)
        ax.plot(place, means[:, 0], marker=marker, markersize=4, color=colour, linewidth=1.2, label=label)
    frame(ax, x=unit, y=f"{quantity},\nmean and {100 * level:g} % interval")
    legend_above(ax)
    return ax


def _check_methods(methods: Mapping[str, Any], what: str) -> None:
    if not methods:
        raise InputError(f"nothing to draw: give at least one entry as {{name: {what}}}")


def _risk(pair: tuple[np.ndarray, np.ndarray], grid: np.ndarray, rows: np.ndarray) -> np.ndarray:
    curve = risk_coverage(pair[0][rows], pair[1][rows])
    return np.interp(grid, curve.coverage, curve.risk)


def _band(
    curve: Callable[[np.ndarray], np.ndarray], sizes: int | tuple[int, ...], level: float, num_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles of a curve over rows drawn with replacement, within each of several consecutive sets of rows."""
    check_resamples(num_resamples)
    sizes = (sizes,) if isinstance(sizes, int) else sizes
    starts = np.cumsum((0, *sizes[:-1]))
    rng = np.random.default_rng(seed)

    def resampled() -> np.ndarray:
        pairs = zip(starts, sizes, strict=True)
        return np.concatenate([start + rng.integers(size, size=size) for start, size in pairs])

    curves = [curve(resampled()) for _ in range(num_resamples)]
    lower, upper = np.quantile(curves, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return lower, upper
