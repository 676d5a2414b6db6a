r"""The cooperative ELBO: Pyro's mean-field ELBO with a KL weight, the paper's cooperative loss, and exact KLs.

.. math::
    \mathrm{loss} = -\tfrac1n \sum_{\text{data}} \log p(y \mid x, A) + \eta\,\mathrm{KL} + \lambda_C \sum_k \pi_k^2
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta, Dirichlet
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

from bayeslora.config import MonteCLoRAConfig
from bayeslora.distributions import expected_cooperation
from bayeslora.errors import InputError
from bayeslora.models.prior import Prior

Nodes = Mapping[str, dict]  # site name to its record, as in pyro.poutine.Trace.nodes


class _Counts(NamedTuple):
    examples: float
    adapters: int


@dataclass
class ELBOParts:
    """What the last loss was made of, detached: ``loss = task + η·Σ kl + λ_C·cooperation``.

    ``task`` is the negative log-likelihood per example; ``kl`` holds each site's KL in nats under the chosen
    normalisation, before η; ``cooperation`` is the mean (``"paper"``) or scaled sum (``"elbo"``) of Σ_k π_k².
    """

    task: Tensor
    kl: dict[str, Tensor] = field(default_factory=dict)
    cooperation: Tensor | float = 0.0

    def add(self, other: "ELBOParts", weight: float | Tensor) -> None:
        self.task = self.task + weight * other.task
        self.cooperation = self.cooperation + weight * other.cooperation
        for name, value in other.kl.items():
            self.kl[name] = self.kl.get(name, 0.0) + weight * value

    def to_floats(self) -> dict[str, float]:
        """Flat, for logging: ``task``, ``cooperation``, ``kl`` and one ``kl_{site}`` each."""
        kl = {f"kl_{name}": float(value) for name, value in self.kl.items()}
        return {
            "task": float(self.task),
            "cooperation": float(self.cooperation),
            "kl": sum(kl.values()),
            **kl,
        }


class Score(NamedTuple):
    """The loss of one draw, and what it was made of."""

    loss: Tensor
    parts: ELBOParts


class CooperativeELBO(TraceMeanField_ELBO):
    """Negative cooperative ELBO per example, in nats; lower is better.

    Args:
        kl_weight: η.
        cooperation: λ_C.
        normalization: ``"paper"``: KL and cooperative loss averaged over adapters, the columns' KL counted N times
            and once per adapter. ``"elbo"``: both summed over adapters and columns and divided by the number of
            training examples, which the model's ``examples`` plate knows; with η = 1 and λ_C = 0 the loss is the
            evidence lower bound per example, negated.
        num_particles: M, draws of all sites per evaluation, averaged.
        exact: Use closed-form expectations over Σ and π where the guide offers them, instead of their values at
            the draw: the same expectation with less noise.

    After each evaluation :attr:`parts` holds the terms. Works in ``pyro.infer.SVI`` like any other ELBO.

    Raises:
        InputError: for a weight below 0 or another normalization; when evaluated, for a guide of another model.

    Example:
        >>> elbo = CooperativeELBO(kl_weight=1e-2)
        >>> loss = elbo.loss(bayes.model, bayes.guide, **batch)
        >>> parts = elbo.parts.to_floats()
        >>> abs(loss - (parts["task"] + 1e-2 * parts["kl"] + parts["cooperation"])) < 1e-5
        True
    """

    def __init__(
        self,
        kl_weight: float = 1e-5,
        cooperation: float = 1.0,
        normalization: Literal["paper", "elbo"] = "paper",
        num_particles: int = 1,
        *,
        exact: bool = True,
    ):
        for name, value in (("kl_weight", kl_weight), ("cooperation", cooperation)):
            if not value >= 0:
                raise InputError(f"{name} must be 0 or greater, got {value!r}")
        if normalization not in ("paper", "elbo"):
            raise InputError(f"normalization must be 'paper' or 'elbo', got {normalization!r}")
        super().__init__(num_particles=num_particles)
        self.kl_weight, self.cooperation, self.normalization = kl_weight, cooperation, normalization
        self.exact = exact
        self.parts: ELBOParts | None = None

    @classmethod
    def from_config(cls, config: MonteCLoRAConfig) -> "CooperativeELBO":
        assert config.kl_weight is not None  # resolved by the config itself
        return cls(config.kl_weight, config.cooperation, config.normalization, config.num_particles)

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(model, Prior):
            model.check_untuned("to train it further")
        scores = []
        for _ in range(self.num_particles):
            guide_trace = poutine.trace(guide, graph_type="flat").get_trace(*args, **kwargs)
            model_trace = replayed(model, guide_trace, *args, **kwargs)
            scores.append(self.score(model_trace.nodes, guide_trace.nodes))
        return self.average(scores)

    def average(self, scores: Sequence[Score]) -> Tensor:
        """The loss over the particles, whose mean parts become :attr:`parts`."""
        self.parts = ELBOParts(torch.zeros_like(scores[0].parts.task))
        for score in scores:
            self.parts.add(score.parts, 1 / len(scores))
        total = scores[0].loss
        for score in scores[1:]:
            total = total + score.loss
        return total / len(scores)

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def score(self, model_nodes: Nodes, guide_nodes: Nodes) -> Score:
        """The loss of one draw, from the sites of the guide, and of the model at the guide's values."""
        latent = {n: s for n, s in _samples(model_nodes) if not s["is_observed"]}
        observed = [s for _, s in _samples(model_nodes) if s["is_observed"]]
        sampled = dict(_samples(guide_nodes))
        _check_sites(latent, sampled)
        task, num_examples = _task_loss(observed)
        counts = _Counts(num_examples, _total_adapters(latent.values()))
        kl = {name: self._site_kl(site, sampled[name], counts) for name, site in latent.items()}
        kl |= {n: self._auxiliary_kl(s, num_examples) for n, s in sampled.items() if n not in latent}
        cooperative = [self._cooperation(sampled[n]) for n, s in latent.items() if isinstance(s["fn"], Dirichlet)]
        together = torch.zeros_like(task)
        if cooperative:
            flat = torch.cat([part.reshape(-1) for part in cooperative])  # one number an adapter
            together = flat.mean() if self.normalization == "paper" else flat.sum() / num_examples
        loss = task + self.cooperation * together
        if self.kl_weight and kl:
            loss = loss + self.kl_weight * sum(kl.values())
        parts = ELBOParts(task.detach(), {n: v.detach() for n, v in kl.items()}, together.detach())
        return Score(loss, parts)

    def _site_kl(self, model_site: dict, guide_site: dict, counts: "_Counts") -> Tensor:
        """One site's KL under the chosen normalisation, from a tensor of the model site's batch shape."""
        kl = self._batched_kl(model_site, guide_site).expand(model_site["fn"].batch_shape)
        if self.normalization == "elbo":
            return kl.sum() / counts.examples
        # the mean over columns is one column's KL, "once per layer"; components are counted N times
        components = _plate_size(model_site, "components", getattr(model_site["fn"], "num_components", 1))
        return kl.mean() * (components * _plate_size(model_site, "adapters", 1) / counts.adapters)

    def _batched_kl(self, model_site: dict, guide_site: dict) -> Tensor:
        if self.exact and "expected_kl" in guide_site["infer"]:
            return guide_site["infer"]["expected_kl"]
        if not isinstance(guide_site["fn"], Delta):  # Delta's registered KL forgets its log_density
            try:
                return kl_divergence(guide_site["fn"], model_site["fn"])
            except NotImplementedError:
                pass
        value = guide_site["value"]
        posterior, prior = guide_site["fn"].log_prob(value), model_site["fn"].log_prob(value)
        if posterior.shape == prior.shape:
            return posterior - prior
        return (posterior.sum() - prior.sum()) / prior.numel()  # a joint density has no share of each column

    def _auxiliary_kl(self, guide_site: dict, num_examples: float) -> Tensor:
        if self.normalization == "paper":
            raise InputError(
                "this guide samples auxiliary sites, whose KL has no share per adapter: "
                "use CooperativeELBO(normalization='elbo')"
            )
        return guide_site["fn"].log_prob(guide_site["value"]).sum() / num_examples

    def _cooperation(self, guide_site: dict) -> Tensor:
        if self.exact and isinstance(guide_site["fn"], Dirichlet):
            return expected_cooperation(guide_site["fn"])
        return guide_site["value"].square().sum(-1)


