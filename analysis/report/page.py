"""One HTML page of everything a run, or several, have to say. Numbers in, one self-contained file out.

The page loads nothing, runs no script, and shows every text of the data as text. :func:`bayeslora.report` collects the
numbers from run folders.
"""

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bayeslora.analysis.metrics.bootstrap import Interval, bootstrap_interval
from bayeslora.analysis.metrics.calibration import accuracy, brier_score, negative_log_likelihood
from bayeslora.analysis.metrics.detection import detection_scores
from bayeslora.analysis.metrics.reliability import expected_calibration_error
from bayeslora.analysis.metrics.selective import area_under_risk_coverage
from bayeslora.analysis.plots.calibration import plot_calibration
from bayeslora.analysis.plots.posterior import plot_adapters, plot_layer_map
from bayeslora.analysis.plots.training import plot_history
from bayeslora.analysis.plots.uncertainty import plot_detection, plot_entropy_parts, plot_risk_coverage
from bayeslora.analysis.tables.diagnostics import Diagnostic
from bayeslora.errors import InputError

RESAMPLES = 400
LEAST_CERTAIN = 10
SHOWN_CHARACTERS = 600
LONGEST_LABEL = 32


@dataclass(frozen=True)
class SplitResults:
    """Predictions for the n examples of one split.

    Classification (C classes): ``probs`` (n, C), ``entropy`` and ``mutual_information`` (n,) in nats. Regression:
    ``mean`` and ``std`` (n,). ``labels`` (n,), or None for a split without; ``texts``, n of them, or none to show.

    Example:
        >>> probs = np.array([[0.9, 0.1], [0.4, 0.6]])
        >>> split = SplitResults(np.array([0, 1]), ["fine", "poor"], probs, predictive_entropy(probs), np.zeros(2))
        >>> split.entropy.round(3)
        array([0.325, 0.673])
    """

    labels: np.ndarray | None
    texts: Sequence[str] = ()
    probs: np.ndarray | None = None
    entropy: np.ndarray | None = None
    mutual_information: np.ndarray | None = None
    mean: np.ndarray | None = None
    std: np.ndarray | None = None


@dataclass(frozen=True)
class RunResults:
    """What the page says about one run.

    Attributes:
        name: How it is called on the page; every run has its own.
        facts: What was trained on what: name to value, in the order of the page.
        splits: Name to predictions; the first is the one that the run is judged by.
        label_names: The classes; empty for regression.
        history: The log of the run, as in ``run.json``.
        adapters: Names of the adapters.
        noise_to_signal: Noise over mean of each, over draws: ``(draws, adapters)``; None for a point estimate.
        diagnostics: Answers of :func:`bayeslora.diagnose`.
        command: The command line that makes this run again, where it is known.

    Example:
        >>> split = SplitResults(np.array([0.1, 0.2]), mean=np.array([0.0, 0.2]), std=np.array([0.1, 0.1]))
        >>> RunResults("first", {"task": "heights"}, {"test": split}).name
        'first'
    """

    name: str
    facts: Mapping[str, str]
    splits: Mapping[str, SplitResults]
    label_names: Sequence[str] = ()
    history: Sequence[Mapping[str, float]] = ()
    adapters: Sequence[str] = ()
    noise_to_signal: np.ndarray | None = None
    diagnostics: Sequence[Diagnostic] = ()
    command: str = ""


@dataclass(frozen=True)
class Metric:
    """A number per split and method: ``function`` of the arrays of :class:`SplitResults` named in ``of``."""

    title: str
    hint: str
    function: Callable[..., float]
    of: tuple[str, ...] = ("probs", "labels")
    factor: float = 1.0
    decimals: int = 3


def _aurc(probs: np.ndarray, entropy: np.ndarray, labels: np.ndarray) -> float:
    return area_under_risk_coverage(entropy, probs.argmax(1) != labels)


