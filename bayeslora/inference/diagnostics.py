"""Asks a fitted network what :mod:`bayeslora.analysis.tables.diagnostics` judges."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from bayeslora.adapters.arrival import check_reached
from bayeslora.adapters.drawing import one_at_a_time, using_draw
from bayeslora.adapters.modes import evaluation_mode
from bayeslora.analysis.tables import diagnostics as verdicts
from bayeslora.analysis.tables.diagnostics import Diagnostic
from bayeslora.data.batches import Collator
from bayeslora.data.checks import check_to_learn_from
from bayeslora.data.rows import check_kind
from bayeslora.errors import InputError
from bayeslora.guides import MeanFieldGuide, MixtureGuide
from bayeslora.inference.draws import as_tuned, draw_trace
from bayeslora.inference.predict import predict
from bayeslora.posterior import Posterior
from bayeslora.prediction import Prediction
from bayeslora.recorder import Recorder

RESTART_EXAMPLES = 100  # whose predictions are compared between restarts


def diagnose(
    bayes: Posterior,
    dataset: Any,
    *,
    restarts: Sequence[Posterior] = (),
    history: Sequence[Mapping[str, float]] = (),
    num_samples: int = 50,
    steps: int = 50,
    batch_size: int = 32,
    learning_rate: float = 0.02,
    seed: int = 0,
    progress: bool = False,
) -> list[Diagnostic]:
    """Judge a fitted posterior where there is no truth to compare it with.

    ====================  =====================================================================================
    ``pareto_k``          would importance sampling turn the guide's draws into the exact posterior's?
    ``restart_r_hat``     do ``restarts`` predict the same?
    ``convergence_...``   has the loss, and each part of the ELBO, settled in ``history``?
    ``data_drivenness``   would permuted labels change the noise?
    ``amortization_gap``  would v and α of each adapter on its own fit better? (for guides with v and α)
    ====================  =====================================================================================

    The last one refines v and α of every adapter for ``steps`` steps from where the guide is, with the network held
    fixed; ``bayes`` is afterwards what it was before. The cost is that of ``num_samples`` passes over the data, as many
    over at most 100 of its examples for each restart, and some 4 × ``steps`` training steps.

    Where a width was tuned (:meth:`bayeslora.BayesLoRA.tune`) it is left aside, in ``restarts`` too: what is judged is
    the posterior that was fitted, whose density the first answer needs.

    Args:
        bayes: The fitted module.
        dataset: What it was fitted to, encoded and labelled.
        restarts: The same fitted from other seeds; left out when there are none.
        history: The log of its run, ``fit(...).history`` or ``history`` in ``run.json``; left out when empty.
        num_samples: Draws behind ``pareto_k`` and ``restart_r_hat``, at least 25.
        steps: Batches behind ``data_drivenness``, and steps of the refinement.
        batch_size: Rows of a forward pass in prediction, examples of a batch in training.
        learning_rate: Of the refinement (Adam), falling linearly to 0.
        seed: Decides draws, batches and the permutation of the labels.
        progress: Show progress bars.

    Raises:
        InputError: for unlabelled data, data other than it was fitted to, too few draws, or plain LoRA (ε = 0).

    Example:
        >>> [answer.name for answer in diagnose(bayes, dataset, num_samples=25, steps=2)]
        ['pareto_k', 'data_drivenness', 'amortization_gap']
    """
    if bayes.monteclora_config.sample_scaler == 0:
        raise InputError("sample_scaler=0 is plain LoRA: it has no posterior to diagnose")
    if bayes.model.labelling.evaluates_labels:
        raise InputError("diagnose permutes labels among examples, and a text has no label but itself")
    if num_samples < 25 or steps < 1:
        raise InputError(f"num_samples must be at least 25 and steps at least 1, got {num_samples} and {steps}")
    check_kind(dataset)
    if bayes.num_examples not in (None, len(dataset)):
        raise InputError(
            f"the posterior is that of the {bayes.num_examples} examples it was fitted to, and this data set has "
            f"{len(dataset)}: pass the training set"
        )
    collate = check_to_learn_from(bayes.model, {"the data set": dataset}, batch_size)
    options: dict[str, Any] = {
        "num_samples": num_samples,
        "batch_size": batch_size,
        "seed": seed,
        "progress": progress,
    }
    with ExitStack() as as_fitted:
        for posterior in (bayes, *restarts):
            as_fitted.enter_context(as_tuned(posterior, None))
        prediction = predict(bayes, dataset, **options)
        answers = [verdicts.importance_sampling(_log_weights(bayes, prediction, seed))]
        if restarts:
            chosen = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:RESTART_EXAMPLES])
            few = [dataset[int(index)] for index in chosen]
            said = [predict(one, few, **options).sample_outputs for one in (bayes, *restarts)]
            answers.append(verdicts.restart_agreement(said))
        answers += verdicts.convergence(history)
        data = _Batches(bayes, dataset, collate, steps, batch_size, seed)
        answers.append(verdicts.data_drivenness(*_response_to_labels(bayes, data, seed)))
        if isinstance(bayes.guide, MixtureGuide):
            answers.append(verdicts.amortization_gap(*_refine(bayes, data, learning_rate, seed)))
    return answers


def log_importance_weights(
    bayes: Posterior, dataset: Any, *, num_samples: int = 100, batch_size: int = 32, seed: int = 0
) -> np.ndarray:
    """log p(y, π, Σ, A) − log q(π, Σ, A) at draws of the guide, in nats, shape ``(num_samples,)``.

    The posterior is that of the model given all of ``dataset``, whatever weight η the KL had in training, and the guide
    as it was fitted, without a tuned width.

    Raises:
        InputError: for unlabelled data.
    """
    options: dict[str, Any] = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed}
    with as_tuned(bayes, None):
        return _log_weights(bayes, predict(bayes, dataset, **options, progress=False), seed)


def _log_weights(bayes: Posterior, prediction: Prediction, seed: int) -> np.ndarray:
    if prediction.sample_log_likelihood is None:
        raise InputError("the data set has no labels: pass the training set")
    with one_at_a_time, torch.no_grad():
        ratios = [_log_ratio(bayes, seed, index) for index in range(len(prediction.sample_log_likelihood))]
    return prediction.sample_log_likelihood.sum(axis=1) + ratios


def _log_ratio(bayes: Posterior, seed: int, index: int) -> float:
    """log p(θ) − log q(θ) at the draw that :func:`bayeslora.inference.predict.predict` uses under this number."""
    sampled = {n: s for n, s in draw_trace(bayes, seed, index).nodes.items() if s["type"] == "sample"}
    guide = [site for site in sampled.values() if not site_is_subsample(site)]
    model = Recorder({name: site["value"] for name, site in sampled.items()})
    bayes.model.run(model)
    return _log_density(model.nodes.values()) - _log_density(guide)


def _log_density(sites: Any) -> float:
    return sum(float(site["fn"].log_prob(site["value"]).double().sum()) for site in sites)


class _Batches:
    """Shuffled batches of the data, ``count`` of them, each with its labels and with labels of other examples."""

    def __init__(self, bayes: Posterior, dataset: Any, collate: Collator, count: int, size: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        full = max(len(dataset) // size, 1)
        orders = [torch.randperm(len(dataset), generator=generator).split(size) for _ in range(-(-count // full))]
        self.indices = [batch for order in orders for batch in order[:full]][:count]
        self.examples = collate([dataset[i] for i in range(len(dataset))])
        self.permuted = bayes.model.labelling.permute(self.examples["labels"], generator)
        self.size = len(dataset)
        self._device = bayes.device

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Arguments of the module, and the permuted labels."""
        for batch in self.indices:
            arguments = {name: value[batch].to(self._device) for name, value in self.examples.items()}
            yield arguments, self.permuted[batch].to(self._device)


