"""What a command finds out before it loads what it works with: a mistake is told without waiting for torch.

Each function is named in :mod:`bayeslora.command.parser`, and gives what the command's own function takes after its
arguments.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bayeslora.command.flags import flag_of
from bayeslora.command.options.idle import refuse
from bayeslora.config import MonteCLoRAConfig, default_preset
from bayeslora.errors import InputError
from bayeslora.options import flags
from bayeslora.study.spec import Study
from bayeslora.tasks.base import Task
from bayeslora.tasks.load import load_task


def check_fit(arguments: argparse.Namespace) -> tuple[Task, MonteCLoRAConfig]:
    task = _read_task(arguments, arguments.task)
    evaluated = "validation" in task.splits and task.is_labelled("validation")
    if not evaluated:
        what = f"for task {task.name!r}, which has no labelled validation split to evaluate on"
        refuse(arguments, ("best_metric", "evaluations", "early_stopping"), what)
    if arguments.tune == "validation" and not evaluated:
        raise InputError(
            f"--tune needs labels that are not trained on, and task {task.name!r} has no labelled validation split: "
            "say which share of the training examples to hold out, such as --tune 0.1"
        )
    return task, configuration(arguments, task.kind)


def check_bayesianize(arguments: argparse.Namespace) -> tuple[Task]:
    task = _read_task(arguments, arguments.task)
    if arguments.split not in task.splits:
        raise InputError(
            f"task {task.name!r} has no split {arguments.split!r} to find a width on, but {', '.join(task.splits)}: "
            "name one with --split that the adapter was not trained on"
        )
    judged = ("test", *task.shift_splits, *task.out_of_scope_splits)
    if arguments.split in judged and arguments.width in (None, "labels"):
        raise InputError(
            f"--split {arguments.split} is what it is judged by: found by its labels, the width's scores would no "
            "longer be those of new examples; give another split, or --width agreement, which looks at no labels"
        )
    needs_labels = arguments.width == "labels" or arguments.with_temperature
    if needs_labels and not task.is_labelled(arguments.split):
        raise InputError(f"split {arguments.split!r} of task {task.name!r} has no labels: use --width agreement")
    if arguments.with_temperature and arguments.width not in (None, "labels"):
        raise InputError("--with-temperature is found by labels, with the width: leave one of the two out")
    return (task,)


def check_evaluate(arguments: argparse.Namespace) -> tuple[()]:
    if arguments.generate and arguments.num_samples == "auto":
        raise InputError("--generate writes with a number of draws: give one for --num-samples in place of auto")
    return ()


def check_predict(arguments: argparse.Namespace) -> tuple[()]:
    if arguments.input is None:
        return ()
    if arguments.output is None:
        raise InputError("--input needs --output: a new file, .csv, .jsonl or .parquet")
    if arguments.num_samples == "auto":
        raise InputError("--num-samples auto looks at all rows at once, and a file is read in chunks: give a number")
    return _check_input(arguments)


def check_watch(arguments: argparse.Namespace) -> tuple[()]:
    if arguments.split == "train":
        raise InputError(
            "--split train is what it was fitted to, of which it is surer than of anything new: take another split"
        )
    return _check_input(arguments)


def _check_input(arguments: argparse.Namespace) -> tuple[()]:
    if str(arguments.input) != "-" and not arguments.input.exists():
        raise InputError(f"there is no {arguments.input}: --input is a file, or - for standard input")
    return ()


def check_compare(arguments: argparse.Namespace) -> tuple[Study | tuple[MonteCLoRAConfig, list[Task]]]:
    """The study of the file, or the configuration and the tasks that flags say."""
    if arguments.study:
        return (_study_from_file(arguments),)
    if not arguments.model or not arguments.task:
        raise InputError("compare needs a study file, or --model and --task")
    refuse(arguments, ("early_stopping",), "in compare, which trains every method on the same budget")
    arguments.rank = arguments.rank or [MonteCLoRAConfig.r]
    config = configuration(arguments, "classification", r=min(arguments.rank))
    if config.mode == "post_hoc":
        raise InputError(
            "compare starts both methods from scratch, but --mode post_hoc needs a trained LoRA: name "
            "monteclora_post_hoc in --methods"
        )
    return ((config, [_read_task(arguments, name) for name in arguments.task]),)


def _read_task(arguments: argparse.Namespace, name: str) -> Task:
    return load_task(
        name,
        arguments.data_dir,
        text_columns=arguments.text_columns,
        label_column=_one_or_several(arguments.label_column),
        shift_splits=arguments.shift_splits,
        prompting=_prompting(arguments.prompting),
    )


def _one_or_several(columns: Sequence[str] | None) -> str | Sequence[str] | None:
    return columns[0] if columns and len(columns) == 1 else columns


def configuration(arguments: argparse.Namespace, kind: str, **changes: Any) -> MonteCLoRAConfig:
    """The preset, by default the one for this ``kind`` of task, with the method options that were given."""
    given = {field.name: getattr(arguments, flag_of(field)) for field in flags(MonteCLoRAConfig)}
    if given["target_modules"] == ["all-linear"]:
        given["target_modules"] = "all-linear"
    options = {name: value for name, value in (given | changes).items() if value is not None}
    return MonteCLoRAConfig.preset(arguments.preset or default_preset(kind, arguments.mode), **options)


def _study_from_file(arguments: argparse.Namespace) -> Study:
    """The study of the file; its tasks from ``--data-dir`` where it names no folder, ``sentiment`` excepted."""
    own = ("study", "output", "storage", "in_process", "data_dir", "reference", "no_tuning")
    beside = (*own, "command", "check", "run", "command_line", "default_of")
    for name, value in vars(arguments).items():
        if name not in beside and value != arguments.default_of(name):
            raise InputError(
                f"--{name.replace('_', '-')} does nothing beside a study file: change {arguments.study} instead"
            )
    study = Study.from_yaml(arguments.study)
    if arguments.reference:
        study = replace(study, reference=tuple(arguments.reference))
    if arguments.data_dir is None:
        return study
    folder = str(arguments.data_dir)
    tasks = [
        task if task.data_dir or task.name == "sentiment" else replace(task, data_dir=folder) for task in study.tasks
    ]
    return replace(study, tasks=tuple(tasks))


def _prompting(entries: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` as a mapping; true, false and numbers as JSON writes them."""
    given: dict[str, Any] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals:
            raise InputError(f"--prompting takes NAME=VALUE, such as style=letters, got {entry!r}")
        if name in given:
            raise InputError(f"--prompting has {name} twice")
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value
    return given


def warn_of_judging(task: Task, split: str) -> None:
    """Say where there is no other labelled split to judge by than the one that was tuned on."""
    if not ("test" in task.splits and task.is_labelled("test")):
        print(
            f"there is no labelled test split: evaluate judges by {split} too, and its scores are now too good",
            file=sys.stderr,
        )
