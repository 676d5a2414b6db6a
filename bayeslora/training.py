"""fit(): good manners around ``transformers.Trainer``, which owns the loop."""

import json
import logging
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from bayeslora.analysis.calibration import calibration_summary
from bayeslora.checkpoint import load_adapter, read_manifest, version_info, write_adapter
from bayeslora.errors import InputError, TrainingDivergedError
from bayeslora.models import CategoricalLikelihood
from bayeslora.module import BayesLoRA
from bayeslora.predict import Collator

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
ADAPTER_FOLDER = "adapter"
CHECKPOINT_FOLDER = "checkpoints"


@dataclass(frozen=True)
class FitResult:
    """``metrics`` of the last evaluation (of the best checkpoint where one was kept), the log ``history``, the
    number of optimizer ``steps``, and where the run lies."""

    metrics: dict[str, float]
    history: list[dict[str, float]]
    steps: int
    output_dir: Path


def fit(
    bayes: BayesLoRA,
    train_dataset: Any,
    eval_dataset: Any = None,
    *,
    output_dir: str | Path,
    epochs: float = 3,
    max_steps: int | None = None,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    variational_learning_rate: float | None = None,
    gradient_accumulation: int = 1,
    warmup: float = 0.06,
    schedule: str = "linear",
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    evaluations: int | None = None,
    early_stopping: int | None = None,
    best_metric: str = "loss",
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[Any] = (),
    metadata: Mapping[str, Any] | None = None,
    **trainer_arguments: Any,
) -> FitResult:
    """Fit the posterior by stochastic variational inference.

    Args:
        bayes: What to fit; left at the best checkpoint where ``eval_dataset`` is given, else at the last step.
        train_dataset: Encoded examples with ``labels`` (``datasets.Dataset`` or a list of dicts).
        eval_dataset: The same, for evaluation at the posterior mean; no evaluation when ``None``.
        output_dir: Run folder: ``run.json``, ``checkpoints/`` while training, ``adapter/`` at the end.
        epochs: Passes over the data; ``max_steps`` optimizer steps instead, where given.
        batch_size: Examples per device and forward pass; ``gradient_accumulation`` of them make a step.
        learning_rate: For μ, B and the head. ``variational_learning_rate``: for the guide; 10 × as much if ``None``.
        warmup: Share of the steps over which the rates rise; then ``schedule`` (any transformers scheduler).
        weight_decay: Decoupled, on the network's matrices only; the posterior is regularised by its KL.
        max_grad_norm: Gradients are clipped to this norm; 0 switches clipping off.
        evaluations: How often to evaluate and save in the run; once an epoch if ``None``.
        early_stopping: Stop after so many evaluations without improvement of ``best_metric``.
        best_metric: ``"loss"`` (at the mean, nats) or an evaluation metric such as ``"accuracy"``; decides the best
            checkpoint, smaller loss or NLL or ECE or Brier better, larger otherwise.
        seed: Decides data order, dropout and noise; the same seed gives the same run.
        resume: Continue an interrupted run from its last checkpoint.
        progress: Show progress bars and print logs.
        callbacks: Further ``TrainerCallback`` objects.
        metadata: JSON-able facts to keep in ``run.json``, such as the model's path and the task.
        trainer_arguments: Any further field of ``transformers.TrainingArguments`` (``bf16=True``, ...).

    Raises:
        InputError: for bad data or arguments, or an output folder that holds something else.
        TrainingDivergedError: when the loss or a gradient is NaN or infinite; the last good checkpoint stays.
    """
    output_dir = Path(output_dir)
    _check_data_sets(
        bayes, train_dataset, eval_dataset, looked_at=early_stopping is not None or evaluations is not None
    )
    _check_counts(batch_size=batch_size, gradient_accumulation=gradient_accumulation, max_steps=max_steps,
                  evaluations=evaluations, early_stopping=early_stopping)  # fmt: skip
    settings = {
        **_schedule_arguments(len(train_dataset), epochs, max_steps, batch_size, gradient_accumulation, evaluations),
        **(_selection_arguments(bayes, best_metric) if eval_dataset is not None else {"eval_strategy": "no"}),
        "output_dir": str(output_dir / CHECKPOINT_FOLDER),
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 2 * batch_size,
        "gradient_accumulation_steps": gradient_accumulation,
        "learning_rate": learning_rate,
        "warmup_steps": warmup,
        "lr_scheduler_type": schedule,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "seed": seed,
        "disable_tqdm": not progress,
        "report_to": _loggers(),
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "save_total_limit": 2,
        "restore_callback_states_from_checkpoint": True,  # early stopping goes on counting after a resume
        "dataloader_pin_memory": torch.cuda.is_available(),
        **trainer_arguments,
    }
    try:
        arguments = TrainingArguments(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"transformers.TrainingArguments refuses an argument: {error}") from error
    checkpoint = _prepare_folder(output_dir, resume)
    if resume:
        _check_same_config(bayes, output_dir / RUN_FILE)
    set_seed(seed)
    bayes.num_examples = len(train_dataset)
    trainer = BayesTrainer(
        model=bayes,
        args=arguments,
        variational_learning_rate=10 * learning_rate
        if variational_learning_rate is None
        else variational_learning_rate,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=Collator.for_network(bayes.network),
        compute_metrics=_metrics if _metric_names(bayes) else None,
        callbacks=[*callbacks, *([EarlyStoppingCallback(early_stopping)] if early_stopping else [])],
    )
    trainer.remove_callback(PrinterCallback)
    if progress:
        trainer.pop_callback(ProgressCallback)
        trainer.add_callback(BriefProgress())
    if checkpoint is None:
        write_json(output_dir / RUN_FILE, _run_record(bayes, arguments, len(train_dataset), metadata))
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate() if eval_dataset is not None else {}
    if trainer.is_world_process_zero():
        bayes.save_pretrained(output_dir / ADAPTER_FOLDER)
        record = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
        record |= {"finished": True, "metrics": metrics, "history": trainer.state.log_history}
        write_json(output_dir / RUN_FILE, record)
    bayes.eval()
    return FitResult(metrics, trainer.state.log_history, trainer.state.global_step, output_dir)


