"""Train and score one point of the grid, with all that builds on its training."""

import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bayeslora.analysis import calibration_summary
from bayeslora.errors import InputError
from bayeslora.files.records import MAX_RUN_BYTES, read_json
from bayeslora.files.writing import write_json
from bayeslora.storage.lock import lock_folder
from bayeslora.storage.manifest import version_info
from bayeslora.storage.run_folder import reporting_full_disk
from bayeslora.study.experiment import Experiment
from bayeslora.study.methods.base import Lineup
from bayeslora.study.outcome import POST_HOC, TRAINED, Predict, Predicted, Predictor, Spent, Stopwatch, Trained
from bayeslora.study.predictions import PREDICTIONS_FILE, is_damaged, write_predictions
from bayeslora.study.spec import Cell, Study, differing

logger = logging.getLogger(__name__)

SCORES_FILE = "scores.json"
TRAINING_FOLDER = "training"


def run_cell(study: Study, cell: Cell, output_dir: Path, *, progress: bool = False, own_process: bool = False) -> dict:
    """Train and score a cell, unless that was done already, and write it into its folder.

    Args:
        study: What it belongs to.
        cell: Which.
        output_dir: The study's folder.
        progress: Show progress bars, and say what is done.
        own_process: The process runs this cell only, so that its peak memory is the cell's.

    Returns:
        ``rows``, one for each predictor and split; ``curve``; ``versions``; ``digest``.

    Raises:
        InputError: among others if another process works on the cell, or if another cell's results lie in its folder.
        StorageError: when the disk is full.
    """
    folder = output_dir / cell.folder
    lineup = Lineup.of(study.methods)
    digest = study.cell_digest(cell, lineup.specs[cell.method])
    done = finished(folder, digest)
    if done is not None:
        return done
    with lock_folder(folder), reporting_full_disk(folder):
        done = finished(folder, digest)
        if done is not None:
            return done
        _refuse_other_cell(folder, cell)
        for remains in (SCORES_FILE, PREDICTIONS_FILE, "run.json"):
            (folder / remains).unlink(missing_ok=True)
        for remains in (TRAINING_FOLDER, "adapter"):
            shutil.rmtree(folder / remains, ignore_errors=True)
        result = _work(study, cell, lineup, folder, progress, own_process)
        result["digest"] = digest
        write_json(folder / SCORES_FILE, result)
    return result


def finished(folder: Path, digest: str) -> dict | None:
    """What a finished cell with this digest wrote; nothing where its files are damaged."""
    result = _scores(folder)
    return result if result.get("digest") == digest and not is_damaged(folder) else None


def _scores(folder: Path) -> dict[str, Any]:
    file = folder / SCORES_FILE
    if not file.is_file():
        return {}
    try:
        return read_json(file, most_bytes=MAX_RUN_BYTES)
    except InputError as error:
        logger.warning("%s; the run is repeated", error)
        return {}


def _refuse_other_cell(folder: Path, cell: Cell) -> None:
    """Another study in the same folder may have finished a cell of a name that only looks different."""
    try:
        other = Cell(**_scores(folder)["cell"])
    except (KeyError, TypeError):  # nothing, or remains
        return
    if other != cell:
        name = differing(cell, other)
        raise InputError(
            f"{folder} holds results of {name.replace('_', ' ')} {getattr(other, name)!r}, and those of "
            f"{getattr(cell, name)!r} would take their place: change one of them, or give another "
            "output folder"
        )