def _response_to_labels(bayes: Posterior, data: _Batches, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The arguments of :func:`bayeslora.analysis.tables.diagnostics.data_drivenness`; each batch has its own draw."""
    model, groups = bayes.model, bayes.model.groups
    gradients, curvatures = [], []
    with one_at_a_time, evaluation_mode(bayes), torch.enable_grad():
        for index, (inputs, permuted) in enumerate(data):
            labels = inputs.pop("labels")
            sites = {n: s["value"] for n, s in draw_trace(bayes, seed, index).nodes.items() if s["type"] == "sample"}
            drawn = model.matrices(sites)
            logs = [torch.zeros(len(group), 1, 1, device=group.device, requires_grad=True) for group in groups]
            scaled = {}
            for group, log_scale in zip(groups, logs, strict=True):
                mean = group.mean().detach()
                scaled[group.name] = mean + log_scale.exp() * (drawn[group.name] - mean)
            with using_draw(groups, scaled):
                logits = model.outputs(inputs)
            check_reached(groups)
            loss, other = (bayes.negative_log_likelihood(logits, y).mean() for y in (labels, permuted))
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(other - loss, logs)]))
            curvatures.append(_curvature(bayes, sites, data.size))
    gradient, curvature = (torch.stack(values).mean(0).cpu().numpy() for values in (gradients, curvatures))
    return gradient, curvature


@torch.no_grad()
def _curvature(bayes: Posterior, sites: Mapping[str, Tensor], num_examples: int) -> Tensor:
    """Second derivative of η·KL in the logarithm of each adapter's noise, ``(adapters,)``.

    The entropy is linear in it, and −log p(μ + e^t d) = const + e^{2t} (log p(μ) − log p(μ + d)).
    """
    config, prior = bayes.monteclora_config, Recorder(sites)
    bayes.model.run(prior)
    parts = []
    for group in bayes.model.groups:
        explicit = config.components == "explicit"
        site = prior.nodes[f"S_{group.name}" if explicit else f"A_{group.name}"]
        mean = torch.zeros_like(site["value"]) if explicit else bayes.model.mean(group)
        quadratic = site["fn"].log_prob(mean) - site["fn"].log_prob(site["value"])  # ([N,] adapters, columns)
        by_adapter = quadratic.reshape(-1, len(group), group.columns).transpose(0, 1).flatten(1)
        if config.normalization == "elbo":
            parts.append(by_adapter.sum(-1) / num_examples)
        else:
            parts.append(by_adapter.mean(-1) * config.num_components / len(bayes.adapter_names))
    assert config.kl_weight is not None  # resolved by the config itself
    return 4 * config.kl_weight * torch.cat(parts)


def _refine(bayes: Posterior, data: _Batches, rate: float, seed: int) -> tuple[list[float], list[float]]:
    """The objective of every batch with the guide's own v and α, and with each adapter's refined from there."""
    refined = _own_parameters(bayes).to(bayes.device)
    with _in_place_of_the_guide(bayes, refined):
        before = _losses(bayes, data, seed)
        optimizer = torch.optim.Adam(refined.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(data.indices))
        with torch.enable_grad():
            for batch, _ in data:
                optimizer.zero_grad()
                bayes(**batch).loss.backward()
                optimizer.step()
                schedule.step()
        return before, _losses(bayes, data, seed)


def _losses(bayes: Posterior, data: _Batches, seed: int) -> list[float]:
    torch.manual_seed(seed)
    with torch.no_grad():
        return [float(bayes(**batch).loss) for batch, _ in data]


@contextmanager
def _in_place_of_the_guide(bayes: Posterior, guide: nn.Module) -> Iterator[None]:
    """Inside, the module's objective is that of ``guide``, which alone is trained, without dropout."""
    own, fixed = bayes.guide, [*bayes.network.parameters(), *bayes.model.parameters()]
    trained = [parameter.requires_grad for parameter in fixed]
    with one_at_a_time, evaluation_mode(bayes), torch.random.fork_rng():
        for parameter in fixed:
            parameter.requires_grad_(False)
        bayes.guide = guide
        bayes.training = True  # the objective, but no dropout
        try:
            yield
        finally:
            bayes.guide = own
            for parameter, requires_grad in zip(fixed, trained, strict=True):
                parameter.requires_grad_(requires_grad)


@torch.no_grad()
def _own_parameters(bayes: Posterior) -> MeanFieldGuide:
    """Free v and α for every adapter, at what the guide says."""
    refined = MeanFieldGuide(bayes.model)
    for group in bayes.model.groups:
        for own, shared in zip(
            refined.variational_parameters(group), bayes.guide.variational_parameters(group), strict=True
        ):
            own.copy_(shared)
    return refined
