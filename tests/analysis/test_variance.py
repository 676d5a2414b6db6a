"""Diagnostics of the draws against closed forms of the Dirichlet, the Wishart and the mean."""

import numpy as np
import pandas as pd
import pytest
import xarray
from scipy.stats import wishart

from bayeslora.analysis import (
    adapter_table,
    contraction,
    draws_needed,
    effective_components,
    eigenvalues,
    mixture_entropy,
    noise_contraction,
)
from bayeslora.errors import InputError

NAMES = ["layer.1.q", "layer.0.q", "layer.0.v", "head"]


def rotation(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


# --- mixture and covariance -----------------------------------------------------------------------


def test_effective_components_and_entropy_by_hand():
    weights = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4]
    np.testing.assert_allclose(effective_components(weights), [1, 2, 4])
    np.testing.assert_allclose(mixture_entropy(weights), np.log([1, 2, 4]), atol=1e-15)


def test_effective_components_of_a_dirichlet():
    """E[Σ π²] = (1 + α) / (1 + N α) under a symmetric Dirichlet."""
    draws = np.random.default_rng(0).dirichlet(np.full(4, 0.7), size=20_000)
    shares = 1 / effective_components(draws)
    assert shares.mean() == pytest.approx(1.7 / 3.8, abs=4 * shares.std() / np.sqrt(20_000))


def test_eigenvalues_are_those_that_were_put_in():
    turned = [rotation(3, seed) @ np.diag([4, 1, 9]) @ rotation(3, seed).T for seed in range(5)]
    np.testing.assert_allclose(eigenvalues(turned), np.tile([9, 4, 1], (5, 1)))


def test_padded_covariances_keep_their_own_eigenvalues():
    padded = np.full((2, 3, 3), np.nan)
    padded[0] = np.diag([1, 2, 3])
    padded[1, :2, :2] = rotation(2, 0) @ np.diag([0.1, 5]) @ rotation(2, 0).T
    np.testing.assert_allclose(eigenvalues(padded), [[3, 2, 1], [5, 0.1, np.nan]])


@pytest.mark.parametrize(
    ("function", "value", "message"),
    [
        (effective_components, [0.5, 0.6], "summing to one over the last axis"),
        (mixture_entropy, [1.5, -0.5], "non-negative"),
        (eigenvalues, np.zeros((2, 3)), r"covariance must have shape \(\.\.\., r, r\), but has shape \(2, 3\)"),
        (eigenvalues, [[1, 2], [0, 1]], "symmetric"),
        (eigenvalues, [[1, np.nan], [np.nan, 1]], "finite and symmetric"),
    ],
)
def test_wrong_draws_are_named(function, value, message):
    with pytest.raises(InputError, match=message):
        function(value)


# --- contraction ----------------------------------------------------------------------------------


def test_contraction_of_a_normal_mean():
    """n observations of unit variance and a unit prior: the posterior variance is 1 / (n + 1)."""
    rng = np.random.default_rng(1)
    prior, posterior = rng.normal(size=(4000, 3)), rng.normal(size=(4000, 3)) / np.sqrt([1, 5, 101])
    expected = 1 - 1 / np.array([1, 5, 101])
    error = 4 * np.sqrt(2 / 4000 + 2 / 4000) / np.array([1, 5, 101])  # of a ratio of two variances
    assert (np.abs(contraction(posterior, prior) - expected) < error).all()
    assert np.isnan(contraction(np.ones((3, 1)), np.ones((3, 1)))).all()


def test_noise_contraction_is_that_of_the_entries():
    """Draw A = μ + scale · normal under both, and compare the variances of its entries."""
    rng = np.random.default_rng(2)
    prior, posterior = rng.gamma(4, 0.25, size=(6000, 2)), rng.gamma(4, 0.1, size=(6000, 2))
    entries = [3 + scale[..., None] * rng.normal(size=(6000, 2, 50)) for scale in (posterior, prior)]
    by_entries = 1 - entries[0].var(axis=(0, 2)) / entries[1].var(axis=(0, 2))
    np.testing.assert_allclose(noise_contraction(posterior, prior), by_entries, atol=0.02)
    assert noise_contraction([[0.1]], [[0.2]]) == pytest.approx([0.75])
    assert noise_contraction([[0.2]], [[0.1]]) == pytest.approx([-3.0])


def test_contraction_needs_draws_of_the_same_things():
    with pytest.raises(InputError, match=r"two or more draws each; they are \(1, 2\) and \(5, 2\)"):
        contraction(np.ones((1, 2)), np.ones((5, 2)))
    with pytest.raises(InputError, match=r"with the same adapters; they are \(4, 2\) and \(4, 3\)"):
        noise_contraction(np.ones((4, 2)), np.ones((4, 3)))


