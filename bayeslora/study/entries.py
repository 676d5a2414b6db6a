"""The entries of a study: methods, numbers and texts, each checked where it is given."""

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import repr as shown
from typing import Any

from bayeslora.errors import InputError
from bayeslora.options import MOST


@dataclass(frozen=True)
class MethodSpec:
    """A method and its options: a ``name`` of :data:`bayeslora.study.methods.base.METHODS`, or ``"module:Class"``."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def suggest(name: str, known: Sequence[str]) -> str:
    """How an error goes on that names an unknown ``name``."""
    close = difflib.get_close_matches(name, known, n=2)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{hint}there are {', '.join(known)}"


def check_fields(where: str, values: Any, known: Sequence[str]) -> None:
    if not isinstance(values, Mapping):
        raise InputError(f"{where} must be a mapping, got {shown(values)}")
    for name in values:
        if name not in known:
            raise InputError(f"{where}: unknown entry {name!r}; {suggest(str(name), known)}")


def listed(name: str, values: Any) -> list[Any]:
    """A list with something in it; one value stands for a list of one."""
    found = list(values) if isinstance(values, list | tuple) else [values]
    if not found:
        raise InputError(f"study: {name} is empty")
    return found


def check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"study: {name} takes text, got {shown(value)}; a number or a truth value as text is quoted")


def number(name: str, value: Any, kind: type, *, least: float | None = None, most: float = MOST) -> Any:
    least = {"learning_rates": 0, "seeds": 0}.get(name, 1) if least is None else least
    wanted = (int, float) if kind is float else (int,)
    fits = isinstance(value, wanted) and not isinstance(value, bool) and least <= value <= most
    if not fits or (kind is float and value == 0):
        what = "a positive number" if kind is float else f"an integer of at least {least}, {most} at most"
        raise InputError(f"study: {name} takes {what}, got {shown(value)}")
    return kind(value)


def method_specs(method: Any) -> list[MethodSpec]:
    """One, or one for every combination of a sweep."""
    if isinstance(method, MethodSpec):
        return [method]
    if isinstance(method, str):
        return [MethodSpec(method)]
    if not isinstance(method, Mapping) or not isinstance(method.get("name"), str):
        raise InputError(f"study: a method is a name, or a mapping with one, got {shown(method)}")
    if set(method) == {"name", "options"} and isinstance(method["options"], Mapping):
        return [MethodSpec(method["name"], dict(method["options"]))]
    options = {name: value for name, value in method.items() if name not in ("name", "sweep")}
    sweep = method.get("sweep", {})
    if not isinstance(sweep, Mapping) or not all(isinstance(values, list) and values for values in sweep.values()):
        raise InputError(f"study: sweep maps options of {method['name']!r} to lists, got {shown(sweep)}")
    if sweep and "label" in options:
        raise InputError(f"study: the methods of a sweep get their own labels; leave label out of {method['name']!r}")
    combinations = itertools.product(*sweep.values())
    return [MethodSpec(method["name"], {**options, **dict(zip(sweep, values, strict=True))}) for values in combinations]
