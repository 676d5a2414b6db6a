r"""A yardstick: MonteCLoRA on one linear layer, where posterior and evidence have closed forms.

.. math:: y = (W_0 + s B A)\,x + \text{noise}, \qquad \text{noise} \sim N(0, \sigma^2 I)

with W0, B and σ known. It is the real model (:class:`~bayeslora.models.MonteCLoRA` over a PEFT layer), so whatever runs
on a language model runs on this. Given π the columns of A are Gaussian a priori, with variance ε²c,
:math:`c = \sum_k \pi_k^2`, and the labels are linear in A: the posterior of A is Gaussian, and the evidence a Gaussian
density. What is left is one integral over the number c.

Two facts about the model itself. The prior of A does not depend on Σ (only the guide's A does), so the posterior of Σ
is its prior, Wishart(I, ν). And the prior's mean is the network's own μ: everything here is given the μ that the
network has when it is asked, and a fit that moves μ moves the prior too (empirical Bayes).
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import pyro
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pyro.nn import PyroModule
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from bayeslora.adapters.groups import AdapterGroup
from bayeslora.config import MonteCLoRAConfig
from bayeslora.distributions import MixtureWeights, WishartCholesky, active_weights
from bayeslora.errors import InputError
from bayeslora.models.likelihoods import GaussianLikelihood, example_plate
from bayeslora.models.monteclora import MonteCLoRA


class LinearNetwork(nn.Module):
    """One linear layer, ``features`` of shape ``(batch, columns)`` to ``logits`` of shape ``(batch, outputs)``."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight = nn.Parameter(weight)
        self.config = PretrainedConfig()

    @property
    def device(self) -> torch.device:
        return self.linear.weight.device

    def forward(self, features: Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.linear(features))


class KnownNoise(GaussianLikelihood):
    """``y ~ N(f, σ²I)`` with a known σ; labels of shape ``(batch,)`` for one output, else ``(batch, outputs)``."""

    def __init__(self, scale: float):
        PyroModule.__init__(self, "likelihood")
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, logits: Tensor, labels: Tensor | None, num_examples: int | None = None) -> Tensor:
        with example_plate(logits.shape[0], num_examples):
            if logits.shape[1] == 1:
                return pyro.sample("labels", pyro.distributions.Normal(logits[:, 0], self.scale), obs=labels)
            return pyro.sample("labels", pyro.distributions.Normal(logits, self.scale).to_event(1), obs=labels)


