"""How well S draws know their mean, and as many draws as a tolerance takes."""

import logging

import numpy as np
import pytest

from bayeslora import InputError
from bayeslora.inference import predict as prediction_module
from bayeslora.inference.predict import monte_carlo_error
from bayeslora.models import Tuning
from tests.conftest import tiny_dataset
from tests.modules import module, randomize_b

DATA = tiny_dataset(12, rule="random")
SEEDS = 60


def noisy(**options):
    return randomize_b(module(**{"sample_scaler": 0.3} | options)).eval()


class TestError:
    def test_closed_form(self):
        said = np.array([[[0.0, 1.0]], [[2.0, 1.0]], [[4.0, 1.0]], [[6.0, 1.0]]])
        assert monte_carlo_error(said) == pytest.approx([np.std([0, 2, 4, 6], ddof=1) / 2])

    def test_of_mirrored_pairs(self):
        said = np.array([1.0, 3.0, 5.0, 7.0]).reshape(4, 1, 1)  # pairs with the means 2 and 6
        assert monte_carlo_error(said, mirrored=True) == pytest.approx([np.std([2, 6], ddof=1) / np.sqrt(2)])

    @pytest.mark.parametrize(("draws", "mirrored"), [(1, False), (3, True), (2, True)])
    def test_unknown_for_fewer_than_two_that_are_independent(self, draws, mirrored):
        assert monte_carlo_error(np.zeros((draws, 5, 2)), mirrored=mirrored) is None

    @pytest.mark.parametrize("antithetic", [False, True])
    def test_is_what_predictions_of_other_seeds_differ_by(self, antithetic):
        """The variance over 60 seeds, against the mean of the variances that each says: both have a relative standard
        error of about 0.2, of 12 examples that share draws."""
        bayes = noisy()
        made = [
            bayes.predict(DATA, num_samples=16, seed=seed, antithetic=antithetic, progress=False)
            for seed in range(SEEDS)
        ]
        measured = np.stack([one.probs[:, 0] for one in made]).var(0, ddof=1).mean()
        said = np.stack([one.monte_carlo_error for one in made]) ** 2
        assert measured / said.mean() == pytest.approx(1, abs=0.5)

    def test_mirrored_pairs_know_it_better_where_noise_acts_linearly(self):
        bayes = noisy(sample_scaler=1e-3)
        plain, mirrored = (
            bayes.predict(DATA, num_samples=16, antithetic=antithetic, progress=False).monte_carlo_error.mean()
            for antithetic in (False, True)
        )
        assert mirrored < plain / 3

    def test_is_kept_without_the_draws(self):
        with_draws, without = (noisy().predict(DATA, keep_draws=keep, progress=False) for keep in (True, False))
        assert without.sample_log_probs is None
        np.testing.assert_array_equal(with_draws.monte_carlo_error, without.monte_carlo_error)

    def test_none_at_the_mean_and_zero_without_noise(self):
        bayes = noisy()
        assert bayes.predict(DATA, num_samples=0, progress=False).monte_carlo_error is None
        bayes.tuning = Tuning(0.0)
        assert not bayes.predict(DATA, num_samples=4, progress=False).monte_carlo_error.any()

    def test_of_numbers(self):
        bayes = noisy(network_options={"num_labels": 1})
        data = [example | {"labels": 0.5} for example in DATA]
        prediction = bayes.predict(data, num_samples=9, progress=False)
        expected = prediction.sample_means.std(0, ddof=1) / 3
        np.testing.assert_allclose(prediction.monte_carlo_error, expected)


class TestAuto:
    @pytest.mark.parametrize("antithetic", [False, True])
    def test_stops_at_the_tolerance_with_the_draws_of_a_number(self, antithetic):
        bayes = noisy()
        first = bayes.predict(DATA, num_samples=16, antithetic=antithetic, progress=False)
        tolerance = float(first.monte_carlo_error.mean()) / 1.5
        found = bayes.predict(DATA, "auto", tolerance=tolerance, antithetic=antithetic, progress=False)
        count = len(found.sample_log_probs)
        assert 16 < count < 256
        assert found.monte_carlo_error.mean() <= tolerance
        same = bayes.predict(DATA, num_samples=count, antithetic=antithetic, progress=False)
        np.testing.assert_allclose(found.probs, same.probs, atol=1e-6)

    def test_sixteen_where_they_are_enough(self):
        assert len(noisy().predict(DATA, "auto", tolerance=0.5, progress=False).sample_log_probs) == 16

    def test_says_where_the_most_are_too_few(self, caplog, monkeypatch):
        monkeypatch.setattr(prediction_module, "MOST_DRAWS", 24)
        with caplog.at_level(logging.WARNING):
            found = noisy().predict(DATA, "auto", tolerance=1e-300, progress=False)
        assert len(found.sample_log_probs) == 24
        assert "24 draws leave a Monte Carlo error of" in caplog.text

    def test_plain_lora_needs_one_pass(self):
        bayes = noisy(sample_scaler=0.0)
        assert bayes.predict(DATA, "auto", progress=False).monte_carlo_error.max() < 1e-12

    def test_numpys_numbers_are_numbers(self):
        assert len(noisy().predict(DATA, np.int64(3), progress=False).sample_log_probs) == 3

    def test_from_an_odd_draw_on_pairs_are_those_of_the_draws(self):
        bayes = noisy(sample_scaler=1e-3)
        odd, even = (
            bayes.predict(DATA, num_samples=17, first_draw=first, antithetic=True, progress=False) for first in (1, 2)
        )
        assert odd.monte_carlo_error.mean() < 3 * even.monte_carlo_error.mean()

    def test_what_lies_beyond_the_end_of_an_example_has_no_error(self):
        said = np.random.default_rng(0).normal(size=(9, 2, 3))
        expected = monte_carlo_error(said[:, :, :2])
        said[:, :, 2] = np.nan
        np.testing.assert_array_equal(monte_carlo_error(said), expected)

    @pytest.mark.parametrize("bad", ["many", 2.5, -1, None, True])
    def test_anything_else_is_refused(self, bad):
        with pytest.raises(InputError, match="num_samples must be"):
            noisy().predict(DATA, bad, progress=False)

    @pytest.mark.parametrize("bad", [0, -0.1, "small", float("nan")])
    def test_tolerance_is_positive(self, bad):
        with pytest.raises(InputError, match="tolerance must be positive"):
            noisy().predict(DATA, "auto", tolerance=bad, progress=False)
