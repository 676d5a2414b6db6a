"""A training budget as ``TrainingArguments``, the same for whatever is trained."""

import dataclasses
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from bayeslora.distributed import launched_processes
from bayeslora.errors import InputError
from bayeslora.storage.run_folder import CHECKPOINT_FOLDER
from bayeslora.training.budget import TRAINER_NAMES, FitOptions, TrainingBudget


def trainer_settings(
    budget: TrainingBudget,
    num_examples: int,
    output_dir: Path,
    *,
    evaluations: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The fields of ``TrainingArguments`` that make up a budget.

    Args:
        budget: What the training may take.
        num_examples: Size of the training set.
        output_dir: The run's folder.
        evaluations: How often to evaluate and save; once an epoch if ``None``.
        progress: Show a progress bar.

    Raises:
        InputError: for no steps at all.
    """
    budget = budget.settled(num_examples, launched_processes())
    if not (budget.epochs or 0) > 0 and not budget.max_steps:
        raise InputError(f"epochs must be greater than 0, got {budget.epochs}")
    total = budget.total_steps(num_examples, launched_processes())
    per_epoch = budget.steps_per_epoch(num_examples, launched_processes())
    every = max(total // evaluations, 1) if evaluations else min(per_epoch, total)
    names = {f.name: TRAINER_NAMES[f.name] for f in dataclasses.fields(TrainingBudget) if f.name in TRAINER_NAMES}
    return {
        **{field: getattr(budget, name) for name, field in names.items()},
        "max_steps": budget.max_steps or -1,
        "logging_steps": max(min(total // 20, 50), 1),
        "save_strategy": "steps",
        "save_steps": every,
        "eval_steps": every,
        "output_dir": str(output_dir / CHECKPOINT_FOLDER),
        # 1: they cannot share a batch
        "per_device_eval_batch_size": 2 * budget.batch_size if budget.batch_size > 1 else 1,
        "disable_tqdm": not progress,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # else Accelerate overlooks that it was launched
    }


def fit_settings(
    options: FitOptions,
    num_examples: int,
    output_dir: Path,
    selection: Mapping[str, Any],
    progress: bool,
    given: Mapping[str, Any],
) -> tuple[TrainingArguments, dict[str, Any] | None]:
    """The ``TrainingArguments`` of :func:`bayeslora.fit`, and those of ``torch.compile`` if it is wanted.

    Args:
        options, num_examples, output_dir, progress: As in :func:`trainer_settings`.
        selection: How the best checkpoint is chosen.
        given: Further fields, which come before all others.

    Raises:
        InputError: for a field that transformers refuses.
    """
    settings = {
        **trainer_settings(options, num_examples, output_dir, evaluations=options.evaluations, progress=progress),
        **selection,
        "report_to": ["tensorboard"] if find_spec("tensorboard") else [],
        "restore_callback_states_from_checkpoint": True,  # early stopping goes on counting after a resume
        "ddp_find_unused_parameters": False,  # every trained parameter gets a gradient in every step
        "save_total_limit": 2,
        **given,
    }
    compiled = compile_options(settings)
    try:
        return TrainingArguments(**settings), compiled
    except (TypeError, ValueError) as error:
        raise InputError(f"transformers.TrainingArguments refuses an argument: {error}") from error


def compile_options(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Takes Trainer's options for torch.compile out of ``settings``: it would compile Pyro too, and not the network."""
    wanted = settings.pop("torch_compile", False)
    options = {name: settings.pop(f"torch_compile_{name}", None) for name in ("backend", "mode")}
    options = {name: value for name, value in options.items() if value is not None}
    return options if wanted or options else None
