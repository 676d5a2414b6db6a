r"""Which examples to have labelled together: those about whose labels the draws disagree, and not all in one way.

The k most uncertain examples are often k of a kind. BatchBALD takes them one by one, each for what it adds to the
mutual information between the labels and the draw:

.. math:: I(y_1, \dots, y_k;\, s) = H(y_1, \dots, y_k) - \sum_i \mathbb E_s\, H(y_i \mid s)

The package batchbald-redux has it for pools of torch tensors; it needs torchvision, and was last released in 2021.

References:
    Kirsch, van Amersfoort & Gal (2019), *BatchBALD: Efficient and Diverse Batch Acquisition for Deep Bayesian Active
    Learning*, algorithm 1, and section 3.3 for drawn configurations of labels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import entr

from bayeslora.analysis.metrics.checks import check_probs
from bayeslora.errors import InputError

MOST_CONFIGURATIONS = 4096  # of the labels of those that are taken; beyond, as many are drawn
_NUMBERS_AT_ONCE = 2**23


@dataclass(frozen=True)
class BatchSelection:
    """What :func:`select_batchbald` takes.

    Attributes:
        indices: Of the examples, in the order in which they were taken, ``(count,)``.
        gains: What each added to the mutual information between labels and draw, in nats, ``(count,)``.

    Example:
        >>> BatchSelection(np.array([4, 0]), np.array([0.5, 0.25])).gains.sum()
        np.float64(0.75)
    """

    indices: np.ndarray
    gains: np.ndarray


def select_batchbald(sample_probs: ArrayLike, count: int, *, seed: int = 0) -> BatchSelection:
    """The examples that BatchBALD takes, greedily.

    Joint entropies are sums over every configuration of labels up to 4096 of them, and beyond are estimated from as
    many drawn ones. With S draws no set of examples tells more than log S nats: where the gains are near 0, the order
    says nothing, and more draws are needed.

    Args:
        sample_probs: Probabilities under each draw, shape ``(draws, examples, classes)``.
        count: How many to take, up to all of them.
        seed: Of the drawn configurations.

    Raises:
        InputError: for another shape, or a count out of range.

    Example:
        >>> draws = [[[1, 0], [1, 0], [1, 0]], [[1, 0], [1, 0], [0, 1]], [[0, 1], [0, 1], [1, 0]], [[0, 1]] * 3]
        >>> select_batchbald(draws, 2).indices  # the second would only repeat the first
        array([0, 2])
    """
    probs = check_probs(sample_probs, name="sample_probs", axes=("draws", "examples", "classes"))
    if not 0 < count <= probs.shape[1]:
        raise InputError(f"count must lie between 1 and the number of examples, {probs.shape[1]}, but is {count}")
    given_draw = entr(probs).sum(-1).mean(0)  # (examples,)
    taken: list[int] = []
    gains: list[float] = []
    for _ in range(count):
        joint, weights = _configurations(probs[:, taken], np.random.default_rng([seed, len(taken)]))
        before = float(weights @ entr(joint.mean(1)))
        gain = _joint_entropy(joint, weights, probs) - before - given_draw
        gain[taken] = -np.inf
        taken.append(int(gain.argmax()))
        gains.append(max(float(gain[taken[-1]]), 0.0))
    return BatchSelection(np.array(taken), np.array(gains))


def _configurations(probs: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the k examples of ``(S, k, C)``: p(labels | draw), ``(M, S)``, and how often each of the M counts."""
    draws, count, classes = probs.shape
    if classes**count <= MOST_CONFIGURATIONS:
        joint = np.ones((1, draws))
        for index in range(count):
            joint = (joint[:, None] * probs[:, index].T).reshape(-1, draws)
        return joint, np.ones(len(joint))
    of = random.integers(draws, size=MOST_CONFIGURATIONS)
    joint = np.ones((MOST_CONFIGURATIONS, draws))
    for index in range(count):
        uniform = random.random((MOST_CONFIGURATIONS, 1))
        labels = (probs[of, index].cumsum(-1)[:, :-1] < uniform).sum(-1)
        joint *= probs[:, index].T[labels]
    return joint, 1 / (len(joint) * joint.mean(1))


def _joint_entropy(joint: np.ndarray, weights: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Of the labels taken and one example's more, for each of ``(S, n, C)``, in nats: ``(n,)``."""
    draws, examples, classes = probs.shape
    size = max(_NUMBERS_AT_ONCE // (len(joint) * classes), 1)
    parts = []
    for start in range(0, examples, size):
        together = joint @ probs[:, start : start + size].reshape(draws, -1) / draws  # (M, examples * C)
        parts.append((weights @ entr(together)).reshape(-1, classes).sum(-1))
    return np.concatenate(parts)
