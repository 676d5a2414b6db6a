r"""Which way the noise of a finished adapter points: a covariance of the rows of A, the same for all its columns.

=============  ========================================================================================================
``isotropic``  Σ ∝ I, of a size in units of each layer's own A.
``output``     Σ ∝ (BᵀB)⁻¹, of one size for all layers: every direction of the layer's output gets the same noise.
``curvature``  Σ ∝ (BᵀGB + λI)⁻¹, in units of each layer's own A, with G the covariance of the gradients of
               log p(y | x) at the layer's output: the row factor of a Laplace approximation. λ is a tenth of the mean
               of BᵀGB's diagonal.
=============  ========================================================================================================

References:
    Shi et al. (2024), *Training-Free Bayesianization for Low-Rank Adapters of Large Language Models*, section 4 (the
    shape ``output``: with B = U diag(d) Vᵀ it is noise of standard deviation σ/d_i on row i of VᵀA).
    Ritter et al. (2018), *A Scalable Laplace Approximation for Neural Networks*; Yang et al. (2024), *Bayesian Low-rank
    Adaptation for Large Language Models* (Kronecker factors of a LoRA's curvature).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from bayeslora.adapters.drawing import clear_draw
from bayeslora.adapters.groups import Adapter, AdapterGroup
from bayeslora.adapters.modes import evaluation_mode, without_cache
from bayeslora.data.checks import read_examples
from bayeslora.models.joint import JointModel

SHAPES = ("isotropic", "output", "curvature")
DAMPING = 0.1  # λ, as a share of the mean of the diagonal
LEAST = 1e-6  # the same for BᵀB, which is singular where B has fewer outputs than rows, or lost a direction


class Shape(NamedTuple):
    """Group name to F, ``(adapters, r, r)``, with a mean of 1 on FFᵀ's diagonal, and to the standard deviation of an
    entry of A − μ at width 1, ``(adapters,)``."""

    factors: dict[str, Tensor]
    deviations: dict[str, Tensor]


def isotropic_shape(groups: Iterable[AdapterGroup]) -> Shape:
    """Noise in units of each layer's μ."""
    groups = tuple(groups)
    identities = {g.name: torch.eye(g.rank, device=g.device).repeat(len(g), 1, 1) for g in groups}
    return Shape(identities, {group.name: group.mean_scale() for group in groups})


@torch.no_grad()
def output_shape(groups: Iterable[AdapterGroup]) -> Shape:
    """Noise of one size in the outputs of all layers, such that A − μ and μ have the same mean square over layers."""
    groups = tuple(groups)
    found = {group.name: [_inverse_factor(_gram(adapter), LEAST) for adapter in group.adapters] for group in groups}
    sizes = {name: torch.stack([size for _, size in each]) for name, each in found.items()}
    own = {group.name: group.mean_scale() for group in groups}
    trained = {name: size.isfinite() for name, size in sizes.items()}  # elsewhere B is zero, and no noise counts
    both = [torch.cat([each[name][trained[name]] for name in sizes]) for each in (own, sizes)]
    ratio = both[0].square().mean().sqrt() / both[1].square().mean().sqrt()
    deviations = {name: torch.where(trained[name], ratio * sizes[name], own[name]) for name in sizes}
    return Shape({name: torch.stack([factor for factor, _ in each]) for name, each in found.items()}, deviations)


def curvature_shape(model: JointModel, dataset: Any, *, batch_size: int, seed: int) -> Shape:
    """The row factor of a Laplace approximation, in units of each layer's μ."""
    covariances = gradient_covariances(model, dataset, batch_size=batch_size, seed=seed)
    factors = {}
    for group in model.groups:
        each = [_inverse_factor(covariance, DAMPING)[0] for covariance in covariances[group.name]]
        factors[group.name] = torch.stack(each)
    return Shape(factors, isotropic_shape(model.groups).deviations)


def _gram(adapter: Adapter) -> Tensor:
    """BᵀB, ``(r, r)``."""
    matrix = adapter.layer.lora_B[adapter.key].weight.double()  # type: ignore[index, union-attr]
    return matrix.mT @ matrix


