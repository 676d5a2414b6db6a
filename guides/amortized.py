"""One small shared network describes every adapter's posterior."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora.adapters.groups import Adapter, AdapterGroup
from bayeslora.adapters.quantized import frozen_weight
from bayeslora.guides.mixture import MixtureGuide, initial_log_alpha, initial_scale
from bayeslora.models.prior import Prior

NUM_FEATURES = 6
WIDTH = 32


class AmortizedGuide(MixtureGuide):
    """v and α of an adapter as a function of its description: O(1) parameters in the number of layers.

    The description is the kind of projection (an embedding), its depth, log n_in, log n_out, the scale and the row
    imbalance of the frozen weight, and the scale of μ. The last layer starts at zero, so every adapter starts with
    the same v and α as in the mean-field guide.

    Args:
        model: The model whose sites it approximates.

    Example:
        >>> log_v, log_alpha = AmortizedGuide(bayes.model).variational_parameters(bayes.model.groups[0])
        >>> log_v.shape, log_alpha.shape  # (adapters, r) and (adapters, N)
        (torch.Size([11, 2]), torch.Size([11, 4]))
    """

    def __init__(self, model: Prior):
        super().__init__(model)
        adapters = [adapter for group in model.groups for adapter in group.adapters]
        kinds = {kind: index for index, kind in enumerate(dict.fromkeys(a.kind for a in adapters))}
        depth = max(adapter.block for adapter in adapters) or 1
        self._rank = max(group.rank for group in model.groups)
        self._described: dict[str, tuple[Tensor, Tensor]] = {}  # during a run
        kind = torch.tensor([kinds[adapter.kind] for adapter in adapters])
        fixed = torch.stack([_description(adapter, adapter.block / depth) for adapter in adapters])
        self.register_buffer("kind", kind, persistent=False)  # follow from the network,
        self.register_buffer("fixed", fixed, persistent=False)  # so never saved
        outputs = self._rank + self.config.num_components
        self.embedding = nn.Embedding(len(kinds), WIDTH)
        self.hidden = nn.Linear(NUM_FEATURES, WIDTH)
        self.output = nn.Linear(WIDTH, outputs)
        with torch.no_grad():
            self.output.weight.zero_()
            start = sum(initial_scale(model, group) for group in model.groups) / len(model.groups)
            self.output.bias[: self._rank] = math.log(start)
            self.output.bias[self._rank :] = initial_log_alpha(self.config.alpha_init, self.config.num_components)

    def run(self, program: Any, means: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        with self.model.full_precision():
            self._described = self._describe()
        try:
            return super().run(program, means)
        finally:
            self._described = {}

    def variational_parameters(self, group: AdapterGroup) -> tuple[Tensor, Tensor]:
        return (self._described or self._describe())[group.name]

    def _describe(self) -> dict[str, tuple[Tensor, Tensor]]:
        """log v and log α of every group, in one pass."""
        groups = self.model.groups
        scale_of_mean = torch.cat([group.mean_scale() for group in groups]).clamp(min=1e-6).log()
        features = torch.cat([self.fixed, scale_of_mean.unsqueeze(-1)], dim=-1)  # (adapters of all groups, features)
        hidden = torch.tanh(self.hidden(features) + self.embedding(self.kind))
        outputs = self.output(hidden).split([len(group) for group in groups])
        return {g.name: (out[:, : g.rank], out[:, self._rank :]) for g, out in zip(groups, outputs, strict=True)}


def _description(adapter: Adapter, depth: float) -> Tensor:
    """What never changes in training: depth, sizes and the frozen weight's statistics, shape ``(features − 1,)``."""
    layer = adapter.layer
    rows = frozen_weight(layer).float().square().mean(-1).clamp(min=1e-12)
    return torch.tensor(
        [
            depth,
            math.log(layer.in_features) / 10,
            math.log(layer.out_features) / 10,
            float(rows.mean().log()) / 2,
            float(rows.log().std()) if len(rows) > 1 else 0.0,
        ]
    )
