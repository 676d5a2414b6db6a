"""What every MonteCLoRA guide shares: given v and α, the three sites of the posterior."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from bayeslora.adapters import AdapterGroup
from bayeslora.distributions import (
    CollapsedMixture,
    MixtureWeights,
    WishartCholesky,
    active_weights,
    expected_column_kl,
)
from bayeslora.models import MonteCLoRA


class Guide(PyroModule):
    r"""q(π, Σ, A) = Dir(π; α) · W(Σ; diag(v), ν) · ∏_i N(A_i; μ_i, ε²·Σ_k π_k²·Σ) for every adapter.

    A subclass says where v and α come from, in :meth:`variational_parameters`; it is called like the model and
    ignores its arguments.

    Args:
        model: The model whose sites it approximates.
    """

    #: A column's deviation from μ is as likely as its mirror image, whatever the other columns are; per-example noise
    #: rests on it. A subclass with correlated or skewed columns sets it to False.
    symmetric_columns = True

    def __init__(self, model: MonteCLoRA):
        super().__init__("guide")
        self._model = (model,)  # in a tuple: the model's parameters are its own
        self.config = model.config

    @property
    def model(self) -> MonteCLoRA:
        return self._model[0]

    def variational_parameters(self, group: AdapterGroup) -> tuple[Tensor, Tensor]:
        """log v of shape ``(adapters, r)`` and log α of shape ``(adapters, N)``."""
        raise NotImplementedError(f"{type(self).__name__} must define variational_parameters(group)")

    def forward(self, *args, **kwargs) -> dict[str, Tensor]:
        """Sample every site once; returns site name to value."""
        return self.run(pyro)

    def run(self, program: Any) -> dict[str, Tensor]:
        """The guide's program, under Pyro's primitives or a :class:`~bayeslora.recorder.Recorder`'s."""
        draw: dict[str, Tensor] = {}
        with self.model.full_precision():
            for group in self.model.groups:
                draw |= self._sample_group(group, program)
        return draw

    def _sample_group(self, group: AdapterGroup, program: Any) -> dict[str, Tensor]:
        config, name = self.config, group.name
        log_v, log_alpha = self.variational_parameters(group)
        wishart = WishartCholesky(self.model.degrees_of_freedom(group), log_v.exp().unsqueeze(-2))
        column_kl = {"expected_kl": expected_column_kl(wishart)}  # (adapters, 1), exact over Σ
        columns = program.plate(f"columns_{name}", group.columns, dim=-1)
        with program.plate(f"adapters_{name}", len(group), dim=-2):
            pi = program.sample(f"pi_{name}", MixtureWeights(log_alpha.exp().unsqueeze(-2)))
            factor = program.sample(f"sigma_tril_{name}", wishart)
            if config.components == "explicit":
                normal = dist.MultivariateNormal(factor.new_zeros(group.rank), scale_tril=factor)
                with program.plate(f"components_{name}", config.num_components, dim=-3), columns:
                    site, value = f"S_{name}", program.sample(f"S_{name}", normal, infer=column_kl)
            else:
                weights = active_weights(pi[..., 0, :], config.mixture)
                posterior = CollapsedMixture(
                    self.model.mean(group), factor[..., 0, :, :], weights, config.sample_scaler
                )
                with columns:
                    site, value = f"A_{name}", program.sample(f"A_{name}", posterior, infer=column_kl)
        return {f"pi_{name}": pi, f"sigma_tril_{name}": factor, site: value}


def initial_scale(model: MonteCLoRA, group: AdapterGroup) -> float:
    r"""Where v starts: the configured value, or the minimum of :math:`KL_W + m\,E[KL_N]`.

    Its derivative in :math:`v_j` is :math:`\tfrac12(\nu(1 - 1/v_j) + m(\nu - 1/v_j))`, so
    :math:`v_j = (\nu + m) / (\nu + m\nu)`, with m the columns' KL as often as the objective counts it: N times
    under ``normalization="paper"``, once a column under ``"elbo"``.
    """
    config = model.config
    if config.scale_init is not None:
        return config.scale_init
    df = model.degrees_of_freedom(group)
    times = config.num_components if config.normalization == "paper" else group.columns
    if config.normalization == "elbo" and config.components == "explicit":
        times *= config.num_components
    return (df + times) / (df + times * df)


def initial_log_alpha(how: str, *shape: int) -> Tensor:
    """Starting log α: zeros for ``"ones"``, uniform on [0, 1) for ``"random"`` (paper, ablation of α)."""
    return torch.zeros(shape) if how == "ones" else torch.rand(shape)
