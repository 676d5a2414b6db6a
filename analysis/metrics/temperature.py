"""Temperature scaling: the one-number recalibration every Bayesian method has to beat."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from bayeslora.analysis.metrics.calibration import negative_log_likelihood
from bayeslora.errors import InputError


def apply_temperature(probs: ArrayLike, temperature: float) -> np.ndarray:
    """softmax(log p / T): probabilities that are less certain for T above 1, and more below.

    Args:
        probs: Probabilities, shape ``(..., classes)``, rows summing to one.
        temperature: T, greater than 0.

    Returns:
        Shape ``(..., classes)``, rows summing to one.

    Raises:
        InputError: T is not greater than 0.

    Example:
        >>> apply_temperature([[0.8, 0.2]], 2.0).round(4)  # odds of 4 become 2
        array([[0.6667, 0.3333]])
    """
    if not temperature > 0:
        raise InputError(f"temperature must be greater than 0, got {temperature!r}")
    logits = np.log(np.clip(np.asarray(probs, dtype=np.float64), np.finfo(np.float64).tiny, None)) / temperature
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def fit_temperature(probs: ArrayLike, labels: ArrayLike) -> float:
    """The T in [0.05, 20] that minimises the negative log-likelihood of held-out labels.

    Args:
        probs: Validation probabilities, shape ``(examples, classes)``.
        labels: Class indices, shape ``(examples,)``.

    Returns:
        T, without a unit.

    Raises:
        InputError: The arrays do not fit that description.

    Example:
        >>> round(fit_temperature([[0.8, 0.2]] * 3, [0, 0, 1]), 2)  # 4^(1/T) = 2, the odds of the labels
        2.0

    References:
        Guo et al. (2017), *On Calibration of Modern Neural Networks*.
    """
    result = minimize_scalar(
        lambda log_t: negative_log_likelihood(apply_temperature(probs, float(np.exp(log_t))), labels),
        bounds=(np.log(0.05), np.log(20)),
        method="bounded",
    )
    return float(np.exp(result.x))
