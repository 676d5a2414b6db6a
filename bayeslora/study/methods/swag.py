"""A Gaussian from the iterates of a training's last part: SWAG and its diagonal."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from bayeslora.errors import InputError
from bayeslora.study.methods.base import register
from bayeslora.study.methods.draws import (
    DrawingOptions,
    mean_and_draws,
    over_members,
    predict_with,
    seeded,
    using_values,
)
from bayeslora.study.methods.peft import LoRA
from bayeslora.study.outcome import Predictor, Trained

if TYPE_CHECKING:
    from bayeslora.study.experiment import Experiment


@register
@dataclass(frozen=True)
class SWAG(DrawingOptions, LoRA):
    """Stochastic weight averaging, Gaussian (Maddox et al. 2019, NeurIPS), on what LoRA trains (Onal et al. 2024).

    From the share ``swag_start`` of the steps on, the rate is constant, ``swag_learning_rate_scale`` times the grid's,
    and ``swag_models`` iterates are collected, evenly to the last step. The posterior is
    N(θ̄, ½ (Σ_diag + D̂ D̂ᵀ / (K − 1))) times ``swag_sample_scale`` (their equation 1 and algorithm 1): θ̄ the mean of
    the iterates, Σ_diag their variances, and the columns of D̂ the last K = ``swag_max_num_models`` deviations, each
    from the mean up to it. The diagonal one is N(θ̄, Σ_diag) times the scale; both, and the mean (SWA), come from one
    training. The defaults are those of Onal et al.: 8 of 13 epochs, then one iterate an epoch, at 1e-4 where training
    took 6e-4. At a scale of 1 their program draws twice this covariance: it leaves the ½ of the equation out.

    ``modules_to_swag``: ``"grad_only"`` is all that is trained, ``"lora_only"`` leaves the head at its last values.
    """

    swag_start: float = 8 / 13
    swag_learning_rate_scale: float = 1 / 6
    swag_models: int = 5
    swag_max_num_models: int = 5
    swag_sample_scale: float = 1.0
    modules_to_swag: str = "grad_only"

    name: ClassVar[str] = "swag"
    title: ClassVar[str] = "SWAG"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.swag_start < 1:
            raise InputError(f"method 'swag': swag_start is a share of the steps, below 1, got {self.swag_start}")
        if min(self.swag_models, self.swag_max_num_models) < 2:
            raise InputError("method 'swag': swag_models and swag_max_num_models must be 2 or more to have a variance")
        if self.modules_to_swag not in ("grad_only", "lora_only"):
            raise InputError(
                f"method 'swag': modules_to_swag takes 'grad_only' or 'lora_only', got {self.modules_to_swag!r}"
            )

    def train(self, experiment: "Experiment") -> Trained:
        network, total = self.adapted(experiment), experiment.total_steps
        start = math.floor(self.swag_start * total)
        if total - start < self.swag_models:
            raise InputError(
                f"{self.label!r} collects {self.swag_models} iterates in the last {total - start} of {total} steps: "
                "lower swag_models or swag_start, or train longer"
            )
        steps = {start + math.ceil((i + 1) * (total - start) / self.swag_models) for i in range(self.swag_models)}
        iterates = Iterates(self.collected(network), self.swag_max_num_models)
        rate = experiment.cell.learning_rate * self.learning_rate_scale * self.swag_learning_rate_scale
        collect = Collect(iterates, start, steps, rate)
        trained = experiment.train(network, learning_rate_scale=self.learning_rate_scale, callbacks=[collect])
        return replace(trained, posterior=iterates)

    def collected(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of the posterior, by name."""
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        return {name: p for name, p in trained.items() if self.modules_to_swag == "grad_only" or ".lora_" in name}

    def predictors(self, trained: Trained, experiment: "Experiment") -> Iterator[Predictor]:
        network, iterates, count = trained.network, trained.posterior, self.draws(experiment)
        with seeded(experiment.cell.seed):
            kinds = {
                f"{count} {kind}draws": [iterates.draw(self.swag_sample_scale, low_rank) for _ in range(count)]
                for kind, low_rank in (("", True), ("diagonal ", False))
            }
        over = {name: over_members(network, members, experiment) for name, members in kinds.items()}
        return mean_and_draws(self.label, predict_with(network, iterates.mean(), experiment), over, experiment)

    def save(self, trained: Trained, experiment: "Experiment") -> None:
        """The mean as PEFT's adapter."""
        with using_values(trained.network, trained.posterior.mean()):
            super().save(trained, experiment)


class Iterates:
    """Mean, variance and last deviations of the values that parameters had.

    Example:
        >>> point = torch.nn.Parameter(torch.zeros(1))
        >>> iterates = Iterates({"x": point}, rank=2)
        >>> for value in (1.0, 3.0):
        ...     iterates.collect({"x": torch.tensor([value])})
        >>> float(iterates.mean()["x"]), float(iterates.variance()), iterates.deviations[1].tolist()
        (2.0, 1.0, [1.0])
    """

    def __init__(self, parameters: dict[str, nn.Parameter], rank: int):
        self.parameters, self.rank = parameters, rank
        self.count = 0
        self.first = self.second = torch.zeros(sum(p.numel() for p in parameters.values()), dtype=torch.float64)
        self.deviations: list[Tensor] = []

    def collect(self, values: dict[str, Tensor] | None = None) -> None:
        """One more iterate: what the parameters are now, or these values."""
        now: dict[str, Any] = values or self.parameters
        point = torch.cat([value.detach().double().cpu().flatten() for value in now.values()])
        self.count += 1
        self.first = self.first + (point - self.first) / self.count
        self.second = self.second + (point.square() - self.second) / self.count
        self.deviations = [*self.deviations, point - self.first][-self.rank :]

    def mean(self) -> dict[str, Tensor]:
        return self._by_name(self.first)

    def variance(self) -> Tensor:
        return (self.second - self.first.square()).clamp(min=0)

    def draw(self, scale: float = 1.0, low_rank: bool = True) -> dict[str, Tensor]:
        """One draw of the posterior."""
        noise = self.variance().sqrt() * torch.randn_like(self.first)
        if low_rank:
            columns = torch.stack(self.deviations)
            noise = noise + torch.randn(len(columns), dtype=torch.float64) @ columns / math.sqrt(len(columns) - 1)
            noise = noise / math.sqrt(2)
        return self._by_name(self.first + math.sqrt(scale) * noise)

    def _by_name(self, vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([p.numel() for p in self.parameters.values()])
        named = zip(self.parameters.items(), parts, strict=True)
        return {name: part.view_as(p).to(p.device, p.dtype) for (name, p), part in named}


class Collect(TrainerCallback):
    """From a step on, a constant rate; after some of the steps, another iterate."""

    def __init__(self, iterates: Iterates, start: int, steps: set[int], rate: float):
        self.iterates, self.start, self.steps, self.rate = iterates, start, steps, rate

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.start:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] = self.rate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.iterates.collect()
