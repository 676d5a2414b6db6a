"""The pictures of a page."""

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bayeslora.analysis.plots.calibration import plot_calibration, plot_interval_coverage
from bayeslora.analysis.plots.posterior import plot_adapters, plot_layer_map
from bayeslora.analysis.plots.training import plot_history
from bayeslora.analysis.plots.uncertainty import plot_deferral, plot_detection, plot_entropy_parts, plot_risk_coverage
from bayeslora.analysis.report.results import RunResults, SplitResults

LONGEST_LABEL = 32


@dataclass(frozen=True)
class Figure:
    """A picture, as a data address, and the sentence that stands for it where it cannot be seen."""

    address: str
    alt: str
    caption: str


def draw_figures(
    runs: Sequence[RunResults], costs: tuple[np.ndarray, float | None] | None = None
) -> dict[str, list[Figure]]:
    """Section to its pictures; sections without any are left out. ``costs`` are those of answers, and of a person."""
    drawn = {
        "training": _training_figures(runs),
        "posterior": _posterior_figures(runs),
        "calibration": _calibration_figures(runs),
        "shift": _shift_figures(runs),
        "selective": _selective_figures(runs),
        "deferral": _deferral_figures(runs, *costs) if costs is not None else [],
    }
    return {section: figures for section, figures in drawn.items() if figures}


def _training_figures(runs: Iterable[RunResults]) -> list[Figure]:
    return [
        _picture(
            plot_history(run.history),
            f"Parts of the loss of {run.name} over its training steps.",
            f"{run.name}: the loss and its parts",
        )
        for run in runs
        if any("loss" in entry for entry in run.history)
    ]


def _posterior_figures(runs: Iterable[RunResults]) -> list[Figure]:
    figures = []
    for run in runs:
        if run.noise_to_signal is None:
            continue
        ratio = np.asarray(run.noise_to_signal)
        quantity = "noise / mean of A"
        figures += [
            _picture(
                plot_adapters(run.adapters, ratio, quantity=quantity),
                f"Noise over mean of each adapter of {run.name}; the median over adapters is {np.median(ratio):.2f}.",
                f"{run.name}: spread of each adapter's draws, median and 90 % interval",
            ),
            _picture(
                plot_layer_map(run.adapters, np.median(ratio, 0), quantity=quantity),
                f"The same numbers of {run.name} by layer and kind of projection.",
                f"{run.name}: where the spread lies",
            ),
        ]
    return figures


def _calibration_figures(runs: Sequence[RunResults]) -> list[Figure]:
    split = _main_split(runs)
    pairs = {
        _plain(run.name): (run.splits[split].probs, run.splits[split].labels) for run in runs if _judged(run, split)
    }
    figures = [
        _picture(
            plot_calibration(chosen),
            f"Accuracy against confidence on {split}; on the diagonal both agree.",
            f"{split}: accuracy against confidence; below the diagonal is overconfident",
        )
        for chosen in _in_sixes(pairs)
    ]
    numbers = {_plain(run.name): _of_numbers(run.splits[split]) for run in runs if _has_numbers(run, split)}
    return figures + [
        _picture(
            plot_interval_coverage(chosen),
            f"Share of the {split} labels within central intervals against the intervals' level.",
            f"{split}: labels within intervals of each level; below the diagonal is overconfident",
        )
        for chosen in _in_sixes(numbers)
    ]


def _shift_figures(runs: Iterable[RunResults]) -> list[Figure]:
    figures = []
    for run in runs:
        if run.noise_to_signal is None or len(run.splits) < 2:
            continue
        parts = {
            _plain(name): (np.maximum(split.entropy - split.mutual_information, 0.0), split.mutual_information)
            for name, split in run.splits.items()
            if split.entropy is not None and split.mutual_information is not None
        }
        if len(parts) > 1:
            figures.append(
                _picture(
                    plot_entropy_parts(parts),
                    f"Mean predictive entropy of {run.name} on each set of inputs, in two parts.",
                    f"{run.name}: how unsure, in expectation (the data's share) and between draws (the model's)",
                )
            )
    outside = sorted({name for run in runs for name, split in run.splits.items() if split.labels is None})
    for name in outside:
        pairs = {}
        for run in runs:
            inside = next(iter(run.splits.values()))
            if name in run.splits and run.splits[name].entropy is not None and inside.entropy is not None:
                pairs[_plain(run.name)] = (inside.entropy, run.splits[name].entropy)
        for chosen in _in_sixes(pairs):
            alt = f"Share of the {name} inputs found against false alarms."
            caption = f"{name}: inputs that belong to no class, found by their entropy"
            figures.append(_picture(plot_detection(chosen), alt, caption))
    return figures


def _selective_figures(runs: Sequence[RunResults]) -> list[Figure]:
    split = _main_split(runs)
    pairs = {}
    for run in runs:
        if _judged(run, split):
            chosen = run.splits[split]
            pairs[_plain(run.name)] = (chosen.entropy, chosen.probs.argmax(1) != chosen.labels)  # type: ignore[union-attr]
    return [
        _picture(
            plot_risk_coverage(chosen),
            f"Error rate on {split} against the share of examples answered.",
            f"{split}: errors among the examples that are answered, the surest first",
        )
        for chosen in _in_sixes(pairs)
    ]


def _deferral_figures(runs: Sequence[RunResults], costs: np.ndarray, person: float | None) -> list[Figure]:
    split = _main_split(runs)
    pairs = {
        _plain(run.name): (run.splits[split].probs, run.splits[split].labels) for run in runs if _judged(run, split)
    }
    marked = "" if person is None else f"; marked: what is expected to cost more than {person:g} is handed over"
    return [
        _picture(
            plot_deferral(chosen, costs, person=person),
            f"Mean cost of a {split} example against the share that is handed to a person.",
            f"{split}: cost against the share that a person takes, the dearest first{marked}",
        )
        for chosen in _in_sixes(pairs)
    ]


def _main_split(runs: Sequence[RunResults]) -> str:
    return next(iter(runs[0].splits))


def _judged(run: RunResults, split: str) -> bool:
    found = run.splits.get(split)
    return found is not None and found.probs is not None and found.labels is not None


def _has_numbers(run: RunResults, split: str) -> bool:
    found = run.splits.get(split)
    return found is not None and found.mean is not None and found.labels is not None


def _of_numbers(split: SplitResults) -> tuple[Any, Any, Any]:
    return split.labels, split.mean, split.std


def _in_sixes(pairs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """At most six methods a picture: more lines cannot be told apart."""
    items = list(pairs.items())
    return (dict(items[start : start + 6]) for start in range(0, len(items), 6))


def _plain(name: str) -> str:
    """For matplotlib, to which dollars mean formulas and a long name leaves no room for the picture."""
    short = name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…"
    return short.replace("$", r"\$")


def _picture(ax: Any, alt: str, caption: str) -> Figure:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    ax.figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(ax.figure)
    return Figure(f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}", alt, caption)
