"""A plain mean-field Gaussian over A: the family of Bayes by backprop, and of BLoB."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayeslora.adapters.groups import AdapterGroup
from bayeslora.distributions import active_weights, expected_cooperation
from bayeslora.errors import InputError
from bayeslora.guides.base import Guide
from bayeslora.models.prior import Prior


class GaussianGuide(Guide):
    r"""q(A) = ∏ N(A_ji; μ_ji, s_ji²): an own standard deviation s for every entry of A.

    π and Σ stay at their priors. It has as many parameters as A, and starts at the dense prior's variance,
    :math:`\epsilon^2\,E[\sum_k \pi_k^2]`, times ``scale_init`` where that is given.

    Args:
        model: The model whose sites it approximates.

    Raises:
        InputError: for ``components="explicit"``, which has no site for A.

    Example:
        >>> guide = GaussianGuide(bayes.model)
        >>> guide.log_scale(bayes.model.groups[0]).shape  # (adapters, columns, r)
        torch.Size([11, 16, 2])

    References:
        Blundell et al. (2015), *Weight Uncertainty in Neural Networks*.
        Wang et al. (2024), *BLoB: Bayesian Low-Rank Adaptation by Backpropagation*.
    """

    symmetric_rows = True
    follows_noise_schedule = True

    def __init__(self, model: Prior):
        super().__init__(model)
        if self.config.components == "explicit":
            raise InputError(
                "the gaussian guide describes A as a whole: use components='collapsed', which has the "
                "same law, or another guide to look at the components"
            )
        if self.config.wishart_scale == "full":
            raise InputError(
                "the gaussian guide has independent entries, and wishart_scale='full' a prior of correlated rows: use "
                "the guide 'amortized' or 'mean_field'"
            )
        for group in model.groups:
            variance = expected_cooperation(model.weights_prior(group)) * (self.config.scale_init or 1.0)
            shape = (len(group), group.columns, group.rank)
            log_scale = torch.full(shape, float(variance.flatten()[0].log()) / 2)
            self.register_parameter(f"log_scale_{group.name}", nn.Parameter(log_scale))

    def log_scale(self, group: AdapterGroup) -> Tensor:
        """log(s/ε), shape ``(adapters, columns, r)``."""
        return getattr(self, f"log_scale_{group.name}")

    def sample_group(self, group: AdapterGroup, program: Any, mean: Tensor | None = None) -> dict[str, Tensor]:
        mean = self.model.mean(group) if mean is None else mean
        site, log_scale = f"A_{group.name}", self.log_scale(group)
        normal = dist.Normal(mean, self._deviation(group)).to_event(1)
        adapters, columns = self.plates(group, program)
        with adapters:
            sites = self.sample_priors(group, program)
            weights = active_weights(sites[f"pi_{group.name}"], self.config.mixture)
            squares = weights.square().sum(-1, keepdim=True)  # (adapters, 1, 1); the prior's variance is ε² times it
            log_ratio = 2 * log_scale - squares.log()
            exact = {"expected_kl": (log_ratio.expm1() - log_ratio).sum(-1) / 2}  # given π
            with columns:
                return sites | {site: program.sample(site, normal, infer=exact)}

    def noise_variance(self, group: AdapterGroup) -> Tensor:
        return self._deviation(group).square().mean((-2, -1))

    def _deviation(self, group: AdapterGroup) -> Tensor:
        """s, shape ``(adapters, columns, r)``."""
        scale = self.model.sample_scaler(group)
        return (scale[:, None, None] if isinstance(scale, Tensor) else scale) * self.log_scale(group).exp()
