"""Draws from the prior, in the form of the posterior's: what did the data change?"""

from collections.abc import Sequence

from bayeslora.adapters.drawing import one_at_a_time
from bayeslora.inference.draws import PosteriorDraws, collect_draws, sample_sites
from bayeslora.posterior import Posterior


def prior_draws(
    bayes: Posterior, *, num_samples: int = 64, seed: int = 0, adapters: Sequence[str] = (), first_draw: int = 0
) -> PosteriorDraws:
    """Draws of (π, Σ, A) of every adapter from the prior, around the means μ that the network has now.

    Args:
        bayes: The module, fitted or not.
        num_samples: S.
        seed: Draw s depends on it and s alone.
        adapters: Names of the adapters whose whole matrix A is kept.
        first_draw: Number of the first draw, to go on in blocks.

    Returns:
        As :meth:`bayeslora.BayesLoRA.posterior_draws`; compare the two with
        :func:`bayeslora.analysis.contraction` and :func:`bayeslora.analysis.noise_contraction`. A's own prior has the
        identity for a covariance, so ``covariance`` has no part in this ``noise_scale``.

    Raises:
        InputError: fewer than one draw, or an unknown adapter.
    """
    with one_at_a_time:
        draws = sample_sites(bayes, num_samples, seed, first_draw=first_draw, prior=True)
        return collect_draws(bayes, draws, adapters)
