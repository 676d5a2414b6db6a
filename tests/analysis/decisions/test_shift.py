"""Does a stream differ from the reference? Seldom where it does not, and nearly always where it does."""

import numpy as np
import pytest
from scipy.stats import binom

from bayeslora import InputError
from bayeslora.analysis import shift_tests


def predicted(rng, count, sureness=1.0, first=1.0, noise=0.05):
    """Probabilities of three classes, and a mutual information."""
    probs = rng.dirichlet([first / sureness, 1 / sureness, 1 / sureness], count)
    return probs, rng.gamma(2.0, noise, count)


def smallest(reference, stream, **options):
    return min(test.p_value for test in shift_tests(reference, stream, **options))


def test_the_level_holds_where_nothing_differs():
    """Over 300 pairs of sets from one source, of unequal size: at most the upper 99.9 % quantile of a binomial."""
    rng = np.random.default_rng(0)
    pairs, level = 300, 0.1
    said = sum(smallest(predicted(rng, 60), predicted(rng, 25), num_resamples=199) <= level for _ in range(pairs))
    assert 0 < said <= binom.ppf(0.999, pairs, level)


@pytest.mark.parametrize(
    ("measure", "change"),
    [("entropy", {"sureness": 0.4}), ("labels", {"first": 3.0}), ("mutual_information", {"noise": 0.15})],
)
def test_what_changes_is_found_and_named(measure, change):
    rng = np.random.default_rng(1)
    tests = shift_tests(predicted(rng, 200), predicted(rng, 200, **change), num_resamples=999)
    by_name = {test.measure: test for test in tests}
    assert by_name[measure].p_value <= 0.01
    assert by_name[measure].difference > 0
    if measure == "mutual_information":
        assert by_name["labels"].p_value > 0.01


def test_numbers_are_those_of_the_sets():
    rng = np.random.default_rng(2)
    (probs, information), (other, watched) = predicted(rng, 50), predicted(rng, 70, first=2.0)
    entropy, mutual, labels = shift_tests((probs, information), (other, watched), num_resamples=99)
    mean = [-(of * np.log(of)).sum(1).mean() for of in (probs, other)]
    assert (entropy.reference, entropy.stream) == pytest.approx(mean)
    assert mutual.difference == pytest.approx(watched.mean() - information.mean())
    shares = [np.bincount(of.argmax(1), minlength=3) / len(of) for of in (probs, other)]
    assert labels.difference == pytest.approx(np.abs(shares[1] - shares[0]).sum() / 2)
    most = np.abs(shares[1] - shares[0]).argmax()
    assert (labels.reference, labels.stream) == pytest.approx((shares[0][most], shares[1][most]))
    assert (entropy.label, labels.label) == (None, most)


def test_equal_sets_do_not_differ():
    same = predicted(np.random.default_rng(3), 40)
    assert [test.p_value for test in shift_tests(same, same, num_resamples=199)] == [1.0, 1.0, 1.0]


def test_without_draws_there_is_no_mutual_information():
    rng = np.random.default_rng(4)
    (probs, _), (other, _) = predicted(rng, 30), predicted(rng, 30)
    assert [test.measure for test in shift_tests((probs, None), (other, None), num_resamples=99)] == [
        "entropy",
        "labels",
    ]


def test_what_cannot_be_compared():
    rng = np.random.default_rng(5)
    probs, few = predicted(rng, 30), predicted(rng, 19)
    with pytest.raises(InputError, match="the stream has 19 examples"):
        shift_tests(probs, few)
    with pytest.raises(InputError, match="the same classes, got 3 and 2"):
        shift_tests(probs, (np.full((30, 2), 0.5), None))