class BriefProgress(ProgressCallback):
    """Trainer's progress bar, with one short line per log instead of every term of the ELBO."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any):
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        shown = {name: value for name, value in logs.items() if name in _SHOWN}
        if shown:
            numbers = "  ".join(f"{_SHOWN[name]} {value:.4g}" for name, value in shown.items())
            self.training_bar.write(f"step {state.global_step}: {numbers}")


_SHOWN = {
    "loss": "loss",
    "elbo/task": "task",
    "elbo/kl": "KL",
    "elbo/cooperation": "cooperation",
    "grad_norm": "gradient norm",
    "eval_loss": "evaluation NLL",
    "eval_accuracy": "accuracy",
    "eval_ece": "ECE",
}


class BayesTrainer(Trainer):
    """Trainer with a learning rate for the posterior, a guard against NaN, and checkpoints without pickled models."""

    optimizer: Any

    def __init__(self, *args: Any, variational_learning_rate: float, **kwargs: Any):
        self.variational_learning_rate = variational_learning_rate
        self._parts: dict[str, float] = {}
        self._parts_steps = 0
        super().__init__(*args, **kwargs)

    @property
    def bayes(self) -> BayesLoRA:
        return self.accelerator.unwrap_model(self.model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            decayed, plain, variational = _parameter_groups(self.bayes)
            rate, posterior_rate = self.args.learning_rate, self.variational_learning_rate
            groups = [
                {"params": decayed, "lr": rate, "weight_decay": self.args.weight_decay},
                {"params": plain, "lr": rate, "weight_decay": 0.0},
                {"params": variational, "lr": posterior_rate, "weight_decay": 0.0},
            ]
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.bayes)
            self.optimizer = cls([group for group in groups if group["params"]], **options)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise self._diverged(f"the loss became {float(loss)}", self.state.global_step + 1)
        parts = self.bayes.elbo.parts
        if parts is not None and self.bayes.sampling:
            for name, value in parts.to_floats().items():
                self._parts[name] = self._parts.get(name, 0.0) + value
            self._parts_steps += 1
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is None:  # clipping is off
            gradients = [p.grad for p in self.bayes.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        scaled = self.accelerator.scaler is not None  # fp16: its scaler skips such steps by itself
        if not np.isfinite(float(norm)) and not scaled:
            raise self._diverged(f"the gradient norm became {float(norm)}", self.state.global_step + 1)
        return norm

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        if logits is not None and not torch.isfinite(logits).all():
            raise self._diverged("the evaluation gave NaN or infinite outputs", self.state.global_step)
        return loss, logits, labels

    def _diverged(self, what: str, step: int) -> TrainingDivergedError:
        last = get_last_checkpoint(self.args.output_dir) if os.path.isdir(self.args.output_dir) else None
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been saved yet"
        return TrainingDivergedError(
            f"{what} at step {step}, so training stopped; {kept}. "
            f"Lower learning_rate (now {self.args.learning_rate:g}) or sample_scaler "
            f"(now {self.bayes.monteclora_config.sample_scaler:g}), or check the data for broken labels"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._parts_steps:
            logs |= {f"elbo/{name}": value / self._parts_steps for name, value in self._parts.items()}
            self._parts, self._parts_steps = {}, 0
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not all(torch.isfinite(p).all() for p in self.bayes.parameters() if p.requires_grad):
            raise self._diverged("a parameter became NaN or infinite", self.state.global_step)
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_adapter(self.bayes, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter(self.bayes, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_adapter(self.bayes, Path(self.state.best_model_checkpoint))


def _parameter_groups(bayes: BayesLoRA) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The network's matrices, its vectors, and the posterior's parameters."""
    network = [p for p in bayes.network.parameters() if p.requires_grad]
    posterior = [*bayes.guide.parameters(), *bayes.model.parameters()]
    return (
        [p for p in network if p.dim() > 1],
        [p for p in network if p.dim() <= 1],
        [p for p in posterior if p.requires_grad],
    )


