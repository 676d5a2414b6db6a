"""Optuna's journal of a study, which survives that its last line is cut off: by a power cut, or on a full disk."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

logger = logging.getLogger(__name__)


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

    @contextmanager
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
