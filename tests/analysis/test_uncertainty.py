"""Entropy and its split, against closed forms."""

import numpy as np
import pytest
from scipy.special import digamma, rel_entr
from scipy.stats import entropy

from bayeslora.analysis import expected_entropy, mutual_information, predictive_entropy
from bayeslora.errors import InputError


def dirichlet_draws(num_draws: int, num_examples: int, concentration, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(concentration, size=(num_draws, num_examples))  # (S, n, C)


def test_entropy_from_certain_to_uniform():
    probs = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25]]
    np.testing.assert_allclose(predictive_entropy(probs), [0, np.log(2), np.log(4)], atol=1e-15)


def test_entropy_agrees_with_scipy():
    probs = dirichlet_draws(1, 20, [0.3, 1, 2], seed=0)[0]
    np.testing.assert_allclose(predictive_entropy(probs), entropy(probs, axis=1))


def test_draws_that_disagree_entirely_share_log_two():
    np.testing.assert_allclose(mutual_information([[[1, 0]], [[0, 1]]]), [np.log(2)])


def test_draws_that_agree_carry_no_information():
    same = np.broadcast_to(dirichlet_draws(1, 30, [1, 1, 1], seed=1), (16, 30, 3))
    np.testing.assert_allclose(mutual_information(same), 0, atol=1e-14)
    assert (predictive_entropy(same[0]) > 0.01).all()  # all of the uncertainty is in the data


def test_information_is_the_mean_divergence_from_the_mixture():
    draws = dirichlet_draws(8, 40, [0.2, 0.5, 1], seed=2)
    divergence = rel_entr(draws, draws.mean(axis=0)).sum(axis=-1).mean(axis=0)
    np.testing.assert_allclose(mutual_information(draws), divergence, rtol=1e-9, atol=1e-14)


def test_information_lies_between_zero_and_the_total():
    draws = dirichlet_draws(5, 500, [0.05, 0.1, 0.2], seed=3)
    information = mutual_information(draws)
    assert information.min() >= -1e-14
    assert (information <= predictive_entropy(draws.mean(axis=0)) + 1e-14).all()
    assert information.max() > 0.3


def test_dirichlet_posterior_has_a_closed_form():
    """E[H(p)] under Dirichlet(a) is psi(a0 + 1) - sum_c (a_c / a0) psi(a_c + 1)."""
    concentration = np.array([0.5, 1.0, 3.0])
    mean = concentration / concentration.sum()
    expected = digamma(concentration.sum() + 1) - (mean * digamma(concentration + 1)).sum()
    draws = dirichlet_draws(4000, 25, concentration, seed=4)
    estimates = mutual_information(draws)  # 25 independent estimates
    error = estimates.std(ddof=1) / np.sqrt(25)
    assert abs(estimates.mean() - (entropy(mean) - expected)) < 4 * error
    assert error < 0.002


@pytest.mark.parametrize(
    ("function", "values", "message"),
    [
        (predictive_entropy, [0.5, 0.5], r"probs must have shape \(examples, classes\)"),
        (predictive_entropy, [[0.5, 0.6]], "probs must sum to one in each row, but row 0"),
        (mutual_information, [[0.5, 0.5]], r"sample_probs must have shape \(draws, examples, classes\)"),
        (mutual_information, np.empty((0, 3, 2)), "sample_probs is empty: no draws"),
        (mutual_information, [[[0.5, 0.5], [2.0, 3.0]]], r"in each row, but row \(0, 1\) sums to 5"),
        (mutual_information, [[[-0.1, -2.3]]], "take the exponential of log probabilities first"),
    ],
)
def test_wrong_input_is_named(function, values, message):
    with pytest.raises(InputError, match=message):
        function(values)


def test_entropy_is_expected_entropy_plus_mutual_information():
    draws = dirichlet_draws(7, 30, [0.3, 1, 2], seed=3)
    total = predictive_entropy(draws.mean(axis=0))
    np.testing.assert_allclose(expected_entropy(draws) + mutual_information(draws), total, rtol=1e-14)


def test_expected_entropy_is_the_mean_of_scipys():
    draws = dirichlet_draws(5, 20, [0.3, 1, 2], seed=4)
    np.testing.assert_allclose(expected_entropy(draws), entropy(draws, axis=-1).mean(axis=0))
