"""``bayeslora fit``."""

import argparse

from transformers import set_seed

from bayeslora.analysis.metrics.registry import METRICS
from bayeslora.command.checks import warn_of_judging
from bayeslora.config import MonteCLoRAConfig
from bayeslora.distributed import leave, rank
from bayeslora.errors import InputError
from bayeslora.module import BayesLoRA
from bayeslora.options import flags
from bayeslora.storage.peft_files import open_peft_adapter
from bayeslora.tasks.base import Task
from bayeslora.training.budget import FitOptions
from bayeslora.training.fit import FitResult, fit


def run(arguments: argparse.Namespace, task: Task, config: MonteCLoRAConfig) -> None:
    set_seed(arguments.seed)
    network, tokenizer = task.load_network(arguments.model)
    if arguments.adapter:
        network = open_peft_adapter(arguments.adapter, network)
    elif config.mode == "post_hoc":
        raise InputError("--mode post_hoc puts a posterior on a trained LoRA: say which with --adapter RUN/adapter")
    length = arguments.max_length
    evaluated = "validation" in task.splits and task.is_labelled("validation")
    if arguments.tune == "validation":
        warn_of_judging(task, "validation")
    validation = task.encode(tokenizer, "validation", max_length=length) if evaluated else None
    bayes = BayesLoRA(network, config, likelihood=task.likelihood())
    result = fit(
        bayes,
        task.encode(tokenizer, "train", max_length=length, limit=arguments.max_train_examples, labelled=True),
        validation,
        output_dir=arguments.output,
        tune=validation if arguments.tune == "validation" else arguments.tune,
        resume=arguments.resume,
        metadata={
            "model": arguments.model,
            "task": task.recipe,
            "max_length": length,
            "command": arguments.command_line,
        },
        **{field.name: getattr(arguments, field.name) for field in flags(FitOptions)},
    )
    if rank() == 0:
        _report(result, task)
        if bayes.tuning is not None:
            print(f"  {bayes.tuning}")
    leave()


def _report(result: FitResult, task: Task) -> None:
    print(f"fitted in {result.steps} steps; adapter and posterior: {result.output_dir / 'adapter'}")
    if task.writes and "eval_loss" in result.metrics:
        print(f"  validation loss at the mean, nats per token: {result.metrics['eval_loss']:.4f}")
    for name in METRICS:
        if f"eval_{name}" in result.metrics:
            print(f"  validation {name} at the mean: {result.metrics[f'eval_{name}']:.4f}")
    print(f"next: bayeslora evaluate {result.output_dir}")
