"""A training budget in the words of ``TrainingArguments``, the same for whatever is trained."""

from pathlib import Path
from typing import Any

import torch

from bayeslora.distributed import launched_processes
from bayeslora.errors import InputError
from bayeslora.storage.run_folder import (
    CHECKPOINT_FOLDER,
)


def trainer_settings(
    num_examples: int,
    output_dir: Path,
    *,
    epochs: float = 3,
    max_steps: int | None = None,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    gradient_accumulation: int = 1,
    warmup: float = 0.06,
    schedule: str = "linear",
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    evaluations: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """The ``TrainingArguments`` that make up a training budget, the same for whatever is trained; words as in
    :func:`fit`."""
    step_size = batch_size * gradient_accumulation * launched_processes()
    return {
        **_schedule_arguments(num_examples, epochs, max_steps, step_size, evaluations),
        "output_dir": str(output_dir / CHECKPOINT_FOLDER),
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 2 * batch_size if batch_size > 1 else 1,  # 1: they cannot share a batch
        "gradient_accumulation_steps": gradient_accumulation,
        "learning_rate": learning_rate,
        "warmup_steps": warmup,
        "lr_scheduler_type": schedule,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "seed": seed,
        "disable_tqdm": not progress,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # else Accelerate overlooks that it was launched
    }


def _schedule_arguments(
    num_examples: int,
    epochs: float,
    max_steps: int | None,
    step_size: int,
    evaluations: int | None,
) -> dict[str, Any]:
    """When to stop, log, evaluate and save, in steps of the optimizer."""
    if not epochs > 0 and not max_steps:
        raise InputError(f"epochs must be greater than 0, got {epochs}")
    per_epoch = max(-(-num_examples // step_size), 1)
    total = max_steps or max(round(per_epoch * epochs), 1)
    every = max(total // evaluations, 1) if evaluations else min(per_epoch, total)
    return {
        "num_train_epochs": epochs,
        "max_steps": max_steps or -1,
        "logging_steps": max(min(total // 20, 50), 1),
        "save_strategy": "steps",
        "save_steps": every,
        "eval_steps": every,
    }
