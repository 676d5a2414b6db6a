"""Draws from the prior, in the form of the posterior's: what did the data change?"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayeslora.adapters import one_at_a_time
from bayeslora.errors import InputError
from bayeslora.predict import PosteriorDraws, collect_draws, seeded
from bayeslora.recorder import Recorder

if TYPE_CHECKING:
    from bayeslora.module import BayesLoRA


def prior_draws(
    bayes: "BayesLoRA", *, num_samples: int = 64, seed: int = 0, adapters: Sequence[str] = ()
) -> PosteriorDraws:
    """Draws of (π, Σ, A) of every adapter from the prior, around the means μ that the network has now.

    Args:
        bayes: The module, fitted or not.
        num_samples: S.
        seed: Draw s depends on it and s alone.
        adapters: Names of the adapters whose whole matrix A is kept.

    Returns:
        As :meth:`bayeslora.BayesLoRA.posterior_draws`; compare the two with
        :func:`bayeslora.analysis.contraction` and :func:`bayeslora.analysis.noise_contraction`. A's own prior has the
        identity for a covariance, so ``covariance`` has no part in this ``noise_scale``.

    Raises:
        InputError: fewer than one draw, or an unknown adapter.
    """
    if num_samples < 1:
        raise InputError(f"num_samples must be at least 1, got {num_samples}")
    with one_at_a_time:
        return collect_draws(bayes, _draws(bayes, num_samples, seed), adapters)


def _draws(bayes: "BayesLoRA", num_samples: int, seed: int) -> Iterator[dict[str, Tensor]]:
    for index in range(num_samples):
        recorder = Recorder()
        with torch.no_grad(), seeded(seed, index), bayes.model.full_precision():
            bayes.model.run(recorder)
        yield recorder.values()