def replayed(model: Callable, guide: Trace, *args: Any, **kwargs: Any) -> Trace:
    """The model's trace at the values of the guide's.

    Raises:
        InputError: where their shapes do not fit.
    """
    replay = poutine.replay(model, trace=guide)
    try:
        return poutine.trace(replay, graph_type="flat").get_trace(*args, **kwargs)
    except ValueError as error:
        if "Shape mismatch inside plate" not in str(error):
            raise
        raise InputError(f"the guide was built for another model: {str(error).splitlines()[0]}") from error


def _samples(nodes: Nodes) -> Iterator[tuple[str, dict]]:
    """The random sites, without the bookkeeping ones that plates leave."""
    return ((n, s) for n, s in nodes.items() if s["type"] == "sample" and not site_is_subsample(s))


def _check_sites(latent: dict[str, dict], sampled: dict[str, dict]) -> None:
    missing = [name for name in latent if name not in sampled]
    extra = [n for n, s in sampled.items() if n not in latent and not s["infer"].get("is_auxiliary")]
    if missing or extra:
        raise InputError(
            f"the guide is not one of this model: missing sites {missing}, unknown sites {extra}; "
            "build the guide from the model it is used with"
        )
    for name, site in latent.items():
        ours, theirs = site["fn"].shape(), sampled[name]["value"].shape
        if ours != theirs:
            raise InputError(
                f"the guide's site {name!r} has shape {tuple(theirs)}, the model's {tuple(ours)}: "
                "it was built for another model"
            )


def _task_loss(observed: list[dict]) -> tuple[Tensor, float]:
    """Mean negative log-likelihood of the batch, and the number of training examples it stands for."""
    if len(observed) != 1:
        raise InputError(f"expected labels: one observed site, found {len(observed)}; pass labels= to the model")
    site = observed[0]
    log_prob = site["fn"].log_prob(site["value"])
    return -log_prob.mean(), float(site["scale"]) * log_prob.numel()


def _plate_size(site: dict, kind: str, default: int) -> int:
    """Size of the site's plate over ``adapters``, ``columns`` or ``components``, or ``default`` outside one."""
    return next((f.size for f in site["cond_indep_stack"] if f.name.startswith(kind)), default)


def _total_adapters(sites: Iterable[dict]) -> int:
    """Adapters of all groups together."""
    plates = {f.name: f.size for s in sites for f in s["cond_indep_stack"] if f.name.startswith("adapters")}
    return sum(plates.values()) or 1
