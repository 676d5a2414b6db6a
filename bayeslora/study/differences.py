"""How the methods of a study differ: in pairs, on the same examples and seeds, with intervals and verdicts."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bayeslora.analysis.metrics.registry import METRICS
from bayeslora.analysis.tables.study import (
    SETTING,
    Difference,
    at_best_settings,
    paired_difference,
    paired_robustness,
)
from bayeslora.errors import InputError
from bayeslora.study.entries import suggest
from bayeslora.study.methods.base import Lineup
from bayeslora.study.outcome import ACROSS_SEEDS
from bayeslora.study.predictions import PREDICTIONS_FILE, read_predictions
from bayeslora.study.spec import Cell, Study


def references(study: Study, results: pd.DataFrame) -> list[str]:
    """What differences are taken from: the study's ``reference`` as the results name it, their first method by default.

    Raises:
        InputError: for a reference that the results do not have.
    """
    known = {name.rstrip("*"): name for name in results["method"].unique()}
    for name in study.reference:
        if name.rstrip("*") not in known:
            raise InputError(
                f"there are no results of the reference {name!r}; {suggest(name, [*known.values()])}. The same command "
                "with another reference trains nothing again; failures.csv has what failed, if anything did"
            )
    return [known[name.rstrip("*")] for name in study.reference] or [next(iter(known.values()))]


def differences(
    study: Study, results: pd.DataFrame, output_dir: Path, split: str, reference: str | None = None
) -> pd.DataFrame:
    """Every method against the ``reference`` (the first if ``None``), each at its own best setting: estimate, interval
    and verdict of every metric. Empty where predictions do not lie in ``output_dir``."""
    chosen = at_best(results)
    chosen = chosen[chosen["split"] == split]
    groups = chosen.groupby("method", sort=False)
    by_method = {str(name): _predictions(study, rows, output_dir, split) for name, rows in groups}
    against = by_method.get(reference or next(iter(by_method)), {})
    others = {name: arrays for name, arrays in by_method.items() if arrays and arrays is not against}
    if not against or not others:
        return pd.DataFrame()
    labels = next(iter(against.values()))[1]
    rows = []
    for name, arrays in others.items():
        ours, theirs, seeds = _paired(arrays, against)
        row = {"method": name, "seeds": seeds, "examples": len(labels)}
        for metric in shown_metrics():
            row |= _columns(metric, paired_difference(ours, theirs, labels, metric=metric))
        rows.append(row)
    return pd.DataFrame(rows)


def shown_metrics() -> list[str]:
    """The metrics that tables of a summary have."""
    return [name for name, metric in METRICS.items() if metric.in_summary]


def grid_differences(
    study: Study,
    results: pd.DataFrame,
    output_dir: Path,
    split: str,
    statistic: str,
    reference: str | None = None,
) -> pd.DataFrame:
    """Every method against the ``reference`` (the first if ``None``) in a statistic over the grid, as
    :func:`differences` has them at single settings; over the settings that both have finished with the same seeds."""
    by_method = _by_setting(study, results, output_dir, split)
    against = by_method.pop(reference or next(iter(by_method)), {})
    rows, seeds = [], set(study.seeds)
    for name, settings in by_method.items():
        complete = [
            setting
            for setting, arrays in against.items()
            if _is_whole(arrays, seeds) and _is_whole(settings.get(setting, {}), seeds)
        ]
        pairs = [_paired(settings[setting], against[setting]) for setting in complete]
        if len({(ours.shape, theirs.shape) for ours, theirs, _ in pairs}) != 1 or len(pairs) < 2:
            continue
        ours, theirs = (np.stack([pair[i] for pair in pairs]) for i in range(2))
        labels = next(iter(against[complete[0]].values()))[1]
        row = {"method": name, "settings": len(pairs), "seeds": pairs[0][2], "examples": len(labels)}
        for metric in shown_metrics():
            row |= _columns(metric, paired_robustness(ours, theirs, labels, metric=metric, statistic=statistic))
        rows.append(row)
    return pd.DataFrame(rows)


def _by_setting(
    study: Study, results: pd.DataFrame, output_dir: Path, split: str
) -> dict[str, dict[tuple, dict[int | None, tuple[np.ndarray, np.ndarray]]]]:
    """Method to setting to what :func:`_predictions` finds."""
    found: dict[str, dict[tuple, dict]] = {}
    chosen = results[results["split"] == split]
    for (name, *setting), rows in chosen.groupby(["method", *SETTING], sort=False):
        found.setdefault(str(name), {})[tuple(setting)] = _predictions(study, rows, output_dir, split)
    return found


def _paired(ours: dict, theirs: dict) -> tuple[np.ndarray, np.ndarray, int]:
    """Probabilities of two methods, (seeds, n, C) each, and the number of seeds that they share: with none, one of
    them is a combination of all seeds."""
    both = [seed for seed in theirs if seed in ours]
    return (
        np.stack([ours[seed][0] for seed in both or ours]),
        np.stack([theirs[seed][0] for seed in both or theirs]),
        len(both),
    )


def _is_whole(arrays: dict, seeds: set[int]) -> bool:
    """Whether every seed has finished, or they are combined."""
    return set(arrays) in (seeds, {None})


def _columns(metric: str, difference: Difference) -> dict[str, Any]:
    return {
        metric: difference.estimate,
        f"{metric}_lower": difference.lower,
        f"{metric}_upper": difference.upper,
        f"{metric}_verdict": difference.verdict,
    }


def _predictions(
    study: Study, rows: pd.DataFrame, output_dir: Path, split: str
) -> dict[int | None, tuple[np.ndarray, np.ndarray]]:
    """Seed to probabilities (n, C) and labels (n,) of one method at one setting; the seed is None across seeds. Empty
    where a cell's predictions are not in ``output_dir``."""
    first = rows.iloc[0]
    across = first["kind"] == ACROSS_SEEDS
    seeds = [int(seed) for seed in (study.seeds if across else rows["seed"])]
    setting = float(first["learning_rate"]), int(first["batch_size"]), int(first["rank"])
    folders = [output_dir / Cell(first["task"], first["trained"], *setting, seed).folder for seed in seeds]
    if not all((folder / PREDICTIONS_FILE).is_file() for folder in folders):
        return {}
    by_folder = [read_predictions(folder, split) for folder in folders]
    if not across:
        return {seed: one[first["method"]] for seed, one in zip(seeds, by_folder, strict=True)}
    methods = Lineup.of(study.methods).across[first["trained"]]
    method = next(m for m in methods if m.label_on(first["trained"], len(seeds)) == first["method"])
    base = next(iter(by_folder[0]))
    return {None: (method.combine(np.stack([one[base][0] for one in by_folder])), by_folder[0][base][1])}


def at_best(results: pd.DataFrame) -> pd.DataFrame:
    return at_best_settings(results) if "validation" in set(results["split"]) else results