def _inverse_factor(precision: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """F with FFᵀ ∝ (precision + λI)⁻¹, and the root of the mean of that inverse's diagonal; the identity and infinity
    for a precision of zero."""
    rank, size = len(precision), precision.diagonal().mean()
    identity = torch.eye(rank, dtype=torch.float64, device=precision.device)
    if not size > 0:
        return identity.float(), size.new_tensor(torch.inf).float()
    scaled = precision / size + damping * identity
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(scaled))
    mean = inverse.diagonal().mean()
    return torch.linalg.cholesky(inverse / mean).float(), (mean / size).sqrt().float()


def gradient_covariances(model: JointModel, dataset: Any, *, batch_size: int = 32, seed: int = 0) -> dict[str, Tensor]:
    r"""BᵀGB of every adapter: the mean over examples of :math:`\sum_t g_t g_t^\top`, with g the gradient of
    log p(y | x) at the output of ``lora_A`` for token t. Where labels are classes, y is drawn from the network's own
    prediction: it is then a block of the Fisher information, and no label is looked at.

    Args:
        model: Whose network and likelihood these are; at the mean.
        dataset: Encoded examples; labelled, unless labels are classes.
        batch_size, seed: Of the passes, and of the labels that are drawn.

    Returns:
        Group name to ``(adapters, r, r)``, in float64.
    """
    network, drawn = model.network, model.labelling.of_classes
    clear_draw(model.groups)
    examples, device = read_examples(model, dataset), model.groups[0].device
    totals = {g.name: torch.zeros(len(g), g.rank, g.rank, dtype=torch.float64, device=device) for g in model.groups}
    generator = torch.Generator().manual_seed(seed)
    with evaluation_mode(network), without_cache(network), torch.enable_grad(), pyro.validation_enabled(False):
        for batch in examples.batches(batch_size)[0]:
            inputs = examples.collate(batch).to(device)
            labels = inputs.pop("labels", None)
            with _probing(model.groups) as probes:
                outputs = model.outputs(inputs, labels)
                if drawn:
                    probs = outputs.detach().softmax(-1, torch.float64).cpu()
                    labels = torch.multinomial(probs, 1, generator=generator)[:, 0].to(device)
                loss = _log_likelihood(model, outputs, labels)
                _add_squares(totals, model.groups, probes, loss)
    return {name: total / len(dataset) for name, total in totals.items()}


def _log_likelihood(model: JointModel, outputs: Tensor, labels: Tensor) -> Tensor:
    site = pyro.poutine.trace(model.likelihood.forward).get_trace(outputs, labels).nodes["labels"]
    return site["fn"].log_prob(site["value"]).sum()


@contextmanager
def _probing(groups: Iterable[AdapterGroup]) -> Iterator[Mapping[str, list[Tensor]]]:
    """Inside, zeros are added to what each ``lora_A`` returns, whose gradients are its output's."""
    probes: dict[str, list[Tensor]] = {}

    def probe(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            zeros = torch.zeros_like(output, requires_grad=True)
            probes.setdefault(name, []).append(zeros)
            return output + zeros

        return hook

    with ExitStack() as hooks:
        for adapter in (adapter for group in groups for adapter in group.adapters):
            handle = adapter.lora_A.register_forward_hook(probe(adapter.name))
            hooks.callback(handle.remove)
        yield probes


def _add_squares(
    totals: Mapping[str, Tensor], groups: Iterable[AdapterGroup], probes: Mapping[str, list[Tensor]], loss: Tensor
) -> None:
    every = [zeros for each in probes.values() for zeros in each]
    gradients = iter(torch.autograd.grad(loss, every, allow_unused=True))
    by_name = {name: [next(gradients) for _ in each] for name, each in probes.items()}
    for group in groups:
        for total, adapter in zip(totals[group.name], group.adapters, strict=True):
            for gradient in by_name.get(adapter.name, []):
                if gradient is not None:
                    rows = gradient.flatten(0, -2).double()
                    total += rows.mT @ rows
