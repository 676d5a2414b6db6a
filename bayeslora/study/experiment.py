"""What the methods of one cell work with: data, a fresh network, and the same training and prediction for all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from bayeslora.analysis import mutual_information
from bayeslora.data.batches import Collator, batches_by_length
from bayeslora.errors import InputError
from bayeslora.models.likelihoods import network_outputs
from bayeslora.study.outcome import Predicted, Stopwatch, Trained
from bayeslora.study.spec import Cell, Study
from bayeslora.study.trainer import CheckpointCallback, Drawing, PlainTrainer
from bayeslora.tasks.base import Task
from bayeslora.training.budget import TRAINER_NAMES, TrainingBudget
from bayeslora.training.monitor import BriefProgress
from bayeslora.training.record import run_record
from bayeslora.training.settings import trainer_settings

PREDICTION_BATCH = 32
# Fields of TrainingArguments that a study sets, and where it is told what they say.
DECIDED = {
    "learning_rate": "learning_rates has it",
    "per_device_train_batch_size": "batch_sizes has it",
    "seed": "seeds has it",
    "eval_strategy": "curve_points says how often to evaluate",
    "save_strategy": "checkpoints are not kept, and keep_adapters keeps what was trained",
    "load_best_model_at_end": "every method is scored at the end of the budget",
    "metric_for_best_model": "every method is scored at the end of the budget",
    "disable_tqdm": "run_study has progress",
    "resume_from_checkpoint": "a cell is trained from its start",
}


class Experiment:
    """One cell's data and budget.

    Args:
        study: What the cell belongs to.
        cell: Its learning rate, batch size, rank and seed.
        folder: Where it may write.
        checkpoints: How many checkpoints the cell's post-hoc methods ask for.
        progress: Show progress bars.
    """

    arguments: TrainingArguments
    history: list[dict[str, float]]

    def __init__(self, study: Study, cell: Cell, folder: Path, *, checkpoints: int = 0, progress: bool = False):
        self.study, self.cell, self.folder, self.progress = study, cell, folder, progress
        self.checkpoints = checkpoints
        self._encoded: dict[tuple[str, int | None], Any] = {}

    def say(self, text: str) -> None:
        """Where progress is shown."""
        if self.progress:
            tqdm.write(f"  {text}")

    @cached_property
    def _prepared(self) -> tuple[Task, str]:
        spec = next(task for task in self.study.tasks if task.name == self.cell.task)
        return prepare_task(spec.load(), self.study)

    @property
    def task(self) -> Task:
        """The task, with labelled splits to train on, to score and, where there is one, to validate on."""
        return self._prepared[0]

    @property
    def test_split(self) -> str:
        """The split that is scored."""
        return self._prepared[1]

    @property
    def splits(self) -> tuple[str, ...]:
        """What is scored: validation first where there is one, then the test split and its shifts."""
        shifts = self.task.shift_splits if self.study.shift_splits else ()
        validation = ("validation",) if self.has_validation else ()
        return (*validation, self.test_split, *(split for split in shifts if split != self.test_split))

    @property
    def has_validation(self) -> bool:
        """Whether there are labelled examples to tune on that are not scored."""
        return self.test_split != "validation" and _is_labelled(self.task, "validation")

    def network(self) -> nn.Module:
        """The pretrained network with its new head: for every method of a seed the same."""
        set_seed(self.cell.seed)
        network, self._tokenizer = self.task.load_network(self.study.model)
        return network

    def outputs(self, network: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Logits of every class, or scores of every option, ``(batch, C)``."""
        return network_outputs(self.task.likelihood(), network, inputs)

    @property
    def tokenizer(self) -> Any:
        if not hasattr(self, "_tokenizer"):
            self.network()
        return self._tokenizer

    def data(self, split: str, limit: int | None = None) -> Any:
        """Encoded, labelled examples of a split: at most ``limit``, else as many as the study says."""
        limit = limit or self._limit(split)
        if (split, limit) not in self._encoded:
            encoded = self.task.encode(
                self.tokenizer, split, max_length=self.study.max_length, limit=limit, labelled=True
            )
            self._encoded[split, limit] = list(encoded)
        return self._encoded[split, limit]

    def _limit(self, split: str) -> int | None:
        if split == "train":
            return self.study.train_examples
        if split == "validation" and self.has_validation and self.study.validation_examples:
            return self.study.validation_examples
        return self.study.test_examples

    @property
    def train_data(self) -> list[dict[str, Any]]:
        return self.data("train")

    def tuning_data(self) -> list[dict[str, Any]]:
        """The validation examples for learning curves.

        Raises:
            InputError: there is no labelled validation split besides what is scored.
        """
        if not self.has_validation:
            raise InputError(
                f"task {self.cell.task!r} has no labelled validation split besides what is scored; "
                "set hold_out to take one from the training examples"
            )
        limit = self._limit("validation")
        return self.data("validation", min(self.study.curve_examples, limit or self.study.curve_examples))

    @property
    def curve_data(self) -> list[dict[str, Any]] | None:
        return self.tuning_data() if self.study.curve_points and self.has_validation else None

    def on_top(self, label: str) -> str:
        """What the predictions of a post-hoc method of this cell are called, from its label."""
        return f"{self.cell.method} + {label}"

    @property
    def metadata(self) -> dict[str, Any]:
        """What a run's record says about model and task."""
        return {"model": self.study.model, "task": self.task.recipe, "max_length": self.study.max_length}

    def record(self, bayes: Any, trained: Trained) -> dict[str, Any]:
        """A ``run.json``, as :func:`bayeslora.fit` writes it, of what :meth:`train` trained."""
        record = run_record(
            bayes, self.arguments, self.arguments.learning_rate, {"train_dataset": self.train_data}, self.metadata
        )
        return record | {"finished": True, "steps": trained.steps, "metrics": {}, "history": self.history}

    def lora_options(self) -> dict[str, Any]:
        """The study's options of every adapter, with the cell's rank."""
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in self.study.lora.items()}
        return {**options, "r": self.cell.rank}

    def budget(self, learning_rate_scale: float = 1.0) -> TrainingBudget:
        """The study's training options with the cell's own."""
        shared = training_budget(self.study)
        rate = self.cell.learning_rate * learning_rate_scale
        return replace(shared, batch_size=self.cell.batch_size, learning_rate=rate, seed=self.cell.seed)

    @property
    def evaluations(self) -> int | None:
        """How often to evaluate while training."""
        return self.study.curve_points or None if self.curve_data else None

    @property
    def total_steps(self) -> int:
        """Steps of the optimizer in the budget."""
        return self.budget().total_steps(len(self.train_data))

    def train(
        self,
        network: nn.Module,
        *,
        learning_rate_scale: float = 1.0,
        optimizer: Callable[[type, dict[str, Any]], Any] | None = None,
        penalty: Callable[[nn.Module], Tensor | float] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        drawing: Drawing | None = None,
    ) -> Trained:
        """Train a network that is not ours within the budget: data order, schedule, warm-up, clipping, optimizer and
        seed are those of :func:`bayeslora.fit`.

        Args:
            network: What to train; its parameters with ``requires_grad``.
            learning_rate_scale: Times the grid's learning rate.
            optimizer: From the optimizer's class and its options to one; one rate for all if ``None``.
            penalty: What is added to the loss in training.
            callbacks: Further ``TrainerCallback`` objects.
            drawing: From a batch to what is entered around its forward and backward pass.

        Raises:
            TrainingDivergedError: when the loss is NaN or infinite.
        """
        settings = trainer_settings(
            self.budget(learning_rate_scale),
            len(self.train_data),
            self.folder,
            evaluations=self.evaluations,
            progress=self.progress,
        )
        evaluating = "steps" if self.curve_data else "no"
        quiet = {"save_strategy": "no", "eval_strategy": evaluating, "report_to": []}
        arguments = TrainingArguments(**{**settings, **quiet, **self.study.trainer})
        checkpoints = self.checkpoint_callback(network)
        set_seed(self.cell.seed)
        trainer = PlainTrainer(
            network,
            arguments,
            make_optimizer=optimizer,
            penalty=penalty,
            drawing=drawing,
            train_dataset=self.train_data,
            eval_dataset=self.curve_data,
            data_collator=Collator.for_network(network),
            compute_metrics=_accuracy,
            callbacks=[*callbacks, checkpoints],
            likelihood=self.task.likelihood(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if self.progress:
            trainer.add_callback(BriefProgress())
        watch = Stopwatch()
        trainer.train()
        spent = watch.read()
        network.eval()
        self.arguments, self.history = arguments, trainer.state.log_history
        return Trained(
            network,
            trainer.state.global_step,
            curve=curve(trainer.state.log_history),
            checkpoints=checkpoints.kept,
            **spent,
        )

    def checkpoint_callback(self, network: nn.Module) -> CheckpointCallback:
        """Copies as many checkpoints as the cell's methods ask for."""
        return CheckpointCallback(network, self.total_steps, self.checkpoints)

    @torch.inference_mode()
    def predict(
        self,
        network: nn.Module,
        data: Sequence[dict[str, Any]],
        run: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    ) -> Predicted:
        """Probabilities of encoded examples, batch by batch; ``run`` maps inputs to probabilities (S, batch, C) of S
        draws. The network's logits at one draw if ``None``."""
        watch = Stopwatch()
        collate, device = Collator.for_network(network), next(network.parameters()).device
        batches, order = batches_by_length(data, PREDICTION_BATCH)
        probs, labels = [], []
        for batch in batches:
            inputs = collate(batch).to(device)
            labels.append(inputs.pop("labels").cpu())
            drawn = self.outputs(network, inputs).softmax(-1, torch.float64)[None] if run is None else run(inputs)
            probs.append(drawn.double().cpu())
        draws = torch.cat(probs, 1).numpy()[:, order]
        information = mutual_information(draws) if len(draws) > 1 else None
        return Predicted(draws.mean(0), torch.cat(labels).numpy()[order], information, **watch.read())


def curve(history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The evaluations in a Trainer's log."""
    points = {
        entry["step"]: {"step": entry["step"], "loss": entry["eval_loss"], "accuracy": entry["eval_accuracy"]}
        for entry in history
        if "eval_loss" in entry and "eval_accuracy" in entry
    }
    return [*points.values()]


def training_budget(study: Study) -> TrainingBudget:
    """What all cells of a study have in common."""
    given = {name: value for name, value in study.training.items() if value is not None}
    return TrainingBudget(**{"epochs": 5, **given})


def check_budget(study: Study) -> None:
    """Raise ``InputError`` for a name or value in ``training`` or ``trainer`` that Trainer does not take, or that is
    said elsewhere."""
    shared = {field: f"training has {name}" for name, field in TRAINER_NAMES.items()} | DECIDED
    for name in study.trainer:
        if name in shared:
            raise InputError(f"study: trainer cannot have {name!r}: {shared[name]}")
    settings = trainer_settings(training_budget(study), 1, Path(), progress=False)
    try:
        TrainingArguments(**{**settings, **study.trainer})
    except (TypeError, ValueError) as error:
        raise InputError(
            f"study: transformers.TrainingArguments refuses an entry of training or trainer: {error}"
        ) from error


def check_comparable(task: Task) -> None:
    """Refuse a task whose examples have no probabilities of one label each.

    Raises:
        InputError: saying which it is.
    """
    if not task.scores_probabilities:
        raise InputError(f"a comparison scores class probabilities; task {task.name!r} is of kind {task.kind}")


def prepare_task(task: Task, study: Study) -> tuple[Task, str]:
    """The task and the split to score: ``study.test_split``, or validation where that is unlabelled.

    With ``study.hold_out``, that many training examples take validation's place: where it is scored, and then is the
    test split, or where there is none.

    Raises:
        InputError: for a regression, a task without a labelled split to score, or too few examples to hold out.
    """
    check_comparable(task)
    scored = next((split for split in (study.test_split, "validation") if _is_labelled(task, split)), None)
    if scored is None:
        raise InputError(f"task {task.name!r} has no labelled {study.test_split!r} or 'validation' split to score on")
    if not study.hold_out or (scored != "validation" and _is_labelled(task, "validation")):
        return task, scored
    train = task.split("train", labelled=True)
    if study.hold_out >= len(train):
        raise InputError(f"hold_out is {study.hold_out}, but task {task.name!r} has {len(train)} training examples")
    order = np.random.default_rng(0).permutation(len(train))
    held, rest = np.sort(order[: study.hold_out]), np.sort(order[study.hold_out :])
    splits = {"train": train.select(rest), "validation": train.select(held), "test": task.data[scored]}
    return replace(task, data=type(task.data)({**task.data, **splits})), "test"


def _is_labelled(task: Task, split: str) -> bool:
    return split in task.splits and task.is_labelled(split)


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((np.asarray(prediction.predictions).argmax(-1) == prediction.label_ids).mean())}
