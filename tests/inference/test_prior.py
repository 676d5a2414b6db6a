"""Draws of the prior against its closed moments, and what the data make of them."""

import numpy as np
import pytest
import torch

from bayeslora import BayesLoRA, MonteCLoRAConfig
from bayeslora.analysis import noise_contraction
from bayeslora.errors import InputError
from bayeslora.inference.prior import prior_draws
from tests.conftest import tiny_network

EPSILON, RANK, COMPONENTS = 0.2, 3, 4


def fitted(**options) -> BayesLoRA:
    config = {"r": RANK, "num_components": COMPONENTS, "sample_scaler": EPSILON, "guide": "mean_field"} | options
    return BayesLoRA(tiny_network(), MonteCLoRAConfig(target_modules=("query", "output.dense"), **config))


def close(values: np.ndarray, expected: float) -> bool:
    """The mean over draws is within four standard errors of what it should be; adapters are averaged first."""
    per_draw = values.reshape(len(values), -1).mean(axis=1)
    return abs(per_draw.mean() - expected) < 4 * per_draw.std() / np.sqrt(len(per_draw))


@pytest.mark.parametrize("components", ["collapsed", "explicit"])
def test_moments_of_the_prior(components):
    bayes = fitted(components=components, prior_concentration=0.5)
    draws = prior_draws(bayes, num_samples=200)
    share = (1 + 0.5) / (1 + COMPONENTS * 0.5)  # E[Σ π²] under Dir(0.5)
    assert close(draws.mixture_weights[..., 0], 1 / COMPONENTS)
    assert close(np.square(draws.mixture_weights).sum(-1), share)
    assert close(draws.covariance[..., 1, 1], RANK)  # E[Σ] = ν I with ν = r
    assert close(draws.covariance[..., 0, 2], 0)
    assert close(np.square(draws.noise_scale), EPSILON**2 * share)  # the columns' prior covariance is the identity
    assert draws.adapters == bayes.adapter_names


def test_the_prior_is_centred_on_the_mean():
    bayes = fitted()
    name = bayes.adapter_names[0]
    draws = prior_draws(bayes, num_samples=100, adapters=[name])
    mean = next(a.lora_A.weight for g in bayes.model.groups for a in g.adapters if a.name == name)
    deviations = draws.A[name] - mean.detach().numpy()
    assert draws.A[name].shape == (100, RANK, mean.shape[1])
    error = deviations.std(axis=0) / 10
    assert (np.abs(deviations.mean(axis=0)) < 5 * error).all()
    np.testing.assert_allclose(np.sqrt(np.square(deviations).mean((1, 2))), draws.noise_scale[:, 0], rtol=1e-5)


def test_contraction_against_the_closed_form():
    """With α = α0 the variance of A is E[Σ] = ν v of the prior's: here 3 × 0.25."""
    bayes = fitted(scale_init=0.25, prior_concentration=1.0, alpha_init="ones")
    posterior, prior = bayes.posterior_draws(num_samples=200), prior_draws(bayes, num_samples=200)
    found = noise_contraction(posterior.noise_scale, prior.noise_scale)
    error = 0.75 * np.sqrt(sum(np.var(d.noise_scale**2) / np.mean(d.noise_scale**2) ** 2 for d in (posterior, prior)))
    assert (np.abs(found - 0.25) < 4.5 * error / np.sqrt(200)).all()


def test_draws_repeat_and_leave_no_trace():
    bayes = fitted()
    state = torch.get_rng_state()
    first, second = prior_draws(bayes, num_samples=3, seed=5), prior_draws(bayes, num_samples=2, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(first.covariance[:2], second.covariance)
    assert not np.array_equal(first.covariance[0], first.covariance[1])
    assert all(adapter.lora_A.draw.weight is None for group in bayes.model.groups for adapter in group.adapters)


def test_wrong_requests_are_named():
    with pytest.raises(InputError, match="num_samples must be at least 1, got 0"):
        prior_draws(fitted(), num_samples=0)
    with pytest.raises(InputError, match="no adapter 'nowhere'"):
        prior_draws(fitted(), adapters=["nowhere"])
