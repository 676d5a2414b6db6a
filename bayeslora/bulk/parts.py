"""What is done of a file, kept beside the output until all is: a part for each chunk of rows, whole or not at all."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from pyarrow import parquet

from bayeslora.errors import InputError
from bayeslora.files.records import read_json
from bayeslora.files.writing import replacing, write_json
from bayeslora.storage.lock import LOCK_FILE, lock_folder

SETTINGS_FILE = "settings.json"
JOINED_FILE = "joined"  # the output is whole, or will be once it has its name


class Done(NamedTuple):
    """A part that is there: the digest of the rows that went in, and how many of them were skipped."""

    digest: str
    skipped: int


class Parts:
    """The folder of parts of one output, held by one process at a time."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, number: int) -> Path:
        return self.folder / f"part-{number:06}.parquet"

    def find(self, number: int) -> Done | None:
        """The part of a chunk, if it was done."""
        if not self.path(number).is_file():
            return None
        metadata = parquet.read_schema(self.path(number)).metadata
        return Done(**json.loads(metadata[b"done"]))

    def write(self, number: int, table: pyarrow.Table, done: Done) -> None:
        with replacing(self.path(number)) as file:
            marked = table.replace_schema_metadata({"done": json.dumps(done._asdict())})
            parquet.write_table(marked, file, compression="zstd")

    def tables(self, count: int) -> Iterator[pyarrow.Table]:
        """The first ``count``, one at a time."""
        for number in range(count):
            yield parquet.read_table(self.path(number)).replace_schema_metadata(None)

    def schema(self, number: int) -> pyarrow.Schema:
        return parquet.read_schema(self.path(number)).remove_metadata()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Say that only the output's own name is wanting, and what the call has to tell."""
        write_json(self.folder / JOINED_FILE, result)


@contextmanager
def opened_parts(output: Path, settings: Mapping[str, Any]) -> Iterator[Parts | dict[str, Any]]:
    """The parts for an output with these settings, new or as they were left; what :meth:`Parts.finish` was told, where
    the output is whole and only they had not been removed.

    Raises:
        InputError: where the output exists, or its parts were made with other settings.
        FolderInUseError: where another process writes it.
    """
    folder = output.with_name(f"{output.name}.parts")
    if output.exists() and not (folder / JOINED_FILE).is_file():
        raise InputError(f"{output} exists: remove it, or give another --output")
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {output.parent}")
    with lock_folder(folder):
        _check_settings(folder, json.loads(json.dumps(settings)))
        yield read_json(folder / JOINED_FILE) if output.exists() else Parts(folder)
        for path in sorted(folder.iterdir()):
            if path.name not in (SETTINGS_FILE, JOINED_FILE, LOCK_FILE):
                path.unlink()
        for name in (SETTINGS_FILE, JOINED_FILE):
            (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS_FILE
    if not path.is_file():
        write_json(path, settings)
        return
    before = read_json(path)
    for name in settings.keys() | before.keys():
        if settings.get(name) != before.get(name):
            raise InputError(
                f"{folder} holds what was done with another {name} ({before.get(name)!r:.80}, now "
                f"{settings.get(name)!r:.80}): go on with that, or remove the folder to begin anew"
            )
