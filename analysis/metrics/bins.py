"""Scores sorted into bins: what every binned measure of calibration begins with."""

from typing import NamedTuple

import numpy as np

from bayeslora.errors import InputError

BINNINGS = ("width", "mass")


class Bins(NamedTuple):
    """B bins over n scores. ``edges`` (B + 1,); ``members`` (n,), the bin of each score; ``size`` (B,) scores each."""

    edges: np.ndarray
    members: np.ndarray
    size: np.ndarray

    def sums(self, weights: np.ndarray) -> np.ndarray:
        """Sum of ``weights``, one per score, within each bin: ``(B,)``."""
        return np.bincount(self.members, weights=weights, minlength=len(self.size))

    def means(self, weights: np.ndarray) -> np.ndarray:
        """Mean of ``weights`` within each bin: ``(B,)``, NaN where it is empty."""
        return self.sums(weights) / np.where(self.size > 0, self.size, np.nan)


def bin_scores(scores: np.ndarray, num_bins: int, binning: str = "width") -> Bins:
    """Bins ``[lower, upper)``, the last with its upper end.

    Args:
        scores: Numbers in ``[0, 1]``, shape ``(n,)``.
        num_bins: Number of bins.
        binning: ``"width"`` for equal widths over ``[0, 1]``. ``"mass"`` for equal numbers of scores, off by
            one at most where all scores differ. Equal scores share a bin, so there may be fewer bins; none is empty.

    Raises:
        InputError: ``num_bins`` is not a positive integer, or ``binning`` is neither of the two.
    """
    if not isinstance(num_bins, (int, np.integer)) or num_bins < 1:
        raise InputError(f"num_bins must be an integer of at least 1, but is {num_bins!r}")
    if binning not in BINNINGS:
        raise InputError(f"binning must be one of {', '.join(BINNINGS)}, but is {binning!r}")
    if binning == "width":
        edges = np.linspace(0.0, 1.0, num_bins + 1)
    else:
        first = np.arange(num_bins) * len(scores) // num_bins  # rank of the lowest score of each bin
        edges = np.append(np.unique(np.sort(scores)[first]), scores.max())
    members = np.digitize(scores, edges[1:-1])
    return Bins(edges, members, np.bincount(members, minlength=len(edges) - 1))
