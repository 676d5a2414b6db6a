"""What parsed arguments ask for: a task, and the configuration of the method."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from bayeslora.command.flags import flag_of
from bayeslora.config import MonteCLoRAConfig, default_preset
from bayeslora.errors import InputError
from bayeslora.options import flags
from bayeslora.tasks.base import Task
from bayeslora.tasks.load import load_task


def read_task(arguments: argparse.Namespace, name: str) -> Task:
    return load_task(
        name,
        arguments.data_dir,
        text_columns=arguments.text_columns,
        label_column=arguments.label_column,
        prompting=_prompting(arguments.prompting),
    )


def configuration(arguments: argparse.Namespace, kind: str, **changes: Any) -> MonteCLoRAConfig:
    """The preset, by default the one for this ``kind`` of task, with the method options that were given."""
    given = {field.name: getattr(arguments, flag_of(field)) for field in flags(MonteCLoRAConfig)}
    if given["target_modules"] == ["all-linear"]:
        given["target_modules"] = "all-linear"
    options = {name: value for name, value in (given | changes).items() if value is not None}
    return MonteCLoRAConfig.preset(arguments.preset or default_preset(kind), **options)


def _prompting(entries: Sequence[str]) -> dict[str, Any]:
    """``WORD=VALUE`` as a mapping; true, false and numbers as JSON writes them."""
    found: dict[str, Any] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals:
            raise InputError(f"--prompting takes WORD=VALUE, such as style=letters, got {entry!r}")
        if name in found:
            raise InputError(f"--prompting has {name} twice")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
