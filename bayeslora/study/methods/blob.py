"""Variational LoRA trained by backpropagation: BLoB, and what other methods of its kind share with it."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from transformers import TrainerCallback

from bayeslora.adapters.arrival import Arrival
from bayeslora.adapters.drawing import rows_are_examples, using_draw, using_noise
from bayeslora.adapters.groups import AdapterGroup, find_groups
from bayeslora.adapters.inject import make_samplable
from bayeslora.distributions import random_signs
from bayeslora.study.methods.base import register
from bayeslora.study.methods.draws import DrawingOptions, mean_and_draws, seeded
from bayeslora.study.methods.peft import LoRA
from bayeslora.study.outcome import Predict, Predictor, Trained
from bayeslora.study.trainer import Drawing

if TYPE_CHECKING:
    from bayeslora.study.experiment import Experiment

POSTERIOR_FILE = "posterior.safetensors"  # beside the adapter of a study that keeps them


class VariationalFamily(nn.Module):
    """A distribution over the matrices A of a network: its parameters, its noise around the mean, its KL."""

    groups: tuple[AdapterGroup, ...]

    @abstractmethod
    def noise(self) -> dict[str, Tensor]:
        """One draw of A − μ by group, ``(adapters, columns, r)``."""

    @abstractmethod
    def kl(self) -> Tensor:
        """KL(q ‖ p) of all adapters together, in nats."""


@dataclass(frozen=True)
class VariationalLoRA(DrawingOptions, LoRA):
    """LoRA with a distribution over A, one draw in each training pass; BLoB and ScalaBL.

    The negative log-likelihood goes to the study's optimizer, which trains the means and the noise. The KL goes to
    gradient descent of its own, at the rate ``bayes_kllr`` times the study's schedule, after each of these steps. In
    step i = 1 … M of a cycle it weighs π_i = 2^i / (2^(M+1) − 1), next to nothing for most of the cycle and one half
    at its end. M = ⌊100 · n^(π/``bayes_gamma``) / batch⌋ for n training examples; with ``bayes_klreweighting`` off
    it is the number of steps of an epoch and each weighs 1/M. ``bayes_eps``: size of the noise at the start.

    Examples of a batch mirror one draw of the noise, each row of A by signs of its own; every example keeps its signs
    from token to token and layer to layer. A draw at test time is one set of matrices for all examples.
    """

    bayes_eps: float = 0.05
    bayes_gamma: float = 8.0
    bayes_kllr: float = 0.01
    bayes_klreweighting: bool = True

    @abstractmethod
    def family(self, groups: tuple[AdapterGroup, ...]) -> VariationalFamily:
        """q at its start."""

    def adapted(self, experiment: "Experiment") -> PeftModel:
        network = super().adapted(experiment)
        make_samplable(network)
        network.variational = self.family(find_groups(network))  # so that the optimizer finds its parameters
        return network

    def training(self, network: Any, experiment: "Experiment") -> dict[str, Any]:
        steps = KLSteps(network.variational, self.bayes_kllr, self.weights(experiment))
        return {"callbacks": [steps], "drawing": drawing(network, network.variational.groups, experiment)}

    def weights(self, experiment: "Experiment") -> list[float]:
        """π_i of the steps of one cycle."""
        budget, examples = experiment.budget(), len(experiment.train_data)
        if not self.bayes_klreweighting:
            steps = budget.steps_per_epoch(examples)
            return [1 / steps] * steps
        batch = budget.batch_size * budget.gradient_accumulation
        steps = max(int(100 * examples ** (math.pi / self.bayes_gamma) / batch), 1)
        return [2**i / (2 ** (steps + 1) - 1) for i in range(1, steps + 1)]

    def predictors(self, trained: Trained, experiment: "Experiment") -> Iterator[Predictor]:
        network, count = trained.network, self.draws(experiment)
        family: VariationalFamily = network.variational
        with seeded(experiment.cell.seed), torch.no_grad():
            drawn = [_draw(family) for _ in range(count)]

        def run(inputs: Mapping[str, Tensor]) -> Tensor:
            probs = []
            for matrices in drawn:
                with using_draw(family.groups, matrices):
                    probs.append(experiment.outputs(network, inputs).double().softmax(-1))
            return torch.stack(probs)

        mean: Predict = lambda split: experiment.predict(network, experiment.data(split))  # noqa: E731
        draws: Predict = lambda split: experiment.predict(network, experiment.data(split), run)  # noqa: E731
        return mean_and_draws(self.label, mean, {f"{count} draws": draws}, experiment)

    def save(self, trained: Trained, experiment: "Experiment") -> None:
        """The means as PEFT's adapter, and the rest of q beside it."""
        state = trained.network.variational.state_dict()
        super().save(trained, experiment)
        save_file(
            {name: value.contiguous() for name, value in state.items()}, experiment.folder / "adapter" / POSTERIOR_FILE
        )


