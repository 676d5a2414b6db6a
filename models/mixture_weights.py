"""What the weights of a mixture are expected to leave of its components' variance."""

import functools

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Dirichlet

from bayeslora.distributions import expected_cooperation

POINTS = 128  # of the quadrature; twice as many change no digit of float32


def expected_active_squares(concentration: Tensor, mixture: str) -> Tensor:
    """E[Σ_k w_k²] of the weights that enter the sum: all of π ~ Dir(α), or its largest for ``mixture="sparse"``.

    Args:
        concentration: α, shape ``(..., N)``.
        mixture: ``"dense"`` or ``"sparse"``.

    Returns:
        Shape ``(...)``.
    """
    if mixture == "dense":
        return expected_cooperation(Dirichlet(concentration, validate_args=False))
    return expected_largest_square(concentration)


@torch.no_grad()
def expected_largest_square(concentration: Tensor) -> Tensor:
    r"""E[max_k π_k²] under Dir(α), by quadrature in float64 on the CPU, so the same on every device.

    π is :math:`G / \sum_k G_k` with gamma variables G, and independent of their sum, so it is
    :math:`E[\max_k G_k^2] / (\alpha_0(\alpha_0 + 1))`, and the numerator
    :math:`\int_0^\infty 2t\,(1 - \prod_k F_k(t))\,dt`.

    Args:
        concentration: α, shape ``(..., N)``.

    Returns:
        Shape ``(...)``, in [1/N², 1].
    """
    alpha = concentration.detach().to("cpu", torch.float64)
    total, largest = alpha.sum(-1), alpha.amax(-1, keepdim=True)
    start = (largest - 12 * largest.sqrt()).clamp(min=0)  # below which the largest's F is 0,
    length = largest + 12 * largest.sqrt() + 40 - start  # and after which every F is 1
    nodes, weights = _nodes()
    times = start + length * nodes.square()  # denser at 0, where F is steep for a small α
    above = torch.special.gammaincc(alpha.unsqueeze(-1), times.unsqueeze(-2))  # 1 − F, (..., N, points)
    some_above = -torch.log1p(-above).sum(-2).expm1()
    square = start.squeeze(-1).square() + (4 * times * some_above * length * nodes * weights).sum(-1)
    return (square / (total * (total + 1))).to(concentration)


@functools.cache
def _nodes() -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss and Legendre on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(POINTS)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
