"""NUTS on MonteCLoRA: what the guides approximate, for networks small enough to sample (some dozens of unknowns)."""

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import pyro
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from bayeslora.errors import InputError
from bayeslora.models.joint import JointModel


class NutsDraws(NamedTuple):
    """Site name to draws of shape ``(chains, draws, *site shape)``, and the divergent transitions of all chains."""

    sites: dict[str, Tensor]
    num_divergences: int


def run_nuts(
    model: JointModel,
    batch: Mapping[str, Tensor],
    *,
    num_chains: int = 2,
    num_draws: int = 500,
    num_warmup: int = 300,
    max_tree_depth: int = 10,
    seed: int = 0,
) -> NutsDraws:
    """Draws from the posterior of (π, Σ, A) given the network's parameters as they are, with Pyro's NUTS.

    The prior of A is centred at the network's μ, so after a fit this is the posterior that the fitted guide
    approximates. Chains run one after another from random starting points, with a dense mass matrix. Use float64
    (``torch.set_default_dtype``) where the network's type can be chosen.

    Args:
        model: The model; its network must not draw noise of its own (no dropout: call ``network.eval()``).
        batch: All training examples, as the model takes them.
        num_chains: Chains, with seeds ``seed``, ``seed + 1`` and so on.
        num_draws: Draws kept of each chain.
        num_warmup: Draws before those, which set step size and mass matrix.
        max_tree_depth: Up to 2**max_tree_depth gradients a draw.
        seed: Of the first chain.

    Raises:
        InputError: where a number of chains, draws or warm-up draws, or the depth, is below 1, or a width was tuned.
    """
    model.check_untuned("to draw from the posterior that was fitted")
    sizes = {"num_chains": num_chains, "num_draws": num_draws, "num_warmup": num_warmup}
    for name, value in {**sizes, "max_tree_depth": max_tree_depth}.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    trainable = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    model.network.requires_grad_(False)
    chains, divergences = [], 0
    try:
        for chain in range(num_chains):
            with pyro.validation_enabled(False), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # what Pyro compiles with
                torch.manual_seed(seed + chain)
                kernel = NUTS(
                    model.joint,
                    full_mass=True,
                    max_tree_depth=max_tree_depth,
                    jit_compile=True,
                    ignore_jit_warnings=True,
                )
                sampler = MCMC(kernel, num_samples=num_draws, warmup_steps=num_warmup, disable_progbar=True)
                sampler.run(**batch)
            chains.append(sampler.get_samples())
            divergences += len(sampler.diagnostics()["divergences"]["chain 0"])
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    sites = {name: torch.stack([chain[name] for chain in chains]) for name in chains[0]}
    return NutsDraws(sites, divergences)
