"""Pictures of the draws of the adapters. Numbers and perhaps an Axes in, the Axes out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.analysis.draws.adapter_names import ShortName, network_order, short_names
from bayeslora.analysis.draws.variance import adapter_draws, noise_contraction
from bayeslora.analysis.metrics.checks import check_level
from bayeslora.analysis.plots.style import SMALL_TEXT_SIZE, TEXT_SIZE, frame, legend_above, name_rows, new_axes, style
from bayeslora.errors import InputError

QUANTITIES = {
    "noise_to_signal": "noise / mean of A  (ratio of RMS)",
    "noise_scale": "RMS noise on A  (units of A)",
}
RATIOS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of noise to mean, drawn as lines


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

    Example:
        >>> data = to_arviz(bayes, num_samples=8, prior=False)
        >>> ax = plot_posterior_spread(data)
        >>> [label.get_text() for label in ax.get_yticklabels()][:2]
        ['0 query', '0 key']
    """
    names, draws = _one_per_adapter(idata, variable)
    return plot_adapters(names, draws, ax, quantity=QUANTITIES.get(variable, variable), level=level)


def plot_adapters(names: Sequence[str], draws: ArrayLike, ax: Any = None, *, quantity: str, level: float = 0.9) -> Any:
    """Per adapter, the median and an equal-tailed interval of any number, such as `effective_components`.

    Args:
        names: Names of the adapters, in any order; drawn in that of the network.
        draws: Shape ``(draws, adapters)``.
        ax: Where to draw; a new figure as high as the number of adapters asks by default.
        quantity: What the number is, with its unit, for the axis.
        level: Share of the draws within the interval.

    Returns:
        The Axes.

    Raises:
        InputError: The shapes do not fit, or ``level`` is out of range.

    Example:
        >>> names = ["layers.0.query", "layers.0.value"]
        >>> ax = plot_adapters(names, [[1.0, 2.0], [3.0, 4.0]], quantity="effective components")
        >>> print(ax.get_xlabel())
        effective components
        median and 90 % interval of 2 draws
    """
    check_level(level)
    values = _check_draws(names, draws, "draws")
    order = network_order(names)
    short = short_names([names[i] for i in order])
    tails = [(1.0 - level) / 2.0, 0.5, (1.0 + level) / 2.0]
    lower, median, upper = np.quantile(values[:, order], tails, axis=0)  # each (adapters,)
    ax = new_axes(ax, height=0.55 + 0.15 * len(names))
    _shade_layers(ax, short)
    for number, kind in enumerate(dict.fromkeys(name.kind for name in short)):
        rows = np.array([row for row, name in enumerate(short) if name.kind == kind])
        colour, marker = style(number)
        ax.hlines(rows, lower[rows], upper[rows], color=colour, linewidth=1.4)
        ax.plot(median[rows], rows, marker, color=colour, markersize=3.6, label=kind)
    name_rows(ax, [name.label for name in short])
    note = f"median and {100 * level:g} % interval of {len(values)} draws"
    ax.set_xlabel(f"{quantity}\n{note}", fontsize=SMALL_TEXT_SIZE)
    return ax


def plot_contraction(
    names: Sequence[str],
    posterior_scale: ArrayLike,
    prior_scale: ArrayLike,
    ax: Any = None,
    *,
    level: float = 0.9,
    num_resamples: int = 400,
    seed: int = 0,
) -> Any:
    """Per adapter, how much narrower than the prior the posterior of A is, with a bootstrap interval over draws.

    Args:
        names: Names of the adapters.
        posterior_scale: ``noise_scale`` of the posterior's draws, shape ``(draws, adapters)``.
        prior_scale: The same of the prior's, shape ``(other draws, adapters)``.
        ax: Where to draw; a new figure by default.
        level: Coverage of the intervals.
        num_resamples: Sets of draws the bootstrap takes.
        seed: Decides them.

    Returns:
        The Axes, with a line at 0, where the posterior is as wide as the prior.

    Raises:
        InputError: The shapes do not fit, or an option is out of range.

    Example:
        >>> names = ["layers.0.query", "layers.0.value"]
        >>> ax = plot_contraction(names, [[0.1, 0.2], [0.1, 0.2]], [[0.2, 0.2], [0.2, 0.2]])
        >>> ax.lines[0].get_xdata()  # 1 − 0.1²/0.2²
        array([0.75])
    """
    after, before = _check_draws(names, posterior_scale, "posterior_scale"), _check_draws(names, prior_scale, "prior")
    rng = np.random.default_rng(seed)
    resampled = [
        noise_contraction(*(scale[rng.integers(len(scale), size=len(scale))] for scale in (after, before)))
        for _ in range(num_resamples)
    ]
    quantity = "1 − posterior / prior variance of A"
    ax = plot_adapters(names, resampled, ax, quantity=quantity, level=level)
    note = f"{100 * level:g} % bootstrap interval over draws"
    ax.set_xlabel(f"{quantity}\n{note}", fontsize=SMALL_TEXT_SIZE)
    ax.axvline(0.0, color="0.45", linestyle="--", linewidth=0.9, zorder=1)
    return ax


