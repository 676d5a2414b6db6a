"""fit(): good manners around ``transformers.Trainer``, which owns the loop."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
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
from transformers.integrations import TensorBoardCallback

from bayeslora.analysis.metrics.calibration import calibration_summary
from bayeslora.data.checks import check_to_learn_from
from bayeslora.distributed import check_parallelism, launched_processes, on_main_process
from bayeslora.elbo import ELBOParts
from bayeslora.errors import InputError, TrainingDivergedError
from bayeslora.models import CategoricalLikelihood
from bayeslora.module import BayesLoRA
from bayeslora.noise_schedules import NoiseScheduleCallback
from bayeslora.storage.checkpoint import load_adapter, read_manifest, version_info, write_adapter
from bayeslora.storage.run_folder import (
    ADAPTER_FOLDER,
    CHECKPOINT_FOLDER,
    RUN_FILE,
    best_checkpoint,
    delete,
    foreign_entry,
    last_checkpoint,
    lock_folder,
    reporting_full_disk,
    rotate,
    seal,
    write_json,
)
from bayeslora.training.arguments import check_fit_arguments, check_words
from bayeslora.training.monitor import BriefProgress, GroupedTensorBoard, posterior_logs
from bayeslora.untrusted import MAX_RUN_BYTES, read_json

logger = logging.getLogger(__name__)


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
    compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
    callbacks: Sequence[Any] = (),
    metadata: Mapping[str, Any] | None = None,
    **trainer_arguments: Any,
) -> FitResult:
    """Fit the posterior by stochastic variational inference.

    Args:
        bayes: What to fit; left at the best checkpoint where ``eval_dataset`` is given, else at the last step.
        train_dataset: Encoded examples with ``labels`` (or ``label``), of the kinds that
            :func:`bayeslora.inference.predict.predict` takes.
        eval_dataset: The same, for evaluation at the posterior mean; no evaluation when ``None``.
        output_dir: Run folder: ``run.json``, ``checkpoints/`` while training, ``adapter/`` at the end, and
            ``tensorboard/`` where that is installed; see :mod:`bayeslora.storage.run_folder`.
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
        resume: Continue an interrupted run from its last whole checkpoint, with the same arguments, as if it had
            never stopped; a finished run's result is loaded.
        progress: Show progress bars and print logs.
        compute_metrics: Further metrics of the evaluation, as for ``transformers.Trainer``: a function of its
            ``EvalPrediction``, whose predictions are the likelihood's outputs at the mean (logits).
        callbacks: Further ``TrainerCallback`` objects.
        metadata: JSON-able facts to keep in ``run.json``, such as the model's path and the task.
        trainer_arguments: Any further field of ``transformers.TrainingArguments`` (``bf16=True``, ...) but those that
            :mod:`bayeslora.training.arguments` lists. ``save_total_limit``: checkpoints to keep, 2 if not given; the
            best and the last always stay. ``greater_is_better``: of a ``best_metric`` that ``compute_metrics`` gives.

    Raises:
        InputError: for bad data (:mod:`bayeslora.data.checks`) or arguments, or an output folder that holds something
            else or is in use.
        TrainingDivergedError: when the loss or a gradient is NaN or infinite; the last good checkpoint stays.
        StorageError: when the disk is full; the last good checkpoint stays.
    """
    output_dir = Path(output_dir)
    if eval_dataset is None and (early_stopping is not None or evaluations is not None):
        raise InputError("early_stopping and evaluations need an eval_dataset to look at")
    _check_counts(batch_size=batch_size, gradient_accumulation=gradient_accumulation, max_steps=max_steps,
                  evaluations=evaluations, early_stopping=early_stopping)  # fmt: skip
    check_words(trainer_arguments)
    data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    collate = check_to_learn_from(bayes, {n: part for n, part in data.items() if part is not None}, batch_size)
    metrics_of = _Metrics(bayes, compute_metrics, best_metric)
    settings = {
        **trainer_settings(
            len(train_dataset), output_dir, epochs=epochs, max_steps=max_steps, batch_size=batch_size,
            learning_rate=learning_rate, gradient_accumulation=gradient_accumulation, warmup=warmup,
            schedule=schedule, weight_decay=weight_decay, max_grad_norm=max_grad_norm, evaluations=evaluations,
            seed=seed, progress=progress,
        ),
        **(metrics_of.selection() if eval_dataset is not None else {"eval_strategy": "no"}),
        "report_to": _loggers(),
        "restore_callback_states_from_checkpoint": True,  # early stopping goes on counting after a resume
        "ddp_find_unused_parameters": False,  # every trained parameter gets a gradient in every step
        **trainer_arguments,
        "save_total_limit": None,  # BayesTrainer deletes old checkpoints itself, once the new one is sealed
    }  # fmt: skip
    compiled = _compile_options(settings)
    try:
        arguments = TrainingArguments(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"transformers.TrainingArguments refuses an argument: {error}") from error
    check_fit_arguments(arguments, bayes.network.get_base_model())
    _check_resumable(arguments)
    _check_evaluated(arguments, eval_dataset, best_metric)
    check_parallelism(arguments)
    rate = 10 * learning_rate if variational_learning_rate is None else variational_learning_rate
    record = run_record(bayes, arguments, rate, len(train_dataset), metadata)
    bayes.num_examples = len(train_dataset)
    if compiled is not None:
        bayes.compile(**compiled)
    with ExitStack() as stack:

        def open_run() -> tuple[Path | None, dict[str, Any] | None]:
            _refuse_other_content(output_dir, resume)
            stack.enter_context(lock_folder(output_dir))
            stack.enter_context(reporting_full_disk(output_dir))
            return _open_run(output_dir, resume, record)

        checkpoint, finished = on_main_process(open_run)
        if finished is not None:
            load_adapter(bayes, output_dir / ADAPTER_FOLDER)
            bayes.to(arguments.device).eval()
            return FitResult(finished["metrics"], finished["history"], finished["steps"], output_dir)
        with _refusing(output_dir, resume):
            trainer = BayesTrainer(
                model=bayes,
                args=arguments,
                variational_learning_rate=rate,
                keep_checkpoints=trainer_arguments.get("save_total_limit", 2),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                data_collator=collate,
                compute_metrics=metrics_of if metrics_of.any else None,
                callbacks=[
                    NoiseScheduleCallback(bayes.noise_schedule),
                    *callbacks,
                    *([EarlyStoppingCallback(early_stopping)] if early_stopping else []),
                ],
            )
            trainer.get_train_dataloader()
        set_seed(seed)
        _choose_reports(trainer, progress, stack)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        metrics = trainer.evaluate() if eval_dataset is not None else {}
        history, steps = trainer.state.log_history, trainer.state.global_step

        def close_run() -> None:
            bayes.save_pretrained(output_dir / ADAPTER_FOLDER)
            record.update(finished=True, steps=steps, metrics=metrics, history=history)
            write_json(output_dir / RUN_FILE, record)

        on_main_process(close_run)
    bayes.eval()
    return FitResult(metrics, history, steps, output_dir)


@contextmanager
def _refusing(output_dir: Path, resume: bool) -> Iterator[None]:
    """What Trainer refuses when it is built is an argument's fault, and must not leave a run that blocks the folder."""
    try:
        yield
    except InputError:
        raise
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        if not resume:
            (output_dir / RUN_FILE).unlink(missing_ok=True)
            shutil.rmtree(output_dir / CHECKPOINT_FOLDER, ignore_errors=True)
        raise InputError(f"transformers.Trainer refuses an argument: {error}") from error