@register
@dataclass(frozen=True)
class BLoB(VariationalLoRA):
    """Bayesian low-rank adaptation by backpropagation (Wang et al. 2024, NeurIPS).

    q(A) = N(M, G⁴), an own G for every entry (their equation 6), which starts uniform between ``bayes_eps``/√2 and
    ``bayes_eps``; the prior is N(0, ``bayes_beta``²) for every entry, so that it pulls the means too. B and the head
    are points. The defaults are those of its authors for Llama-2; for RoBERTa they took ``bayes_kllr`` 0.002.

    ``gaussian`` is the same family on the evidence lower bound: a prior around the means, the KL over the number of
    examples at every step, log-scales and one optimizer.
    """

    bayes_beta: float = 0.2

    name: ClassVar[str] = "blob"
    title: ClassVar[str] = "BLoB"

    def family(self, groups: tuple[AdapterGroup, ...]) -> VariationalFamily:
        return MeanField(groups, self.bayes_eps, self.bayes_beta)


class MeanField(VariationalFamily):
    """A standard deviation G² for every entry of A, and the prior N(0, ``prior_scale``²)."""

    def __init__(self, groups: tuple[AdapterGroup, ...], eps: float, prior_scale: float):
        super().__init__()
        self.groups, self.prior_scale = groups, prior_scale
        self.G = nn.ParameterDict()
        for group in groups:
            start = torch.empty(len(group), group.columns, group.rank, device=group.device)
            self.G[group.name] = nn.Parameter(start.uniform_(eps / math.sqrt(2), eps))

    def noise(self) -> dict[str, Tensor]:
        return {name: root.square() * torch.randn_like(root) for name, root in self.G.items()}

    def kl(self) -> Tensor:
        kl = torch.zeros(())
        for group in self.groups:
            q = Normal(group.mean(), self.G[group.name].square(), validate_args=False)
            kl = kl + kl_divergence(q, Normal(torch.zeros_like(q.loc), self.prior_scale)).sum()
        return kl


class KLSteps(TrainerCallback):
    """A step of gradient descent on the weighted KL after each step of the optimizer; the weights repeat."""

    def __init__(self, family: VariationalFamily, rate: float, weights: list[float]):
        self.family, self.rate, self.weights = family, rate, weights

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        group = kwargs["optimizer"].param_groups[0]
        schedule = group["lr"] / group["initial_lr"]
        step = self.rate * schedule * self.weights[state.global_step % len(self.weights)]
        means = [adapter.lora_A for group in self.family.groups for adapter in group.adapters]
        trained = [p for module in (*means, self.family) for p in module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(self.family.kl(), trained, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(step * gradient)


def drawing(network: nn.Module, groups: tuple[AdapterGroup, ...], experiment: "Experiment") -> Drawing:
    """Around the passes of each training batch: a draw of the noise, mirrored from example to example where examples
    lie along the first dimension of every adapted layer."""
    known: dict[str, bool] = {}
    arrival = Arrival()
    family: VariationalFamily = network.variational  # type: ignore[assignment]

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        return experiment.outputs(network, inputs)

    @contextmanager
    def draw(batch: Mapping[str, Tensor]) -> Iterator[None]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if "rows" not in known:
            known["rows"] = rows_are_examples(network, groups, inputs, run=run)
        shapes = [(group, (len(group), len(batch["labels"]), group.rank)) for group in groups]
        signs = {g.name: random_signs(*shape, device=g.device) for g, shape in shapes} if known["rows"] else None
        with using_noise(groups, family.noise(), signs):
            yield
            arrival.check(network, groups, lambda: run(inputs))

    return draw


def _draw(family: VariationalFamily) -> dict[str, Tensor]:
    """One draw of A by group."""
    noise = family.noise()
    return {group.name: group.mean() + noise[group.name] for group in family.groups}
