"""``bayeslora fit``."""

import argparse
import sys
from typing import Any

import numpy as np
from transformers import set_seed

from bayeslora.analysis.metrics.registry import METRICS
from bayeslora.analysis.tables.diagnostics import convergence
from bayeslora.command.checks import warn_of_judging
from bayeslora.config import MonteCLoRAConfig
from bayeslora.distributed import leave, rank
from bayeslora.errors import InputError
from bayeslora.module import BayesLoRA
from bayeslora.options import flags
from bayeslora.storage.peft_files import open_peft_adapter
from bayeslora.tasks.base import Task
from bayeslora.tasks.network import loading
from bayeslora.training.budget import FitOptions
from bayeslora.training.fit import FitResult, fit
from bayeslora.training.predictive import PREFIX

NOTICED = 1e-3  # a difference of scores below it, in the last digit that is shown but one, means nothing


def run(arguments: argparse.Namespace, task: Task, config: MonteCLoRAConfig) -> None:
    set_seed(arguments.seed)
    network, tokenizer = task.load_network(arguments.model, **loading(arguments.bits, arguments.device_map))
    if arguments.adapter:
        network = open_peft_adapter(arguments.adapter, network)
        _say_what_is_trained(arguments, config)
    elif config.mode == "post_hoc":
        raise InputError("--mode post_hoc puts a posterior on a trained LoRA: say which with --adapter RUN/adapter")
    length = arguments.max_length
    if arguments.tune == "validation":
        warn_of_judging(task, "validation")
    bayes = BayesLoRA(network, config, likelihood=task.likelihood())
    bayes.tokenizer = tokenizer
    train = task.encode(tokenizer, "train", max_length=length, limit=arguments.max_train_examples, labelled=True)
    most = arguments.max_eval_examples or _examples_read(arguments, bayes, len(train))
    validation = _validation(task, tokenizer, length, most)
    result = fit(
        bayes,
        train,
        validation,
        output_dir=arguments.output,
        tune=task.encode(tokenizer, "validation", max_length=length)
        if arguments.tune == "validation"
        else arguments.tune,
        resume=arguments.resume,
        metadata={
            "model": arguments.model,
            "task": task.recipe,
            "max_length": length,
            "bits": arguments.bits,
            "command": arguments.command_line,
        },
        **{field.name: getattr(arguments, field.name) for field in flags(FitOptions)},
        **_asked_of_trainer(arguments),
    )
    if rank() == 0:
        unit = " (NLL in nats per token)" if task.writes else ""
        _report(result, 0 if validation is None else len(validation), unit, config, arguments.eval_samples)
        if bayes.tuning is not None:
            print(f"  {bayes.tuning}")
        if still_falls(result):
            print("the loss was still falling when training ended: train longer (--epochs, --max-steps)")
        print(f"next: bayeslora evaluate {result.output_dir}")
    leave()


def _asked_of_trainer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of ``TrainingArguments`` that were given."""
    names = ("bf16", "gradient_checkpointing", "report_to")
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name)}


def _say_what_is_trained(arguments: argparse.Namespace, config: MonteCLoRAConfig) -> None:
    if rank() == 0 and arguments.mode is None and config.mode == "joint":
        print(
            f"the adapter in {arguments.adapter} is trained on, together with its posterior; "
            "--mode post_hoc leaves it as it is",
            file=sys.stderr,
        )


def _examples_read(arguments: argparse.Namespace, bayes: BayesLoRA, num_examples: int) -> int:
    """As many as training reads in all, 200 at most: an evaluation must not outlast the training that it is for."""
    budget = FitOptions(**{field.name: getattr(arguments, field.name) for field in flags(FitOptions)})
    budget = budget.settled(num_examples, few_passes=bayes.model.labelling.learnt_in_few_passes)
    steps, every = budget.total_steps(num_examples), budget.batch_size * budget.gradient_accumulation
    return min(steps * min(every, num_examples), 200)


def _validation(task: Task, tokenizer: Any, max_length: int, most: int) -> Any:
    """A labelled validation split, or a random subset of it; None where there is none."""
    if "validation" not in task.splits or not task.is_labelled("validation"):
        return None
    data, total = task.encode(tokenizer, "validation", max_length=max_length, limit=most), len(task.split("validation"))
    if rank() == 0 and len(data) < total:
        print(f"evaluating on {len(data)} of {total} validation examples (--max-eval-examples)", file=sys.stderr)
    return data


def _report(result: FitResult, evaluated: int, unit: str, config: MonteCLoRAConfig, draws: int) -> None:
    """What was kept, and what the draws do for it."""
    print(f"fitted in {result.steps} steps; adapter and posterior: {result.output_dir / 'adapter'}")
    if not evaluated:
        return
    best = "the best" if any(f"eval_{PREFIX}" in name for name in result.metrics) else "the best at the mean"
    looks = len({entry["step"] for entry in result.history if "eval_loss" in entry})
    which = f"{best} of {looks} evaluations" if looks > 1 else "the only evaluation"
    print(f"kept: step {result.checkpoint}, {which}, on {evaluated} validation examples{unit}")
    before, after = "at the mean", f"{draws} draws"
    if config.mode == "post_hoc":
        before, after = "the LoRA alone", f"with its posterior, {after}"
    rows = [
        (name, result.metrics.get(f"eval_{mean}"), result.metrics.get(f"eval_{PREFIX}{name}"))
        for name, mean in [("nll", "loss"), *((n, n) for n, of in METRICS.items() if n != "nll" and of.in_summary)]
    ]
    drawn = any(draw is not None for _, _, draw in rows)
    print(f"  {'validation':12} {before:>16}" + (f"  {after}" if drawn else ""))
    for name, mean, draw in rows:
        if mean is not None:
            print(f"  {name:12} {mean:16.4f}" + ("" if draw is None else f"  {draw:.4f}"))
    mean, draw = rows[0][1:]
    if mean is not None and draw is not None and draw - mean >= NOTICED:
        print(
            f"  the mean predicts these better: bayeslora tune {result.output_dir} narrows the noise by held-out labels"
        )
    if drawn and all(draw is None or abs(draw - mean) < NOTICED for _, mean, draw in rows if mean is not None):
        print("  the draws say what the mean says: there is next to no noise yet, and no uncertainty to read off them")


def still_falls(result: FitResult) -> bool:
    """Whether the loss of the labels fell by 5 % and more in the last quarter, beyond its noise."""
    trace = [entry["elbo/task"] for entry in result.history if "elbo/task" in entry]
    end = next((one for one in convergence(result.history) if one.name == "convergence_task"), None)
    half = len(trace) // 2
    return end is not None and end.verdict == "bad" and np.mean(trace[-(half // 2) :]) < np.mean(trace[half:])
