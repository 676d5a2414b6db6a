"""The paper's variational family: free v and α for every adapter."""

import math

import torch
from torch import Tensor, nn

from bayeslora.adapters.groups import AdapterGroup
from bayeslora.guides.mixture import MixtureGuide, initial_log_alpha, initial_scale
from bayeslora.models.prior import Prior


class MeanFieldGuide(MixtureGuide):
    """r + N parameters for every adapter: log v and log α (paper, section 4.1).

    Args:
        model: The model whose sites it approximates.

    Example:
        >>> guide = MeanFieldGuide(bayes.model)
        >>> sum(p.numel() for p in guide.parameters()) == len(bayes.adapter_names) * (2 + 4)  # r and N
        True
    """

    def __init__(self, model: Prior):
        super().__init__(model)
        for group in model.groups:
            log_v = torch.full((len(group), group.rank), math.log(initial_scale(model, group)))
            log_alpha = initial_log_alpha(self.config.alpha_init, len(group), self.config.num_components)
            self.register_parameter(f"log_v_{group.name}", nn.Parameter(log_v))
            self.register_parameter(f"log_alpha_{group.name}", nn.Parameter(log_alpha))

    def variational_parameters(self, group: AdapterGroup) -> tuple[Tensor, Tensor]:
        return getattr(self, f"log_v_{group.name}"), getattr(self, f"log_alpha_{group.name}")
