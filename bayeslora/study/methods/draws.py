"""Predictions of methods that draw: over draws of some parameters' values, and beside them at the mean."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bayeslora.study.methods.recalibration import tempered
from bayeslora.study.outcome import Predict, Predicted, Predictor

if TYPE_CHECKING:
    from bayeslora.study.experiment import Experiment

Values = Mapping[str, Tensor]  # of parameters, by their names


@dataclass(frozen=True)
class DrawingOptions:
    """``num_samples``: draws of a prediction, the study's if ``None``."""

    num_samples: int | None = None

    def draws(self, experiment: "Experiment") -> int:
        """How many draws a prediction averages."""
        return self.num_samples or experiment.study.num_samples


def mean_and_draws(
    label: str, mean: Predict, draws: Mapping[str, Predict], experiment: "Experiment"
) -> Iterator[Predictor]:
    """Predictors at the mean and over draws, ``draws`` by what the tables add to ``label``; each with a temperature
    too where there is a validation split."""
    mean = cache(mean)
    over = {name: cache(predict) for name, predict in draws.items()}
    yield Predictor(f"{label}, mean", mean)
    for name, predict in over.items():
        yield Predictor(f"{label}, {name}", predict, draws=True)
    if experiment.has_validation:
        yield tempered(f"{label}, mean + temperature*", mean)
        for name, predict in over.items():
            yield tempered(f"{label}, {name} + temperature*", predict, draws=True)


def over_members(network: nn.Module, members: Sequence[Values], experiment: "Experiment") -> Predict:
    """The mean prediction with each member's values in turn; the network's own are put back."""

    def run(inputs: Values) -> Tensor:
        probs = []
        for member in members:
            with using_values(network, member):
                probs.append(experiment.outputs(network, inputs).double().softmax(-1))
        return torch.stack(probs)

    return lambda split: experiment.predict(network, experiment.data(split), run)


def predict_with(network: nn.Module, values: Values, experiment: "Experiment") -> Predict:
    """The network's prediction with these values; its own are put back."""

    def predict(split: str) -> Predicted:
        with using_values(network, values):
            return experiment.predict(network, experiment.data(split))

    return predict


@contextmanager
def using_values(network: nn.Module, values: Values) -> Iterator[None]:
    """Inside, the network's parameters have these values."""
    parameters = dict(network.named_parameters())
    own = {name: parameters[name].detach().clone() for name in values}
    try:
        _copy(parameters, values)
        yield
    finally:
        _copy(parameters, own)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch draws from this seed; outside it goes on as if nothing had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _copy(parameters: Mapping[str, nn.Parameter], values: Values) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
