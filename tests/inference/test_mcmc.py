"""NUTS against the closed form, within its own Monte Carlo error."""

import arviz as az
import numpy as np
import pytest
import torch

from bayeslora import InputError
from bayeslora.distributions import WishartCholesky
from bayeslora.inference.mcmc import run_nuts
from bayeslora.models import low_rank_regression


def standard_error(draws):
    """MCSE of the mean, from the chains' effective sample size; draws of shape ``(chains, draws)``."""
    return float(draws.std()) / np.sqrt(float(az.ess(draws)))


@pytest.mark.slow
def test_nuts_finds_the_closed_form():
    """Mean and second moments of A, the mean of c = Σπ², and Σ's prior; every bound from the chains' ESS."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        problem = low_rank_regression(12, columns=2, num_components=2)
        trainable = {n for n, p in problem.network.named_parameters() if p.requires_grad}
        state = torch.get_rng_state()
        sites, divergences = run_nuts(problem.model, problem.batch, num_draws=120, num_warmup=80)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n for n, p in problem.network.named_parameters() if p.requires_grad} == trainable
    assert divergences <= 5

    A = sites["A_r2_in2"].flatten(2).numpy()
    assert A.shape == (2, 120, 4)
    posterior = problem.posterior()
    exact = problem.posterior_draws(20_000)
    for i in range(4):
        assert az.rhat(A[..., i]) < 1.1
        assert abs(A[..., i].mean() - float(posterior.mean[i])) <= 4 * standard_error(A[..., i])
        for j in range(i + 1):
            products = (A[..., i] - float(posterior.mean[i])) * (A[..., j] - float(posterior.mean[j]))
            assert abs(products.mean() - float(posterior.covariance[i, j])) <= 4 * standard_error(products)
    squared = problem.squared_weights(sites["pi_r2_in2"]).numpy()[..., 0, 0]
    expected = float(problem.squared_weights(exact["pi_r2_in2"]).mean())
    assert abs(squared.mean() - expected) <= 4 * standard_error(squared) + 0.005  # 20 000 draws know it to ±0.001
    prior = WishartCholesky(2, torch.ones(2)).mean
    for i in range(2):
        diagonal = sites["sigma_tril_r2_in2"][..., 0, 0, i, i].numpy()
        assert abs(diagonal.mean() - float(prior[i, i])) <= 4 * standard_error(diagonal)


def test_bad_input():
    problem = low_rank_regression(4)
    with pytest.raises(InputError, match="num_warmup must be at least 1"):
        run_nuts(problem.model, problem.batch, num_warmup=0)
