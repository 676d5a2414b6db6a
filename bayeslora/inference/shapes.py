r"""Which way the noise of a finished adapter points: a covariance of the rows of A, the same for all its columns.

=============  ========================================================================================================
``isotropic``  Σ ∝ I. Width 1 is noise as large as each layer's own A.
``output``     Σ ∝ (BᵀB)⁻¹: every direction of the output has the same noise, in all layers. Width 1 is as much in the
               outputs, in the mean square over layers, as isotropic noise of width 1 is.
``curvature``  Σ ∝ (BᵀGB + λI)⁻¹, with G the covariance of the gradients of log p(y | x) at the layer's output: the
               row factor of a Laplace approximation. λ is a tenth of the mean of BᵀGB's diagonal. Width 1 is as much in
               each layer's output as isotropic noise of width 1 is.
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
from bayeslora.adapters.groups import AdapterGroup
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
    """Noise of one size in the outputs of all layers."""
    groups = tuple(groups)
    grams = {group.name: _grams(group) for group in groups}
    factors = {name: _inverse_factors(each, LEAST) for name, each in grams.items()}
    sizes = {name: _gain(factors[name], each) for name, each in grams.items()}
    even = {group.name: group.mean_scale() * _gain(None, grams[group.name]) for group in groups}
    trained = torch.cat([*sizes.values()]) > 0  # elsewhere B is zero, and no noise counts
    size = torch.cat([*even.values()])[trained].square().mean().sqrt()
    deviations = {
        group.name: torch.where(sizes[group.name] > 0, size / sizes[group.name], group.mean_scale()) for group in groups
    }
    return Shape(factors, deviations)


def curvature_shape(model: JointModel, dataset: Any, *, batch_size: int, seed: int) -> Shape:
    """The row factor of a Laplace approximation."""
    covariances = gradient_covariances(model, dataset, batch_size=batch_size, seed=seed)
    factors, deviations = {}, {}
    with torch.no_grad():
        for group in model.groups:
            grams, factor = _grams(group), _inverse_factors(covariances[group.name], DAMPING)
            ratio = _gain(None, grams) / _gain(factor, grams)
            factors[group.name] = factor
            deviations[group.name] = group.mean_scale() * ratio.nan_to_num(1.0)  # B is zero
    return Shape(factors, deviations)


def _grams(group: AdapterGroup) -> Tensor:
    """BᵀB of every adapter, ``(adapters, r, r)``, in float64."""
    matrices: list[Any] = [adapter.layer.lora_B[adapter.key].weight for adapter in group.adapters]
    return torch.stack([(b.double().mT @ b.double()).to(group.device) for b in matrices])


def _gain(factors: Tensor | None, grams: Tensor) -> Tensor:
    """Root mean square over the rank of the output of noise Fz, for z of variance 1: ``(adapters,)``."""
    turned = grams if factors is None else factors.double().mT @ grams @ factors.double()
    return turned.diagonal(dim1=-2, dim2=-1).mean(-1).sqrt().float()


def _inverse_factors(precisions: Tensor, damping: float) -> Tensor:
    """F with FFᵀ ∝ (precision + λI)⁻¹ and a mean of 1 on its diagonal; the identity for a precision of zero."""
    identity = torch.eye(precisions.shape[-1], dtype=torch.float64, device=precisions.device)
    sizes = precisions.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    scaled = torch.where(sizes > 0, precisions / sizes + damping * identity, identity)
    inverses = torch.cholesky_inverse(torch.linalg.cholesky(scaled))
    means = inverses.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return torch.linalg.cholesky(inverses / means).float()


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
    network = model.network
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
                labels = model.labelling.simulate(outputs.detach(), labels, generator)
                loss = _log_likelihood(model, outputs, labels)
                _add_squares(totals, model.groups, probes, loss)
    return {name: total / len(dataset) for name, total in totals.items()}


def _log_likelihood(model: JointModel, outputs: Tensor, labels: Tensor | None) -> Tensor:
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
                    total += (rows.mT @ rows).to(total.device)
