"""Pictures of whether inference is right. Numbers and perhaps an Axes in, the Axes out."""

from collections.abc import Mapping
from typing import Any

from numpy.typing import ArrayLike

from bayeslora.analysis.metrics.simulation_based_calibration import rank_ecdf
from bayeslora.analysis.plots.style import BAND, frame, legend_above, new_axes, style
from bayeslora.errors import InputError


def plot_rank_ecdf(ranks: Mapping[str, ArrayLike], num_draws: int, ax: Any = None, *, level: float = 0.95) -> Any:
    """ECDF of the ranks of simulation-based calibration, less the uniform one, for one or more methods.

    A right posterior stays within the band. Draws that are too narrow run above it on the left and below it on the
    right; draws that lie too low run below it all along, too high above.

    Args:
        ranks: Name of a method to its ranks, as many for each method, shape ``(simulations,)``.
        num_draws: S, draws of each simulation.
        ax: Where to draw; a new figure by default.
        level: Probability with which uniform ranks stay within the band all along.

    Returns:
        The Axes.

    Raises:
        InputError: No ranks, or unequally many.

    Example:
        >>> ax = plot_rank_ecdf({"narrow": np.repeat([0, 9], 50)}, num_draws=9)
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('rank of the truth / 9', 'ECDF − uniform')
    """
    if not ranks:
        raise InputError("ranks is empty: give at least one method as {name: ranks}")
    sizes = {len(values) for values in ranks.values()}  # type: ignore[arg-type]
    if len(sizes) > 1:
        raise InputError(f"methods have {', '.join(map(str, sorted(sizes)))} ranks: one band needs as many of each")
    curves = {name: rank_ecdf(values, num_draws, level=level) for name, values in ranks.items()}
    ax = new_axes(ax)
    band = next(iter(curves.values()))
    ax.fill_between(
        band.z,
        band.lower,
        band.upper,
        step="mid",
        color="0.5",
        alpha=BAND,
        linewidth=0,
        label=f"{100 * level:g} % band",
    )
    for number, (name, curve) in enumerate(curves.items()):
        ax.step(curve.z, curve.difference, where="mid", color=style(number)[0], linewidth=1.2, label=name)
    ax.axhline(0, color="0.45", linewidth=0.8, linestyle="--")
    ax.set_xlim(0, 1)
    frame(ax, x=f"rank of the truth / {num_draws}", y="ECDF − uniform")
    legend_above(ax)
    return ax
