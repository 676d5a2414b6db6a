"""Simulation-based calibration: the numbers, and that right posteriors pass and wrong ones do not."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from scipy import stats

from bayeslora import InputError
from bayeslora.analysis.metrics.simulation_based_calibration import (
    chi_square_test,
    coverage,
    ecdf_test,
    rank_ecdf,
    ranks,
)
from bayeslora.analysis.plots.inference import plot_rank_ecdf
from bayeslora.models import low_rank_regression

DRAWS = 99


def conjugate_ranks(*, simulations=300, stretch=1.0, shift=0.0, seed=0):
    """θ ~ N(0, 1), y ~ N(θ, 1): the posterior is N(y/2, 1/2); stretched and shifted by so many of its deviations."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=simulations)
    mean = (truth + rng.normal(size=simulations)) / 2
    noise = stretch * rng.normal(size=(simulations, DRAWS)) + shift
    return ranks(truth, mean[:, None] + np.sqrt(0.5) * noise)


class TestRanks:
    def test_count_the_draws_below(self):
        draws = np.array([[[1.0, 9.0], [2.0, 8.0], [3.0, 7.0]]])  # one simulation, three draws, two quantities
        assert ranks([[2.5, 0.0]], draws).tolist() == [[2, 0]]

    def test_bad_input(self):
        with pytest.raises(InputError, match="truth's dimensions"):
            ranks(np.zeros(3), np.zeros((4, 9)))
        with pytest.raises(InputError, match="NaN"):
            ranks([np.nan], np.zeros((1, 9)))
        with pytest.raises(InputError, match=r"0\.\.9"):
            ecdf_test([10], 9)
        with pytest.raises(InputError, match="integers"):
            ecdf_test([0.5], 9)
        with pytest.raises(InputError, match="divide"):
            chi_square_test(np.zeros(99, int), 99, bins=7)
        with pytest.raises(InputError, match="too few"):
            chi_square_test(np.zeros(10, int), 99)


class TestUniformity:
    def test_chi_square_is_scipys(self):
        values = np.random.default_rng(0).integers(100, size=300)
        counts = np.histogram(values, bins=np.arange(0, 101, 10))[0]
        assert chi_square_test(values, 99) == pytest.approx(stats.chisquare(counts).pvalue)

    @pytest.mark.parametrize("test", [chi_square_test, lambda v, s: ecdf_test(v, s, repeats=400)])
    def test_false_alarms_are_as_rare_as_the_level_says(self, test):
        """p < 0.1 in a tenth of 200 sets of uniform ranks, within the binomial's 99.9 % interval."""
        rng = np.random.default_rng(1)
        alarms = sum(test(rng.integers(100, size=60), 99) < 0.1 for _ in range(200))
        low, high = stats.binom.ppf([5e-4, 1 - 5e-4], 200, 0.1)
        assert low <= alarms <= high

    def test_band_holds_the_whole_curve_as_often_as_it_says(self):
        rng = np.random.default_rng(2)
        held = 0
        for _ in range(200):
            curve = rank_ecdf(rng.integers(20, size=50), 19, level=0.9, repeats=400)
            held += bool(((curve.difference >= curve.lower) & (curve.difference <= curve.upper)).all())
        low, high = stats.binom.ppf([5e-4, 1 - 5e-4], 200, 0.9)
        assert low <= held <= high

    def test_band_and_test_agree(self):
        for shift in (0.0, 0.25, 0.5):
            values = conjugate_ranks(shift=shift)
            curve = rank_ecdf(values, DRAWS)
            outside = ((curve.difference < curve.lower) | (curve.difference > curve.upper)).any()
            assert outside == (ecdf_test(values, DRAWS) < 0.05)


