"""``transformers.Trainer`` for a posterior."""

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
)

from bayeslora.adapters.parameters import POSTERIOR_RATE, trained_parameters
from bayeslora.data.batches import Collator
from bayeslora.data.checks import check_to_learn_from
from bayeslora.data.sampling import OrderedTrainer
from bayeslora.distributed import check_parallelism
from bayeslora.elbo import ELBOParts
from bayeslora.errors import InputError, TrainingDivergedError
from bayeslora.noise_schedules import NoiseScheduleCallback
from bayeslora.posterior import Posterior
from bayeslora.storage.checkpoint import load_adapter, write_adapter
from bayeslora.storage.run_folder import (
    CHECKPOINT_FOLDER,
    best_checkpoint,
    delete,
    last_checkpoint,
    rotate,
    seal,
)
from bayeslora.training.arguments import REFUSED_BY_TRAINER, check_fit_arguments
from bayeslora.training.engines import OnShards, take_sharding
from bayeslora.training.monitor import posterior_logs
from bayeslora.training.predictive import predictive_metrics, predictive_names

logger = logging.getLogger(__name__)


class DropTuning(TrainerCallback):
    """A width that was tuned for the adapter as it is ends where its training goes on."""

    def __init__(self, bayes: Posterior):
        self.bayes = bayes

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.bayes.model.tuning is not None:
            logger.warning(
                "%s: that is for the adapter as it was, so training goes on without; tune it again afterwards",
                self.bayes.model.tuning,
            )
            self.bayes.model.tuning = None


