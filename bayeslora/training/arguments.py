"""Fields of ``TrainingArguments`` that cannot mean here what they mean in transformers are refused, before all else.

All others work as they do there; the table in ``tests/training/test_trainer_manners.py`` has every field.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from bayeslora.adapters.modes import checkpointable, recomputes, refuse_reentrant
from bayeslora.errors import InputError
from bayeslora.training.budget import TRAINER_NAMES, FitOptions

# Field to the argument of fit that says it.
FIT_NAMES = {field: name for name, field in TRAINER_NAMES.items() if field != name} | {
    "disable_tqdm": "progress",
    "resume_from_checkpoint": "resume",
}

# What else fit has by name, beside its options.
ARGUMENTS = ("eval_dataset", "tune", "resume", "progress", "compute_metrics", "callbacks", "metadata")

_OWN_LOSS = "the loss is the posterior's objective, noise and KL included, and it would be replaced by one without them"
_COMPILED = "it would compile Pyro too: call bayes.compile() before training"
_HUB = "the run would push whole checkpoints: call bayes.push_to_hub when it has ended"

REFUSED = {
    "label_smoothing_factor": _OWN_LOSS,
    "use_liger_kernel": "it would patch the network when training starts, its loss too: apply Liger's kernels to the "
    "network yourself, without fused_linear_cross_entropy, before BayesLoRA",
    "liger_kernel_config": "it goes with use_liger_kernel, which is not supported",
    "optim_target_modules": "GaLore and APOLLO project the gradients of whole weights, and those are frozen here",
    "bf16_full_eval": "evaluating would leave the network rounded to bfloat16: use bf16=True",
    "fp16_full_eval": "evaluating would leave the network rounded to float16: use fp16=True",
    "label_names": "labels are the column 'labels'",
    "debug": "its hooks fail at masks; training stops at the first loss or gradient that is not finite anyway",
}

REFUSED_BY_FIT = REFUSED | {
    "auto_find_batch_size": "the run would not be the one that was asked for: choose a smaller batch_size",
    "eval_do_concat_batches": "metrics are over the whole evaluation set",
    "eval_use_gather_object": "the evaluation gathers tensors",
    "batch_eval_metrics": "metrics are over the whole evaluation set",
    "enable_jit_checkpoint": "a run that is interrupted resumes from its last checkpoint: choose save_steps",
    "save_on_each_node": "one process writes the run's folder, which all processes must see",
    "push_to_hub": _HUB,
}

REFUSED_BY_TRAINER = REFUSED_BY_FIT | {"torch_compile": _COMPILED}

REFUSED_BY_SFT = REFUSED | {
    "torch_compile": _COMPILED,
    "loss_type": _OWN_LOSS,
    "router_aux_loss_coef": "mixtures of experts are not supported",
}


def check_names(given: Mapping[str, Any]) -> None:
    """Refuse what :func:`bayeslora.fit` has a name of its own for, and what nobody knows."""
    fields = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for name in given:
        if name in FIT_NAMES:
            raise InputError(f"fit calls {name} {FIT_NAMES[name]}: pass {FIT_NAMES[name]}=")
        if name not in fields:
            own = [field.name for field in dataclasses.fields(FitOptions)]
            close = difflib.get_close_matches(name, {*own, *ARGUMENTS, *fields}, n=2)
            meant = f"did you mean {' or '.join(close)}?" if close else "help(bayeslora.fit) lists what there is"
            raise InputError(f"neither fit nor transformers.TrainingArguments has an argument {name!r}: {meant}")


def check_arguments(arguments: TrainingArguments, refused: Mapping[str, str]) -> None:
    """Refuse fields that are set and cannot be honoured, and integrations and optimizers that are not there.

    Raises:
        InputError: naming the field, its value and the reason.
    """
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        if field.name in refused and value != field.default and (value or field.default):
            raise InputError(f"{field.name}={value!r} cannot be combined with bayeslora: {refused[field.name]}")
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if getattr(arguments, name) and not arguments.dataloader_num_workers:
            raise InputError(f"{name}={getattr(arguments, name)!r} needs dataloader_num_workers of 1 or more")
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):  # the second is the former name
        refuse_reentrant(getattr(arguments, name, None))
    _check_reports(arguments)
    _check_optimizer(arguments)


def check_fit_arguments(
    arguments: TrainingArguments, network: nn.Module, refused: Mapping[str, str] = REFUSED_BY_FIT
) -> None:
    """:func:`check_arguments` for :func:`bayeslora.fit`, and what depends on the network."""
    check_arguments(arguments, refused)
    recomputes(checkpointable(network))  # not reentrantly
    if "num_steps" in (arguments.accelerator_config.gradient_accumulation_kwargs or {}):
        raise InputError("fit calls num_steps of accelerator_config gradient_accumulation: pass gradient_accumulation=")
    try:
        embeddings: Any = network.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embeddings = None
    if arguments.neftune_noise_alpha is not None and not isinstance(embeddings, nn.Embedding):
        raise InputError(f"neftune_noise_alpha is noise on token embeddings, and {type(network).__name__} has none")


def check_resumable(arguments: TrainingArguments) -> None:
    """Refuse what would let a run start that cannot be resumed exactly."""
    promised = {"save_only_model": False, "ignore_data_skip": False, "restore_callback_states_from_checkpoint": True}
    for name, value in promised.items():
        if getattr(arguments, name) != value:
            raise InputError(
                f"{name}={not value} leaves checkpoints from which a run cannot be resumed exactly: leave it out "
                "(save_strategy='no' writes no checkpoints at all)"
            )


def check_evaluated(arguments: TrainingArguments, eval_dataset: Any, best_metric: str) -> None:
    """What looks at an evaluation has one to look at."""
    if eval_dataset is None and (arguments.eval_strategy != "no" or arguments.load_best_model_at_end):
        raise InputError("eval_strategy and load_best_model_at_end need an eval_dataset to look at")
    if eval_dataset is not None and arguments.dataloader_drop_last:
        smallest = arguments.per_device_eval_batch_size * arguments.world_size
        if len(eval_dataset) < smallest:
            raise InputError(
                f"dataloader_drop_last=True drops all {len(eval_dataset)} examples of the eval_dataset: "
                "pass a smaller per_device_eval_batch_size"
            )
    if arguments.prediction_loss_only and best_metric not in ("loss", "predictive_nll"):
        raise InputError(f"prediction_loss_only=True computes the loss alone, and best_metric is {best_metric!r}")


def _check_reports(arguments: TrainingArguments) -> None:
    """Build every integration once, as Trainer will."""
    for name in arguments.report_to or ():
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ImportError, RuntimeError) as error:
            raise InputError(
                f"report_to={name!r} needs the package {name}: install it, or leave it out ({error})"
            ) from error
        except ValueError as error:
            raise InputError(f"report_to={name!r}: {error}") from error


def _check_optimizer(arguments: TrainingArguments) -> None:
    """Build the optimizer and the schedule once, for one number."""
    number = nn.Parameter(torch.zeros(1, device=arguments.device))
    try:
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        built = optimizer([number], **options)
    except Exception as error:  # each library has its own
        raise InputError(
            f"optim={arguments.optim.value!r} with optim_args={arguments.optim_args!r} cannot be used: {error}"
        ) from error
    try:
        get_scheduler(arguments.lr_scheduler_type, built, 1, 2, scheduler_specific_kwargs=arguments.lr_scheduler_kwargs)
    except Exception as error:
        raise InputError(
            f"the schedule {arguments.lr_scheduler_type.value!r} with lr_scheduler_kwargs="
            f"{arguments.lr_scheduler_kwargs!r} cannot be used: {error}"
        ) from error
