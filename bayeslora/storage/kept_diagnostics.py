"""Diagnostics of a finished run, kept in its folder: they take minutes, and do not change unless the run does."""

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bayeslora._version import __version__
from bayeslora.analysis.tables.diagnostics import Diagnostic
from bayeslora.errors import InputError
from bayeslora.files.records import read_json
from bayeslora.files.writing import write_json
from bayeslora.storage.run_folder import ADAPTER_FOLDER

DIAGNOSTICS_FILE = "diagnostics.json"


def fingerprint(folder: Path, data: Iterable[Any], *of: Any) -> str:
    """What diagnostics of a run follow from: its adapter's weights, its training data, this version, and ``of``."""
    digest = hashlib.sha256(json.dumps([__version__, *of], default=str).encode())
    for file in sorted((folder / ADAPTER_FOLDER).glob("*.safetensors")):
        digest.update(file.name.encode() + file.read_bytes())
    for example in data:
        digest.update(json.dumps(example, default=str).encode())
    return digest.hexdigest()


def kept_diagnostics(folder: Path, of: str) -> list[Diagnostic] | None:
    """What :func:`keep_diagnostics` wrote with the same fingerprint; None where there is nothing of the kind."""
    try:
        record = read_json(folder / DIAGNOSTICS_FILE) if (folder / DIAGNOSTICS_FILE).is_file() else {}
        if record.get("of") != of:
            return None
        return [
            Diagnostic(**{**one, "value": float(one["value"]), "threshold": tuple(one["threshold"])})
            for one in record["diagnostics"]
        ]
    except (InputError, KeyError, TypeError, ValueError):  # damaged, or of another version
        return None


def keep_diagnostics(folder: Path, of: str, found: list[Diagnostic]) -> None:
    """Where the folder may be written to."""
    plain = [one.to_dict() | {"value": repr(float(one.value))} for one in found]  # also what is infinite
    with suppress(OSError):
        write_json(folder / DIAGNOSTICS_FILE, {"of": of, "diagnostics": plain}, shared=True)


def diagnosed_once(
    folder: Path, of: str, diagnose: Callable[[], list[Diagnostic]], say: Callable[[str], Any]
) -> list[Diagnostic]:
    """Those that are kept, or those that ``diagnose`` finds now, which are kept; ``say`` is told which."""
    kept = kept_diagnostics(folder, of)
    if kept is not None:
        say(f"diagnostics as an earlier report found them ({folder / DIAGNOSTICS_FILE})")
        return kept
    say("diagnostics, which take longest (--no-diagnostics leaves them out; they are kept for the next report)")
    found = diagnose()
    keep_diagnostics(folder, of, found)
    return found
