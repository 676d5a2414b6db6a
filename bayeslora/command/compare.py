"""``bayeslora compare``."""

import argparse
from dataclasses import replace

from bayeslora.analysis import to_markdown
from bayeslora.command.arguments import configuration, read_task
from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError
from bayeslora.study.compare import two_methods
from bayeslora.study.methods.monteclora import WAYS
from bayeslora.study.runner import run_study
from bayeslora.study.spec import TRAINING_OPTIONS, Study
from bayeslora.study.summary import headline


def run(arguments: argparse.Namespace) -> None:
    study = _study_from_file(arguments) if arguments.study else _study_from_flags(arguments)
    result = run_study(study, arguments.output, storage=arguments.storage, isolate=not arguments.in_process)
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


def _study_from_file(arguments: argparse.Namespace) -> Study:
    """The study of the file; its tasks from ``--data-dir`` where it names no folder, ``sentiment`` excepted."""
    beside = ("study", "output", "storage", "in_process", "data_dir", "run", "command_line", "default_of")
    for name, value in vars(arguments).items():
        if name not in beside and value != arguments.default_of(name):
            raise InputError(
                f"--{name.replace('_', '-')} does nothing beside a study file: change {arguments.study} instead"
            )
    study = Study.from_yaml(arguments.study)
    if arguments.data_dir is None:
        return study
    folder = str(arguments.data_dir)
    tasks = [
        task if task.data_dir or task.name == "sentiment" else replace(task, data_dir=folder) for task in study.tasks
    ]
    return replace(study, tasks=tuple(tasks))


def _study_from_flags(arguments: argparse.Namespace) -> Study:
    if not arguments.model or not arguments.task:
        raise InputError("compare needs a study file, or --model and --task")
    if arguments.early_stopping is not None:
        raise InputError("compare trains every method on the same budget: --early-stopping does not apply")
    ranks = arguments.rank or [MonteCLoRAConfig.r]
    config = configuration(arguments, "classification", r=min(ranks))
    if config.mode == "post_hoc":
        raise InputError(
            "compare starts both methods from scratch, but --mode post_hoc needs a trained LoRA: name "
            "monteclora_post_hoc in --methods"
        )
    tasks = [read_task(arguments, name) for name in arguments.task]
    values = two_methods(config, tasks[0], arguments.test_split)
    if arguments.methods:
        chosen = {"monteclora": values["methods"][-1] | {"predictions": list(WAYS)}}
        values["methods"] = [chosen.get(name, name) for name in arguments.methods]
    training = {name: value for name, value in vars(arguments).items() if name in TRAINING_OPTIONS}
    return Study.from_dict(
        {
            **values,
            "model": str(arguments.model),
            "tasks": [task.recipe for task in tasks],
            "learning_rates": arguments.learning_rate,
            "batch_sizes": arguments.batch_size,
            "ranks": ranks,
            "seeds": arguments.seeds,
            "train_examples": arguments.max_train_examples,
            "test_examples": arguments.max_test_examples,
            "test_split": arguments.test_split,
            "num_samples": arguments.num_samples,
            "max_length": arguments.max_length,
            "training": training,
            "keep_adapters": True,
        }
    )