def _work(study: Study, cell: Cell, lineup: Lineup, folder: Path, progress: bool, own_process: bool) -> dict:
    method, post_hoc = lineup.trained[cell.method], lineup.post_hoc[cell.method]
    began = time.time()
    experiment = Experiment(
        study, cell, folder, progress=progress, checkpoints=max((later.checkpoints() for later in post_hoc), default=0)
    )
    trained = method.train(experiment)
    experiment.say(f"{cell.method}: {trained.steps} steps in {trained.seconds:.0f} s")
    peak = _peak_memory() if own_process else None
    rows: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    failures: list[dict[str, str]] = []
    for predictor, kind, preparation in _predictors(lineup, experiment, trained, failures):
        watch = Stopwatch()
        try:
            predictions = {split: predictor.predict(split) for split in experiment.splits}
        except Exception as error:
            if kind == TRAINED:
                raise
            failures.append({"method": predictor.label, "error": f"{type(error).__name__}: {error}"})
            continue
        prepared = f", prepared in {preparation['seconds']:.0f} s" if preparation["seconds"] >= 1 else ""
        experiment.say(f"{predictor.label}: predicted in {watch.read()['seconds']:.0f} s{prepared}")
        for split, predicted in predictions.items():
            cost = {
                "steps": trained.steps,
                "train_seconds": trained.seconds + preparation["seconds"],
                "train_cpu_seconds": _sum(trained.cpu_seconds, preparation["cpu_seconds"]),
                "predict_seconds": predicted.seconds,
                "predict_cpu_seconds": predicted.cpu_seconds,
                "peak_memory_mb": peak,
            }
            facts = {**(trained.facts if kind == TRAINED else {}), **predictor.tuned}
            rows.append({**_place(cell, predictor.label, kind, split), **_scores_of(predicted), **cost, **facts})
            arrays[f"{split}/{predictor.label}"] = predicted.probs.astype(np.float32)
            arrays[f"{split}/labels"] = predicted.labels.astype(np.int64)
    if study.keep_adapters:
        method.save(trained, experiment)
    shutil.rmtree(folder / TRAINING_FOLDER, ignore_errors=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    write_predictions(folder, arrays)
    return {
        "cell": {**cell.__dict__},
        "rows": rows,
        "curve": trained.curve,
        "failures": failures,
        "versions": {**version_info(), "python": platform.python_version(), "numpy": np.__version__},
        "host": platform.node(),
        "processors": os.cpu_count(),
        "between": [began, time.time()],
    }


def _sum(*seconds: float | None) -> float | None:
    """Nothing where one is not known."""
    return None if None in seconds else sum(seconds)  # type: ignore[arg-type]


def _place(cell: Cell, label: str, kind: str, split: str) -> dict[str, Any]:
    """What tells a row of results from all others."""
    return {
        "task": cell.task,
        "method": label,
        "trained": cell.method,
        "kind": kind,
        "split": split,
        "learning_rate": cell.learning_rate,
        "batch_size": cell.batch_size,
        "rank": cell.rank,
        "seed": cell.seed,
    }


def _scores_of(predicted: Predicted) -> dict[str, Any]:
    information = predicted.mutual_information
    return {
        "examples": len(predicted.labels),
        **calibration_summary(predicted.probs, predicted.labels),
        "mutual_information": None if information is None else float(information.mean()),
    }


def _predictors(
    lineup: Lineup, experiment: Experiment, trained: Trained, failures: list[dict[str, str]]
) -> Iterator[tuple[Predictor, str, Spent]]:
    """Every predictor of the cell, its kind, and what its preparation took; post-hoc methods that fail are noted
    and left out."""
    own = []
    for predictor, seconds in _timed(lineup.trained[experiment.cell.method].predictors(trained, experiment)):
        own.append(predictor.predict)
        yield predictor, TRAINED, seconds
    for method in lineup.post_hoc[experiment.cell.method]:
        try:
            for predictor, seconds in _timed(method.predictors(trained, experiment, own[0])):
                yield predictor, POST_HOC, seconds
        except Exception as error:
            failures.append({"method": experiment.on_top(method.label), "error": f"{type(error).__name__}: {error}"})


def _timed(predictors: Iterable[tuple[str, Predict] | Predictor]) -> Iterator[tuple[Predictor, Spent]]:
    """With what a method has spent on preparing so far."""
    wall, cpu, watch = 0.0, 0.0, Stopwatch()
    for predictor in predictors:
        spent = watch.read()
        wall, cpu = wall + spent["seconds"], cpu + spent["cpu_seconds"]
        yield Predictor(*predictor), {"seconds": wall, "cpu_seconds": cpu}
        watch = Stopwatch()


def _peak_memory() -> float:
    """Peak resident memory of this process in MB."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
