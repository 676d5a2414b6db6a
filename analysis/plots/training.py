"""How training went."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bayeslora.analysis.plots.style import BAND, SMALL_TEXT_SIZE, frame, legend_above, new_axes, style
from bayeslora.errors import InputError

PARTS = {
    "elbo/task": "task (−log likelihood)",
    "elbo/cooperation": "cooperation Σ π² (no unit)",
    "eval_loss": "validation, at the mean",
    "eval_predictive_nll": "validation, over draws",
}
SMOOTHED_OVER = 20  # points of a smoothed line's window, as a share of the trace: 1/20


def plot_history(history: Sequence[Mapping[str, float]], ax: Any = None) -> Any:
    """The loss's parts over the steps of a run: each logged value lightly, and a running median.

    Args:
        history: A run's log: ``fit(...).history``, or ``history`` in ``run.json``.
        ax: Where to draw; a new figure by default.

    Returns:
        The Axes. The KL is left out, as its weight makes it small and its own size large; it is one of the logged
        parts, ``elbo/kl``.

    Raises:
        InputError: nothing was logged.

    Example:
        >>> ax = plot_history([{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.5}])
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('step', 'nats per example')
    """
    traces = {name: _trace(history, name) for name in PARTS}
    if not len(traces["elbo/task"][0]):
        traces = {"loss": _trace(history, "loss")} | {name: traces[name] for name in PARTS if name.startswith("eval_")}
    if not any(len(steps) for steps, _ in traces.values()):
        raise InputError("the history holds no loss: give fit(...).history")
    ax = new_axes(ax, height=2.4)
    for number, (name, (steps, values)) in enumerate(traces.items()):
        if not len(steps):
            continue
        colour, marker = style(number)
        label = PARTS.get(name, "loss")
        if name.startswith("eval_"):
            ax.plot(steps, values, color=colour, marker=marker, markersize=4, linewidth=1.0, label=label)
        else:
            ax.plot(steps, values, color=colour, linewidth=0.8, alpha=2 * BAND)
            ax.plot(steps, _running_median(values), color=colour, linewidth=1.4, label=label)
    frame(ax, x="step", y="nats per example")
    ax.tick_params(labelsize=SMALL_TEXT_SIZE)
    legend_above(ax)
    return ax


def _trace(history: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one logged number."""
    pairs = [(entry.get("step", index), entry[name]) for index, entry in enumerate(history) if name in entry]
    found = np.array([pair for pair in pairs if pair[1] is not None], dtype=np.float64).reshape(-1, 2)
    found = found[np.isfinite(found[:, 1])]
    return found[:, 0], found[:, 1]


def _running_median(values: np.ndarray) -> np.ndarray:
    half = len(values) // (2 * SMOOTHED_OVER)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return np.array([np.median(window) for window in windows])
