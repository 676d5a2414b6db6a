"""JSON files that others wrote: of reasonable size, and every entry what it should be."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bayeslora.errors import InputError

MAX_JSON_BYTES = 4 * 2**20
MAX_RUN_BYTES = 256 * 2**20  # run.json holds the log of every adapter
MAX_JSON_DEPTH = 20


def read_json(path: Path, *, most_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: if it is not a regular file, or not one JSON object of reasonable size and depth with every name
            given once.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing or not a regular file")
    try:
        if path.stat().st_size > most_bytes:
            raise ValueError(f"more than {most_bytes} bytes")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}, not an object")
        if _deeper_than(value, MAX_JSON_DEPTH):
            raise ValueError(f"nested more than {MAX_JSON_DEPTH} deep")
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): use another copy") from error
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these names and values, for :func:`json.loads`; ``ValueError`` where a name is given twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a name is given twice")
    return record


def _deeper_than(value: Any, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_deeper_than(child, levels - 1) for child in children)


def is_integer(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**53


def is_number(value: Any) -> bool:
    """A finite number whose square is finite in float64 as well."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e100


def is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_object_of(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(holds(entry) for entry in value.values())


def is_path(value: Any) -> bool:
    """A path or a hub name; the home directory it starts with, if any, must exist."""
    return isinstance(value, str) and not (value.startswith("~") and os.path.expanduser(value) == value)


_RECIPE_FIELDS: dict[str, Callable[[Any], bool]] = {
    "name": lambda v: isinstance(v, str),
    "data_dir": lambda v: v is None or is_path(v),
    "text_columns": lambda v: v is None or isinstance(v, str) or is_names(v),
    "label_column": lambda v: v is None or isinstance(v, str) or is_names(v),
    "label_names": lambda v: v is None or is_names(v),
    "shift_splits": lambda v: v is None or is_names(v),
    "kind": lambda v: v is None or isinstance(v, str),
    "prompting": lambda v: v is None or is_object_of(v, lambda entry: isinstance(entry, str | bool)),
}


def _is_recipe(value: Any) -> bool:
    """What :func:`bayeslora.load_task` takes."""
    if not isinstance(value, dict) or "name" not in value or not value.keys() <= _RECIPE_FIELDS.keys():
        return False
    return all(_RECIPE_FIELDS[name](entry) for name, entry in value.items())


_RUN_FIELDS: dict[str, Callable[[Any], bool]] = {
    "model": is_path,
    "task": _is_recipe,
    "max_length": lambda v: is_integer(v, 1) and v <= 2**20,
    "bits": lambda v: v is None or (is_integer(v) and v in (4, 8)),
}


def read_run(path: Path) -> dict[str, Any]:
    """A run's ``run.json``, which must say which model and task it was fitted to.

    Raises:
        InputError: naming the first entry that is missing or of the wrong type.
    """
    record = read_json(path, most_bytes=MAX_RUN_BYTES)
    for name, fits in _RUN_FIELDS.items():
        if not fits(record.get(name)):
            raise InputError(
                f"{path} does not say which model and task it was fitted to ({name!r} is missing or damaged): "
                "was it fitted from the command line?"
            )
    return record
