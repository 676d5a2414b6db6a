"""The options of a training, each in one place.

:func:`bayeslora.fit` has them as arguments, ``bayeslora fit`` and ``compare`` as flags, a study in its grid and its
``training:``, and ``run.json`` by the names of ``TrainingArguments``.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from bayeslora.errors import InputError
from bayeslora.options import COUNT, FROM_ZERO, NOT_NEGATIVE, POSITIVE, SEED, Range, option, ranges

LEAST_STEPS = 120  # of a training that says neither epochs nor steps; docs/faq.md has the measurement
FEWEST_EPOCHS = 3


@dataclass(frozen=True)
class TrainingBudget:
    """What a training may take, and how it goes about it: equal for whatever is compared."""

    epochs: float | None = option(
        None,
        f"passes over the data; default {FEWEST_EPOCHS}, or for little data as many as make {LEAST_STEPS} steps",
        Range(float, 0, 1e6, above=True),
        trainer="num_train_epochs",
    )
    max_steps: int | None = option(None, "optimizer steps, instead of epochs", COUNT, trainer="max_steps")
    batch_size: int = option(16, "examples per device and forward pass", COUNT, trainer="per_device_train_batch_size")
    learning_rate: float = option(1e-3, "for μ, B and the head", POSITIVE, trainer="learning_rate")
    variational_learning_rate: float | None = option(
        None, "for the posterior; default 10 × the other", NOT_NEGATIVE, trainer=None
    )
    gradient_accumulation: int = option(1, "batches to a step", COUNT, trainer="gradient_accumulation_steps")
    warmup: float = option(
        0.06, "share of the steps over which rates rise", Range(float, 0, 1, below=True), trainer="warmup_steps"
    )
    schedule: str = option("linear", "any transformers schedule: linear, cosine, ...", trainer="lr_scheduler_type")
    weight_decay: float = option(0.0, "decoupled, on the network's matrices", NOT_NEGATIVE, trainer="weight_decay")
    max_grad_norm: float = option(1.0, "clip gradients; 0 does not", NOT_NEGATIVE, trainer="max_grad_norm")
    seed: int = option(0, "decides initialisation, data order and noise", SEED, trainer="seed")

    def settled(self, num_examples: int, processes: int = 1, few_passes: bool = False) -> Self:
        """With a number of epochs, where none was given; ``few_passes``: whatever the number of examples.

        Example:
            >>> [TrainingBudget(batch_size=16).settled(size).epochs for size in (300, 1000)]
            [7, 3]
        """
        if self.epochs is not None:
            return self
        if self.max_steps or few_passes:
            return dataclasses.replace(self, epochs=FEWEST_EPOCHS)
        enough = -(-LEAST_STEPS // self.steps_per_epoch(num_examples, processes))
        return dataclasses.replace(self, epochs=max(enough, FEWEST_EPOCHS))

    def total_steps(self, num_examples: int, processes: int = 1) -> int:
        """Steps of the optimizer."""
        epochs = self.settled(num_examples, processes).epochs or 0
        return self.max_steps or max(round(self.steps_per_epoch(num_examples, processes) * epochs), 1)

    def steps_per_epoch(self, num_examples: int, processes: int = 1) -> int:
        return max(-(-num_examples // (self.batch_size * self.gradient_accumulation * processes)), 1)


@dataclass(frozen=True)
class FitOptions(TrainingBudget):
    """A budget, and what is made of evaluations along the way."""

    evaluations: int | None = option(None, "how often to evaluate and save; default once an epoch", COUNT)
    early_stopping: int | None = option(None, "stop after so many evaluations without gain", COUNT)
    eval_samples: int = option(4, "draws that an evaluation scores beside the mean; 0 for none", FROM_ZERO)
    best_metric: str | None = option(
        None,
        "decides the best checkpoint: predictive_nll (default, with draws), loss (the mean's), accuracy, ...",
        trainer="metric_for_best_model",
    )

    def check(self, eval_dataset: Any) -> None:
        """Raise ``InputError`` for a count below 1, and for evaluations of nothing."""
        if eval_dataset is None and (self.early_stopping is not None or self.evaluations is not None):
            raise InputError("early_stopping and evaluations need an eval_dataset to look at")
        for name, takes in ranges(type(self)).items():
            value = getattr(self, name)
            if takes == COUNT and value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        FROM_ZERO.check("eval_samples", self.eval_samples)


# Option to the field of TrainingArguments that it is.
TRAINER_NAMES = {f.name: f.metadata["trainer"] for f in dataclasses.fields(FitOptions) if f.metadata["trainer"]}

# What run.json says of a training's options; a run may go on with another early_stopping.
RECORDED = (
    *TRAINER_NAMES.values(),
    "eval_steps",
    "eval_samples",
    "variational_learning_rate",
    "train_sampling_strategy",
)
