"""``bayeslora compare``."""

import argparse
from dataclasses import replace

from bayeslora.analysis import to_markdown
from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError
from bayeslora.study.compare import training_by_default, two_methods
from bayeslora.study.experiment import check_comparable
from bayeslora.study.methods.base import without_tuning
from bayeslora.study.runner import run_study
from bayeslora.study.spec import TRAINING_OPTIONS, Study
from bayeslora.study.summary import headline
from bayeslora.tasks.base import Task


def run(arguments: argparse.Namespace, given: Study | tuple[MonteCLoRAConfig, list[Task]]) -> None:
    study = given if isinstance(given, Study) else _study_from_flags(arguments, *given)
    if arguments.no_tuning:
        study = _without_tuning(study)
    result = run_study(
        study,
        arguments.output,
        storage=arguments.storage,
        isolate=not arguments.in_process,
        command=arguments.command_line,
    )
    if arguments.study or arguments.methods or len(study.tasks) > 1:
        print((arguments.output / "summary.md").read_text(encoding="utf-8"))
    elif len(result.results):
        table = to_markdown(headline(result.results))
        (arguments.output / "comparison.md").write_text(table + "\n", encoding="utf-8")
        print(table)
    print(f"\nruns, tables and figures: {arguments.output}")
    if len(result.failures):
        failed = result.failures.iloc[0]
        raise InputError(
            f"{len(result.failures)} failed, the first: {failed['method']}: {failed['error']}; the same "
            "command tries them again"
        )


def _without_tuning(study: Study) -> Study:
    left = without_tuning(study.methods)
    if left == [*study.methods]:
        raise InputError("--no-tuning does nothing here: none of the methods searches for a width")
    return replace(study, methods=tuple(left))


def _study_from_flags(arguments: argparse.Namespace, config: MonteCLoRAConfig, tasks: list[Task]) -> Study:
    for task in tasks:
        check_comparable(task)
    values = two_methods(config, tasks[0], arguments.test_split)
    if arguments.methods:
        ours = {name: value for name, value in values["methods"][-1].items() if name != "predictions"}
        chosen = {"monteclora": ours}
        values["methods"] = [chosen.get(name, name) for name in arguments.methods]
    given = {name: value for name, value in vars(arguments).items() if name in TRAINING_OPTIONS}
    training = training_by_default(tasks, given, arguments.max_train_examples, max(arguments.batch_size))
    return Study.from_dict(
        {
            **values,
            "model": str(arguments.model),
            "tasks": [task.recipe for task in tasks],
            "learning_rates": arguments.learning_rate,
            "batch_sizes": arguments.batch_size,
            "ranks": arguments.rank,
            "seeds": arguments.seeds,
            "train_examples": arguments.max_train_examples,
            "test_examples": arguments.max_test_examples,
            "test_split": arguments.test_split,
            "num_samples": arguments.num_samples,
            "max_length": arguments.max_length,
            "training": training,
            "keep_adapters": True,
            "reference": arguments.reference or (),
        }
    )
