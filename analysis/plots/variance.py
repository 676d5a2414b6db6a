"""Pictures of the predictive variance: how many draws are enough, and which adapters it comes from."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bayeslora.analysis.draws.adapter_names import short_names
from bayeslora.analysis.draws.variance import DrawsNeeded, VarianceShares
from bayeslora.analysis.plots.style import SMALL_TEXT_SIZE, frame, legend_above, name_rows, new_axes, style


def plot_draws_needed(found: DrawsNeeded, ax: Any = None, *, unit: str = "probability") -> Any:
    """Error of an average over draws against their number, and where it meets the tolerance.

    Args:
        found: What `draws_needed` returned.
        ax: Where to draw; a new figure by default.
        unit: Unit of the averaged values, for the axis.

    Returns:
        The Axes, both logarithmic. Points are what means of so many draws differ by in fact; where draws are
        independent they lie on the line.

    Example:
        >>> needed = draws_needed([[0.4], [0.6], [0.4], [0.6]] * 25, tolerance=0.01)
        >>> [text.get_text() for text in plot_draws_needed(needed).get_legend().get_texts()]
        ['σ / √S', 'between blocks of draws', 'tolerance 0.01', 'enough: S = 102']
    """
    ax = new_axes(ax, height=2.5)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    line, other = style(0)[0], style(1)[0]
    last = max(2 * found.num_draws[-1], 1.5 * found.enough)
    counts = np.geomspace(1, last, 50)
    ax.plot(counts, found.error(counts), color=line, linewidth=1.2, label="σ / √S")
    ax.plot(found.num_draws, found.measured, "o", color=line, markersize=4, label="between blocks of draws")
    ax.axhline(found.tolerance, color="0.45", linestyle="--", linewidth=0.9, label=f"tolerance {found.tolerance:g}")
    ax.axvline(found.enough, color=other, linewidth=1.2, label=f"enough: S = {found.enough}")
    ax.xaxis.set_major_formatter("{x:g}")
    frame(ax, x="number of draws S", y=f"standard error  ({unit})")
    legend_above(ax)
    return ax


def plot_variance_shares(shares: VarianceShares, ax: Any = None) -> Any:
    """Which parts cause the uncertainty: their shares of the variance of the logits, with intervals over draws.

    Args:
        shares: What `variance_shares` returned.
        ax: Where to draw; a new figure as high as the number of parts asks by default.

    Returns:
        The Axes; the last row is what the parts do not explain one by one.

    Example:
        >>> shares = variance_shares(["query", "value"], [[1.0, 2.0, 4.0], [2.0, 4.0, 8.0]])
        >>> ax = plot_variance_shares(shares)
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['query', 'value', 'remainder']
    """
    ax = new_axes(ax, height=0.6 + 0.16 * (len(shares.parts) + 1))
    rows = np.arange(len(shares.parts) + 1)
    colours = [style(0)[0]] * len(shares.parts) + ["0.6"]
    ax.barh(rows, 100 * shares.estimate, height=0.7, color=colours, alpha=0.75)
    ax.hlines(rows, 100 * shares.lower, 100 * shares.upper, color="black", linewidth=1.0)
    ax.axvline(0.0, color="0.45", linewidth=0.8)
    name_rows(ax, [*_short_parts(shares.parts), "remainder"])
    note = f"{100 * shares.level:g} % interval over {shares.num_draws} draws"
    ax.set_xlabel(f"% of the variance of the logits\n{note}", fontsize=SMALL_TEXT_SIZE)
    return ax


def _short_parts(parts: Sequence[str]) -> list[str]:
    """Adapters by their short names; layers and kinds as they are."""
    return [name.label for name in short_names(parts)] if any("." in part for part in parts) else list(parts)
