"""One HTML page of everything a run, or several, have to say. Numbers in, one self-contained file out.

The page loads nothing, runs no script, and shows every text of the data as text. :func:`bayeslora.report` collects the
numbers from run folders.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bayeslora.analysis.metrics.bootstrap import Interval, bootstrap_interval
from bayeslora.analysis.metrics.detection import detection_scores
from bayeslora.analysis.report.columns import CLASSIFICATION, ENTITIES, LABELS, REGRESSION, Column
from bayeslora.analysis.report.deferral import cost_columns, thresholds
from bayeslora.analysis.report.figures import Figure, draw_figures
from bayeslora.analysis.report.opening import opening
from bayeslora.analysis.report.results import ComparedMethods, RunResults, SplitResults
from bayeslora.analysis.report.sets import set_measures
from bayeslora.analysis.tables.diagnostics import Diagnostic
from bayeslora.errors import InputError

RESAMPLES = 400
LEAST_CERTAIN = 10
SHOWN_CHARACTERS = 600


@dataclass
class Page:
    """What the template fills in."""

    title: str
    runs: list[dict[str, Any]]
    facts: Sequence[str]
    columns: Sequence[Column]
    scores: list[dict[str, Any]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)
    detection: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, list[Figure]] = field(default_factory=dict)
    diagnostics: list[tuple[str, Sequence[Diagnostic]]] = field(default_factory=list)
    uncertain: list[tuple[str, list[dict[str, Any]]]] = field(default_factory=list)
    command: str = ""
    opening: str = ""
    compared: Sequence[ComparedMethods] = ()
    deferral: dict[str, Any] = field(default_factory=dict)
    sets: list[dict[str, Any]] = field(default_factory=list)


def report_html(
    runs: Sequence[RunResults],
    *,
    title: str = "bayeslora report",
    command: str = "",
    compared: Sequence[ComparedMethods] = (),
    costs: tuple[np.ndarray, float | None] | None = None,
) -> str:
    """The page.

    Args:
        runs: One or more; with several, each is also compared with the first, on the examples that both predicted.
        title: Of the page.
        command: The command line that makes the page again.
        compared: Tables of comparisons that the runs are from.
        costs: Of classes, what each answer (column) costs under each truth (row), ``(classes, classes)``, and what a
            person costs to whom an example is handed, or None: the page then has a section on deferral.

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
    columns = _columns(runs[0])
    page = Page(
        title,
        [{"name": run.name, "facts": run.facts, "command": run.command} for run in runs],
        list(dict.fromkeys(fact for run in runs for fact in run.facts)),
        columns,
        scores=_by_split(row for run in runs for row in _scores(run, columns)),
        differences=_by_split(row for run in runs[1:] for row in _differences(runs[0], run, columns)),
        detection=[row for run in runs for row in _detection(run)],
        figures=draw_figures(runs, costs),
        diagnostics=[(run.name, _most_telling_first(run.diagnostics)) for run in runs if run.diagnostics],
        uncertain=[(run.name, _least_certain(run)) for run in runs],
        command=command,
        opening=opening(runs),
        compared=compared,
        deferral=_deferral(runs, *costs) if costs is not None else {},
        sets=_by_split(row for run in runs for row in _sets(run)),
    )
    environment = Environment(
        loader=PackageLoader("bayeslora.analysis.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(page=page)


def _deferral(runs: Sequence[RunResults], costs: np.ndarray, person: float | None) -> dict[str, Any]:
    """The tables of costs, and the thresholds to use."""
    columns = cost_columns(costs, person)
    return {
        "person": person,
        "columns": columns,
        "scores": _by_split(row for run in runs for row in _scores(run, columns)),
        "differences": _by_split(row for run in runs[1:] for row in _differences(runs[0], run, columns)),
        "thresholds": list(thresholds(runs, costs, person)),
    }


def _sets(run: RunResults) -> Iterator[dict[str, Any]]:
    """Coverage and size of conformal sets or intervals on every labelled split, by what a run has to calibrate on."""
    known = run.calibration
    if known is None or known.labels is None or len(known.labels) < 9:  # of fewer, everything would be inside at 90 %
        return
    if known.groups is not None:  # words of a sentence are not exchangeable: no coverage can be promised
        return
    for name, split, labels in _labelled(run):
        measures = set_measures(known, split)
        cells = [_cell(of, bootstrap_interval(of.function, values, num_resamples=RESAMPLES)) for of, values in measures]
        columns = [column for column, _ in measures]
        yield {"split": name, "run": run.name, "examples": len(labels), "columns": columns, "cells": cells}


def _most_telling_first(diagnostics: Sequence[Diagnostic]) -> list[Diagnostic]:
    """Importance sampling last: over so many weights it hardly ever holds, whatever held-out data say."""
    return sorted(diagnostics, key=lambda one: one.name == "pareto_k")


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
    listed = list(rows)
    order = list(dict.fromkeys(row["split"] for row in listed))
    return sorted(listed, key=lambda row: order.index(row["split"]))


def _arrays(split: SplitResults, column: Column) -> list[np.ndarray]:
    return [np.asarray(getattr(split, name)) for name in column.of]


def _columns(run: RunResults) -> Sequence[Column]:
    if not run.label_names:
        return REGRESSION
    own = [(ENTITIES, "entity_counts"), (LABELS, "label_truth")]
    splits = [split for _, split, _ in _labelled(run)]
    first = [columns for columns, name in own if all(getattr(split, name) is not None for split in splits)]
    unit = next(iter(run.splits.values())).unit.removesuffix("s")
    shared = [replace(column, hint=column.hint.replace("per example", f"per {unit}")) for column in CLASSIFICATION]
    return (*(first[0] if first and splits else ()), *shared)


def _interval(statistic: Callable[..., float], split: SplitResults, arrays: Sequence[np.ndarray]) -> Interval:
    """Over examples drawn anew, with all that is scored of each."""
    groups = split.groups if split.groups is not None and len(split.groups) == len(arrays[0]) else None
    return bootstrap_interval(statistic, *arrays, num_resamples=RESAMPLES, groups=groups)


def _scores(run: RunResults, columns: Sequence[Column]) -> Iterator[dict[str, Any]]:
    for name, split, labels in _labelled(run):
        cells = [_cell(column, _interval(column.function, split, _arrays(split, column))) for column in columns]
        yield {"split": name, "run": run.name, "examples": _size(split, len(labels)), "cells": cells}


def _size(split: SplitResults, count: int) -> str:
    return str(count) if split.groups is None else f"{count} {split.unit}, {len(np.unique(split.groups))} examples"


def _differences(first: RunResults, run: RunResults, columns: Sequence[Column]) -> Iterator[dict[str, Any]]:
    """Each number of a run less that of the first, with a paired interval: both see the same resampled examples."""
    for name, split, labels in _labelled(run):
        other = first.splits.get(name)
        if other is None or other.labels is None or not np.array_equal(other.labels, labels):
            continue
        cells = []
        for column in columns:
            mine, theirs = _arrays(split, column), _arrays(other, column)

            def difference(*arrays: np.ndarray, column: Column = column) -> float:
                half = len(column.of)
                return column.function(*arrays[:half]) - column.function(*arrays[half:])

            interval = _interval(difference, split, [*mine, *theirs])
            cells.append(_cell(column, interval, signed=True))
        yield {"split": name, "run": run.name, "against": first.name, "cells": cells}


def _cell(column: Column, interval: Interval, *, signed: bool = False) -> dict[str, Any]:
    style = f"{'+' if signed else ''}.{column.decimals}f"
    estimate, lower, upper = (format(column.factor * value, style) for value in interval)
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