# --- the table ------------------------------------------------------------------------------------


def posterior(num_draws: int = 50) -> dict[str, xarray.Dataset]:
    """Draws of four adapters, the last of rank 2 among 3."""
    rng = np.random.default_rng(3)
    covariance = wishart(5, np.eye(3)).rvs((2, num_draws, 4), random_state=rng)
    covariance[:, :, 3, 2, :] = covariance[:, :, 3, :, 2] = np.nan
    variables = {
        "noise_scale": (("chain", "draw", "adapter"), rng.gamma(9, 0.01, size=(2, num_draws, 4))),
        "mixture_weights": (("chain", "draw", "adapter", "component"), rng.dirichlet([1, 2], (2, num_draws, 4))),
        "covariance": (("chain", "draw", "adapter", "rank", "rank_other"), covariance),
    }
    scale = xarray.Dataset({"mean_scale": ("adapter", [0.1, 0.2, 0.0, 0.4])}, coords={"adapter": NAMES})
    return {"posterior": xarray.Dataset(variables, coords={"adapter": NAMES}), "constant_data": scale}


def test_table_has_a_row_for_each_adapter_in_network_order():
    data = posterior()
    table = adapter_table(data)
    assert list(table.index) == ["layer.0.q", "layer.0.v", "layer.1.q", "head"]
    assert list(table["kind"]) == ["q", "v", "q", "head"]
    assert table["layer"].tolist() == [0, 0, 1, pd.NA]
    noise = data["posterior"]["noise_scale"].values.reshape(100, 4)
    rows = table.loc[NAMES]
    np.testing.assert_allclose(rows["noise_scale"], np.sqrt((noise**2).mean(axis=0)))
    np.testing.assert_allclose(rows["noise_to_signal"], rows["noise_scale"] / [0.1, 0.2, np.nan, 0.4])
    matrix = data["posterior"]["covariance"].values.reshape(100, 4, 3, 3)
    spectrum = np.linalg.eigvalsh(matrix[:, 0])
    assert rows["largest_eigenvalue"].iloc[0] == pytest.approx(spectrum[:, -1].mean())
    assert rows["condition"].iloc[0] == pytest.approx(np.median(spectrum[:, -1] / spectrum[:, 0]))
    spectrum = np.linalg.eigvalsh(matrix[:, 3, :2, :2])
    assert rows["condition"].iloc[3] == pytest.approx(np.median(spectrum[:, -1] / spectrum[:, 0]))


# --- how many draws -------------------------------------------------------------------------------


@pytest.mark.parametrize(("deviation", "enough"), [(0.1, 100), (0.02, 4), (0.001, 1), (0.0, 1)])
def test_enough_draws_by_hand(deviation, enough):
    """Half of the draws lie at +deviation and half at -deviation around their mean."""
    values = np.tile([deviation, -deviation], 500)[:, None] * np.sqrt(999 / 1000)  # unbiased variance: deviation²
    found = draws_needed(values, tolerance=0.01)
    assert found.enough == enough
    assert found.error(enough) <= 0.01 * (1 + 1e-9)
    assert enough == 1 or found.error(enough - 1) > 0.01


def test_the_answer_holds_for_new_draws():
    """The error of a mean over ``enough`` new draws is at the tolerance, and above it with one draw in four less."""
    rng = np.random.default_rng(4)
    scale = rng.uniform(0.01, 0.2, size=300)
    found = draws_needed(scale * rng.normal(size=(64, 300)), tolerance=0.02)
    means = (scale * rng.normal(size=(500, found.enough, 300))).mean(axis=1)
    assert np.sqrt(np.square(means).mean()) == pytest.approx(0.02, rel=0.03)


def test_measured_errors_follow_the_law_only_for_independent_draws():
    rng = np.random.default_rng(5)
    independent = draws_needed(rng.normal(size=(256, 200)))
    np.testing.assert_array_equal(independent.num_draws, [1, 2, 4, 8, 16, 32, 64, 128])
    np.testing.assert_allclose(independent.measured, independent.error(independent.num_draws), rtol=0.15)
    repeated = draws_needed(np.repeat(rng.normal(size=(64, 200)), 4, axis=0))
    assert repeated.measured[2] > 1.8 * repeated.error(4)  # blocks of four equal draws do not average anything


@pytest.mark.parametrize(
    ("values", "tolerance", "message"),
    [
        (np.zeros((3, 2)), 0.01, "four draws or more"),
        (np.full((4, 1), np.nan), 0.01, "NaN"),
        (np.zeros((4, 1)), 0, "tolerance must be greater than 0, but is 0"),
    ],
)
def test_wrong_values_are_named(values, tolerance, message):
    with pytest.raises(InputError, match=message):
        draws_needed(values, tolerance=tolerance)