class Gaussian(NamedTuple):
    """Mean ``(columns·r,)`` and covariance ``(columns·r, columns·r)`` of vec A: A's columns one after another."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class LowRankRegression:
    """The problem and its answers. All answers are float64 tensors, in nats where they are log densities.

    Args:
        network: The PEFT network; its ``lora_B`` is frozen.
        model: MonteCLoRA over it, to be called as ``model(**batch)``; also ``model.config`` and ``model.likelihood``.
        features: x, shape ``(examples, columns)``.
        labels: y, shape ``(examples,)`` for one output, else ``(examples, outputs)``.
        truth: The site values that the labels were simulated from.
        num_draws: Prior draws of π behind every integral over π.

    Example:
        >>> problem = low_rank_regression(20, columns=3, rank=2)
        >>> problem.posterior().mean.shape, problem.posterior().covariance.shape  # of vec A
        (torch.Size([6]), torch.Size([6, 6]))
        >>> problem.log_predictive(problem.features[:2], problem.labels[:2]).shape  # in nats
        torch.Size([2])
    """

    network: PeftModel
    model: MonteCLoRA
    features: Tensor
    labels: Tensor
    truth: dict[str, Tensor]
    num_draws: int = 100_000

    @property
    def batch(self) -> dict[str, Tensor]:
        """Arguments of the model, and of ``BayesLoRA``."""
        return {"features": self.features, "labels": self.labels}

    @property
    def dataset(self) -> list[dict[str, Tensor]]:
        """The examples one by one, as ``fit`` and ``predict`` take them."""
        return [{"features": x, "labels": y} for x, y in zip(self.features, self.labels, strict=True)]

    @property
    def group(self) -> AdapterGroup:
        return self.model.groups[0]

    @property
    def noise(self) -> float:
        """σ."""
        return float(self.model.likelihood.scale)

    @property
    def mean(self) -> Tensor:
        """μ as the network has it now, as vec A: ``(columns·r,)``."""
        return self.group.mean().detach().double().reshape(-1)

    def simulate(self, seed: int, *, A: Tensor | None = None) -> "LowRankRegression":
        """The same network and features with parameters drawn anew from the prior (or with this A, in the shape of its
        site), and their labels."""
        values = {} if A is None else {f"A_{self.group.name}": A}
        program = pyro.poutine.condition(self.model.joint, data=values)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            nodes = pyro.poutine.trace(program).get_trace(features=self.features).nodes
        sites = [f"{kind}_{self.group.name}" for kind in ("pi", "sigma_tril", "A", "S")]
        truth = {name: nodes[name]["value"] for name in sites if name in nodes}
        return replace(self, labels=nodes["labels"]["value"], truth=truth)

    def with_features(self, features: Tensor, *, seed: int) -> "LowRankRegression":
        """New examples of the same truth: labels of these features under ``self.truth``, with new noise."""
        program = pyro.poutine.condition(self.model.joint, data=self.truth)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _, labels = program(features=features)
        return replace(self, features=features, labels=labels)

    def design(self, features: Tensor) -> Tensor:
        """Φ, with which the adapter's outputs are Φ·vec A: shape ``(examples, outputs, columns·r)``."""
        layer, key = self.group.adapters[0].layer, self.group.adapters[0].key
        update = layer.scaling[key] * layer.lora_B[key].weight.detach().double()
        return torch.einsum("ni,or->noir", features.double(), update).flatten(-2)

    def outputs(self, A: Tensor, features: Tensor) -> Tensor:
        """(W0 + s·B·A)x for drawn A ``(draws, columns·r)``: shape ``(draws, examples, outputs)``."""
        return self._frozen_outputs(features) + torch.einsum("nod,sd->sno", self.design(features), A.double())

    def squared_weights(self, pi: Tensor) -> Tensor:
        """c = Σ_k w_k² of mixture weights π, whose last dimension is N."""
        return active_weights(pi.double(), self.model.config.mixture).square().sum(-1)

    def posterior_given(self, pi: Tensor) -> Gaussian:
        """The posterior of vec A given π, shape ``(N,)``."""
        spectrum, prior = self._spectrum(self.features, self.labels), self._prior_variance(self.squared_weights(pi))
        mean, variance = spectrum.posterior(prior)
        return Gaussian(self.mean + spectrum.basis @ mean, spectrum.basis @ torch.diag(variance) @ spectrum.basis.mT)

    def log_evidence_given(self, pi: Tensor) -> Tensor:
        """log p(y | π) for π of shape ``(..., N)``."""
        prior = self._prior_variance(self.squared_weights(pi))
        return self._spectrum(self.features, self.labels).log_evidence(prior)

    def log_evidence(self) -> tuple[float, float]:
        """log p(y), π integrated by Monte Carlo over its prior, and its standard error."""
        log_terms = self._log_terms(self.features, self.labels)
        terms = (log_terms - log_terms.max()).exp()
        error = terms.std() / terms.mean() / len(terms) ** 0.5
        return float(terms.mean().log() + log_terms.max()), float(error)

    def posterior(self) -> Gaussian:
        """Mean and covariance of the posterior of vec A with π integrated (it is a mixture of Gaussians)."""
        spectrum = self._spectrum(self.features, self.labels)
        mean, variance = spectrum.posterior(self._prior_variance(self._prior_draws[1]))
        weights = self._log_terms(self.features, self.labels).softmax(0)
        centre = weights @ mean
        between = torch.einsum("s,si,sj->ij", weights, mean - centre, mean - centre)
        covariance = spectrum.basis @ (torch.diag(weights @ variance) + between) @ spectrum.basis.mT
        return Gaussian(self.mean + spectrum.basis @ centre, covariance)

    def posterior_draws(self, num_draws: int, *, seed: int = 0) -> dict[str, Tensor]:
        """Independent draws of the posterior, site name to ``(num_draws, *site shape)``.

        π is resampled from ``self.num_draws`` draws of its prior by their evidence; Σ comes from its prior, A from its
        closed form.
        """
        group, generator = self.group, torch.Generator().manual_seed(seed)
        pi, squared = self._prior_draws
        weights = self._log_terms(self.features, self.labels).softmax(0)
        chosen = torch.multinomial(weights, num_draws, replacement=True, generator=generator)
        spectrum = self._spectrum(self.features, self.labels)
        mean, variance = spectrum.posterior(self._prior_variance(squared[chosen]))
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
        A = self.mean + (mean + variance.sqrt() * noise) @ spectrum.basis.mT
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wishart = WishartCholesky(self.model.degrees_of_freedom(group), torch.ones(group.rank).double())
            factors = wishart.sample(torch.Size([num_draws, 1, 1]))
        return {
            f"pi_{group.name}": pi[chosen].view(num_draws, 1, 1, -1),
            f"sigma_tril_{group.name}": factors,
            f"A_{group.name}": A.view(num_draws, 1, group.columns, group.rank),
        }

    def log_predictive(self, features: Tensor, labels: Tensor, *, pi: Tensor | None = None) -> Tensor:
        """log p(y* | x*, y) of each new example, shape ``(new examples,)``; given π, or with π integrated.

        The evidence of the data with that example over the evidence without it.
        """

        def evidence(features: Tensor, labels: Tensor) -> Tensor:
            if pi is None:
                return self._log_terms(features, labels).logsumexp(0)
            return self._spectrum(features, labels).log_evidence(self._prior_variance(self.squared_weights(pi)))

        pairs = zip(features.split(1), labels.split(1), strict=True)
        both = [evidence(torch.cat([self.features, x]), torch.cat([self.labels, y])) for x, y in pairs]
        return torch.stack(both) - evidence(self.features, self.labels)

    def _frozen_outputs(self, features: Tensor) -> Tensor:
        return features.double() @ self.group.adapters[0].layer.get_base_layer().weight.detach().double().mT

    def _prior_variance(self, squared_weights: Tensor) -> Tensor:
        return self.model.sample_scaler(self.group) ** 2 * squared_weights

    @cached_property
    def _prior_draws(self) -> tuple[Tensor, Tensor]:
        """π, shape ``(num_draws, N)``, and c."""
        config = self.model.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            concentration = torch.full((config.num_components,), config.prior_concentration, dtype=torch.float64)
            pi = MixtureWeights(concentration).sample(torch.Size([self.num_draws]))
        return pi, self.squared_weights(pi)

    def _log_terms(self, features: Tensor, labels: Tensor) -> Tensor:
        """log p(y | π) at prior draws of π, ``(num_draws,)``."""
        return self._spectrum(features, labels).log_evidence(self._prior_variance(self._prior_draws[1]))

    def _spectrum(self, features: Tensor, labels: Tensor) -> "_Spectrum":
        design = self.design(features)
        residual = labels.double().view(design.shape[:2]) - self._frozen_outputs(features) - design @ self.mean
        design = design.flatten(0, 1)
        eigenvalues, basis = torch.linalg.eigh(design.mT @ design)
        projected = basis.mT @ design.mT @ residual.flatten()
        return _Spectrum(
            eigenvalues.clamp(min=0), basis, projected, residual.square().sum(), residual.numel(), self.noise**2
        )


