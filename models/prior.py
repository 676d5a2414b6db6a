r"""The prior of MonteCLoRA as a Pyro program: three sites over the columns of every LoRA-A matrix.

========================  ===========================================  ===============================================
site (one per group)      prior                                        shape (plates ``adapters``, ``columns``)
========================  ===========================================  ===============================================
``pi_{group}``            Dirichlet(α0·1_N)                            ``(adapters, 1, N)``
``sigma_tril_{group}``    Cholesky factor of Wishart(I_r, ν)           ``(adapters, 1, r, r)``
``A_{group}``             N(μ_i, ε²·Σ_k π_k²·I_r) for every column i   ``(adapters, columns, r)``
========================  ===========================================  ===============================================

A group holds all adapters of one shape (r, n_in). With ``wishart_scale="full"`` a matrix FFᵀ of each adapter stands in
place of both I_r. With ``components="explicit"`` the third site is the N Gaussians
``S_{group}``, of shape ``(N, adapters, columns, r)``, and A is computed from them.

Reference: Seth et al., *Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank
Adaptation* (TMLR 2025), section 4.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from bayeslora.adapters.groups import AdapterGroup
from bayeslora.config import MonteCLoRAConfig
from bayeslora.distributions import (
    CollapsedMixture,
    MixtureWeights,
    WishartCholesky,
    active_weights,
)
from bayeslora.errors import InputError
from bayeslora.models.mixture_weights import expected_active_squares
from bayeslora.models.tuning import Tuning

LOWER_CHOLESKY = dist.constraints.lower_cholesky


class Prior(PyroModule):
    """p(π, Σ, A) of groups of adapters: all that a guide needs to know of the model.

    Args:
        groups: The adapters by shape.
        config: Hyperparameters.
    """

    def __init__(self, groups: tuple[AdapterGroup, ...], config: MonteCLoRAConfig):
        super().__init__("model")
        self.config = config
        self.tuning: Tuning | None = None  # what was tuned once the posterior was fitted
        self.groups = groups
        for group in groups:
            if config.noise_schedule != "constant":
                self.register_buffer(f"noise_factor_{group.name}", torch.ones(len(group), device=group.device))
            if config.noise_units != "absolute":
                self.register_buffer(f"noise_unit_{group.name}", torch.ones(len(group), device=group.device))
            if config.wishart_scale == "full":
                identity = torch.eye(group.rank, device=group.device).repeat(len(group), 1, 1)
                self.register_buffer(f"wishart_factor_{group.name}", identity)
        self.set_noise_units(lambda group: None)

    def degrees_of_freedom(self, group: AdapterGroup) -> float:
        """ν of a group: the configured value, or its rank."""
        return float(self.config.degrees_of_freedom or group.rank)

    def sample_scaler(self, group: AdapterGroup) -> float | Tensor:
        """ε of prior and posterior: a number, or one for each adapter, ``(adapters,)``, where a noise schedule changes
        it or ``noise_units="relative"`` sets it; times the width that was tuned."""
        scale: float | Tensor = self.config.sample_scaler
        for factors in (self.noise_factors(group), self.noise_units(group)):
            scale = scale if factors is None else scale * factors
        return scale if self.tuning is None else scale * self.tuning.width

    @property
    def has_noise(self) -> bool:
        """Whether draws differ from the mean: not in plain LoRA, nor where the width was tuned to 0."""
        return self.config.sample_scaler > 0 and (self.tuning is None or self.tuning.width > 0)

    def check_untuned(self, purpose: str) -> None:
        """Refuse what is about the posterior as it is fitted where a width was tuned: ε would be another."""
        if self.tuning is not None:
            raise InputError(
                f"this posterior has a tuned width, {self.tuning.width:.3g}, for the adapter as it is: set "
                f"bayes.tuning = None (or model.tuning) {purpose}"
            )

    def noise_scale(self, group: AdapterGroup) -> float | Tensor:
        """The former name of :meth:`sample_scaler`, for guides that were written with it."""
        return self.sample_scaler(group)

    def noise_factors(self, group: AdapterGroup) -> Tensor | None:
        """What a noise schedule multiplies ε by, ``(adapters,)``: a buffer, saved with the posterior; None without."""
        return getattr(self, f"noise_factor_{group.name}", None)

    def noise_units(self, group: AdapterGroup) -> Tensor | None:
        """ε of noise of size 1 in a unit of the layer, ``(adapters,)``: a buffer, saved with the posterior; None for
        absolute ε."""
        return getattr(self, f"noise_unit_{group.name}", None)

    def wishart_factor(self, group: AdapterGroup) -> Tensor | None:
        """F, the Cholesky factor of the prior Wishart's scale matrix, ``(adapters, r, r)``: a buffer, saved with the
        posterior; None for the identity."""
        return getattr(self, f"wishart_factor_{group.name}", None)

    @torch.no_grad()
    def set_wishart_factors(self, factors: Mapping[str, Tensor]) -> None:
        """Replace F; ε stays what it is, so that the size of the noise changes with F.

        Args:
            factors: Group name to F, lower triangular with a positive diagonal, ``(adapters, r, r)``.

        Raises:
            InputError: without ``wishart_scale="full"``, for another shape, or what is no such factor.
        """
        for group in self.groups:
            own, new = self.wishart_factor(group), factors[group.name]
            if own is None:
                raise InputError("a factor of the Wishart's scale needs MonteCLoRAConfig(wishart_scale='full')")
            if own.shape != new.shape or not bool(LOWER_CHOLESKY.check(new).all() & new.isfinite().all()):
                raise InputError(
                    f"the factors of {group.name} must be lower triangular with a positive diagonal, of shape "
                    f"{tuple(own.shape)}, got {tuple(new.shape)}"
                )
            own.copy_(new)

    @torch.no_grad()
    def set_noise_units(
        self,
        variance: Callable[[AdapterGroup], Tensor | None],
        deviations: Mapping[str, Tensor] | None = None,
    ) -> None:
        r"""Make a ``sample_scaler`` that is not absolute the standard deviation of A − μ over a deviation of the layer.

        PEFT draws A uniform on :math:`\pm n_{in}^{-1/2}`, with standard deviation :math:`(3 n_{in})^{-1/2}`. Relative
        noise of size ρ so has :math:`\epsilon = \rho\,(3 n_{in})^{-1/2} / \sqrt{E[\sum_k \pi_k^2]\,\nu\,\bar v}`. A
        model starts with the prior's variance, and :class:`bayeslora.BayesLoRA` takes its guide's instead.

        Args:
            variance: Of an entry of A − μ at the ε that is set, ``(adapters,)``, as a guide says it where it starts;
                the prior's where that is None.
            deviations: Group name to what 1 stands for, ``(adapters,)``: PEFT's start for relative noise and the root
                mean square of μ for ``noise_units="trained"``, if None.
        """
        for group in self.groups:
            units = self.noise_units(group)
            if units is None or self.config.sample_scaler == 0:
                continue
            scale, found = self.sample_scaler(group), variance(group)
            if found is None:
                weights, factor = self.weights_prior(group).concentration[:, 0], self.wishart_factor(group)
                found = scale**2 * expected_active_squares(weights, self.config.mixture)
                found = found if factor is None else found * factor.square().sum(-1).mean(-1)
            units.copy_(scale * self._deviation(group, deviations) / found.sqrt())

    def _deviation(self, group: AdapterGroup, deviations: Mapping[str, Tensor] | None) -> float | Tensor:
        """What noise of size 1 has for a standard deviation."""
        if deviations is not None:
            return deviations[group.name]
        return group.mean_scale() if self.config.noise_units == "trained" else (3 * group.columns) ** -0.5

    def weights_prior(self, group: AdapterGroup) -> MixtureWeights:
        """p(π) = Dirichlet(α0·1_N) of a group's adapters, batch shape ``(adapters, 1)``."""
        shape = (len(group), 1, self.config.num_components)
        return MixtureWeights(torch.full(shape, float(self.config.prior_concentration), device=group.device))

    def covariance_prior(self, group: AdapterGroup) -> WishartCholesky:
        """p(Σ) = Wishart(I_r, ν), on its Cholesky factor, batch shape ``(adapters, 1)``."""
        return self.wishart(group, torch.ones((len(group), group.rank), device=group.device))

    def wishart(self, group: AdapterGroup, scale: Tensor) -> WishartCholesky:
        """W(F diag(v) Fᵀ, ν) of a group's adapters, v of shape ``(adapters, r)``; batch shape ``(adapters, 1)``."""
        factor = self.wishart_factor(group)
        factor = None if factor is None else factor.unsqueeze(-3)
        return WishartCholesky(self.degrees_of_freedom(group), scale.unsqueeze(-2), factor)

    def full_precision(self) -> torch.autocast:
        """Switches autocast off inside: factors and noise stay in float32, whatever the network computes in."""
        return torch.autocast(self.groups[0].device.type, enabled=False)

    def run(self, program: Any, means: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The prior's program, under Pyro's primitives or a :class:`~bayeslora.recorder.Recorder`'s.

        Args:
            program: Has ``sample`` and ``plate``.
            means: Group name to what A is centred at, ``(adapters, columns, r)``; μ where ``None``. Around
                :meth:`zero_means` the program draws A − μ, whose law does not depend on μ.

        Returns:
            Group name to A, one column a row: ``(adapters, columns, r)``.
        """
        means = {group.name: self.mean(group) for group in self.groups} if means is None else means
        return {group.name: self._sample_group(group, program, means[group.name]) for group in self.groups}

    def mean(self, group: AdapterGroup) -> Tensor:
        """μ of a group's adapters, one column a row, ``(adapters, columns, r)``."""
        return group.mean()

    def zero_means(self) -> dict[str, Tensor]:
        """Zeros in place of every group's μ, for both programs to draw A − μ: see :meth:`run`."""
        zero = torch.zeros((), device=self.groups[0].device)
        return {group.name: zero.expand(len(group), group.columns, group.rank) for group in self.groups}

    def matrices(self, sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A of every group from the values of its sites: group name to ``(adapters, columns, r)``; μ of adapters that
        are not :meth:`drawn`."""
        if self.config.components == "explicit":
            found = {group.name: self._from_components(group, sites, self.mean(group)) for group in self.groups}
        else:
            found = {group.name: sites[f"A_{group.name}"] for group in self.groups}
        for group in self.groups:
            drawn = self.drawn(group)
            if not all(drawn):
                here = torch.tensor(drawn, device=group.device)[:, None, None]
                found[group.name] = torch.where(here, found[group.name], self.mean(group))
        return found

    def drawn(self, group: AdapterGroup) -> list[bool]:
        """Which adapters' draws differ from their means; all, unless something of a network says otherwise."""
        return [True] * len(group)

    def _sample_group(self, group: AdapterGroup, program: Any, mean: Tensor) -> Tensor:
        config, name, device = self.config, group.name, group.device
        factor = self.wishart_factor(group)
        if factor is None:
            factor = torch.eye(group.rank, device=device).expand(len(group), group.rank, group.rank)
        adapters = program.plate(f"adapters_{name}", len(group), dim=-2)
        columns = program.plate(f"columns_{name}", group.columns, dim=-1)
        with adapters:
            pi = program.sample(f"pi_{name}", self.weights_prior(group))
            program.sample(f"sigma_tril_{name}", self.covariance_prior(group))
            if config.components == "explicit":
                normal = dist.Normal(torch.zeros((), device=device), 1).expand([group.rank]).to_event(1)
                if self.wishart_factor(group) is not None:
                    normal = dist.MultivariateNormal(factor.new_zeros(group.rank), scale_tril=factor.unsqueeze(-3))
                with program.plate(f"components_{name}", config.num_components, dim=-3), columns:
                    components = program.sample(f"S_{name}", normal)
                return self._from_components(group, {f"pi_{name}": pi, f"S_{name}": components}, mean)
            weights = active_weights(pi[..., 0, :], config.mixture)
            prior = CollapsedMixture(mean, factor, weights, self.sample_scaler(group))
            with columns:
                return program.sample(f"A_{name}", prior)

    def _from_components(self, group: AdapterGroup, sites: Mapping[str, Tensor], mean: Tensor) -> Tensor:
        """A as the mixture of its N Gaussians."""
        weights = active_weights(sites[f"pi_{group.name}"][..., 0, :], self.config.mixture)  # (adapters, N)
        noise = torch.einsum("ak,kacr->acr", weights, sites[f"S_{group.name}"])
        scale = self.sample_scaler(group)
        return mean + (scale[:, None, None] if isinstance(scale, Tensor) else scale) * noise
