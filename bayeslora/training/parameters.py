"""Which parameters of a network are trained, in the groups that the optimizer treats alike."""

from torch import Tensor, nn


def trained_parameters(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The network's trained matrices, which weight decay shrinks, and its trained vectors, which it does not."""
    trained = [p for p in network.parameters() if p.requires_grad]
    return [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
