"""Training of networks that are not ours, as ``fit`` trains a posterior, and checkpoints kept along the way."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput

from bayeslora.adapters.parameters import trained_parameters
from bayeslora.data.sampling import OrderedTrainer
from bayeslora.errors import TrainingDivergedError
from bayeslora.models.likelihoods import network_outputs

Drawing = Callable[[Mapping[str, Tensor]], AbstractContextManager[Any]]  # around the passes of a training batch


class PlainTrainer(OrderedTrainer):
    """``Trainer`` for networks that are not ours, with batches weighed and parameters decayed as ``fit`` does it."""

    optimizer: Any

    def __init__(
        self,
        *args: Any,
        make_optimizer: Any,
        penalty: Any,
        drawing: Drawing | None = None,
        likelihood: Any = None,
        **kwargs: Any,
    ):
        self.make_optimizer, self.penalty, self.likelihood = make_optimizer, penalty, likelihood
        self.drawing = drawing
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # each loss below is its batch's share of the step's

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if self.make_optimizer is not None:
                self.optimizer = self.make_optimizer(cls, options)
            else:
                decayed, plain = trained_parameters(self.model)
                groups = [
                    {"params": decayed, "weight_decay": self.args.weight_decay},
                    {"params": plain, "weight_decay": 0.0},
                ]
                self.optimizer = cls([group for group in groups if group["params"]], **options)
        return self.optimizer

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> int | None:
        return sum(len(batch["labels"]) for batch in batch_samples) or None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self.drawing is None:
            return super().training_step(model, inputs, *args, **kwargs)
        inputs = self._prepare_inputs(inputs)
        with self.drawing(inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.likelihood is None:
            outputs = model(**inputs)
        else:
            given = {name: value for name, value in inputs.items() if name != "labels"}
            logits = network_outputs(self.likelihood, model, given)
            loss = nn.functional.cross_entropy(logits, inputs["labels"])
            outputs = SequenceClassifierOutput(loss=loss, logits=logits)
        if not model.training:  # AdaLoRA's own loss has its penalty in evaluation too
            loss = nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        else:
            loss = outputs.loss + (self.penalty(model) if self.penalty else 0.0)
            loss = loss * (len(inputs["labels"]) / (num_items_in_batch or len(inputs["labels"])))
        if not torch.isfinite(loss):
            raise TrainingDivergedError(
                f"the loss became {float(loss)} at step {self.state.global_step + 1}, so training stopped"
            )
        return (loss, outputs) if return_outputs else loss


class CheckpointCallback(TrainerCallback):
    """Copies the trained parameters at ``count`` steps spread evenly over the second half of training, the last
    step among them."""

    def __init__(self, network: nn.Module, total_steps: int, count: int):
        self.network = network
        self.steps = {math.ceil(total_steps * (0.5 + 0.5 * (i + 1) / count)) for i in range(count)}
        self.kept: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.kept.append(
                {name: p.detach().clone() for name, p in self.network.named_parameters() if p.requires_grad}
            )
