"""Go through a study's grid with Optuna: resumable, shared among machines, and no failure stops the rest."""

import contextlib
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas as pd

from bayeslora.errors import FolderInUseError, InputError, StorageError, TrainingDivergedError
from bayeslora.files.records import read_json
from bayeslora.files.writing import write_json
from bayeslora.storage.run_folder import failed_write, foreign_entry, free_space
from bayeslora.study.cell import finished, run_cell
from bayeslora.study.experiment import check_budget
from bayeslora.study.isolation import call_isolated, preload
from bayeslora.study.methods.base import Lineup, method_modules
from bayeslora.study.predictions import read_predictions
from bayeslora.study.spec import SETTINGS_FILE, Cell, Study, axes, cells, check_folders
from bayeslora.study.summary import write_summary
from bayeslora.study.table import collect, write_tables
from bayeslora.study.trials import POLL_SECONDS, Progress, are_waiting, complete, open_trials, queue_again, quiet

logger = logging.getLogger(__name__)

FINAL_ERRORS = (InputError, TrainingDivergedError)  # another try would end the same way
ENDS_THE_STUDY = (StorageError, BrokenPipeError)  # a full disk, and nobody who reads what is said (| head)


@dataclass(frozen=True)
class StudyResult:
    """``results``: the tidy table, one row for each predictor, split and cell; ``curves`` along training;
    ``failures``, one for each cell or post-hoc method that failed, with its ``error``; where the ``folder`` is."""

    study: Study
    results: pd.DataFrame
    curves: pd.DataFrame
    failures: pd.DataFrame
    folder: Path

    def predictions(self, cell: Cell, split: str) -> dict[str, tuple[Any, Any]]:
        """Probabilities (n, C) and labels (n,) of every method of one cell on one split."""
        return read_predictions(self.folder / cell.folder, split)


def run_study(
    study: Study,
    output_dir: str | Path,
    *,
    storage: str | None = None,
    isolate: bool = False,
    progress: bool = True,
    command: str = "",
) -> StudyResult:
    """Train and score every cell that is not finished yet; then write the tables.

    Run it again to go on after an interruption, and to repeat the cells that failed. Run it on several machines, with
    one ``storage`` and best one shared ``output_dir``, to divide the work.

    Args:
        study: What to compare.
        output_dir: Where cells, tables and figures go, and by default Optuna's journal.
        storage: An Optuna storage URL such as ``sqlite:///study.db`` or ``postgresql://...``; ``None`` for a journal
            file in ``output_dir``.
        isolate: Run each cell in a process of its own, forked from one that has everything imported: its peak memory
            is then the cell's, and a crash fails one cell. A script that asks for it needs the usual
            ``if __name__ == "__main__":``. Otherwise ``peak_memory_mb`` is empty.
        progress: Say which cell runs, and how long the rest will take; in a terminal, and where cells run in this
            process, also show how far each is.
        command: The command line that this is, for the report.

    Raises:
        InputError: for methods or tasks that cannot be, an ``output_dir`` that holds other settings or something else.
        StorageError: when the disk is full.

    Example:
        >>> tasks = TaskSpec("reviews", "reviews", text_columns=("text",))
        >>> study = Study("base", tasks, ("lora", "monteclora"), ranks=2, num_samples=2, training={"max_steps": 1})
        >>> result = run_study(study, "study", progress=False)
        >>> "MonteCLoRA, 2 draws" in set(result.results["method"]), len(result.failures)
        (True, 0)
    """
    output_dir = Path(output_dir)
    lineup = Lineup.of(study.methods)
    lineup.check(study)
    trained = list(lineup.trained)
    check_folders(study, trained)
    check_budget(study)
    _check_folder(output_dir, study, command)
    with _reporting_full_disk(output_dir):
        return _run_cells(study, lineup, output_dir, storage, isolate, progress)