def _choose_reports(trainer: Trainer, progress: bool, stack: ExitStack) -> None:
    trainer.remove_callback(PrinterCallback)
    if progress:
        trainer.pop_callback(ProgressCallback)
        trainer.add_callback(BriefProgress())
    if trainer.pop_callback(TensorBoardCallback) is not None:
        board = GroupedTensorBoard()
        trainer.add_callback(board)
        stack.callback(board.close)


class BayesTrainer(Trainer):
    """Trainer with a learning rate for the posterior, a guard against NaN, and checkpoints that are whole or do not
    count."""

    optimizer: Any

    def __init__(
        self, *args: Any, variational_learning_rate: float, keep_checkpoints: int | None = None, **kwargs: Any
    ):
        self.variational_learning_rate = variational_learning_rate
        self.keep_checkpoints = keep_checkpoints
        self._ended = False
        self._step_loss: Tensor | float = 0.0
        self._parts: ELBOParts | None = None
        self._parts_steps = 0
        self._norms: dict[str, Tensor] = {}
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # whatever the likelihood: what it averages over is counted here
        self.label_names = ["labels"]

    @property
    def bayes(self) -> BayesLoRA:
        return self.accelerator.unwrap_model(self.model)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor | None:
        """What all batches of a step count together: the step is then that of one batch, however it was split."""
        if not batch_samples:
            return None
        total = torch.stack([self.bayes.model.count(batch["labels"]) for batch in batch_samples]).sum().to(device)
        return self.accelerator.reduce(total) if self.args.average_tokens_across_devices else total

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

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, *args, **kwargs)
        if self.state.global_step:
            current = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            best = best_checkpoint(current)
            self.state.best_model_checkpoint = str(best) if best else None
            if self.args.should_save:  # a run killed in the middle of this left too many
                rotate(self._run_folder, current, best, self.keep_checkpoints)
        stoppers = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        self._ended = self.state.global_step >= max_steps or any(
            stopper.early_stopping_patience_counter >= stopper.early_stopping_patience for stopper in stoppers
        )
        return position

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._ended:  # before it was interrupted
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = self._step_loss + loss
        parts = self.bayes.elbo.parts
        if parts is not None and self.bayes.sampling:
            share = self.bayes.share(inputs["labels"], num_items_in_batch)
            ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            self._parts = self._parts or ELBOParts(torch.zeros_like(parts.task))
            self._parts.add(parts, share.to(parts.task) * ranks)  # log() averages over the ranks
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        gradients = {n: [p.grad for p in group if p.grad is not None] for n, group in self._trained.items()}
        self._norms = {name: nn.utils.get_total_norm(tensors) for name, tensors in gradients.items() if tensors}
        clipped = torch.stack([*self._norms.values()]).norm()
        norm = clipped if norm is None else torch.as_tensor(norm).to(clipped)
        before_clipping = norm / clipped.clamp(min=torch.finfo(clipped.dtype).tiny)
        self._norms = {name: part * before_clipping for name, part in self._norms.items()}
        step_loss = self.accelerator.reduce(torch.as_tensor(self._step_loss).to(norm), "mean")  # all ranks agree
        loss, total = torch.stack([step_loss, norm]).tolist()
        self._step_loss, self._parts_steps = 0.0, self._parts_steps + 1
        if not math.isfinite(loss):
            raise self._diverged(f"the loss became {loss}", self.state.global_step + 1)
        scaled = self.accelerator.scaler is not None  # fp16: its scaler skips such steps by itself
        if not math.isfinite(total) and not scaled:
            raise self._diverged(f"the gradient norm became {total}", self.state.global_step + 1)
        return norm

    @cached_property
    def _trained(self) -> dict[str, list[Tensor]]:
        """Parameters of the network (μ, B, head) and of the posterior."""
        matrices, vectors, posterior = _parameter_groups(self.bayes)
        return {"network": [*matrices, *vectors], "posterior": posterior}

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # averages over steps begin anew at each checkpoint, so that a resumed run logs what an uninterrupted one does
        self.control.should_log |= self.control.should_save or self.control.should_evaluate
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        loss, logits, labels = super().prediction_step(model, inputs, False, *args, **kwargs)
        if not torch.isfinite(self.accelerator.reduce(logits.float().sum())):  # all ranks stop together
            raise self._diverged("the evaluation gave NaN or infinite outputs", self.state.global_step)
        losses = self.bayes.negative_log_likelihood(logits, labels).detach()
        self._losses.append(self.gather_function(losses))
        self._weights.append(self.gather_function(self.bayes.model.example_weights(logits).to(losses)))
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """With the mean loss of all examples; Trainer's own counts those twice that fill up the last batches."""
        self._losses: list[Tensor] = []
        self._weights: list[Tensor] = []
        output = super().evaluation_loop(*args, **kwargs)
        losses, weights = torch.cat(self._losses), torch.cat(self._weights)
        output.metrics["eval_loss"] = float((losses * weights).sum() / weights.sum())
        return output

    def _diverged(self, what: str, step: int) -> TrainingDivergedError:
        last = last_checkpoint(self._run_folder)
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been saved yet"
        return TrainingDivergedError(
            f"{what} at step {step}, so training stopped; {kept}. "
            f"Lower learning_rate (now {self.args.learning_rate:g}) or sample_scaler "
            f"(now {self.bayes.monteclora_config.sample_scaler:g}), or check the data for broken labels"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            if self._parts is not None:
                mean = ELBOParts(torch.zeros_like(self._parts.task))
                mean.add(self._parts, 1 / self._parts_steps)
                parts = mean.to_floats()
                values = self.accelerator.reduce(torch.tensor([*parts.values()], device=self.args.device), "mean")
                logs |= {f"elbo/{name}": value for name, value in zip(parts, values.tolist(), strict=True)}
                self._parts, self._parts_steps = None, 0
            logs |= {f"grad_norm/{name}": float(norm) for name, norm in self._norms.items()}
            logs |= posterior_logs(self.bayes)
        super().log(logs, *args, **kwargs)

    @property
    def _run_folder(self) -> Path:
        return Path(self.args.output_dir).parent

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not all(torch.isfinite(p).all() for p in self.bayes.parameters() if p.requires_grad):
            raise self._diverged("a parameter became NaN or infinite", self.state.global_step)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            delete(folder)  # what a killed run left of it
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(folder)
            rotate(self._run_folder, folder, best_checkpoint(folder), self.keep_checkpoints)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:  # Trainer calls this on every rank
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_adapter(self.bayes, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter(self.bayes, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_adapter(self.bayes, Path(self.state.best_model_checkpoint))


def _parameter_groups(bayes: BayesLoRA) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The network's matrices, its vectors, and the posterior's parameters."""
    posterior = [*bayes.guide.parameters(), *bayes.model.parameters()]
    return *trained_parameters(bayes.network), [p for p in posterior if p.requires_grad]


def trained_parameters(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The network's trained matrices, which weight decay shrinks, and its trained vectors, which it does not."""
    trained = [p for p in network.parameters() if p.requires_grad]
    return [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]


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


def _compile_options(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Takes Trainer's words for torch.compile out of ``settings``: it would compile Pyro too, and not the network."""
    wanted = settings.pop("torch_compile", False)
    options = {word: settings.pop(f"torch_compile_{word}", None) for word in ("backend", "mode")}
    options = {word: value for word, value in options.items() if value is not None}
    return options if wanted or options else None


class _Metrics:
    """What an evaluation computes: ours for classes, and the caller's.

    Raises:
        InputError: where ``best_metric`` is not among them; for the caller's, at the first evaluation.
    """

    def __init__(self, bayes: BayesLoRA, compute_metrics: Callable[..., dict[str, Any]] | None, best_metric: str):
        self.of_classes = isinstance(bayes.model.likelihood, CategoricalLikelihood)
        self.compute, self.best = compute_metrics, best_metric
        self.ours = ("loss", *(("accuracy", "nll", "ece", "brier") if self.of_classes else ()))
        self.any = self.of_classes or compute_metrics is not None
        if compute_metrics is None:
            self._check(self.ours)

    def _check(self, available: Sequence[str]) -> None:
        if self.best.removeprefix("eval_") not in available:
            raise InputError(f"no evaluation metric {self.best!r}; there are {', '.join(available)}")

    def selection(self) -> dict[str, Any]:
        """How the best checkpoint is chosen."""
        smaller = {*self.ours} - {"accuracy"}
        return {
            "eval_strategy": "steps",
            "load_best_model_at_end": True,
            "metric_for_best_model": self.best,
            "greater_is_better": self.best not in smaller and not self.best.endswith("loss"),
        }

    def __call__(self, prediction: EvalPrediction) -> dict[str, Any]:
        found = _of_classes(prediction) if self.of_classes else {}
        if self.compute is not None:
            found |= self.compute(prediction)
        self._check(["loss", *(name.removeprefix("eval_") for name in found)])
        return found


def _of_classes(prediction: EvalPrediction) -> dict[str, float]:
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


def _check_resumable(arguments: TrainingArguments) -> None:
    """Refuse what would let a run start that cannot be resumed exactly."""
    promised = {"save_only_model": False, "ignore_data_skip": False, "restore_callback_states_from_checkpoint": True}
    for name, value in promised.items():
        if getattr(arguments, name) != value:
            raise InputError(
                f"{name}={not value} leaves checkpoints from which a run cannot be resumed exactly: leave it out "
                "(save_strategy='no' writes no checkpoints at all)"
            )


def _check_evaluated(arguments: TrainingArguments, eval_dataset: Any, best_metric: str) -> None:
    """What looks at an evaluation has one to look at."""
    if eval_dataset is None and (arguments.eval_strategy != "no" or arguments.load_best_model_at_end):
        raise InputError("eval_strategy and load_best_model_at_end need an eval_dataset to look at")
    if eval_dataset is not None and arguments.dataloader_drop_last:
        smallest = arguments.per_device_eval_batch_size * arguments.world_size
        if len(eval_dataset) < smallest:
            raise InputError(f"dataloader_drop_last=True drops all {len(eval_dataset)} examples of the eval_dataset: "
                             "pass a smaller per_device_eval_batch_size")  # fmt: skip
    if arguments.prediction_loss_only and best_metric != "loss":
        raise InputError(f"prediction_loss_only=True computes the loss alone, and best_metric is {best_metric!r}")


def _refuse_other_content(output_dir: Path, resume: bool) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"output_dir {output_dir} is a file; give a folder")
    ours = (output_dir / RUN_FILE).is_file()
    if output_dir.is_dir() and not ours and foreign_entry(output_dir, RUN_FILE):
        raise InputError(f"output_dir {output_dir} holds something else already; give a new or empty folder")
    if resume and not ours:
        raise InputError(f"nothing to resume in {output_dir}: it holds no {RUN_FILE}")


def _open_run(output_dir: Path, resume: bool, record: dict[str, Any]) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to resume from, if any, and the record of a run that is finished already."""
    run_file = output_dir / RUN_FILE
    if not resume:
        if run_file.is_file():
            raise InputError(
                f"output_dir {output_dir} holds a run already; continue it with resume=True (--resume), "
                "or give another folder"
            )
        write_json(run_file, record)
        return None, None
    before = _read_record(run_file)
    _check_same_run(output_dir, before, json.loads(json.dumps(record, default=float)))
    for remains in output_dir.glob(f".{ADAPTER_FOLDER}-*"):  # of a run killed while it wrote the adapter
        shutil.rmtree(remains, ignore_errors=True)
    if before["finished"]:
        try:
            read_manifest(output_dir / ADAPTER_FOLDER)
            return None, before
        except InputError as error:
            logger.warning("%s; finishing the run again from its last checkpoint", error)
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is None:
        logger.warning("%s holds no whole checkpoint: starting from the beginning", output_dir)
    return checkpoint, None


def _read_record(run_file: Path) -> dict[str, Any]:
    record = read_json(run_file, most_bytes=MAX_RUN_BYTES)
    for name, kind in (("config", dict), ("training", dict), ("finished", bool)):
        if not isinstance(record.get(name), kind):
            raise InputError(f"{run_file} is damaged (its {name!r}): start the run again in another folder")
    return record


def _check_same_run(output_dir: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """A resumed run goes on with the settings it began with."""
    for part in ("config", "training"):
        for name, value in now[part].items():
            if before[part].get(name) != value:
                raise InputError(
                    f"the run in {output_dir} began with {name}={before[part].get(name)!r}, not {value!r}: "
                    "resume it with the same settings, or use another folder"
                )


def run_record(
    bayes: BayesLoRA,
    arguments: TrainingArguments,
    variational_learning_rate: float,
    num_examples: int,
    metadata: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What ``run.json`` says of a run that begins."""
    kept = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
            "learning_rate", "warmup_steps", "lr_scheduler_type", "weight_decay", "max_grad_norm", "seed",
            "metric_for_best_model", "eval_steps")  # fmt: skip
    return {
        **(metadata or {}),
        "finished": False,
        "config": bayes.monteclora_config.to_dict(),
        "training": {
            **{name: _plain(getattr(arguments, name)) for name in kept},
            "variational_learning_rate": variational_learning_rate,
            "train_examples": num_examples,
            "processes": arguments.world_size,
        },
        "train_examples": num_examples,
        "versions": version_info(),
    }


def _plain(value: Any) -> Any:
    return value.value if hasattr(value, "value") else value
