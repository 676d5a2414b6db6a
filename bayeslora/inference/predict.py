"""Posterior predictive: average over whole networks, each one coherent draw of all adapters."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from bayeslora.adapters.drawing import check_reached, using_draw
from bayeslora.adapters.groups import AdapterGroup
from bayeslora.adapters.modes import evaluation_mode, is_compiled, without_cache
from bayeslora.analysis.metrics.uncertainty import mutual_information, predictive_entropy
from bayeslora.data.batches import Batch, Collator, pad_token
from bayeslora.data.checks import read_examples
from bayeslora.errors import InputError
from bayeslora.inference.prefix import MAX_KEPT_BYTES, Prefix
from bayeslora.models import GaussianLikelihood, Likelihood, NextTokenLikelihood
from bayeslora.posterior import Posterior
from bayeslora.recorder import Recorder

Array = Any  # a numpy array, or None where the task has no such thing


@dataclass(frozen=True)
class Prediction:
    """Posterior predictive of n examples; numpy arrays, float64 where they are averaged.

    Classification (C classes): ``probs`` (n, C), the mean of the draws' probabilities; ``entropy`` (n,) of ``probs``
    and ``mutual_information`` (n,) between label and draw, in nats; ``sample_log_probs`` (S, n, C).
    Regression: ``mean`` (n,), ``std`` (n,) of the predictive including the noise; ``sample_means`` (S, n);
    ``noise_scale``, the likelihood's σ. Texts: ``text_log_likelihood`` (S, n) of their scored tokens, in nats, and
    ``num_tokens`` (n,), how many those are. Fields of other tasks, and draws that were not kept, are ``None``.
    ``labels`` (n,) is ``None`` for unlabelled data, and for texts. S is 1 at the mean (``num_samples=0``).
    """

    labels: Array
    label_names: tuple[str, ...] | None = None
    probs: Array = None
    entropy: Array = None
    mutual_information: Array = None
    sample_log_probs: Array = field(default=None, repr=False)
    mean: Array = None
    std: Array = None
    sample_means: Array = field(default=None, repr=False)
    noise_scale: float | None = None
    text_log_likelihood: Array = field(default=None, repr=False)
    num_tokens: Array = None

    @property
    def text_log_predictive(self) -> Array:
        """log p of each text under the posterior predictive, one draw for a whole text, in nats, (n,)."""
        if self.text_log_likelihood is None:
            return None
        return np.logaddexp.reduce(self.text_log_likelihood, axis=0) - np.log(len(self.text_log_likelihood))

    @property
    def nats_per_token(self) -> float | None:
        """−log p of all texts under the posterior predictive, over the number of their scored tokens."""
        if self.text_log_likelihood is None:
            return None
        return float(-self.text_log_predictive.sum() / self.num_tokens.sum())

    @property
    def perplexity(self) -> float | None:
        """exp of :attr:`nats_per_token`."""
        nats = self.nats_per_token
        return None if nats is None else float(np.exp(nats))

    @property
    def sample_probs(self) -> Array:
        """Probabilities of every draw, (S, n, C)."""
        return None if self.sample_log_probs is None else np.exp(self.sample_log_probs)

    @property
    def sample_log_likelihood(self) -> Array:
        """log p(y_i | draw s) in nats, (S, n); ``None`` without labels or draws. Of a text: the sum over its tokens."""
        if self.text_log_likelihood is not None:
            return self.text_log_likelihood
        if self.labels is None:
            return None
        if self.sample_log_probs is not None:
            return self.sample_log_probs[:, np.arange(len(self.labels)), self.labels.astype(int)]
        if self.sample_means is not None and self.noise_scale is not None:
            standard = (self.labels - self.sample_means) / self.noise_scale
            return -(standard**2) / 2 - np.log(self.noise_scale) - np.log(2 * np.pi) / 2
        return None


@dataclass(frozen=True)
class PosteriorDraws:
    """S draws of K adapters: ``mixture_weights`` (S, K, N), ``covariance`` Σ (S, K, r, r), padded with NaN where
    ranks differ, ``noise_scale`` (S, K), the root mean square of A − μ, ``mean_scale`` (K,), that of μ, and
    ``A``, by adapter name, each (S, r, n_in)."""

    adapters: list[str]
    mixture_weights: np.ndarray
    covariance: np.ndarray
    noise_scale: np.ndarray
    mean_scale: np.ndarray
    A: dict[str, np.ndarray]


def predict(
    bayes: Posterior,
    dataset: Any,
    *,
    num_samples: int = 16,
    batch_size: int = 32,
    seed: int | None = 0,
    keep_draws: bool = True,
    progress: bool = True,
    first_draw: int = 0,
    prior: bool = False,
    noise_factor: float = 1.0,
    antithetic: bool = False,
) -> Prediction:
    """Average the predictive over draws of the posterior.

    Args:
        bayes: The fitted module; its training mode is restored afterwards.
        dataset: Encoded examples, numbered rows that are dicts, such as a ``datasets.Dataset``, a list or torch's
            ``Subset``; ``labels`` (or ``label``) are optional. See :mod:`bayeslora.data.checks`.
        num_samples: S; each draw is one network for all examples. 0 runs the posterior mean instead.
        batch_size: Rows of one forward pass, examples times draws: a batch of fewer examples is run for several draws
            at once, where the network keeps its examples in rows. Changes memory and speed, not the result beyond
            rounding (1e-6 in the probabilities of a float32 network).
        seed: Draw s is the same for any S, batch size and data set with the same seed. ``None`` for fresh draws.
        keep_draws: Keep every draw's output, ``S × n × C`` numbers.
        progress: Show a progress bar.
        first_draw: Use the draws ``first_draw .. first_draw + num_samples - 1`` of ``seed``, to go on in blocks.
        prior: Draw from the prior around the means that the network has now, instead of the posterior.
        noise_factor: Multiplies every draw's A − μ: below 1 the draws lie closer to the mean than the posterior's.
        antithetic: Draw in mirrored pairs: draw 2k is the same as without, and draw 2k + 1 is its image 2μ − A, as
            likely under the posterior. Averages have less Monte Carlo error, as what is odd in A − μ cancels
            (Hammersley and Morton 1956, *A new Monte Carlo technique: antithetic variates*); a pair is dependent.

    Whatever the network computes before its first adapter is computed once for all draws of a batch
    (:mod:`bayeslora.inference.prefix`).

    Raises:
        InputError: for an empty data set, a row that the network cannot read, texts without labels, a negative number
            of draws, ``antithetic`` with a guide that does not promise symmetry (``symmetric_rows``), or a layer that a
            draw does not reach.
    """
    if num_samples < 0:
        raise InputError(f"num_samples must be 0 (the mean network) or more, got {num_samples}")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if antithetic and not prior and not getattr(bayes.guide, "symmetric_rows", False):
        raise InputError(f"antithetic draws need a posterior that is symmetric about its mean, and "
                         f"{type(bayes.guide).__name__} does not promise it: leave antithetic out, or set "
                         "symmetric_rows = True on the guide if no row's sign matters to it")  # fmt: skip
    copies = 1
    if bayes.monteclora_config.sample_scaler == 0:  # plain LoRA: every draw is the mean network
        num_samples, copies = 0, max(num_samples, 1)
    is_text = isinstance(bayes.model.likelihood, NextTokenLikelihood)
    examples = read_examples(bayes, dataset)
    batches, order = examples.batches(batch_size)
    outputs: list[Tensor] = []
    targets: list[Tensor | None] = []
    with evaluating(bayes):
        draws = Draws(bayes, num_samples, seed, first=first_draw, prior=prior, noise_factor=noise_factor,
                      antithetic=antithetic)  # fmt: skip
        for logits, target in run_batches(bayes, batches, examples.collate, draws, batch_size, progress):
            outputs.append(logits)
            targets.append(target if target is None or target.dim() == 1 or not is_text else None)
    labelled = [target.cpu() for target in targets if target is not None]
    labels = torch.cat(labelled).numpy()[order] if len(labelled) == len(targets) else None
    drawn = torch.cat(outputs, 1).numpy()[:, order]  # (S, n, C)
    return _summarize(bayes, np.repeat(drawn, copies, axis=0), labels, keep_draws)


def run_batches(
    bayes: Posterior, batches: Sequence[Sequence[dict[str, Any]]], collate: Collator, draws: "Draws",
    batch_size: int, progress: bool,
) -> Iterator[tuple[Tensor, Tensor | None]]:  # fmt: skip
    """Logits of each batch under every draw, ``(draws, n, C)`` (the mean's, if there is no draw), and its labels."""
    prefix = Prefix(bayes.network, bayes.model.groups, bayes.model.outputs)
    with _progress(len(batches) * max(draws.count, 1), progress) as bar:
        for batch in batches:
            inputs = collate(batch).to(bayes.network.device)
            labels = inputs.pop("labels", None)
            parts = []
            for part in _outputs(bayes, inputs, labels, draws, prefix, batch_size):
                parts.append(part.float().cpu())
                bar.update(len(part))
            yield torch.cat(parts), labels


def _outputs(
    bayes: Posterior, inputs: "Batch", labels: Tensor | None, draws: "Draws", prefix: Prefix, batch_size: int
) -> Iterator[Tensor]:
    """One batch under every draw, or at the mean: shapes ``(draws, n, C)``, as many draws as fit at a time."""
    if draws.count == 0:
        yield bayes.model.outputs(inputs, labels).unsqueeze(0)
        return
    together = _draws_together(bayes, inputs, draws, batch_size)
    prefix.run(inputs, repeat=together > 1)
    for start in range(0, draws.count, together):
        count = min(together, draws.count - start)
        repeated = {name: torch.cat([value] * count) for name, value in inputs.items()}
        with using_draw(bayes.model.groups, draws.weights(start, count)), prefix.reused(count):
            outputs = bayes.model.outputs(repeated, None if labels is None else torch.cat([labels] * count))
        check_reached(bayes.model.groups)
        yield outputs.unflatten(0, (count, -1))


def _draws_together(bayes: Posterior, inputs: "Batch", draws: "Draws", batch_size: int) -> int:
    """How many draws one forward pass takes."""
    examples = len(next(iter(inputs.values())))
    fitting = min(batch_size // examples, draws.count, MAX_KEPT_BYTES // draws.bytes_each)
    without_padding = "input_ids" in inputs and pad_token(bayes.network) is None
    if fitting < 2 or without_padding:  # transformers' decoders then take one row only
        return 1
    if is_compiled(bayes.network):  # other shapes would be other graphs
        return 1
    return fitting if bayes.rows_are_examples(inputs) else 1


class Draws:
    """A of every adapter in ``count`` draws: kept where they take up to a GiB, else drawn anew for every use.

    They are those from number ``first`` on, of the posterior or of the ``prior``, with A − μ times ``noise_factor``.
    If ``antithetic``, each draw of an odd number is the mirror image of the one before it.
    """

    def __init__(
        self, bayes: Posterior, count: int, seed: int | None, *, first: int = 0, prior: bool = False,
        noise_factor: float = 1.0, antithetic: bool = False,
    ):  # fmt: skip
        self.bayes, self.count, self.first = bayes, count, first
        self.noise_factor, self.antithetic = noise_factor, antithetic
        self.draw_sites = prior_sites if prior else posterior_sites
        self.seed = int(torch.randint(2**62, ())) if seed is None and count else seed
        self.bytes_each = sum(group.mean().nbytes for group in bayes.model.groups)
        self.kept = self._draw(range(count)) if 0 < count * self.bytes_each <= MAX_KEPT_BYTES else None

    def weights(self, start: int, count: int) -> dict[str, Tensor]:
        """Group name to A of consecutive draws, as :func:`bayeslora.adapters.drawing.set_draw` takes them."""
        if self.kept is None:
            drawn = self._draw(range(start, start + count))
        else:
            drawn = {name: values[start : start + count] for name, values in self.kept.items()}
        return drawn if count > 1 else {name: values[0] for name, values in drawn.items()}

    def _draw(self, indices: range) -> dict[str, Tensor]:
        model = self.bayes.model
        numbers = [self.first + index for index in indices]
        mirrored = [self.antithetic and number % 2 == 1 for number in numbers]
        sources = [number - mirror for number, mirror in zip(numbers, mirrored, strict=True)]
        found = {number: model.matrices(self.draw_sites(self.bayes, self.seed, number)) for number in set(sources)}
        drawn = {g.name: torch.stack([found[number][g.name] for number in sources]) for g in model.groups}
        if self.noise_factor != 1 or any(mirrored):
            factors = [-self.noise_factor if mirror else self.noise_factor for mirror in mirrored]
            for group in model.groups:
                mean, values = group.mean(), drawn[group.name]
                drawn[group.name] = torch.lerp(mean, values, values.new_tensor(factors)[:, None, None, None])
        return drawn


def _summarize(bayes: Posterior, logits: np.ndarray, labels: np.ndarray | None, keep: bool) -> Prediction:
    likelihood = bayes.model.likelihood
    if isinstance(likelihood, NextTokenLikelihood):
        return Prediction(None, text_log_likelihood=logits[..., 0].astype(np.float64), num_tokens=logits[0, :, 1])
    if isinstance(likelihood, GaussianLikelihood):
        means = logits.reshape(logits.shape[0], -1).astype(np.float64)
        noise = float(likelihood.scale.detach())
        return Prediction(
            labels,
            mean=means.mean(0),
            std=np.sqrt(means.var(0) + noise**2),
            sample_means=means if keep else None,
            noise_scale=noise,
        )
    if labels is not None and (labels == -1).all():  # how official test splits say that they have none
        labels = None
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    probs = np.exp(log_probs).mean(0)
    of_names = likelihood if isinstance(likelihood, Likelihood) else Likelihood()
    return Prediction(
        labels,
        of_names.label_names(bayes.network),
        probs,
        predictive_entropy(probs),
        mutual_information(np.exp(log_probs)),
        log_probs if keep else None,
    )


def sample_sites(
    bayes: Posterior, num_samples: int, seed: int | None, *, first_draw: int = 0, prior: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Draws of the model's sites from the guide or the prior, one at a time; draw s depends on (seed, s) alone."""
    if num_samples < 1:
        raise InputError(f"num_samples must be at least 1, got {num_samples}")
    for index in range(first_draw, first_draw + num_samples):
        yield prior_sites(bayes, seed, index) if prior else posterior_sites(bayes, seed, index)


def prior_sites(bayes: Posterior, seed: int | None, index: int) -> dict[str, Tensor]:
    """Values of the model's sites in draw ``index`` from the prior."""
    recorder = Recorder()
    with torch.no_grad(), seeded(seed, index), bayes.model.full_precision():
        bayes.model.run(recorder)
    return recorder.values()


def posterior_sites(bayes: Posterior, seed: int | None, index: int) -> dict[str, Tensor]:
    """Values of the model's sites in draw ``index`` from the guide."""
    names = {f"{kind}_{g.name}" for g in bayes.model.groups for kind in ("pi", "sigma_tril", "A", "S")}
    return {name: site["value"] for name, site in draw_trace(bayes, seed, index).nodes.items() if name in names}


def draw_trace(bayes: Posterior, seed: int | None, index: int) -> pyro.poutine.Trace:
    """Pyro's trace of the guide in draw ``index``, as every function here draws it."""
    with torch.no_grad(), seeded(seed, index), pyro.validation_enabled(False):
        return pyro.poutine.trace(bayes.guide.forward).get_trace()


@torch.no_grad()
def posterior_draws(
    bayes: Posterior, *, num_samples: int, seed: int | None, adapters: Sequence[str] = (), first_draw: int = 0
) -> PosteriorDraws:
    """See :meth:`bayeslora.BayesLoRA.posterior_draws`."""
    return collect_draws(bayes, sample_sites(bayes, num_samples, seed, first_draw=first_draw), adapters)


@torch.no_grad()
def collect_draws(bayes: Posterior, draws: Iterable[dict[str, Tensor]], adapters: Sequence[str] = ()) -> PosteriorDraws:
    """Values of the model's sites, draw by draw, as arrays per adapter, with A itself for the named ``adapters``."""
    unknown = sorted(set(adapters) - set(bayes.adapter_names))
    if unknown:
        raise InputError(f"no adapter {unknown[0]!r}; there are {', '.join(bayes.adapter_names)}")
    weights: list[np.ndarray] = []
    covariances: list[np.ndarray] = []
    scales: list[np.ndarray] = []
    matrices: dict[str, list[np.ndarray]] = {name: [] for name in adapters}
    rank = max(group.rank for group in bayes.model.groups)
    for sites in draws:
        drawn = bayes.model.matrices(sites)
        per_group = [_group_arrays(group, sites, drawn[group.name], rank) for group in bayes.model.groups]
        for collected, parts in zip((weights, covariances, scales), zip(*per_group, strict=True), strict=True):
            collected.append(np.concatenate(parts))
        for group in bayes.model.groups:
            for adapter, matrix in zip(group.adapters, drawn[group.name], strict=True):
                if adapter.name in matrices:
                    matrices[adapter.name].append(matrix.mT.cpu().numpy())
    means = [group.mean_scale() for group in bayes.model.groups]
    return PosteriorDraws(
        bayes.adapter_names,
        np.stack(weights),
        np.stack(covariances),
        np.stack(scales),
        torch.cat(means).cpu().numpy(),
        {name: np.stack(matrix) for name, matrix in matrices.items()},
    )


def _group_arrays(group: AdapterGroup, sites: dict[str, Tensor], drawn: Tensor, rank: int):
    """π, Σ padded to ``rank`` and the root mean square of A − μ of one group, adapters first."""
    pi, factor = sites[f"pi_{group.name}"][:, 0], sites[f"sigma_tril_{group.name}"][:, 0]
    covariance = factor @ factor.mT
    noise = (drawn - group.mean()).square().mean((-2, -1)).sqrt()
    missing = rank - group.rank
    padded = torch.nn.functional.pad(covariance, (0, missing, 0, missing), value=float("nan"))
    return pi.cpu().numpy(), padded.cpu().numpy(), noise.cpu().numpy()


@contextmanager
def evaluating(bayes: Posterior) -> Iterator[None]:
    """No gradients, no dropout and no cache of keys and values inside."""
    with without_cache(bayes.network), evaluation_mode(bayes), torch.inference_mode():
        yield


@contextmanager
def seeded(seed: int | None, index: int) -> Iterator[None]:
    """The generator of draw ``index`` inside, the caller's own outside."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1))
        yield


def _progress(total: int, show: bool) -> Any:
    return tqdm(total=total, desc="predict", unit="batch", disable=None if show else True, leave=False)
