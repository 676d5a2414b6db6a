"""Files and folders that are there whole or not at all, and their digests."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """A path beside ``path`` for a file or folder that takes its place at the end of the block."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        unfinished = Path(scratch) / path.name
        yield unfinished
        os.replace(unfinished, path)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of ``folder``, and of all that is in it, at the end of the block."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise


def sync(path: Path) -> None:
    """Have the file on the disk, and not only in the operating system's memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """The digest of a file's bytes, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
