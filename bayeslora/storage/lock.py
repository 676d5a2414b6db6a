"""The lock that keeps a second process out of a folder.

``filelock.SoftFileLock`` takes over the lock of a dead process too. It does so in silence, names the holder by a number
alone, and takes a lock in our format, from a process of an earlier version, for a damaged one, which it removes.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from bayeslora.errors import FolderInUseError, InputError
from bayeslora.files.writing import write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
ENDED, UNKNOWN = "ended", "unknown"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Work in ``folder`` alone; the folder is made if need be, and the lock removed at the end.

    A lock left by a process that died on this host is taken over with a message.

    Raises:
        FolderInUseError: if another process, or one on another host that cannot be asked, holds the lock.
        InputError: if the folder cannot be written in.
    """
    path = folder / LOCK_FILE
    mine = _this_process()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not _claim(path, mine):
            pass
    except OSError as error:
        raise InputError(f"cannot write in {folder}: {error}") from error
    try:
        yield
    finally:
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def _claim(path: Path, mine: dict[str, Any]) -> bool:
    """Create the lock, or take over a dead process's; false if it changed hands meanwhile."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(mine))
        return True
    except FileExistsError:
        pass
    try:
        with path.open("r+", encoding="utf-8") as file, _one_at_a_time(file):
            holder = _read(path)
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return False
            if holder is not None:
                _refuse_if_alive(path, holder)
            logger.warning("taking over %s: %s is no longer running", path, _describe(holder))
            write_json(path, mine)
            return True
    except FileNotFoundError:  # released just now
        return False


@contextmanager
def _one_at_a_time(file: Any) -> Iterator[None]:
    """Two processes that find the same dead lock look at it in turn, where the file system can do that."""
    with suppress(OSError):
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _refuse_if_alive(path: Path, holder: dict[str, Any]) -> None:
    who = f"{path.parent} is in use by {_describe(holder)} (lock file {path})"
    if holder.get("host") != socket.gethostname():
        raise FolderInUseError(
            f"{who}: whether it still runs cannot be seen from here; if it does not, delete the lock file"
        )
    if _identity(holder.get("pid")) in (holder.get("identity"), UNKNOWN):
        raise FolderInUseError(f"{who}: wait for it, stop it, or give another folder")


def _describe(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "a process that did not live to sign it"
    return f"process {holder.get('pid')} on {holder.get('host')}, started {holder.get('started')}"


def _read(path: Path) -> dict[str, Any] | None:
    """Who holds the lock; a process that has just created the file gets a second to sign it."""
    for _ in range(20):
        try:
            holder = json.loads(path.read_text(encoding="utf-8"))
            return holder if isinstance(holder, dict) else None
        except FileNotFoundError:
            return None
        except ValueError:
            time.sleep(0.05)
    return None


def _this_process() -> dict[str, Any]:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(psutil.Process().create_time()))
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "started": started, "identity": _identity(pid)}


def _identity(pid: Any) -> str:
    """What tells a running process from a later one of the same number.

    On Linux its start in ticks since boot, which no change of the clock moves.
    """
    if not isinstance(pid, int) or not psutil.pid_exists(pid):
        return ENDED
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return ENDED
        if not psutil.LINUX:
            return f"{process.create_time():.0f}"
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path(f'/proc/{pid}/stat').read_text(encoding='utf-8').rpartition(')')[2].split()[19]}"
    except (psutil.Error, OSError):
        return UNKNOWN
