"""A study's trials in Optuna, one for each cell, shared by all who work with one storage.

The journal survives that its last line is cut off: by a power cut, or on a full disk.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState
from tqdm.auto import tqdm

from bayeslora.errors import InputError
from bayeslora.study.predictions import is_damaged
from bayeslora.study.spec import Cell

logger = logging.getLogger(__name__)

JOURNAL_FILE = "optuna.journal"
POLL_SECONDS = 1.0
OPENING_TRIES = 3


def open_trials(study_name: str, sampler: optuna.samplers.BaseSampler, url: str | None, output_dir: Path) -> Any:
    """The Optuna study at a storage URL, or in a journal in ``output_dir``, made if need be.

    Raises:
        InputError: for a storage that Optuna cannot open.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=_storage(url, output_dir),
        sampler=sampler,
        load_if_exists=True,
        study_name=study_name,
        direction="minimize",
    )


def _storage(url: str | None, output_dir: Path) -> Any:
    if url is None:
        return optuna.storages.JournalStorage(open_journal(output_dir / JOURNAL_FILE))
    for tries_left in reversed(range(OPENING_TRIES)):  # two workers that begin at once both create the tables
        try:
            return optuna.storages.get_storage(url)
        except Exception as error:
            if not tries_left:
                raise InputError(f"Optuna cannot open the storage {url!r}: {str(error).splitlines()[0]}") from error
        time.sleep(POLL_SECONDS)
    raise AssertionError


def queue_again(trials: Any, output_dir: Path) -> None:
    """Queue every cell whose last trial failed and that never succeeded, or whose predictions are damaged."""
    latest: dict[int, Any] = {}
    for trial in trials.get_trials(deepcopy=False):
        grid = trial.system_attrs.get("grid_id")
        if grid is not None and not (grid in latest and latest[grid].state == TrialState.COMPLETE):
            latest[grid] = trial
    for trial in latest.values():
        if trial.state == TrialState.FAIL or (trial.state == TrialState.COMPLETE and _has_lost(trial, output_dir)):
            attributes = {"grid_id": trial.system_attrs["grid_id"], "search_space": trial.system_attrs["search_space"]}
            trials.add_trial(optuna.trial.create_trial(state=TrialState.WAITING, system_attrs=attributes))


def _has_lost(trial: Any, output_dir: Path) -> bool:
    """Whether the predictions of a finished trial are in ``output_dir`` and damaged."""
    lost = is_damaged(output_dir / Cell(**trial.params).folder)
    if lost:
        logger.warning("the predictions of %s are damaged: it is run again", Cell(**trial.params))
    return lost


def are_waiting(trials: Any) -> bool:
    """Whether cells are queued again; the sampler takes them for visited."""
    return bool(trials.get_trials(deepcopy=False, states=(TrialState.WAITING,)))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Failures are told by our own progress and table; Optuna's warnings repeat them with a traceback."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


class Progress:
    """Says what runs, how far the study is and how long the rest will take.

    ``known``: cells that were finished before this study's trials began, as those of a smaller study in the folder.
    """

    def __init__(self, total: int, trials: Any, known: Set[Cell], shown: bool):
        self.total, self.trials, self.known, self.shown = total, trials, known, shown
        self.durations: list[float] = []
        self.started, self.reads = time.monotonic(), False
        if known and shown:
            tqdm.write(f"[{self.done()}/{self.total}] finished before")

    def done(self) -> int:
        return len(complete(self.trials) | self.known)

    def begin(self, cell: Cell) -> None:
        self.started, self.reads = time.monotonic(), cell in self.known
        if self.shown and not self.reads:
            tqdm.write(f"[{self.done()}/{self.total}] {cell}")

    def end(self, _: Any, trial: Any) -> None:
        reads, self.reads = self.reads, False
        if reads:
            return
        took = time.monotonic() - self.started
        self.durations.append(took)
        if not self.shown:
            return
        done = self.done()
        left = (self.total - done) * sum(self.durations) / len(self.durations)
        failed = trial.state == TrialState.FAIL
        outcome = f"FAILED: {trial.user_attrs.get('error', '?')[:300]}" if failed else f"{took:.0f} s"
        rest = f"; about {_clock(left)} left for one worker" if left else ""
        tqdm.write(f"[{done}/{self.total}] {outcome}{rest}")


def complete(trials: Any) -> set[Cell]:
    """The cells of which a trial has ended well."""
    ended = trials.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {Cell(**trial.params) for trial in ended}


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def open_journal(path: Path) -> "Journal":
    """The journal in ``path``, made if need be. Its whole lines up to the first damaged one are kept; of what follows
    Optuna would read nothing more, and finished cells are found in their folders."""
    journal = Journal(str(path), JournalFileOpenLock(str(path)))
    with journal.locked():
        journal.cut(_whole_lines(path))
    return journal


class Journal(JournalFileBackend):
    """Lines are only added after whole lines: else half a line and the next would become one that nobody can read."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with self.locked():
            self.cut(_whole_end(self._file_path))
        super().append_logs(logs)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def cut(self, size: int) -> None:
        """Keep the first ``size`` bytes."""
        lost = os.stat(self._file_path).st_size - size
        if lost:
            logger.warning("%s: its last %d bytes are not whole and are left out", self._file_path, lost)
            os.truncate(self._file_path, size)


def _whole_lines(path: Path) -> int:
    """Where the first line begins that is cut off or no JSON object; the size of the file if there is none."""
    size = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or not _is_object(line):
                break
            size += len(line)
    return size


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _whole_end(path: str, block: int = 2**16) -> int:
    """The size of the file without the half line at its end, if there is one."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(end - block, 0)
            file.seek(start)
            last = file.read(end - start).rfind(b"\n")
            if last >= 0:
                return start + last + 1
            end = start
    return 0
