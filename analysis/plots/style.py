"""What all pictures share: the width of a column, sizes of text, colours that the colour-blind can tell apart.

Nothing is shown or saved and no global setting is touched: sizes are given to each element. pyplot is used only to
make a figure where no Axes is given.
"""

from collections.abc import Sequence
from typing import Any

COLUMN_WIDTH = 3.3  # inches
TEXT_SIZE = 8.0  # points
SMALL_TEXT_SIZE = 7.0
LETTER = 0.055  # inches of one letter in small text, on average

# Okabe and Ito (2008), without yellow, which is too light for thin lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BAND = 0.18  # opacity of an interval's band


def new_axes(ax: Any, *, height: float = 2.6, width: float = COLUMN_WIDTH) -> Any:
    """The given Axes, or one in a new figure (of column width), known to pyplot so that a notebook shows it."""
    if ax is not None:
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]


def style(number: int) -> tuple[str, str]:
    """Colour and marker of the n-th method or kind: 49 pairs before one comes again."""
    return COLOURS[number % len(COLOURS)], MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]


def frame(ax: Any, *, x: str, y: str) -> None:
    """Labels with units, small ticks, and no lines above and to the right."""
    ax.set_xlabel(x, fontsize=TEXT_SIZE)
    ax.set_ylabel(y, fontsize=TEXT_SIZE)
    ax.tick_params(which="both", labelsize=SMALL_TEXT_SIZE)
    ax.spines[["top", "right"]].set_visible(False)


def size_below_legend(names: Sequence[str]) -> dict[str, float]:
    """Inches of a new figure whose axes lie below a legend in one column."""
    return {"height": 2.2 + 0.15 * len(names), "width": max(COLUMN_WIDTH, 0.4 + LETTER * max(map(len, names)))}


def size_beside_names(names: Sequence[str]) -> dict[str, float]:
    """Inches of a new figure with a row for each name, the names on the left."""
    return {"height": 0.5 + 0.22 * len(names), "width": max(COLUMN_WIDTH, 2.0 + LETTER * max(map(len, names)))}


def legend_above(ax: Any, *, height: float = 1.0) -> None:
    """A legend outside, where it hides nothing; in two columns if the names are short enough."""
    handles, names = ax.get_legend_handles_labels()
    ax.legend(
        handles,
        names,
        loc="lower center",
        bbox_to_anchor=(0.5, height),
        ncols=2 if max(map(len, names)) <= 24 else 1,
        fontsize=SMALL_TEXT_SIZE,
        frameon=False,
        columnspacing=1.0,
    )


def name_rows(ax: Any, names: list[str]) -> None:
    """One row for each name, from the top down, with light lines to read values off."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0, labelsize=SMALL_TEXT_SIZE)
    ax.tick_params(axis="x", labelsize=SMALL_TEXT_SIZE)
    ax.locator_params(axis="x", nbins=5)
    ax.grid(axis="x", color="0.85", linewidth=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
