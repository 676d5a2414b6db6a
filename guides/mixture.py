"""The paper's family: given v and α, the three sites of the posterior."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from bayeslora.adapters.groups import AdapterGroup
from bayeslora.distributions import (
    CollapsedMixture,
    MixtureWeights,
    active_weights,
    expected_column_kl,
    expected_cooperation,
)
from bayeslora.guides.base import Guide
from bayeslora.models.mixture_weights import expected_active_squares
from bayeslora.models.prior import Prior


class MixtureGuide(Guide):
    r"""q(π, Σ, A) = Dir(π; α) · W(Σ; diag(v), ν) · ∏_i N(A_i; μ_i, ε²·Σ_k π_k²·Σ) for every adapter.

    A subclass says where v and α come from, in :meth:`variational_parameters`. With ``wishart_scale="full"`` the scale
    is F diag(v) Fᵀ, with the model's F: all of it is then the same in the coordinates F⁻¹A.

    Args:
        model: The model whose sites it approximates.

    Example:
        >>> isinstance(bayes.guide, MixtureGuide)
        True
        >>> bayes.guide.expected_squares(bayes.model.groups[0])[:2]  # 2/(N + 1) for N = 4 and α = 1
        tensor([0.4000, 0.4000], grad_fn=<SliceBackward0>)
    """

    symmetric_rows = True  # turns Σ into DΣD with a diagonal D of ±1, which is as likely for a diagonal V
    follows_noise_schedule = True

    def variational_parameters(self, group: AdapterGroup) -> tuple[Tensor, Tensor]:
        """log v of shape ``(adapters, r)`` and log α of shape ``(adapters, N)``."""
        raise NotImplementedError(f"{type(self).__name__} must define variational_parameters(group)")

    def sample_group(self, group: AdapterGroup, program: Any, mean: Tensor | None = None) -> dict[str, Tensor]:
        config, name = self.config, group.name
        log_v, log_alpha = self.variational_parameters(group)
        wishart = self.model.wishart(group, log_v.exp())
        column_kl = {"expected_kl": expected_column_kl(wishart)}  # (adapters, 1), exact over Σ
        adapters, columns = self.plates(group, program)
        with adapters:
            pi = program.sample(f"pi_{name}", MixtureWeights(log_alpha.exp().unsqueeze(-2)))
            factor = program.sample(f"sigma_tril_{name}", wishart)
            if config.components == "explicit":
                normal = dist.MultivariateNormal(factor.new_zeros(group.rank), scale_tril=factor)
                with program.plate(f"components_{name}", config.num_components, dim=-3), columns:
                    site, value = f"S_{name}", program.sample(f"S_{name}", normal, infer=column_kl)
            else:
                weights = active_weights(pi[..., 0, :], config.mixture)
                mean = self.model.mean(group) if mean is None else mean
                posterior = CollapsedMixture(mean, factor[..., 0, :, :], weights, self.model.sample_scaler(group))
                with columns:
                    site, value = f"A_{name}", program.sample(f"A_{name}", posterior, infer=column_kl)
        return {f"pi_{name}": pi, f"sigma_tril_{name}": factor, site: value}

    def expected_squares(self, group: AdapterGroup) -> Tensor:
        """E[Σ_k π_k²], shape ``(adapters,)``."""
        _, log_alpha = self.variational_parameters(group)
        return expected_cooperation(dist.Dirichlet(log_alpha.exp(), validate_args=False))

    def noise_variance(self, group: AdapterGroup) -> Tensor:
        r""":math:`\epsilon^2\,E[\sum_k \pi_k^2]\,\nu\,\bar v`, as :math:`E[\Sigma] = \nu\,\mathrm{diag}(v)`, with the
        largest :math:`\pi_k^2` alone for the sparse mixture; :math:`\bar v` is the mean of V's diagonal."""
        log_v, log_alpha = self.variational_parameters(group)
        squares = expected_active_squares(log_alpha.exp(), self.config.mixture)
        factor, variances = self.model.wishart_factor(group), log_v.exp()
        if factor is not None:  # the diagonal of F diag(v) Fᵀ
            variances = (factor.square() @ variances.unsqueeze(-1)).squeeze(-1)
        scale = self.model.degrees_of_freedom(group) * variances.mean(-1)
        return self.model.sample_scaler(group) ** 2 * squares * scale


def initial_scale(model: Prior, group: AdapterGroup) -> float:
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
