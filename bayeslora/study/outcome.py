"""What a training and a prediction hand over."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

# What made a row of results: its own training, something built on one, or the trainings of all seeds together.
TRAINED, POST_HOC, ACROSS_SEEDS = "trained", "post-hoc", "across seeds"


@dataclass(frozen=True)
class Predicted:
    """Predictive probabilities ``probs`` (n, C), ``labels`` (n,), the mutual information between label and draw (n,)
    where there are draws, and the ``seconds`` it took."""

    probs: np.ndarray
    labels: np.ndarray
    mutual_information: np.ndarray | None = None
    seconds: float = 0.0


Predict = Callable[[str], Predicted]  # of a split


class Predictor(NamedTuple):
    """What predicts: the ``label`` that tables call it by, how to ``predict`` a split, and whether it averages
    ``draws`` of a posterior. A plain ``(label, predict)`` will do where it does not."""

    label: str
    predict: Predict
    draws: bool = False


@dataclass(frozen=True)
class Trained:
    """What a training hands over.

    Attributes:
        network: The trained network, in evaluation mode.
        steps: Steps of the optimizer.
        seconds: What training took, evaluations for the curve included.
        curve: ``{"step", "loss", "accuracy"}`` on validation examples, along training.
        checkpoints: Values of the trained parameters at some steps, for methods that asked for them.
        facts: Further numbers for the table.
        bayes: The :class:`bayeslora.BayesLoRA` around the network, where there is one.
        posterior: What else a method draws from.
    """

    network: Any
    steps: int
    seconds: float
    curve: list[dict[str, float]] = field(default_factory=list)
    checkpoints: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, float] = field(default_factory=dict)
    bayes: Any = None
    posterior: Any = None
