"""What is trained, in the groups that an optimizer treats alike."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

POSTERIOR_RATE = 10  # times the network's learning rate


def trained_parameters(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The network's trained matrices, which weight decay shrinks, and its trained vectors, which it does not."""
    trained = [p for p in network.parameters() if p.requires_grad]
    return [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]


def optimizer_groups(
    network: nn.Module, posterior: Iterable[Tensor], learning_rate: float, rate: float | None, weight_decay: float
) -> list[dict[str, Any]]:
    """See :meth:`bayeslora.BayesLoRA.parameter_groups`."""
    matrices, vectors = trained_parameters(network)
    groups = [
        {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
        {
            "params": [p for p in posterior if p.requires_grad],
            "lr": POSTERIOR_RATE * learning_rate if rate is None else rate,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]
