"""Go through a study's grid with Optuna: resumable, shared among machines, and no failure stops the rest."""

import contextlib
import json
import logging
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from bayeslora.errors import InputError, StorageError, TrainingDivergedError
from bayeslora.storage.run_folder import failed_write, foreign_entry, free_space, write_json
from bayeslora.study.bench import check_budget
from bayeslora.study.methods.base import Lineup
from bayeslora.study.predictions import is_damaged, read_predictions
from bayeslora.study.spec import Cell, Study, axes, cells
from bayeslora.study.table import collect, write_tables
from bayeslora.untrusted import read_json

logger = logging.getLogger(__name__)

SETTINGS_FILE = "comparison.json"
JOURNAL_FILE = "optuna.journal"
FINAL_ERRORS = (InputError, TrainingDivergedError)  # another try would end the same way
ENDS_THE_STUDY = (StorageError, BrokenPipeError)  # a full disk, and nobody who reads what is said (| head)
POLL_SECONDS = 1.0
OPENING_TRIES = 3


@dataclass(frozen=True)
class StudyResult:
    """``results``: the tidy table, one row for each way to predict, split and cell; ``curves`` along training;
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
    study: Study, output_dir: str | Path, *, storage: str | None = None, isolate: bool = False, progress: bool = True
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
        progress: Say which cell runs, and how long the rest will take.

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
    lineup = Lineup.of(study)
    check_budget(study)
    _check_folder(output_dir, study)
    with _reporting_full_disk(output_dir):
        return _run_cells(study, list(lineup.trained), output_dir, storage, isolate, progress)


def _run_cells(
    study: Study, trained: list[str], output_dir: Path, storage: str | None, isolate: bool, progress: bool
) -> StudyResult:
    import optuna

    space = axes(study, trained)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.GridSampler(space, seed=0)
    trials = optuna.create_study(
        storage=_storage(optuna, storage, output_dir), sampler=sampler, load_if_exists=True,
        study_name=f"bayeslora-{study.digest}", direction="minimize",
    )  # fmt: skip
    _queue_again(optuna, trials, output_dir)
    watch = _Watch(len(list(cells(study, trained))), trials, optuna, progress)

    ended_by: list[Exception] = []  # what every further cell would meet too

    def run(cell: Cell) -> dict:
        return _in_own_process(study, cell, output_dir) if isolate else _run_here(study, cell, output_dir, progress)

    def objective(trial: Any) -> float:
        cell = Cell(**{name: trial.suggest_categorical(name, values) for name, values in space.items()})
        watch.begin(cell)
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

    with _quiet(optuna), _preloaded(isolate):
        while not ended_by and (_waiting(optuna, trials) or not sampler.is_exhausted(trials)):
            trials.optimize(objective, catch=(Exception,), callbacks=[watch.end])
    if ended_by:
        raise ended_by[0]
    results, curves, failures = collect(study, trials, output_dir)
    write_tables(study, results, curves, failures, output_dir)
    return StudyResult(study, results, curves, failures, output_dir)


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
        except InputError as error:
            if " is in use by " not in str(error):
                raise
            if not said:
                logger.warning("waiting: %s", error)
                said = True
            time.sleep(POLL_SECONDS)


def _run_here(study: Study, cell: Cell, output_dir: Path, progress: bool) -> dict:
    from bayeslora.study.cell import run_cell

    return run_cell(study, cell, output_dir, progress=progress)


def _in_own_process(study: Study, cell: Cell, output_dir: Path) -> dict:
    """Run a cell in a fresh process.

    Raises:
        InputError, TrainingDivergedError, StorageError: what the cell raised.
        RuntimeError: for any other error of the cell, and where its process died.
    """
    context: Any = multiprocessing.get_context(_start_method())
    here, there = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(there, study.to_dict(), asdict(cell), str(output_dir)), daemon=True)
    worker.start()
    there.close()
    try:
        kind, value = here.recv()
    except EOFError:
        worker.join()
        raise RuntimeError(
            f"the cell's process died with exit code {worker.exitcode} (-9 is often a lack of memory)"
        ) from None
    except BaseException:  # asked to stop: an orphan would go on, and hold the cell's lock
        worker.terminate()
        raise
    finally:
        with contextlib.suppress(BaseException):
            worker.join()
        here.close()
    if kind == "result":
        return value
    known = {error.__name__: error for error in (*FINAL_ERRORS, StorageError)}
    raise known.get(kind, RuntimeError)(value if kind in known else f"{kind}: {value}")


def _work(pipe: Any, study: dict, cell: dict, output_dir: str) -> None:
    """What a cell's process does."""
    import warnings

    from bayeslora.study.cell import run_cell

    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        pipe.send(("result", run_cell(Study.from_dict(study), Cell(**cell), Path(output_dir), own_process=True)))
    except Exception as error:
        text = str(error) if isinstance(error, (*FINAL_ERRORS, StorageError)) else f"{error}\n{traceback.format_exc()}"
        pipe.send((type(error).__name__, text))
    finally:
        pipe.close()