class TestConjugateModel:
    def test_the_exact_posterior_passes(self):
        values = conjugate_ranks()
        assert ecdf_test(values, DRAWS) > 0.01
        assert chi_square_test(values, DRAWS) > 0.01

    @pytest.mark.parametrize("wrong", [{"stretch": 0.5}, {"stretch": 2.0}, {"shift": 0.5}, {"shift": -0.5}])
    def test_wrong_ones_do_not(self, wrong):
        values = conjugate_ranks(**wrong)
        assert ecdf_test(values, DRAWS) < 0.001
        assert chi_square_test(values, DRAWS) < 0.001

    @pytest.mark.parametrize("stretch", [1.0, 0.5])
    def test_coverage_is_the_normal_distributions(self, stretch):
        """The truth is within z·stretch standard deviations with probability 2Φ(z·stretch) − 1."""
        found = coverage(conjugate_ranks(simulations=4000, stretch=stretch), DRAWS, levels=[0.5, 0.8, 0.9])
        z = stats.norm.ppf((1 + found.nominal) / 2)
        expected = 2 * stats.norm.cdf(stretch * z) - 1
        error = np.sqrt(expected * (1 - expected) / 4000)
        assert (np.abs(found.share - expected) < 4 * error + 0.01).all()  # 0.01: 99 draws' own quantiles
        assert ((found.lower < found.share) & (found.share < found.upper)).all()
        assert found.nominal == pytest.approx([0.5, 0.8, 0.9], abs=0.02)

    def test_coverage_of_nothing_and_everything(self):
        never, always = coverage([0] * 20, 99, levels=0.9), coverage([50] * 20, 99, levels=0.9)
        assert (never.share[0], never.lower[0]) == (0, 0)
        assert (always.share[0], always.upper[0]) == (1, 1)
        assert never.upper[0] == pytest.approx(1 - 0.025 ** (1 / 20))


class TestYardstick:
    @pytest.fixture(scope="class")
    @staticmethod
    def simulated():
        """Truth and exact posterior draws of two numbers, an entry of A and Σπ², for 200 data sets."""
        import dataclasses

        problem = dataclasses.replace(low_rank_regression(10, num_components=2), num_draws=1000)
        name = problem.group.name
        truth, draws = [], []
        for seed in range(200):
            one = problem.simulate(seed)
            sites = one.posterior_draws(DRAWS, seed=1000 + seed)
            truth.append([one.truth[f"A_{name}"][0, 0, 0], one.truth[f"pi_{name}"].square().sum()])
            draws.append(torch.stack([sites[f"A_{name}"][:, 0, 0, 0], sites[f"pi_{name}"].square().sum((1, 2, 3))], -1))
        return np.array(truth), torch.stack(draws).numpy()

    def test_the_exact_posterior_passes(self, simulated):
        truth, draws = simulated
        for column in range(2):
            found = ranks(truth, draws)[:, column]
            assert ecdf_test(found, DRAWS) > 0.01
            assert chi_square_test(found, DRAWS) > 0.01

    @pytest.mark.parametrize(("stretch", "shift"), [(0.5, 0.0), (1.0, 0.5)])
    def test_wrong_ones_do_not(self, simulated, stretch, shift):
        truth, draws = simulated
        mean, spread = draws.mean(1, keepdims=True), draws.std(1, keepdims=True)
        found = ranks(truth, mean + stretch * (draws - mean) + shift * spread)[:, 0]
        assert ecdf_test(found, DRAWS) < 0.001
        assert chi_square_test(found, DRAWS) < 0.001
        if stretch < 1:
            assert coverage(found, DRAWS, levels=0.9).upper[0] < 0.9


class TestPicture:
    def test_draws_each_method_and_the_band(self):
        methods = {"right": conjugate_ranks(), "narrow": conjugate_ranks(stretch=0.5)}
        ax = plot_rank_ecdf(methods, DRAWS)
        texts = [text.get_text() for text in ax.get_legend().get_texts()]
        assert texts == ["95 % band", "right", "narrow"]
        curve = rank_ecdf(methods["narrow"], DRAWS)
        np.testing.assert_array_equal(ax.get_lines()[1].get_ydata(), curve.difference)
        assert (curve.difference[:20] > curve.upper[:20]).any()
        pyplot.close(ax.figure)

    def test_uses_the_given_axes(self):
        figure = matplotlib.figure.Figure()
        ax = figure.subplots()
        assert plot_rank_ecdf({"right": conjugate_ranks()}, DRAWS, ax) is ax

    def test_bad_input(self):
        with pytest.raises(InputError, match="empty"):
            plot_rank_ecdf({}, DRAWS)
        with pytest.raises(InputError, match="as many of each"):
            plot_rank_ecdf({"a": [1, 2], "b": [1]}, DRAWS)
