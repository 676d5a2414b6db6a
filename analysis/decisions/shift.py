"""Does a stream of inputs look like the data that was fitted to? What is predicted of both is compared, without labels.

Where both are from one source, they are exchangeable, and a permutation test says "differs" as seldom as it is asked
to, whatever the network. So the examples of reference must not have been trained on.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import permutation_test

from bayeslora.analysis.metrics.checks import check_examples, check_probs
from bayeslora.analysis.metrics.uncertainty import predictive_entropy
from bayeslora.errors import InputError

_FEWEST = 20


class ShiftTest(NamedTuple):
    """One measure of both sets.

    Attributes:
        measure: ``"entropy"`` or ``"mutual_information"``, means in nats; or ``"labels"``.
        reference, stream: Of both sets; for ``"labels"`` the share of the class whose share differs most.
        difference: Stream less reference; for ``"labels"`` the total variation distance of the shares of the predicted
            labels, in [0, 1].
        p_value: Of a permutation test, after Holm's correction for the number of measures.
        label: The class that ``reference`` and ``stream`` are the shares of, for ``"labels"``.

    Example:
        >>> ShiftTest("entropy", reference=0.2, stream=0.5, difference=0.3, p_value=0.001).difference
        0.3
    """

    measure: str
    reference: float
    stream: float
    difference: float
    p_value: float
    label: int | None = None


def shift_tests(
    reference: tuple[ArrayLike, ArrayLike | None],
    stream: tuple[ArrayLike, ArrayLike | None],
    *,
    num_resamples: int = 9999,
    seed: int = 0,
) -> list[ShiftTest]:
    """Do mean entropy, mean mutual information, or the shares of the predicted labels differ?

    Args:
        reference: Class probabilities ``(n, C)`` of examples that are like the training data and not of it, and their
            mutual information ``(n,)`` in nats, or None without draws.
        stream: The same of what is watched, ``(m, C)`` and ``(m,)``.
        num_resamples: Of the permutation; no p-value is below 3 / (num_resamples + 1).
        seed: Decides the permutations.

    Returns:
        A test for each measure. A set is said to differ at level a where a p-value is at most a: this happens with
        probability a at most where nothing differs.

    Raises:
        InputError: for fewer than 20 examples in a set, or arrays that do not fit.

    Example:
        >>> sure, unsure = np.tile([0.9, 0.1], (40, 1)), np.tile([0.6, 0.4], (40, 1))
        >>> [test.p_value for test in shift_tests((sure, None), (unsure, None), num_resamples=999)]
        [0.004, 1.0]

    References:
        Rabanser, Günnemann and Lipton (2019), *Failing Loudly: An Empirical Study of Methods for Detecting Dataset
        Shift* (tests on what a classifier says of both sets); Holm (1979), *A Simple Sequentially Rejective Multiple
        Test Procedure*.
    """
    probs = [check_probs(of) for of, _ in (reference, stream)]
    if len({of.shape[1] for of in probs}) > 1:
        raise InputError(f"both sets need the same classes, got {probs[0].shape[1]} and {probs[1].shape[1]}")
    for name, of in zip(("reference", "stream"), probs, strict=True):
        if len(of) < _FEWEST:
            raise InputError(f"the {name} has {len(of)} examples: to compare with, give {_FEWEST} at least")
    known = {"entropy": [predictive_entropy(of) for of in probs]}
    if reference[1] is not None and stream[1] is not None:
        known["mutual_information"] = [check_examples(of, name="information") for of in (reference[1], stream[1])]
    options = {"permutation_type": "independent", "n_resamples": num_resamples, "vectorized": True, "batch": 64}
    found = []
    for name, (own, other) in known.items():
        result = permutation_test((own, other), _difference, rng=np.random.default_rng(seed), **options)
        means = float(own.mean()), float(other.mean())
        found.append(ShiftTest(name, *means, means[1] - means[0], float(result.pvalue)))
    predicted = [np.eye(of.shape[1])[of.argmax(1)] for of in probs]
    together = np.concatenate(predicted)

    def distance(own: np.ndarray, other: np.ndarray, axis: int = -1) -> np.ndarray:
        shares = [together[of.astype(int)].mean(-2) for of in (own, other)]
        return np.abs(shares[1] - shares[0]).sum(-1) / 2

    numbers = np.split(np.arange(len(together)), [len(predicted[0])])
    rng = np.random.default_rng(seed)
    result = permutation_test(tuple(numbers), distance, alternative="greater", rng=rng, **options)
    shares = [of.mean(0) for of in predicted]
    most = int(np.abs(shares[1] - shares[0]).argmax())
    of_class = [float(of[most]) for of in shares]
    found.append(ShiftTest("labels", of_class[0], of_class[1], float(result.statistic), float(result.pvalue), most))
    return _corrected(found)


def _difference(own: np.ndarray, other: np.ndarray, axis: int = -1) -> np.ndarray:
    return other.mean(axis) - own.mean(axis)


def _corrected(tests: list[ShiftTest]) -> list[ShiftTest]:
    """With Holm's p-values."""
    order = sorted(range(len(tests)), key=lambda index: tests[index].p_value)
    corrected, largest = {}, 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(tests) - place) * tests[index].p_value))
        corrected[index] = largest
    return [test._replace(p_value=corrected[index]) for index, test in enumerate(tests)]
