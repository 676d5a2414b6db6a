"""``bayeslora bayesianize``: a posterior over an adapter that something else trained."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from bayeslora.adapters.untrusted import is_same_base
from bayeslora.command.checks import warn_of_judging
from bayeslora.command.tune import say_tuning
from bayeslora.errors import InputError
from bayeslora.files.writing import write_json
from bayeslora.inference.bayesianize import absorb_width, find_width
from bayeslora.module import BayesLoRA
from bayeslora.storage.base_network import check_base
from bayeslora.storage.lock import lock_folder
from bayeslora.storage.manifest import ADAPTER_CONFIG, is_adapter_folder, read_manifest
from bayeslora.storage.peft_files import open_peft_adapter
from bayeslora.storage.run_folder import ADAPTER_FOLDER, RUN_FILE, reporting_full_disk
from bayeslora.tasks.base import Task
from bayeslora.tasks.network import loading
from bayeslora.training.closing import close_run
from bayeslora.training.fit import fit
from bayeslora.training.record import record_without_training, refuse_other_content

PREDICTION = ("num_samples", "batch_size", "seed")


def run(arguments: argparse.Namespace, task: Task) -> None:
    output, folder = arguments.output, arguments.adapter
    refuse_other_content(output, resume=False)
    if (output / RUN_FILE).is_file():
        raise InputError(f"--output {output} holds a run already: give another folder")
    set_seed(arguments.seed)
    network, tokenizer = task.load_network(arguments.model, **loading(arguments.bits, arguments.device_map))
    _check_base(folder, network, arguments)
    started = time.perf_counter()
    data = _examples(task, tokenizer, arguments)
    how = {name: getattr(arguments, name) for name in ("agreement", "with_temperature", *PREDICTION)}
    bayes = BayesLoRA.from_adapter(
        open_peft_adapter(folder, network),
        data,
        shape=arguments.shape,
        width=arguments.width,
        likelihood=task.likelihood(),
        **how,
    )
    bayes.tokenizer = tokenizer
    seconds = time.perf_counter() - started
    metadata = {
        "model": arguments.model,
        "task": task.recipe,
        "max_length": arguments.max_length,
        "bits": arguments.bits,
        "command": arguments.command_line,
        "bayesianized": {"adapter": str(folder), "shape": arguments.shape, "split": arguments.split},
    }
    if arguments.steps:
        absorb_width(bayes)
        _train(bayes, task, tokenizer, arguments, metadata)
        if not isinstance(arguments.width, float):
            find_width(bayes, data, rule=arguments.width, **how)
            bayes.save_pretrained(output / ADAPTER_FOLDER)
    else:
        with lock_folder(output), reporting_full_disk(output):
            record = record_without_training(bayes, metadata)
            write_json(output / RUN_FILE, record)
            close_run(bayes, record, output, {"steps": 0, "checkpoint": 0, "metrics": {}, "history": []})
    _report(bayes, len(data), seconds, arguments)


def _examples(task: Task, tokenizer: Any, arguments: argparse.Namespace) -> Any:
    """What the width is found on."""
    if arguments.split == "train":
        print(
            "the adapter may have been trained on these examples (--split train), and no noise changes what a network "
            "knows by heart: the width will be too large; give examples that are new to it",
            file=sys.stderr,
        )
    labelled = True if arguments.width == "labels" or arguments.with_temperature else None
    if task.is_labelled(arguments.split) and arguments.width in (None, "labels"):
        warn_of_judging(task, arguments.split)
    return task.encode(
        tokenizer,
        arguments.split,
        max_length=arguments.max_length,
        limit=arguments.max_examples,
        seed=arguments.seed,
        labelled=labelled,
    )


def _check_base(folder: Path, network: Any, arguments: argparse.Namespace) -> None:
    """Refuse another base network than the one that the adapter's folder names, or knows by its weights."""
    if is_adapter_folder(folder):
        check_base(folder, read_manifest(folder), network)
        return
    if not (folder / ADAPTER_CONFIG).is_file():
        held = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
        inside = f"; it holds the adapters {', '.join(held)}: give {folder / held[0]}" if held else ""
        raise InputError(f"no adapter in {folder}: it holds no {ADAPTER_CONFIG}{inside}")
    names = (arguments.model, getattr(network, "name_or_path", ""))
    known = is_same_base(folder / ADAPTER_CONFIG, names)
    if not known and not arguments.any_base:
        raise InputError(
            f"{folder / ADAPTER_CONFIG} names another base network than --model {arguments.model}: give that one, or "
            "--any-base if the two are the same under different names"
        )


def _train(bayes: BayesLoRA, task: Task, tokenizer: Any, arguments: Any, metadata: dict[str, Any]) -> None:
    """Some steps of the guide alone, from the width that was found."""
    length, limit = arguments.max_length, arguments.max_train_examples
    fit(
        bayes,
        task.encode(tokenizer, "train", max_length=length, limit=limit, labelled=True),
        output_dir=arguments.output,
        max_steps=arguments.steps,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        metadata=metadata,
    )


def _report(bayes: BayesLoRA, examples: int, seconds: float, arguments: argparse.Namespace) -> None:
    device = "" if bayes.device.type == "cpu" else f" on {torch.cuda.get_device_name()}"
    print(f"{'adapter':24} {arguments.adapter}: {len(bayes.adapter_names)} layers, unchanged")
    print(f"{'shape':24} {arguments.shape}")
    if bayes.tuning is not None:
        say_tuning(bayes.tuning, arguments.split)
    passes = f"{bayes.tuning.passes} passes over " if bayes.tuning and bayes.tuning.passes else ""
    print(f"{'cost':24} {passes}{examples} examples, {seconds:.0f} s{device}")
    print(f"next: bayeslora evaluate {arguments.output}")
