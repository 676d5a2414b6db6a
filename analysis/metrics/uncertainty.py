"""How unsure is a prediction, and how much of that is the posterior's doing?"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import entr

from bayeslora.analysis.metrics.checks import check_probs


def predictive_entropy(probs: ArrayLike) -> np.ndarray:
    r"""Total uncertainty of each prediction, in nats.

    .. math:: H_i = -\sum_c p_{ic} \log p_{ic}

    Args:
        probs: Predictive probabilities, shape ``(examples, classes)``, rows summing to one.

    Returns:
        Shape ``(examples,)``, between 0 (certain) and ``log(classes)`` (uniform).

    Raises:
        InputError: The array does not fit that description.

    Example:
        >>> predictive_entropy([[0.5, 0.5], [1.0, 0.0]]).round(4)  # log 2, and none
        array([0.6931, 0.    ])
    """
    return entr(check_probs(probs)).sum(axis=-1)


def expected_entropy(sample_probs: ArrayLike) -> np.ndarray:
    r"""The aleatoric part of the uncertainty: what stays when the weights are known, in nats.

    .. math:: \frac{1}{S} \sum_s H(p_{si})

    ``predictive_entropy(sample_probs.mean(0))`` is this plus `mutual_information`, exactly.

    Args:
        sample_probs: Probabilities under each draw, shape ``(draws, examples, classes)``.

    Returns:
        Shape ``(examples,)``, between 0 and ``log(classes)``.

    Raises:
        InputError: The array does not fit that description.

    Example:
        >>> draws = [[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]  # two draws, two examples
        >>> expected_entropy(draws).round(4)  # each draw is sure of the first
        array([0.    , 0.6931])

    References:
        Depeweg et al. (2018), *Decomposition of Uncertainty in Bayesian Deep Learning*, Eq. 3.
    """
    return entr(_check(sample_probs)).sum(axis=-1).mean(axis=0)


def mutual_information(sample_probs: ArrayLike) -> np.ndarray:
    r"""The part of the uncertainty that the posterior adds: disagreement between draws, in nats.

    .. math:: I_i = H\!\left(\tfrac{1}{S} \sum_s p_{si}\right) - \tfrac{1}{S} \sum_s H(p_{si})

    The second term is the noise that stays when the weights are known. Over a finite number of draws the
    value is slightly too small, by about ``1 / S`` of itself.

    Args:
        sample_probs: Probabilities under each draw, shape ``(draws, examples, classes)``.

    Returns:
        Shape ``(examples,)``: 0 where all draws agree (up to rounding, so perhaps -1e-16), at most
        ``log(min(draws, classes))``.

    Raises:
        InputError: The array does not fit that description.

    Example:
        >>> draws = [[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]  # two draws, two examples
        >>> mutual_information(draws).round(4)  # they disagree about the first
        array([0.6931, 0.    ])

    References:
        Houlsby et al. (2011), *Bayesian Active Learning for Classification and Preference Learning*, Eq. 2.
    """
    values = _check(sample_probs)
    return predictive_entropy(values.mean(axis=0)) - expected_entropy(values)


def _check(sample_probs: ArrayLike) -> np.ndarray:
    return check_probs(sample_probs, name="sample_probs", axes=("draws", "examples", "classes"))