def _schedule_arguments(
    num_examples: int,
    epochs: float,
    max_steps: int | None,
    batch_size: int,
    accumulation: int,
    evaluations: int | None,
) -> dict[str, Any]:
    """When to stop, log, evaluate and save, in steps of the optimizer."""
    if not epochs > 0 and not max_steps:
        raise InputError(f"epochs must be greater than 0, got {epochs}")
    per_epoch = max(-(-num_examples // (batch_size * accumulation)), 1)
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


def _selection_arguments(bayes: BayesLoRA, best_metric: str) -> dict[str, Any]:
    available = ("loss", *_metric_names(bayes))
    if best_metric not in available:
        raise InputError(f"no evaluation metric {best_metric!r}; there are {', '.join(available)}")
    return {
        "eval_strategy": "steps",
        "load_best_model_at_end": True,
        "metric_for_best_model": best_metric,
        "greater_is_better": best_metric == "accuracy",
    }


def _metric_names(bayes: BayesLoRA) -> tuple[str, ...]:
    """What :func:`_metrics` computes; nothing for regression."""
    return ("accuracy", "nll", "ece", "brier") if isinstance(bayes.model.likelihood, CategoricalLikelihood) else ()


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    logits = np.asarray(prediction.predictions, dtype=np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return calibration_summary(odds / odds.sum(-1, keepdims=True), np.asarray(prediction.label_ids))


def _loggers() -> list[str]:
    from importlib.util import find_spec

    return ["tensorboard"] if find_spec("tensorboard") else []


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")


def _check_data_sets(bayes: BayesLoRA, train: Any, evaluation: Any, *, looked_at: bool) -> None:
    _check_data(bayes, train, "train_dataset")
    if evaluation is not None:
        _check_data(bayes, evaluation, "eval_dataset")
    elif looked_at:
        raise InputError("early_stopping and evaluations need an eval_dataset to look at")


def _check_data(bayes: BayesLoRA, dataset: Any, name: str) -> None:
    """Labels there, numbers, and within the classes; the error names the first that is not."""
    if len(dataset) == 0:
        raise InputError(f"{name} is empty: nothing to learn from")
    if "labels" not in dataset[0]:
        raise InputError(f"{name} has no column 'labels' (it has {', '.join(dataset[0])}): is it an unlabelled split?")
    labels = np.asarray([dataset[i]["labels"] for i in range(len(dataset))] if isinstance(dataset, list)
                        else dataset["labels"])  # fmt: skip
    if labels.dtype == object or not np.issubdtype(labels.dtype, np.number) or not np.isfinite(labels).all():
        raise InputError(f"{name}: every label must be a finite number; found {labels.dtype} with missing values")
    if isinstance(bayes.model.likelihood, CategoricalLikelihood):
        classes = bayes.network.config.num_labels
        if not np.equal(labels, np.round(labels)).all():
            raise InputError(f"{name}: a classifier's labels are whole numbers, found {labels[labels % 1 != 0][0]}")
        if (labels == -1).all():
            raise InputError(f"{name} is an unlabelled split (every label is -1): use a labelled one")
        outside = labels[(labels < 0) | (labels >= classes)]
        if len(outside):
            raise InputError(f"{name}: label {outside[0]} is outside the network's {classes} classes 0..{classes - 1}")


def _prepare_folder(output_dir: Path, resume: bool) -> str | None:
    """Refuse a folder in use; return the checkpoint to resume from, if any."""
    checkpoints = output_dir / CHECKPOINT_FOLDER
    ours = (output_dir / RUN_FILE).is_file()
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"output_dir {output_dir} is a file; give a folder")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not ours:
        raise InputError(f"output_dir {output_dir} holds something else already; give a new or empty folder")
    if not resume:
        if ours:
            raise InputError(
                f"output_dir {output_dir} holds a run already; continue it with resume=True (--resume), "
                "or give another folder"
            )
        output_dir.mkdir(parents=True, exist_ok=True)
        return None
    if not ours:
        raise InputError(f"nothing to resume in {output_dir}: it holds no {RUN_FILE}")
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    for checkpoint in found:
        if _is_whole(checkpoint):
            return str(checkpoint)
        logger.warning("%s is incomplete or damaged; using the one before", checkpoint)
    return None


def _check_same_config(bayes: BayesLoRA, run_file: Path) -> None:
    """A resumed run goes on with the hyperparameters it began with."""
    try:
        before = json.loads(run_file.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{run_file} is damaged ({error}): start the run again in another folder") from error
    for name, value in bayes.monteclora_config.to_dict().items():
        if before.get(name) != value:
            raise InputError(
                f"the run in {run_file.parent} began with {name}={before.get(name)!r}, not {value!r}: "
                "resume it with the same configuration, or use another folder"
            )


def _is_whole(checkpoint: Path) -> bool:
    """Whether all that an exact resume needs is there and readable; a crash while saving leaves less."""
    try:
        read_manifest(checkpoint)
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (InputError, OSError, ValueError):
        return False
    states = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
    return len(states) > 2 and all(zipfile.is_zipfile(state) for state in states)  # torch.save writes zip files


def _run_record(
    bayes: BayesLoRA, arguments: TrainingArguments, num_examples: int, metadata: Mapping[str, Any] | None
) -> dict[str, Any]:
    kept = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
            "learning_rate", "warmup_steps", "lr_scheduler_type", "weight_decay", "max_grad_norm", "seed")  # fmt: skip
    return {
        **(metadata or {}),
        "finished": False,
        "config": bayes.monteclora_config.to_dict(),
        "training": {name: _plain(getattr(arguments, name)) for name in kept},
        "train_examples": num_examples,
        "versions": version_info(),
    }


def _plain(value: Any) -> Any:
    return value.value if hasattr(value, "value") else value


def write_json(path: Path, record: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=2, default=float) + "\n", encoding="utf-8")
    os.replace(temporary, path)
