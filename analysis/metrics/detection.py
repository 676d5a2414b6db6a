"""Does the model notice inputs that it knows nothing about? Its uncertainty as a detector of them."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from bayeslora.analysis.metrics.checks import check_examples, check_level


class DetectionScores(NamedTuple):
    """How well uncertainty tells foreign inputs from the task's own; see `detection_scores`.

    Attributes:
        auroc: Chance that a foreign input is less certain than one of the task's (ties count half); 0.5 is
            guessing, higher is better.
        aupr: Average precision with the foreign inputs as positives; guessing gives their share, higher is better.
        fpr95: Share of foreign inputs that still pass at the threshold which lets 95 % of the task's own pass (at
            least, as ties may want); lower is better.
    """

    auroc: float
    aupr: float
    fpr95: float


class RocCurve(NamedTuple):
    """Detection at every threshold: ``flagged_inside`` and ``flagged_outside``, shares in ``[0, 1]`` of the task's own
    and of the foreign inputs that are less certain than it; both rise from 0 to 1."""

    flagged_inside: np.ndarray
    flagged_outside: np.ndarray


def detection_scores(inside: ArrayLike, outside: ArrayLike, *, passing: float = 0.95) -> DetectionScores:
    """AUROC, AUPR and FPR95 of an uncertainty as a detector of shifted or out-of-scope inputs.

    Args:
        inside: Uncertainty of the task's own inputs, larger is less sure; shape ``(examples,)``.
        outside: The same of the foreign inputs; shape ``(other examples,)``.
        passing: The share of the task's inputs that must pass in ``fpr95``.

    Raises:
        InputError: The arrays do not fit that description, or ``passing`` is no share.

    Example:
        >>> scores = detection_scores(inside=[0.1, 0.2, 0.3, 0.6], outside=[0.5, 0.7])
        >>> scores.auroc, round(scores.aupr, 4), scores.fpr95  # 7 of 8 pairs are in order
        (0.875, 0.8333, 0.5)

    References:
        Hendrycks and Gimpel (2017), *A Baseline for Detecting Misclassified and Out-of-Distribution Examples in
        Neural Networks*; Liang, Li and Srikant (2018), *Enhancing the Reliability of Out-of-distribution Image
        Detection in Neural Networks* (FPR95).
    """
    check_level(passing, name="passing")
    scores, foreign = _joined(inside, outside)
    curve = detection_curve(inside, outside)
    lenient = curve.flagged_inside <= 1 - passing + 1e-12
    return DetectionScores(
        float(roc_auc_score(foreign, scores)),
        float(average_precision_score(foreign, scores)),
        float(1 - curve.flagged_outside[lenient].max()),
    )


def detection_curve(inside: ArrayLike, outside: ArrayLike) -> RocCurve:
    """Shares of both kinds of input that are flagged, from the strictest threshold to the most lenient.

    Args:
        inside, outside: As for `detection_scores`.

    Returns:
        Shares in ``[0, 1]``, one for each threshold and the strictest of all; shape ``(thresholds + 1,)``.

    Raises:
        InputError: The arrays do not fit that description.

    Example:
        >>> curve = detection_curve(inside=[0.1, 0.6], outside=[0.5, 0.7])
        >>> curve.flagged_inside, curve.flagged_outside
        (array([0. , 0. , 0.5, 0.5, 1. ]), array([0. , 0.5, 0.5, 1. , 1. ]))
    """
    scores, foreign = _joined(inside, outside)
    flagged_inside, flagged_outside, _ = roc_curve(foreign, scores, drop_intermediate=False)
    return RocCurve(flagged_inside, flagged_outside)


def _joined(inside: ArrayLike, outside: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """All scores, and which of them are foreign."""
    own, other = check_examples(inside, name="inside"), check_examples(outside, name="outside")
    return np.concatenate([own, other]), np.repeat([0, 1], [len(own), len(other)])