def _start_method() -> str:
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


@contextlib.contextmanager
def _preloaded(isolate: bool) -> Iterator[None]:
    """The server that cells' processes are forked from imports everything once, and computes nothing."""
    if isolate and _start_method() == "forkserver":
        families = [f"bayeslora.study.{name}" for name in ("cell", "methods_peft", "methods_monteclora",
                                                          "methods_post_hoc")]  # fmt: skip
        multiprocessing.get_context("forkserver").set_forkserver_preload(families)
    yield


class _Watch:
    """Says what runs, how far the study is and how long the rest will take."""

    def __init__(self, total: int, trials: Any, optuna: Any, progress: bool):
        self.total, self.trials, self.optuna, self.progress = total, trials, optuna, progress
        self.durations: list[float] = []
        self.cell = ""
        self.started = time.monotonic()

    def done(self) -> int:
        complete = self.trials.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.COMPLETE,))
        return len({trial.system_attrs.get("grid_id") for trial in complete})

    def begin(self, cell: Cell) -> None:
        self.cell, self.started = str(cell), time.monotonic()
        if self.progress:
            tqdm.write(f"[{self.done()}/{self.total}] {cell}")

    def end(self, _: Any, trial: Any) -> None:
        took = time.monotonic() - self.started
        self.durations.append(took)
        if not self.progress:
            return
        done = self.done()
        left = (self.total - done) * sum(self.durations) / len(self.durations)
        failed = trial.state == self.optuna.trial.TrialState.FAIL
        outcome = f"FAILED: {trial.user_attrs.get('error', '?')[:300]}" if failed else f"{took:.0f} s"
        tqdm.write(f"[{done}/{self.total}] {outcome}; about {_clock(left)} left for one worker")


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _value(result: dict) -> float:
    """What Optuna's dashboards show: the first row's negative log-likelihood on validation, else on the test split."""
    return float(result["rows"][0]["nll"])


def _queue_again(optuna: Any, trials: Any, output_dir: Path) -> None:
    """Queue every cell whose last trial failed and that never succeeded, or whose predictions are damaged."""
    state = optuna.trial.TrialState
    latest: dict[int, Any] = {}
    for trial in trials.get_trials(deepcopy=False):
        grid = trial.system_attrs.get("grid_id")
        if grid is not None and not (grid in latest and latest[grid].state == state.COMPLETE):
            latest[grid] = trial
    for trial in latest.values():
        if trial.state == state.FAIL or (trial.state == state.COMPLETE and _has_lost(trial, output_dir)):
            attributes = {"grid_id": trial.system_attrs["grid_id"], "search_space": trial.system_attrs["search_space"]}
            trials.add_trial(optuna.trial.create_trial(state=state.WAITING, system_attrs=attributes))


def _has_lost(trial: Any, output_dir: Path) -> bool:
    """Whether the predictions of a finished trial are in ``output_dir`` and damaged."""
    lost = is_damaged(output_dir / Cell(**trial.params).folder)
    if lost:
        logger.warning("the predictions of %s are damaged: it is run again", Cell(**trial.params))
    return lost


def _waiting(optuna: Any, trials: Any) -> bool:
    """Whether cells are queued again; the sampler takes them for visited."""
    return bool(trials.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)))


def _storage(optuna: Any, url: str | None, output_dir: Path) -> Any:
    if url is not None:
        for tries_left in reversed(range(OPENING_TRIES)):  # two workers that begin at once both create the tables
            try:
                return optuna.storages.get_storage(url)
            except Exception as error:
                if not tries_left:
                    raise InputError(f"Optuna cannot open the storage {url!r}: {str(error).splitlines()[0]}") from error
            time.sleep(POLL_SECONDS)
    from bayeslora.study.journal import open_journal

    return optuna.storages.JournalStorage(open_journal(output_dir / JOURNAL_FILE))


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Failures are told by our own progress and table; Optuna's warnings repeat them with a traceback."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _holds_something(output_dir: Path) -> bool:
    return not output_dir.is_dir() or foreign_entry(output_dir, SETTINGS_FILE) is not None


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


def _check_folder(output_dir: Path, study: Study) -> None:
    """Make the folder, or refuse one with anything in it but a study with these settings."""
    file = output_dir / SETTINGS_FILE
    found = _settings(file)
    if found is not None:
        plain = json.loads(json.dumps(study.settings))
        changed = [name for name in plain if found.get(name) != plain[name]]
        if changed:
            raise InputError(
                f"{output_dir} holds a comparison with another {changed[0]} ({found.get(changed[0])!r}); "
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
        write_json(file, {"settings": study.settings, "study": study.to_dict()}, shared=True)
    except OSError as error:
        raise InputError(f"cannot write in {output_dir}: {error}") from error