class BayesTrainer(OnShards, OrderedTrainer):
    """``transformers.Trainer`` for a :class:`bayeslora.BayesLoRA`: what :func:`bayeslora.fit` trains with.

    It has a learning rate for the posterior, stops at NaN, logs the parts of the objective, and writes checkpoints that
    are whole or do not count. ``fit`` adds a run folder, the choice of the best checkpoint, exact resuming, and batches
    of like length, which are ``train_sampling_strategy="group_by_length"`` here.

    Args:
        model: What to fit. Its ``num_examples`` is set to the length of ``train_dataset``.
        args: Any fields but those that :mod:`bayeslora.training.arguments` refuses. Of the checkpoints
            ``save_total_limit`` are kept; the best and the last always stay.
        data_collator: Puts examples into batches; :class:`bayeslora.data.batches.Collator` if ``None``, and the data
            are then checked as in ``fit``.
        train_dataset: Encoded examples with ``labels`` (or ``label``), as for ``fit``.
        eval_dataset: The same, or a mapping of several, for evaluation at the posterior mean.
        variational_learning_rate: For the guide; 10 × ``args.learning_rate`` if ``None``.
        callbacks: Further ones; that of the noise schedule is always there.
        options: Further arguments of ``transformers.Trainer``.

    Raises:
        InputError: For another model, arguments that cannot mean here what they mean in transformers, or bad data.
        TrainingDivergedError: When the loss or a gradient is NaN or infinite.

    Example:
        >>> from transformers import TrainingArguments
        >>> asked = {"save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
        >>> args = TrainingArguments("out", max_steps=2, **asked)
        >>> trainer = BayesTrainer(BayesLoRA(network), args, train_dataset=dataset)
        >>> trainer.train().global_step
        {'train_runtime': ...}
        2
    """

    optimizer: Any

    def __init__(
        self,
        model: Posterior,
        args: TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        variational_learning_rate: float | None = None,
        callbacks: Sequence[Any] | None = None,
        **options: Any,
    ):
        if not isinstance(model, Posterior):
            raise InputError(
                f"BayesTrainer fits a BayesLoRA, and model is a {type(model).__name__}: pass model=BayesLoRA(network)"
            )
        args = TrainingArguments() if args is None else copy.copy(args)
        check_fit_arguments(args, model.network.get_base_model(), REFUSED_BY_TRAINER)
        sharding = take_sharding(args)
        check_parallelism(args)
        self.keep_checkpoints, args.save_total_limit = args.save_total_limit, None  # old ones go once the new is sealed
        if data_collator is None:
            data_collator = _collator(model, train_dataset, eval_dataset, args.per_device_train_batch_size)
        if isinstance(train_dataset, Sized):
            model.num_examples = len(train_dataset)
        self.variational_learning_rate = variational_rate(args, variational_learning_rate)
        self.eval_samples = 0  # draws that an evaluation scores beside the mean
        self._ended = False
        self._step_loss: Tensor | float = 0.0
        self._parts: ELBOParts | None = None
        self._parts_steps = 0
        self._norms: dict[str, Tensor] = {}
        if sharding is not None:
            sharding.apply(model, args.device)
        callbacks = [NoiseScheduleCallback(model.noise_schedule), DropTuning(model), *(callbacks or ())]
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, callbacks=callbacks, **options)
        self.model_accepts_loss_kwargs = True  # whatever the likelihood: what it averages over is counted here
        self.label_names = ["labels"]

    @property
    def bayes(self) -> Posterior:
        return self.accelerator.unwrap_model(self.model)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor | None:
        """What all batches of a step count together: the step is then that of one batch, however it was split."""
        if not batch_samples:
            return None
        total = torch.stack([self.bayes.model.count(batch["labels"]) for batch in batch_samples]).sum().to(device)
        return self.accelerator.reduce(total) if self.args.average_tokens_across_devices else total

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            rates = self.args.learning_rate, self.variational_learning_rate
            groups = self.bayes.parameter_groups(*rates, weight_decay=self.args.weight_decay)
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.bayes)
            self.optimizer = cls(groups, **options)
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
        matrices, vectors = trained_parameters(self.bayes.network)
        posterior = [*self.bayes.guide.parameters(), *self.bayes.model.parameters()]
        return {"network": [*matrices, *vectors], "posterior": [p for p in posterior if p.requires_grad]}

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # averages over steps begin anew at each checkpoint, so that a resumed run logs what an uninterrupted one does
        self.control.should_log |= self.control.should_save or self.control.should_evaluate
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        loss, logits, labels = super().prediction_step(model, inputs, False, *args, **kwargs)
        losses = self.bayes.negative_log_likelihood(logits, labels).detach()
        if not torch.isfinite(self.accelerator.reduce(losses.float().sum())):  # all ranks stop together
            raise self._diverged("the evaluation gave NaN or infinite outputs", self.state.global_step)
        self._losses.append(self.gather_function(losses))
        weights = self.bayes.model.example_weights(logits, labels)
        self._example_weights.append(self.gather_function(weights.to(losses)))
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """With the mean loss of all examples; Trainer's own counts those twice that fill up the last batches."""
        self._losses: list[Tensor] = []
        self._example_weights: list[Tensor] = []
        output = super().evaluation_loop(*args, **kwargs)
        losses, weights = torch.cat(self._losses), torch.cat(self._example_weights)
        output.metrics["eval_loss"] = float((losses * weights).sum() / weights.sum())
        if predictive_names(self.bayes, self.eval_samples):
            size = self.args.per_device_eval_batch_size
            found = predictive_metrics(self.bayes, self.eval_dataset, self.eval_samples, size)
            output.metrics.update({f"eval_{name}": value for name, value in found.items()})
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
        folder = Path(self.args.output_dir)
        return folder.parent if folder.name == CHECKPOINT_FOLDER else folder

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


def variational_rate(args: TrainingArguments, given: float | None) -> float:
    """The learning rate of the guide: ten times the network's, unless it is given."""
    return POSTERIOR_RATE * args.learning_rate if given is None else given


def _collator(bayes: Posterior, train: Any, evaluation: Any, batch_size: int) -> Collator:
    """For data sets that are checked first."""
    several = evaluation if isinstance(evaluation, Mapping) else {"eval_dataset": evaluation}
    data = {"train_dataset": train, **several}
    given = {name: part for name, part in data.items() if part is not None}
    if not given:
        return Collator.for_network(bayes.network, bayes.model.labelling)
    return check_to_learn_from(bayes.model, given, batch_size)
