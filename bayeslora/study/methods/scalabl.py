"""ScalaBL: a distribution over r numbers of each adapter."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from bayeslora.adapters.groups import AdapterGroup
from bayeslora.study.methods.base import register
from bayeslora.study.methods.blob import VariationalFamily, VariationalLoRA
from bayeslora.study.outcome import Trained

if TYPE_CHECKING:
    from bayeslora.study.experiment import Experiment


@register
@dataclass(frozen=True)
class ScalaBL(VariationalLoRA):
    """Stochastic variational subspace inference (Samplawski et al. 2025, UAI).

    ΔW = B · diag(s + σ·e) · V with e standard normal: q is N(s, σ²) on the r numbers s of an adapter, the prior
    N(0, 1). s and V start as singular values and right singular vectors of a LoRA-A matrix, σ uniform between
    ``bayes_eps``/√2 and ``bayes_eps``; both s and σ are trained as logarithms, V and B as points. The KL's cycle is
    BLoB's. The defaults are those of its authors, but for the KL: theirs is KL(p ‖ q) in the program they published,
    ours KL(q ‖ p), as the evidence lower bound has it.
    """

    bayes_kllr: float = 0.2

    name: ClassVar[str] = "scalabl"
    title: ClassVar[str] = "ScalaBL"

    def family(self, groups: tuple[AdapterGroup, ...]) -> VariationalFamily:
        return Spectral(groups, self.bayes_eps)

    def save(self, trained: Trained, experiment: "Experiment") -> None:
        network: PeftModel = trained.network
        for group in network.variational.groups:
            for adapter in group.adapters:
                remove_parametrizations(adapter.lora_A, "weight")
        super().save(trained, experiment)


class Spectral(VariationalFamily):
    """μ = diag(s) V of every adapter, and a standard deviation σ for every s; the prior is N(0, 1)."""

    def __init__(self, groups: tuple[AdapterGroup, ...], eps: float):
        super().__init__()
        self.groups = groups
        self.log_sigma = nn.ParameterDict()
        for group in groups:
            start = torch.empty(len(group), group.rank, device=group.device).uniform_(eps / math.sqrt(2), eps)
            self.log_sigma[group.name] = nn.Parameter(start.log())
            for adapter in group.adapters:
                register_parametrization(adapter.lora_A, "weight", Product())

    def noise(self) -> dict[str, Tensor]:
        noise = {}
        for group in self.groups:
            right = torch.stack([_factors(adapter)[1] for adapter in group.adapters])
            log_sigma = self.log_sigma[group.name]
            noise[group.name] = ((log_sigma.exp() * torch.randn_like(log_sigma))[..., None] * right).mT
        return noise

    def kl(self) -> Tensor:
        kl = torch.zeros(())
        for group in self.groups:
            singular = torch.stack([_factors(adapter)[0].exp() for adapter in group.adapters])
            q = Normal(singular, self.log_sigma[group.name].exp(), validate_args=False)
            kl = kl + kl_divergence(q, Normal(torch.zeros_like(singular), 1.0)).sum()
        return kl


class Product(nn.Module):
    """diag(s) V, from log s and V; what it takes the place of gives its singular values and right vectors."""

    def forward(self, log_s: Tensor, right: Tensor) -> Tensor:
        return log_s.exp()[:, None] * right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        _, singular, right = torch.linalg.svd(weight.detach(), full_matrices=False)
        return singular.log(), right.contiguous()


def _factors(adapter: Any) -> tuple[Tensor, Tensor]:
    """log s (r) and V (r, n_in) of an adapter."""
    parts = adapter.lora_A.parametrizations.weight
    return parts.original0, parts.original1