def _run_cells(
    study: Study, lineup: Lineup, output_dir: Path, storage: str | None, isolate: bool, progress: bool
) -> StudyResult:
    space = axes(study, list(lineup.trained))
    sampler = optuna.samplers.GridSampler(space, seed=0)
    trials = open_trials(f"bayeslora-{study.digest}", sampler, storage, output_dir)
    queue_again(trials, output_dir)
    grid = list(cells(study, list(lineup.trained)))
    said = Progress(len(grid), trials, _read(study, grid, lineup, complete(trials), output_dir), progress)
    ended_by: list[Exception] = []  # what every further cell would meet too

    def run(cell: Cell) -> dict:
        if isolate:
            watched = progress and sys.stderr is not None and sys.stderr.isatty()  # else it is for a log
            return call_isolated(run_cell, study, cell, output_dir, progress=watched, own_process=True)
        return run_cell(study, cell, output_dir, progress=progress)

    def objective(trial: Any) -> float:
        cell = Cell(**{name: trial.suggest_categorical(name, values) for name, values in space.items()})
        said.begin(cell)
        try:
            result = _with_retries(run, cell, study.retries)
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            trial.set_user_attr("traceback", traceback.format_exc()[-4000:])
            if isinstance(error, ENDS_THE_STUDY):
                ended_by.append(error)
                trials.stop()
            raise
        trial.set_user_attr("result", result)
        return _value(result)

    if isolate:
        preload(cell_modules())
    with quiet():
        while not ended_by and (are_waiting(trials) or not sampler.is_exhausted(trials)):
            trials.optimize(objective, catch=(Exception,), callbacks=[said.end])
    if ended_by:
        raise ended_by[0]
    results, curves, failures = collect(study, trials, output_dir)
    write_tables(results, curves, failures, output_dir)
    write_summary(study, results, curves, failures, output_dir)
    return StudyResult(study, results, curves, failures, output_dir)


def _read(study: Study, grid: list[Cell], lineup: Lineup, ended: set[Cell], output_dir: Path) -> set[Cell]:
    """The cells that were finished before this study's trials began: by a smaller one, which has grown since."""
    digests = {cell: study.cell_digest(cell, lineup.specs[cell.method]) for cell in grid if cell not in ended}
    return {cell for cell, digest in digests.items() if finished(output_dir / cell.folder, digest) is not None}


def cell_modules() -> list[str]:
    """What the process of a cell needs."""
    return [run_cell.__module__, *method_modules()]


def _with_retries(run: Callable[[Cell], dict], cell: Cell, retries: int) -> dict:
    for attempt in range(retries + 1):
        try:
            return _when_free(run, cell)
        except (*FINAL_ERRORS, *ENDS_THE_STUDY):
            raise
        except Exception as error:
            if attempt == retries:
                raise
            logger.warning("%s failed (%s); trying again", cell, error)
    raise AssertionError


def _when_free(run: Callable[[Cell], dict], cell: Cell) -> dict:
    """Run the cell; where another process is at it, wait for that one's result."""
    said = False
    while True:
        try:
            return run(cell)
        except FolderInUseError as error:
            if not said:
                logger.warning("waiting: %s", error)
                said = True
            time.sleep(POLL_SECONDS)


def _value(result: dict) -> float:
    """What Optuna's dashboards show: the first row's negative log-likelihood on validation, else on the test split."""
    return float(result["rows"][0]["nll"])


def _settings(file: Path) -> dict[str, Any] | None:
    """What the cells of a study's folder have in common; None where that is not known: each cell knows its own."""
    if not file.is_file():
        return None
    try:
        return read_json(file).get("settings", {})
    except InputError as error:
        logger.warning("%s; writing it anew", error)
        return None


@contextlib.contextmanager
def _reporting_full_disk(output_dir: Path) -> Iterator[None]:
    """One clear error where the journal, a table or a picture cannot be written."""
    try:
        yield
    except Exception as error:
        reason = failed_write(error)
        if reason is None:
            raise
        raise StorageError(
            f"writing to {output_dir} failed ({reason}; {free_space(output_dir)} free); what is finished is kept: free "
            "some space, then give the same command again"
        ) from error


def _check_folder(output_dir: Path, study: Study, command: str) -> None:
    """Make the folder, or refuse one with anything in it but a study with these settings."""
    file = output_dir / SETTINGS_FILE
    kept = _settings(file)
    if kept is not None:
        plain = json.loads(json.dumps(study.settings))
        changed = [name for name in plain if kept.get(name) != plain[name]]
        if changed:
            raise InputError(
                f"{output_dir} holds a comparison with another {changed[0]} ({kept.get(changed[0])!r}); "
                "use the same settings to continue it, or another folder"
            )
    elif (
        not file.is_file()
        and output_dir.exists()
        and (not output_dir.is_dir() or foreign_entry(output_dir, SETTINGS_FILE))
    ):
        raise InputError(f"{output_dir} holds something else already; give a new or empty folder")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(file, {"settings": study.settings, "study": study.to_dict(), "command": command}, shared=True)
    except OSError as error:
        raise InputError(f"cannot write in {output_dir}: {error}") from error