CLASSIFICATION = (
    Metric("accuracy", "%, higher is better", accuracy, factor=100.0, decimals=1),
    Metric("NLL", "nats per example, lower is better", negative_log_likelihood),
    Metric("ECE", "%, 15 bins of equal width, lower is better", expected_calibration_error, factor=100.0, decimals=1),
    Metric("Brier", "lower is better", brier_score),
    Metric("AURC", "%, lower is better", _aurc, ("probs", "entropy", "labels"), factor=100.0, decimals=1),
)
REGRESSION = (
    Metric("RMSE", "in the labels' unit, lower is better", lambda m, y: float(np.sqrt(np.mean((m - y) ** 2))),
           ("mean", "labels")),
    Metric("NLL", "nats per example, normal predictive, lower is better",
           lambda m, s, y: float(np.mean(((y - m) / s) ** 2 / 2 + np.log(s) + np.log(2 * np.pi) / 2)),
           ("mean", "std", "labels")),
    Metric("coverage", "% of labels within the central 90 % interval; 90 is right",
           lambda m, s, y: float(np.mean(np.abs(y - m) <= 1.6448536 * s)), ("mean", "std", "labels"),
           factor=100.0, decimals=1),
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A picture, as a data address, and the sentence that stands for it where it cannot be seen."""

    address: str
    alt: str
    caption: str


@dataclass
class Page:
    """What the template fills in."""

    title: str
    runs: list[dict[str, Any]]
    facts: Sequence[str]
    metrics: Sequence[Metric]
    scores: list[dict[str, Any]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)
    detection: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, list[Figure]] = field(default_factory=dict)
    diagnostics: list[tuple[str, Sequence[Diagnostic]]] = field(default_factory=list)
    uncertain: list[tuple[str, list[dict[str, Any]]]] = field(default_factory=list)
    command: str = ""


def report_html(runs: Sequence[RunResults], *, title: str = "bayeslora report", command: str = "") -> str:
    """The page.

    Args:
        runs: One or more; with several, each is also compared with the first, on the examples that both predicted.
        title: Of the page.
        command: The command line that makes the page again.

    Returns:
        HTML; it needs no network and no script.

    Raises:
        InputError: no runs, two of one name, or runs that do different tasks.

    Example:
        >>> split = SplitResults(np.array([0.1, 0.2]), mean=np.array([0.0, 0.2]), std=np.array([0.1, 0.1]))
        >>> page = report_html([RunResults("first", {"task": "heights"}, {"test": split})], title="Heights")
        >>> "<title>Heights</title>" in page, "<script" in page
        (True, False)
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    _check(runs)
    metrics = CLASSIFICATION if runs[0].label_names else REGRESSION
    page = Page(
        title,
        [{"name": run.name, "facts": run.facts, "command": run.command} for run in runs],
        list(dict.fromkeys(fact for run in runs for fact in run.facts)),
        metrics,
        scores=_by_split(row for run in runs for row in _scores(run, metrics)),
        differences=_by_split(row for run in runs[1:] for row in _differences(runs[0], run, metrics)),
        detection=[row for run in runs for row in _detection(run)],
        figures=_figures(runs),
        diagnostics=[(run.name, run.diagnostics) for run in runs if run.diagnostics],
        uncertain=[(run.name, _least_certain(run)) for run in runs],
        command=command,
    )
    environment = Environment(
        loader=PackageLoader("bayeslora.analysis.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(page=page)


def _check(runs: Sequence[RunResults]) -> None:
    if not runs:
        raise InputError("nothing to report on: give at least one run")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise InputError(f"every run needs its own name; given are {', '.join(names)}")
    for run in runs:
        if tuple(run.label_names) != tuple(runs[0].label_names):
            raise InputError(f"{run.name} and {runs[0].name} have other classes: report on runs of one task at a time")
        if not run.splits:
            raise InputError(f"{run.name} predicted nothing: give at least one split")


def _labelled(run: RunResults) -> Iterator[tuple[str, SplitResults, np.ndarray]]:
    return ((name, split, split.labels) for name, split in run.splits.items() if split.labels is not None)


def _by_split(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs of one split next to each other, splits in order of appearance."""
    found = list(rows)
    order = list(dict.fromkeys(row["split"] for row in found))
    return sorted(found, key=lambda row: order.index(row["split"]))


def _arrays(split: SplitResults, metric: Metric) -> list[np.ndarray]:
    return [np.asarray(getattr(split, name)) for name in metric.of]


def _scores(run: RunResults, metrics: Sequence[Metric]) -> Iterator[dict[str, Any]]:
    for name, split, labels in _labelled(run):
        cells = [
            _cell(metric, bootstrap_interval(metric.function, *_arrays(split, metric), num_resamples=RESAMPLES))
            for metric in metrics
        ]
        yield {"split": name, "run": run.name, "examples": len(labels), "cells": cells}


def _differences(first: RunResults, run: RunResults, metrics: Sequence[Metric]) -> Iterator[dict[str, Any]]:
    """Each number of a run less that of the first, with a paired interval: both see the same resampled examples."""
    for name, split, labels in _labelled(run):
        other = first.splits.get(name)
        if other is None or other.labels is None or not np.array_equal(other.labels, labels):
            continue
        cells = []
        for metric in metrics:
            mine, theirs = _arrays(split, metric), _arrays(other, metric)

            def difference(*arrays: np.ndarray, metric: Metric = metric) -> float:
                half = len(metric.of)
                return metric.function(*arrays[:half]) - metric.function(*arrays[half:])

            interval = bootstrap_interval(difference, *mine, *theirs, num_resamples=RESAMPLES)
            cells.append(_cell(metric, interval, signed=True))
        yield {"split": name, "run": run.name, "against": first.name, "cells": cells}


def _cell(metric: Metric, interval: Interval, *, signed: bool = False) -> dict[str, Any]:
    style = f"{'+' if signed else ''}.{metric.decimals}f"
    estimate, lower, upper = (format(metric.factor * value, style) for value in interval)
    decided = signed and (interval.lower > 0 or interval.upper < 0)
    return {"estimate": estimate, "interval": f"{lower} to {upper}", "decided": decided}


def _detection(run: RunResults) -> Iterator[dict[str, Any]]:
    inside = next(iter(run.splits.values()))
    for name, split in run.splits.items():
        if split.labels is None and split.entropy is not None and inside.entropy is not None:
            scores = detection_scores(inside.entropy, split.entropy)
            cells = [f"{100 * value:.1f}" for value in scores]
            yield {"split": name, "run": run.name, "examples": len(split.entropy), "cells": cells}


def _least_certain(run: RunResults) -> list[dict[str, Any]]:
    split = next(iter(run.splits.values()))
    if not split.texts:
        return []
    doubt = split.entropy if split.probs is not None else split.std
    assert doubt is not None
    return [_example(run, split, int(index)) for index in np.argsort(-doubt, kind="stable")[:LEAST_CERTAIN]]


def _example(run: RunResults, split: SplitResults, index: int) -> dict[str, Any]:
    text = split.texts[index]
    row = {"text": text[:SHOWN_CHARACTERS] + ("…" if len(text) > SHOWN_CHARACTERS else "")}
    label = None if split.labels is None else split.labels[index]
    if split.probs is None:
        assert split.mean is not None
        assert split.std is not None
        predicted = {"predicted": f"{split.mean[index]:.3f} ± {split.std[index]:.3f}"}
        return row | predicted | {"label": "" if label is None else f"{label:.3f}"}
    best = int(split.probs[index].argmax())
    return row | {
        "predicted": f"{run.label_names[best]} ({100 * split.probs[index, best]:.0f} %)",
        "label": "" if label is None else run.label_names[int(label)],
        "entropy": f"{split.entropy[index]:.3f}",  # type: ignore[index]
        "mutual_information": f"{split.mutual_information[index]:.3f}",  # type: ignore[index]
    }


def _figures(runs: Sequence[RunResults]) -> dict[str, list[Figure]]:
    """Section to its pictures; sections without any are left out."""
    found = {
        "training": _training_figures(runs),
        "posterior": _posterior_figures(runs),
        "calibration": _calibration_figures(runs),
        "shift": _shift_figures(runs),
        "selective": _selective_figures(runs),
    }
    return {section: figures for section, figures in found.items() if figures}


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
    return [
        _picture(
            plot_calibration(chosen),
            f"Accuracy against confidence on {split}; on the diagonal both agree.",
            f"{split}: accuracy against confidence; below the diagonal is overconfident",
        )
        for chosen in _in_sixes(pairs)
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


def _main_split(runs: Sequence[RunResults]) -> str:
    return next(iter(runs[0].splits))


def _judged(run: RunResults, split: str) -> bool:
    found = run.splits.get(split)
    return found is not None and found.probs is not None and found.labels is not None


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