def plot_layer_map(
    names: Sequence[str], values: ArrayLike, ax: Any = None, *, quantity: str, colours: str = "cividis"
) -> Any:
    """One number per adapter as a map: layers from left to right, kinds of projection from top to bottom.

    Args:
        names: Names of the adapters. Those outside the stack of layers share a last column.
        values: Shape ``(adapters,)``; NaN and adapters that do not exist are left white.
        ax: Where to draw; a new figure by default. The colour bar stands above it.
        quantity: What the number is, with its unit, for the colour bar.
        colours: A matplotlib colour map.

    Returns:
        The Axes.

    Raises:
        InputError: The shapes do not fit.

    Example:
        >>> names = ["layers.0.query", "layers.0.value", "layers.1.query"]
        >>> ax = plot_layer_map(names, [0.1, 0.2, 0.3], quantity="noise / mean")
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['query', 'value']
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.shape != (len(names),):
        raise InputError(f"values must have shape ({len(names)},), one per adapter, but has shape {numbers.shape}")
    order = network_order(names)
    short = short_names([names[i] for i in order])
    kinds = list(dict.fromkeys(name.kind for name in short))
    layers = sorted({name.layer for name in short if name.layer is not None})
    columns: list[int | None] = [*layers, *([None] if any(name.layer is None for name in short) else [])]
    grid = np.full((len(kinds), len(columns)), np.nan)
    for place, name in zip(order, short, strict=True):
        grid[kinds.index(name.kind), columns.index(name.layer)] = numbers[place]
    ax = new_axes(ax, height=1.0 + 0.2 * len(kinds))
    image = ax.pcolormesh(np.ma.masked_invalid(grid), cmap=colours, edgecolors="white", linewidth=0.4)
    ax.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
    step = max(1, int(np.ceil(len(columns) / 12)))
    shown = [(place, layer) for place, layer in enumerate(columns) if place % step == 0 or layer is None]
    labels = ["other" if layer is None else str(layer) for _, layer in shown]
    ax.set_xticks([place + 0.5 for place, _ in shown], labels)
    ax.invert_yaxis()
    ax.tick_params(length=0, labelsize=SMALL_TEXT_SIZE)
    ax.set_xlabel("layer", fontsize=TEXT_SIZE)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, location="top", aspect=40, fraction=0.08, pad=0.04)
    bar.set_label(quantity, fontsize=SMALL_TEXT_SIZE)
    bar.ax.tick_params(labelsize=SMALL_TEXT_SIZE)
    bar.ax.locator_params(nbins=5)
    bar.outline.set_visible(False)
    return ax


def plot_spread_against_mean(
    names: Sequence[str], mean_scale: ArrayLike, noise_scale: ArrayLike, ax: Any = None, *, level: float = 0.9
) -> Any:
    """Noise on A against the size of its mean, one point per adapter, with lines where their ratio is constant.

    Args:
        names: Names of the adapters.
        mean_scale: Root mean square of μ, shape ``(adapters,)``; adapters where it is 0 are left out.
        noise_scale: Root mean square of the noise, shape ``(draws, adapters)``.
        ax: Where to draw; a new figure by default.
        level: Share of the draws within the bars.

    Returns:
        The Axes, both logarithmic.

    Raises:
        InputError: The shapes do not fit, every mean is 0, or ``level`` is out of range.

    Example:
        >>> names = ["layers.0.query", "layers.0.value"]
        >>> ax = plot_spread_against_mean(names, [1.0, 2.0], [[0.1, 0.2], [0.3, 0.4]])
        >>> ax.get_xlabel(), ax.get_xscale()
        ('RMS of the mean of A  (units of A)', 'log')
    """
    check_level(level)
    noise = _check_draws(names, noise_scale, "noise_scale")
    mean = np.asarray(mean_scale, dtype=np.float64)
    if mean.shape != (len(names),):
        raise InputError(f"mean_scale must have shape ({len(names)},), one per adapter, but has shape {mean.shape}")
    if not (mean > 0).any():
        raise InputError("the mean of A is zero in every adapter: there is nothing to compare the noise with")
    lower, median, upper = np.quantile(noise, [(1 - level) / 2, 0.5, (1 + level) / 2], axis=0)
    ax = new_axes(ax, height=3.2)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(mean[mean > 0].min() / 1.2, mean.max() * 1.2)
    ax.set_ylim(lower.min() / 1.1, upper.max() * 1.1)
    short = short_names(names)
    for number, kind in enumerate(dict.fromkeys(short[i].kind for i in network_order(names))):
        chosen = np.array([i for i, name in enumerate(short) if name.kind == kind and mean[i] > 0], dtype=int)
        colour, marker = style(number)
        ax.vlines(mean[chosen], lower[chosen], upper[chosen], color=colour, linewidth=0.9, alpha=0.7)
        ax.plot(mean[chosen], median[chosen], marker, color=colour, markersize=4, linestyle="none", label=kind)
    _draw_ratios(ax)
    note = f"median and {100 * level:g} % of {len(noise)} draws"
    frame(ax, x="RMS of the mean of A  (units of A)", y=f"RMS noise on A  (units of A)\n{note}")
    legend_above(ax)
    return ax


def plot_eigenvalues(names: Sequence[str], eigenvalues: ArrayLike, ax: Any = None, *, level: float = 0.9) -> Any:
    """Eigenvalues of Σ from the largest down, for each kind of projection, over its adapters and the draws.

    Args:
        names: Names of the adapters.
        eigenvalues: Shape ``(draws, adapters, r)``, largest first, as `bayeslora.analysis.eigenvalues` gives them.
        ax: Where to draw; a new figure by default.
        level: Share of draws and adapters within the bars.

    Returns:
        The Axes, with a logarithmic vertical axis.

    Raises:
        InputError: The shapes do not fit, or ``level`` is out of range.

    Example:
        >>> names = ["layers.0.query", "layers.0.value"]
        >>> ax = plot_eigenvalues(names, [[[2.0, 1.0], [4.0, 1.0]], [[2.0, 1.0], [4.0, 1.0]]])
        >>> [line.get_ydata().tolist() for line in ax.lines]  # of the queries, of the values
        [[2.0, 1.0], [4.0, 1.0]]
    """
    check_level(level)
    spectrum = np.asarray(eigenvalues, dtype=np.float64)
    if spectrum.ndim != 3 or spectrum.shape[1] != len(names):
        raise InputError(f"eigenvalues must have shape (draws, {len(names)}, r), but has shape {spectrum.shape}")
    ax = new_axes(ax, height=2.8)
    ax.set_yscale("log")
    short = short_names(names)
    kinds = list(dict.fromkeys(short[i].kind for i in network_order(names)))
    for number, kind in enumerate(kinds):
        chosen = spectrum[:, [i for i, name in enumerate(short) if name.kind == kind]]
        values = chosen.reshape(-1, chosen.shape[-1])
        values = values[:, ~np.isnan(values).all(axis=0)]
        lower, median, upper = np.nanquantile(values, [(1 - level) / 2, 0.5, (1 + level) / 2], axis=0)
        place = np.arange(1, values.shape[1] + 1) + 0.5 * ((number + 0.5) / len(kinds) - 0.5)
        colour, marker = style(number)
        ax.vlines(place, lower, upper, color=colour, linewidth=0.9)
        ax.plot(place, median, marker=marker, color=colour, markersize=3.2, linewidth=0.8, label=kind)
    ax.set_xticks(range(1, spectrum.shape[-1] + 1))
    note = f"median, {100 * level:g} % of draws and adapters"
    frame(ax, x="eigenvalue, from the largest down", y=f"eigenvalue of Σ\n({note})")
    ax.yaxis.label.set_size(SMALL_TEXT_SIZE)
    legend_above(ax)
    return ax


def _one_per_adapter(idata: Any, variable: str) -> tuple[list[str], np.ndarray]:
    """Names of the adapters, and the draws of one number for each: ``(draws, adapters)``."""
    posterior = idata["posterior"]
    fitting = [name for name, values in posterior.data_vars.items() if set(values.dims) == {"chain", "draw", "adapter"}]
    if variable not in fitting:
        raise InputError(
            f"the posterior has no variable {variable!r} with one number per adapter; "
            f"it has {', '.join(fitting) or 'none'}"
        )
    return [str(name) for name in posterior["adapter"].values], adapter_draws(idata, variable)


def _check_draws(names: Sequence[str], draws: ArrayLike, title: str) -> np.ndarray:
    values = np.asarray(draws, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(names) or not values.size:
        raise InputError(f"{title} must have shape (draws, {len(names)}), but has shape {values.shape}")
    return values


def _shade_layers(ax: Any, names: list[ShortName]) -> None:
    """A light band behind every other layer, to guide the eye along the rows."""
    for row, name in enumerate(names):
        if name.layer is not None and name.layer % 2 == 1:
            ax.axhspan(row - 0.5, row + 0.5, color="0.94", linewidth=0, zorder=0)


def _draw_ratios(ax: Any) -> None:
    """Lines of constant noise over mean that cross the picture, each with its ratio."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    for ratio in RATIOS:
        start, end = max(left, bottom / ratio), min(right, top / ratio)
        if start < end:
            ax.plot([start, end], [ratio * start, ratio * end], ":", color="0.6", linewidth=0.8, zorder=0)
            ax.text(end, ratio * end, f"{ratio:g} ", fontsize=6, color="0.4", ha="right", va="top")
