"""Draws of all adapters: one coherent network each, the same wherever its number and seed are the same."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyro
import torch
from torch import Tensor

from bayeslora.adapters.arrival import check_reached
from bayeslora.adapters.drawing import one_at_a_time, using_draw
from bayeslora.adapters.groups import AdapterGroup
from bayeslora.adapters.modes import evaluation_mode, without_cache
from bayeslora.distributed import refuse_sharded
from bayeslora.errors import InputError
from bayeslora.inference.prefix import MAX_KEPT_BYTES
from bayeslora.models.tuning import Tuning
from bayeslora.posterior import Posterior
from bayeslora.recorder import Recorder


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


class Networks(Protocol):
    """``count`` networks that differ in A alone, of ``bytes_each``."""

    count: int
    bytes_each: int

    def matrices(self, start: int, count: int) -> dict[str, Tensor]:
        """Group name to A of consecutive networks, as :func:`bayeslora.adapters.drawing.set_draw` takes them."""
        ...


class Draws:
    """A of every adapter in ``count`` draws: kept where they take up to a GiB, else drawn anew for every use.

    They are those from number ``first`` on, of the posterior or of the ``prior``, with A − μ times ``noise_factor``.
    If ``antithetic``, each draw of an odd number is the mirror image of the one before it.
    """

    def __init__(
        self,
        bayes: Posterior,
        count: int,
        seed: int | None,
        *,
        first: int = 0,
        prior: bool = False,
        noise_factor: float = 1.0,
        antithetic: bool = False,
    ):
        self.bayes, self.count, self.first = bayes, count, first
        self.noise_factor, self.antithetic = noise_factor, antithetic
        self.draw_sites = prior_sites if prior else posterior_sites
        self.seed = int(torch.randint(2**62, ())) if seed is None and count else seed
        self.bytes_each = sum(group.mean().nbytes for group in bayes.model.groups)
        self.kept = self._draw(range(count)) if 0 < count * self.bytes_each <= MAX_KEPT_BYTES else None

    def matrices(self, start: int, count: int) -> dict[str, Tensor]:
        """See :meth:`Networks.matrices`."""
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
        by_number = {number: model.matrices(self.draw_sites(self.bayes, self.seed, number)) for number in set(sources)}
        drawn = {g.name: torch.stack([by_number[number][g.name] for number in sources]) for g in model.groups}
        if self.noise_factor != 1 or any(mirrored):
            factors = [-self.noise_factor if mirror else self.noise_factor for mirror in mirrored]
            for group in model.groups:
                mean, values = group.mean(), drawn[group.name]
                drawn[group.name] = torch.lerp(mean, values, values.new_tensor(factors)[:, None, None, None])
        return drawn


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
    """No gradients, no dropout and no cache of keys and values inside.

    Raises:
        InputError: where an engine has taken the matrices apart that draws are made of.
    """
    refuse_sharded(bayes.model.groups)
    with without_cache(bayes.network), evaluation_mode(bayes), torch.inference_mode():
        yield


@contextmanager
def as_tuned(bayes: Posterior, tuning: Tuning | None) -> Iterator[None]:
    """Inside, draws are as this says; as they were fitted if None."""
    before, bayes.model.tuning = bayes.model.tuning, tuning
    try:
        yield
    finally:
        bayes.model.tuning = before


@contextmanager
def seeded(seed: int | None, index: int) -> Iterator[None]:
    """The generator of draw ``index`` inside, the caller's own outside."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1))
        yield


def run_as(bayes: Posterior, matrices: dict[str, Tensor] | None, run: Callable[[], Any]) -> Any:
    """What ``run`` returns under these draws; at the mean if None. What is not drawn need not run."""
    if matrices is None:
        return run()
    parts = bayes.model.drawn_groups()
    groups = tuple(group for group, _ in parts)
    with using_draw(groups, {g.name: _of(matrices[g.name], places) for g, places in parts}):
        output = run()
    check_reached(groups)
    return output


def _of(matrices: Tensor, places: list[int]) -> Tensor:
    """Those of some adapters, of ``(..., adapters, columns, r)``."""
    return matrices if len(places) == matrices.shape[-3] else matrices[..., places, :, :]


@contextmanager
def running_as(bayes: Posterior, matrices: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the network is this draw; afterwards it must have reached every layer, if the network ran."""
    ran: list[bool] = []
    hook = bayes.network.get_base_model().register_forward_hook(lambda *_: ran.append(True))
    try:
        with one_at_a_time, using_draw(bayes.model.groups, matrices):
            yield
            taken = any(a.lora_A.draw.weight is None for group in bayes.model.groups for a in group.adapters)
    finally:
        hook.remove()
    if taken:
        raise InputError(
            "inside as_draw something else took the draw away, and what ran after it was the mean network: call "
            "predict, generate, merge or a training step outside"
        )
    if ran:
        check_reached(bayes.model.groups)
