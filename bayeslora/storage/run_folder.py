"""A run's folder on disk: its files and its checkpoints.

::

    run.json        what was asked for and, at the end, what came out
    checkpoints/    while training; a checkpoint counts once its seal, written last, names every file's SHA-256
    adapter/        the result
    run.lock        while a process works in the folder
"""

import errno
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bayeslora.errors import InputError, StorageError
from bayeslora.files.records import MAX_RUN_BYTES, read_json
from bayeslora.files.writing import sha256_of, sync, write_json
from bayeslora.storage.lock import LOCK_FILE

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
ADAPTER_FOLDER = "adapter"
CHECKPOINT_FOLDER = "checkpoints"
SEAL_FILE = "sealed.json"
STATE_FILE = "trainer_state.json"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def adapter_in(folder: Path) -> Path:
    """The adapter's folder: ``folder`` itself, or the one in it where it is a run's."""
    inside = folder / ADAPTER_FOLDER
    return inside if (folder / RUN_FILE).is_file() and inside.is_dir() else folder


def record_beside(adapter: Path) -> dict[str, Any] | None:
    """``run.json`` of the run that an adapter's folder lies in, if it does and that can be read."""
    path = adapter.absolute().parent / RUN_FILE
    if adapter.name != ADAPTER_FOLDER or not path.is_file():
        return None
    try:
        return read_json(path, most_bytes=MAX_RUN_BYTES)
    except InputError:
        return None


def foreign_entry(folder: Path, *own: str) -> Path | None:
    """Something in ``folder`` besides the ``own`` files, the lock, and what a killed process leaves of them."""

    def is_ours(name: str) -> bool:
        left = name.endswith(".tmp") and any(name.startswith(f".{one}.") for one in own)  # see write_json
        return left or name in {LOCK_FILE, *own}

    return next((path for path in sorted(folder.iterdir()) if not is_ours(path.name)), None)


def seal(checkpoint: Path) -> None:
    """Declare a checkpoint complete: everything is on the disk before the seal that lists it."""
    digests = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != SEAL_FILE:
            sync(path)
            digests[path.relative_to(checkpoint).as_posix()] = sha256_of(path)
    write_json(checkpoint / SEAL_FILE, digests)


def is_whole(checkpoint: Path) -> bool:
    """Whether the checkpoint was sealed, and every file is what it was then."""
    try:
        digests = json.loads((checkpoint / SEAL_FILE).read_text(encoding="utf-8"))
        return STATE_FILE in digests and all(sha256_of(checkpoint / name) == known for name, known in digests.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def checkpoints(run: Path) -> list[Path]:
    """Every checkpoint folder of a run, or of a trainer's own folder, whole or not, the newest first."""
    folder = run / CHECKPOINT_FOLDER
    folders = (folder if folder.is_dir() else run).glob("checkpoint-*")
    return sorted((p for p in folders if p.is_dir() and _step(p) >= 0), key=_step, reverse=True)


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
    """What Python, safetensors and torch say, each in its own way, when the disk takes no more.

    safetensors and torch give no error number: their messages are all there is to tell it by.
    """
    text = str(error)
    if isinstance(error, OSError):
        return text if error.errno in _FULL else None
    if isinstance(error, SafetensorError):
        return text if any(f"(os error {number})" in text for number in _FULL) else None
    if isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
        return "torch.save could not write all of a file"
    return None


def free_space(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"
