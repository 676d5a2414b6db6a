"""From finished cells to one tidy table, and to the files a study leaves."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from optuna.trial import TrialState

from bayeslora.analysis import calibration_summary
from bayeslora.analysis.metrics.registry import METRICS
from bayeslora.study.methods.base import Lineup
from bayeslora.study.outcome import ACROSS_SEEDS
from bayeslora.study.predictions import PREDICTIONS_FILE, read_predictions
from bayeslora.study.spec import Cell, Study

RESULTS_FILE = "results.csv"
COSTS = ("train_seconds", "train_cpu_seconds", "predict_seconds", "predict_cpu_seconds")


def collect(study: Study, trials: Any, output_dir: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Results, learning curves and failures of the trials in an Optuna study, each cell once.

    Methods across seeds are added where the predictions of every seed lie in ``output_dir``.
    """
    done: dict[Cell, dict] = {}
    failed: dict[Cell, str] = {}
    for trial in trials.get_trials(deepcopy=False):
        if "result" in trial.user_attrs and trial.state == TrialState.COMPLETE:
            done.setdefault(Cell(**trial.user_attrs["result"]["cell"]), trial.user_attrs["result"])
        elif trial.state == TrialState.FAIL and len(trial.params) == len(Cell.__dataclass_fields__):
            failed[Cell(**trial.params)] = trial.user_attrs.get("error", "the process was interrupted")
    order = sorted(done, key=_key(study))
    for cell in order:
        _complete(done[cell]["rows"], output_dir / cell.folder)
    workers = _workers(done)
    rows = [row | _provenance(done[cell], workers[cell]) for cell in order for row in done[cell]["rows"]]
    rows += _across_seeds(study, {cell: done[cell] for cell in order}, workers, output_dir)
    curves = [{**cell.__dict__, **point} for cell in order for point in done[cell]["curve"]]
    failures = [
        {**cell.__dict__, "error": failed[cell]} for cell in sorted(failed, key=_key(study)) if cell not in done
    ]
    failures += [{**cell.__dict__, **failure} for cell in order for failure in done[cell]["failures"]]
    results = pd.DataFrame(rows)
    if len(results):
        results["seed"] = results["seed"].astype("Int64")
        results["workers"] = results["workers"].astype("Int64")
        for name in ("mutual_information", "peak_memory_mb", *COSTS):
            results[name] = pd.to_numeric(results.get(name, pd.Series(dtype=float)))
    return results, pd.DataFrame(curves), pd.DataFrame(failures)


def _complete(rows: list[dict[str, Any]], folder: Path) -> None:
    """Score the metrics that there were not when the cell was, by the predictions that it kept."""
    for row in rows:
        if not METRICS.keys() <= row.keys() and (folder / PREDICTIONS_FILE).is_file():
            scores = calibration_summary(*read_predictions(folder, row["split"])[row["method"]])
            row |= {name: score for name, score in scores.items() if name not in row}


def write_tables(results: pd.DataFrame, curves: pd.DataFrame, failures: pd.DataFrame, output_dir: Path) -> None:
    """``results.parquet`` and ``results.csv``, ``curves.csv`` and ``failures.csv``."""
    if len(results):
        results.to_parquet(output_dir / "results.parquet", index=False)
        results.to_csv(output_dir / RESULTS_FILE, index=False)
    for name, frame in (("curves", curves), ("failures", failures)):
        file = output_dir / f"{name}.csv"
        if len(frame):
            frame.to_csv(file, index=False)
        else:
            file.unlink(missing_ok=True)


def _across_seeds(
    study: Study, done: dict[Cell, dict], workers: dict[Cell, int | None], output_dir: Path
) -> list[dict[str, Any]]:
    lineup = Lineup.of(study.methods)
    rows: list[dict[str, Any]] = []
    groups: dict[tuple, list[Cell]] = {}
    for cell in done:
        groups.setdefault((cell.task, cell.method, cell.learning_rate, cell.batch_size, cell.rank), []).append(cell)
    for members in groups.values():
        first = members[0]
        methods = lineup.across[first.method]
        folders = [output_dir / cell.folder for cell in members]
        if not methods or len(members) < len(study.seeds) or not all((f / PREDICTIONS_FILE).is_file() for f in folders):
            continue
        base = done[first]["rows"][0]["method"]
        own = [[row for row in done[cell]["rows"] if row["method"] == base] for cell in members]
        for number, template in enumerate(own[0]):
            predictions = [read_predictions(folder, template["split"])[base] for folder in folders]
            probs, labels = np.stack([p for p, _ in predictions]), predictions[0][1]
            for method in methods:
                combined = method.combine(probs)
                spent = [{name: row[number].get(name) for name in COSTS} for row in own]
                seconds = {name: None if None in (of := [one[name] for one in spent]) else sum(of) for name in COSTS}
                rows.append(
                    {
                        **template,
                        **_provenance(done[first], workers[first]),
                        **seconds,
                        **calibration_summary(combined, labels),
                        "method": method.label_on(first.method, len(members)),
                        "kind": ACROSS_SEEDS,
                        "seed": None,
                        "members": len(members),
                    }
                )
    return rows


def _key(study: Study) -> Any:
    """Cells in the order in which the study names things."""
    tasks = [task.name for task in study.tasks]
    labels = list(Lineup.of(study.methods).trained)
    return lambda c: (tasks.index(c.task), labels.index(c.method), c.learning_rate, c.batch_size, c.rank, c.seed)


def _workers(done: dict[Cell, dict]) -> dict[Cell, int | None]:
    """How many finished cells of a machine were at work at once, at most, while each one was; None where it is not
    known, as of an older version."""
    spans = {cell: (result["host"], *result["between"]) for cell, result in done.items() if "between" in result}
    found = dict.fromkeys(done)
    for cell, (host, begin, end) in spans.items():
        beside = [span[1:] for span in spans.values() if span[0] == host and span[1] < end and span[2] > begin]
        moments = [max(start, begin) for start, _ in beside]
        found[cell] = max((sum(start <= now < stop for start, stop in beside) for now in moments), default=1)
    return found


def _provenance(result: dict, workers: int | None) -> dict[str, Any]:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    where = {"host": result["host"], "processors": result["processors"], "workers": workers}
    return {"versions": versions, **where}