class _Spectrum(NamedTuple):
    """The data in the basis of ΦᵀΦ, where posterior and evidence are sums over single numbers for any prior variance.

    ``projected`` is z = UᵀΦᵀe for the residual e = y − W0 x − Φμ, ``squares`` |e|², ``length`` its own.
    """

    eigenvalues: Tensor
    basis: Tensor
    projected: Tensor
    squares: Tensor
    length: int
    noise_variance: float

    def posterior(self, prior_variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of Uᵀ(vec A − μ) and its variances, ``prior_variance.shape + (columns·r,)``."""
        prior = prior_variance.unsqueeze(-1)
        total = self.noise_variance + prior * self.eigenvalues
        return prior * self.projected / total, prior * self.noise_variance / total

    def log_evidence(self, prior_variance: Tensor) -> Tensor:
        """log N(e; 0, σ²I + τ²ΦΦᵀ) for τ² of any shape."""
        mean, _ = self.posterior(prior_variance)
        ratio = prior_variance.unsqueeze(-1) * self.eigenvalues / self.noise_variance
        log_det = torch.log1p(ratio).sum(-1) + self.length * math.log(2 * math.pi * self.noise_variance)
        quadratic = (self.squares - (self.projected * mean).sum(-1)) / self.noise_variance
        return -(log_det + quadratic) / 2


def low_rank_regression(
    num_examples: int = 20,
    *,
    columns: int = 3,
    outputs: int = 1,
    rank: int = 2,
    noise: float = 0.5,
    seed: int = 0,
    A: Tensor | None = None,
    **options,
) -> LowRankRegression:
    """A seeded problem: W0, B, μ and the features are standard normal, π, Σ, A and the labels drawn from the model.

    Args:
        num_examples: n.
        columns: n_in, length of a feature vector.
        outputs: n_out, length of a label; with 1, ``BayesLoRA.predict`` and ``to_arviz`` work on it too.
        rank: r.
        noise: σ, known.
        seed: Decides everything.
        A: The adapter that the labels are simulated from, ``(1, columns, r)``, instead of a draw.
        options: Fields of :class:`MonteCLoRAConfig`. Other than there, ε is 1, so that prior and data have a say, s is
            1, and the objective is the evidence lower bound.

    Raises:
        InputError: for sizes below 1, a noise that is not positive, or explicit components.

    Example:
        >>> problem = low_rank_regression(20, columns=3, rank=2)
        >>> problem.features.shape, problem.labels.shape
        (torch.Size([20, 3]), torch.Size([20]))
        >>> evidence, error = problem.log_evidence()  # in nats
        >>> error < 0.01
        True
    """
    for name, value in (("num_examples", num_examples), ("columns", columns), ("outputs", outputs)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if not noise > 0:
        raise InputError(f"noise (σ) must be positive, got {noise}")
    if options.get("components", "collapsed") != "collapsed":
        raise InputError("the closed forms are of A itself: components must be 'collapsed'")
    evidence_bound = {"normalization": "elbo", "kl_weight": 1.0, "cooperation": 0.0}
    config = MonteCLoRAConfig(
        **{"sample_scaler": 1.0, "lora_alpha": rank, **evidence_bound, **options},
        r=rank,
        target_modules=("linear",),
    )
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    network = get_peft_model(
        LinearNetwork(normal(outputs, columns)),
        LoraConfig(r=rank, lora_alpha=config.lora_alpha, target_modules=["linear"]),
    )
    features = normal(num_examples, columns)
    model = MonteCLoRA(network, config, likelihood=KnownNoise(noise), num_examples=num_examples)
    adapter = model.groups[0].adapters[0]
    with torch.no_grad():
        adapter.lora_A.weight.copy_(normal(rank, columns))
        adapter.layer.lora_B[adapter.key].weight.copy_(normal(outputs, rank)).requires_grad_(False)
    problem = LowRankRegression(network, model, features, torch.zeros(num_examples), {})
    return problem.simulate(seed, A=A)
