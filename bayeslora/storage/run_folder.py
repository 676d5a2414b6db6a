"""A run's folder on disk: its files, its checkpoints, and the lock that keeps a second run out.

::

    run.json        what was asked for and, at the end, what came out
    checkpoints/    while training; a checkpoint counts once its seal, written last, names every file's SHA-256
    adapter/        the result
    run.lock        while a process works in the folder
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from bayeslora.errors import InputError, StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
ADAPTER_FOLDER = "adapter"
CHECKPOINT_FOLDER = "checkpoints"
LOCK_FILE = "run.lock"
SEAL_FILE = "sealed.json"
STATE_FILE = "trainer_state.json"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def write_json(path: Path, record: Any, *, shared: bool = False) -> None:
    """Whole or not at all; ``shared``: also where two processes write it at once."""
    with replacing(path, shared=shared) as file:
        file.write((json.dumps(record, indent=2, default=float) + "\n").encode())


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Any]:
    """A binary file that takes the place of ``path`` once it is on the disk, whole; as :func:`write_json`."""
    own = f"{os.getpid()}." if shared else ""
    temporary = path.with_name(f".{path.name}.{own}tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def foreign_entry(folder: Path, *own: str) -> Path | None:
    """Something in ``folder`` besides the ``own`` files, the lock, and what a killed process leaves of them."""

    def is_ours(name: str) -> bool:
        left = name.endswith(".tmp") and any(name.startswith(f".{one}.") for one in own)  # see write_json
        return left or name in {LOCK_FILE, *own}

    return next((path for path in sorted(folder.iterdir()) if not is_ours(path.name)), None)


# ---- checkpoints ----


def seal(checkpoint: Path) -> None:
    """Declare a checkpoint complete: everything is on the disk before the seal that lists it."""
    digests = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != SEAL_FILE:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            digests[path.relative_to(checkpoint).as_posix()] = _digest(path)
    write_json(checkpoint / SEAL_FILE, digests)


def is_whole(checkpoint: Path) -> bool:
    """Whether the checkpoint was sealed, and every file is what it was then."""
    try:
        digests = json.loads((checkpoint / SEAL_FILE).read_text(encoding="utf-8"))
        return STATE_FILE in digests and all(_digest(checkpoint / name) == known for name, known in digests.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(run: Path) -> list[Path]:
    """Every checkpoint folder of a run, or of a trainer's own folder, whole or not, the newest first."""
    folder = run / CHECKPOINT_FOLDER
    found = (folder if folder.is_dir() else run).glob("checkpoint-*")
    return sorted((p for p in found if p.is_dir() and _step(p) >= 0), key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint to resume from: whole, and so is the best one so far, which the run's end needs."""
    for checkpoint in checkpoints(run):
        damaged = next((path for path in _needed(checkpoint) if not is_whole(path)), None)
        if damaged is None:
            return checkpoint
        what = "" if damaged == checkpoint else f" needs {damaged}, which"
        logger.warning("%s%s is incomplete or damaged; using the one before", checkpoint, what)
    return None


def _needed(checkpoint: Path) -> Iterator[Path]:
    yield checkpoint
    best = best_checkpoint(checkpoint)
    if best not in (None, checkpoint):
        yield best


def best_checkpoint(checkpoint: Path) -> Path | None:
    """The best checkpoint so far, as a whole ``checkpoint`` knows it: beside it, wherever the run now lies."""
    recorded = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["best_model_checkpoint"]
    return checkpoint.with_name(Path(recorded).name) if recorded else None


def rotate(run: Path, current: Path, best: Path | None, limit: int | None) -> None:
    """Delete remains of killed runs, and all checkpoints but ``current``, ``best`` and the newest up to ``limit``."""
    kept = {current} if best is None else {current, best}
    others = [path for path in checkpoints(run) if path.name not in {path.name for path in kept}]
    sealed = [path for path in others if (path / SEAL_FILE).is_file()]
    if limit:
        sealed = sealed[: max(limit - len(kept), 0)]
    for path in others:
        if path not in sealed:
            delete(path)


def delete(checkpoint: Path) -> None:
    """The seal goes first: half a checkpoint must not count."""
    (checkpoint / SEAL_FILE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


@contextmanager
def reporting_full_disk(run: Path) -> Iterator[None]:
    """Turn a write that fails for want of space into one clear error; what was half written is removed.

    Raises:
        StorageError: naming the folder, the error and the checkpoint to resume from.
    """
    try:
        yield
    except Exception as error:
        reason = failed_write(error)
        if reason is None:
            raise
        for checkpoint in checkpoints(run):
            if not (checkpoint / SEAL_FILE).is_file():
                delete(checkpoint)
        last = last_checkpoint(run)
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been saved yet"
        raise StorageError(
            f"writing to {run} failed ({reason}; {free_space(run)} free); {kept}. Free some space, then resume the run"
        ) from error


def failed_write(error: Exception) -> str | None:
    """What Python, safetensors and torch say, each in its own way, when the disk takes no more."""
    text = str(error)
    if isinstance(error, OSError):
        return text if error.errno in _FULL else None
    if type(error).__name__ == "SafetensorError":
        return text if any(f"(os error {number})" in text for number in _FULL) else None
    if isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
        return "torch.save could not write all of a file"
    return None


def free_space(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"


# ---- the lock ----

ENDED, UNKNOWN = "ended", "unknown"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Work in ``folder`` alone; the folder is made if need be, and the lock removed at the end.

    A lock left by a process that died on this host is taken over with a message.

    Raises:
        InputError: if another process, or one on another host that cannot be asked, holds the lock.
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
        raise InputError(f"{who}: whether it still runs cannot be seen from here; if it does not, delete the lock file")
    if _identity(holder.get("pid")) in (holder.get("identity"), UNKNOWN):
        raise InputError(f"{who}: wait for it, stop it, or give another folder")


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
