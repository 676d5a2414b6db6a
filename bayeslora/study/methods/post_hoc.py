"""What can be made of a finished training without another one: dropout and ensembles."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bayeslora.errors import InputError
from bayeslora.study.methods.base import AcrossSeeds, PostHocMethod, register
from bayeslora.study.methods.draws import over_members
from bayeslora.study.outcome import Predict, Predictor, Trained

if TYPE_CHECKING:
    from bayeslora.study.experiment import Experiment


@register
@dataclass(frozen=True)
class MCDropout(PostHocMethod):
    """The mean over passes with every dropout layer at work that was at work in training (Gal and Ghahramani 2016):
    those of the network, of its head, and LoRA's own where ``lora_dropout`` is positive, each at its trained rate."""

    num_samples: int | None = None

    name: ClassVar[str] = "mc_dropout"
    title: ClassVar[str] = "MC dropout"

    def predictors(self, trained: Trained, experiment: "Experiment", predict: Predict) -> Iterator[Predictor]:
        network = trained.network
        if not any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules()):
            raise InputError(
                f"{type(network).__name__} has no dropout at a positive rate, so MC dropout would repeat "
                "one prediction: set lora_dropout in the study's lora options"
            )
        count = self.num_samples or experiment.study.num_samples

        def run(inputs: Mapping[str, Tensor]) -> Tensor:
            return torch.stack([experiment.outputs(network, inputs).double().softmax(-1) for _ in range(count)])

        def predictor(split: str) -> Any:
            with torch.random.fork_rng():
                torch.manual_seed(experiment.cell.seed)
                network.train()
                try:
                    return experiment.predict(network, experiment.data(split), run)
                finally:
                    network.eval()

        yield Predictor(experiment.on_top(self.label), cache(predictor))


@register
@dataclass(frozen=True)
class CheckpointEnsemble(PostHocMethod):
    """The mean over ``count`` checkpoints, spread evenly over the second half of one training."""

    count: int = 5

    name: ClassVar[str] = "checkpoint_ensemble"
    title: ClassVar[str] = "checkpoint ensemble"

    def checkpoints(self) -> int:
        return self.count

    def predictors(self, trained: Trained, experiment: "Experiment", predict: Predict) -> Iterator[Predictor]:
        members = list(trained.checkpoints)
        if not members:
            raise InputError(f"{self.label!r}: training kept no checkpoint")
        yield Predictor(experiment.on_top(self.label), cache(over_members(trained.network, members, experiment)))


@register
@dataclass(frozen=True)
class DeepEnsemble(AcrossSeeds):
    """The mean over the trainings of all seeds (Lakshminarayanan et al. 2017); costs as many trainings."""

    name: ClassVar[str] = "deep_ensemble"
    title: ClassVar[str] = "deep ensemble"

    def combine(self, probs: np.ndarray) -> np.ndarray:
        return probs.mean(0)
