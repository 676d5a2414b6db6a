r"""MonteCLoRA as a Pyro model: three sites over the columns of every LoRA-A matrix, then the network, then the labels.

========================  ===========================================  ===============================================
site (one per group)      prior                                        shape (plates ``adapters``, ``columns``)
========================  ===========================================  ===============================================
``pi_{group}``            Dirichlet(α0·1_N)                            ``(adapters, 1, N)``
``sigma_tril_{group}``    Cholesky factor of Wishart(I_r, ν)           ``(adapters, 1, r, r)``
``A_{group}``             N(μ_i, ε²·Σ_k π_k²·I_r) for every column i   ``(adapters, columns, r)``
========================  ===========================================  ===============================================

A group holds all adapters of one shape (r, n_in). With ``components="explicit"`` the third site is the N Gaussians
``S_{group}``, of shape ``(N, adapters, columns, r)``, and A is computed from them.

Reference: Sengupta et al., *Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank
Adaptation* (TMLR 2025), section 4.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from bayeslora.adapters.drawing import leaves_for_recomputation, using_draw
from bayeslora.adapters.groups import AdapterGroup, find_groups
from bayeslora.adapters.inject import adapt
from bayeslora.config import MonteCLoRAConfig
from bayeslora.distributions import CollapsedMixture, MixtureWeights, WishartCholesky, active_weights
from bayeslora.errors import InputError
from bayeslora.models.likelihoods import Likelihood, network_outputs
from bayeslora.models.selection import likelihood_for
from bayeslora.parameter_store import claim_names


class MonteCLoRA(PyroModule):
    """Prior over (π, Σ, A) of every adapter, and the likelihood of the labels given the network with that A.

    Args:
        network: A transformers model, or a PeftModel with one active LoRA adapter.
        config: Hyperparameters.
        likelihood: A :class:`PyroModule` as in :mod:`bayeslora.models.likelihoods`; read off the network if ``None``.
        num_examples: Size of the training set; scales the likelihood of a mini-batch up to it.

    Called as a Pyro model, ``model(**batch)``, it registers the network's trainable parameters with Pyro, so
    ``pyro.infer.SVI(model, guide, optim, CooperativeELBO())`` trains them all.

    Raises:
        InputError: for a network that cannot be adapted, or whose likelihood is not known.

    References:
        Sengupta et al. (2025), *Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank
        Adaptation*, section 4.

    Example:
        >>> model = MonteCLoRA(network, MonteCLoRAConfig(r=2, target_modules=["query"]))
        >>> trace = pyro.poutine.trace(model).get_trace(**batch)
        >>> {name: tuple(trace.nodes[name]["value"].shape) for name in ("pi_r2_in16", "A_r2_in16")}
        {'pi_r2_in16': (2, 1, 4), 'A_r2_in16': (2, 16, 2)}
    """

    likelihood: Any

    def __init__(
        self,
        network: nn.Module,
        config: MonteCLoRAConfig,
        *,
        likelihood: PyroModule | None = None,
        num_examples: int | None = None,
    ):
        super().__init__("model")
        adapted = adapt(network, config)
        self._network = (adapted,)  # in a tuple: its parameters are its own, not this module's
        self._checkpointable = tuple(m for m in adapted.modules() if hasattr(m, "gradient_checkpointing"))
        self.config = config
        self.groups = find_groups(adapted)
        self._is_centred = False
        if config.noise_schedule != "constant":
            for group in self.groups:
                factors = torch.ones(len(group), device=_device(group))
                self.register_buffer(f"noise_factor_{group.name}", factors)
        self.likelihood = likelihood if likelihood is not None else likelihood_for(adapted.get_base_model())
        self.num_examples = num_examples

    @property
    def network(self) -> nn.Module:
        return self._network[0]

    def degrees_of_freedom(self, group: AdapterGroup) -> float:
        """ν of a group: the configured value, or its rank."""
        return float(self.config.degrees_of_freedom or group.rank)

    def noise_scale(self, group: AdapterGroup) -> float | Tensor:
        """ε of prior and posterior: a number, or under a noise schedule one for each adapter, ``(adapters,)``."""
        factors = self.noise_factors(group)
        return self.config.sample_scaler if factors is None else self.config.sample_scaler * factors

    def noise_factors(self, group: AdapterGroup) -> Tensor | None:
        """What a noise schedule multiplies ε by, ``(adapters,)``: a buffer, saved with the posterior; None without."""
        return getattr(self, f"noise_factor_{group.name}", None)

    def weights_prior(self, group: AdapterGroup) -> MixtureWeights:
        """p(π) = Dirichlet(α0·1_N) of a group's adapters, batch shape ``(adapters, 1)``."""
        shape = (len(group), 1, self.config.num_components)
        return MixtureWeights(torch.full(shape, float(self.config.prior_concentration), device=_device(group)))

    def covariance_prior(self, group: AdapterGroup) -> WishartCholesky:
        """p(Σ) = Wishart(I_r, ν), on its Cholesky factor, batch shape ``(adapters, 1)``."""
        scale = torch.ones((len(group), 1, group.rank), device=_device(group))
        return WishartCholesky(self.degrees_of_freedom(group), scale)

    def full_precision(self) -> torch.autocast:
        """Switches autocast off inside: factors and noise stay in float32, whatever the network computes in."""
        return torch.autocast(_device(self.groups[0]).type, enabled=False)

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> Tensor:
        self._register_parameters()
        return self.joint(labels=labels, **inputs)[1]

    def joint(self, labels: Tensor | None = None, **inputs: Any) -> tuple[Tensor, Tensor]:
        """The joint density of latent sites and labels, without the bookkeeping of Pyro's parameter store.

        Returns:
            The network's outputs (logits, see :meth:`outputs`) under this draw, and the labels.
        """
        with self.full_precision():
            draw = self.run(pyro)
        with using_draw(self.groups, draw, keep=self.recomputes()):
            return self.observe(labels=labels, **inputs)

    def run(self, program: Any) -> dict[str, Tensor]:
        """The prior's program, under Pyro's primitives or a :class:`~bayeslora.recorder.Recorder`'s.

        Returns:
            Group name to A, one column a row: ``(adapters, columns, r)``.
        """
        return {group.name: self._sample_group(group, program) for group in self.groups}

    def observe(self, labels: Tensor | None = None, **inputs: Any) -> tuple[Tensor, Tensor]:
        """The likelihood's site, given the weights that are set; returns outputs and labels."""
        recomputed = leaves_for_recomputation(self.groups, self.network) if self.recomputes() else nullcontext()
        with recomputed:
            outputs = self.outputs(inputs, labels)
        # forward, not call: σ enters Pyro's global store only where the whole model is called as a Pyro model
        return outputs, self.likelihood.forward(outputs, labels, self.num_examples)

    def outputs(self, inputs: Mapping[str, Any], labels: Tensor | None = None) -> Tensor:
        """What the likelihood makes of the network under the weights that are set: its logits, unless it is a
        :class:`~bayeslora.models.Likelihood` that says otherwise."""
        return network_outputs(self.likelihood, self.network, inputs, labels)

    def example_weights(self, outputs: Tensor) -> Tensor:
        """How much each example counts in an average over several batches, ``(batch,)``."""
        if isinstance(self.likelihood, Likelihood):
            return self.likelihood.weights(outputs)
        return outputs.new_ones(len(outputs), dtype=torch.float32)

    def count(self, labels: Tensor) -> Tensor:
        """What the mean over a batch is over: its examples, or the scored tokens of its texts."""
        if isinstance(self.likelihood, Likelihood):
            return self.likelihood.count(labels)
        return torch.tensor(len(labels), device=labels.device)

    def mean_field(self, labels: Tensor | None = None, **inputs: Any) -> tuple[Tensor, Tensor]:
        """The same with every A at its mean μ: no latent site, plain LoRA."""
        return self.observe(labels=labels, **inputs)

    def mean(self, group: AdapterGroup) -> Tensor:
        """μ of a group's adapters, one column a row, ``(adapters, columns, r)``; 0 inside :meth:`centred`."""
        return self._zero.expand(len(group), group.columns, group.rank) if self._is_centred else group.mean()

    @contextmanager
    def centred(self) -> Iterator[None]:
        """Inside, both programs leave μ out: they draw A − μ, whose law does not depend on μ."""
        self._is_centred = True
        try:
            yield
        finally:
            self._is_centred = False

    @property
    def _zero(self) -> Tensor:
        return torch.zeros((), device=_device(self.groups[0]))

    def weights(self, sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A of every group from the values of its sites: group name to ``(adapters, columns, r)``."""
        return {group.name: self._adapted_matrix(group, sites) for group in self.groups}

    def _sample_group(self, group: AdapterGroup, program: Any) -> Tensor:
        config, name = self.config, group.name
        device = _device(group)
        identity = torch.eye(group.rank, device=device).expand(len(group), group.rank, group.rank)
        adapters = program.plate(f"adapters_{name}", len(group), dim=-2)
        columns = program.plate(f"columns_{name}", group.columns, dim=-1)
        with adapters:
            pi = program.sample(f"pi_{name}", self.weights_prior(group))
            program.sample(f"sigma_tril_{name}", self.covariance_prior(group))
            if config.components == "explicit":
                standard = dist.Normal(torch.zeros((), device=device), 1).expand([group.rank]).to_event(1)
                with program.plate(f"components_{name}", config.num_components, dim=-3), columns:
                    components = program.sample(f"S_{name}", standard)
                return self._adapted_matrix(group, {f"pi_{name}": pi, f"S_{name}": components})
            weights = active_weights(pi[..., 0, :], config.mixture)
            prior = CollapsedMixture(self.mean(group), identity, weights, self.noise_scale(group))
            with columns:
                return program.sample(f"A_{name}", prior)

    def _adapted_matrix(self, group: AdapterGroup, sites: Mapping[str, Tensor]) -> Tensor:
        name = group.name
        if f"A_{name}" in sites:
            return sites[f"A_{name}"]
        weights = active_weights(sites[f"pi_{name}"][..., 0, :], self.config.mixture)  # (adapters, N)
        noise = torch.einsum("ak,kacr->acr", weights, sites[f"S_{name}"])
        scale = self.noise_scale(group)
        return self.mean(group) + (scale[:, None, None] if isinstance(scale, Tensor) else scale) * noise

    def recomputes(self) -> bool:
        """Whether layers run again in the backward pass, and must then see the same draw."""
        return torch.is_grad_enabled() and any(module.gradient_checkpointing for module in self._checkpointable)

    def _register_parameters(self) -> None:
        trained = {f"network.{name}": p for name, p in self.network.named_parameters() if p.requires_grad}
        own = [f"model.{name.removesuffix('_unconstrained')}" for name, _ in self.named_parameters()]
        claim_names([*trained, *own], self)
        for name, parameter in trained.items():
            if pyro.param(name, parameter) is not parameter:
                raise InputError(f"Pyro's parameter store holds another {name!r}: call pyro.clear_param_store() before "
                                 "fitting a second model")  # fmt: skip


def _device(group: AdapterGroup) -> torch.device:
    return group.adapters[0].lora_A.weight.device
