"""What a training and a prediction hand over."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, TypedDict

import numpy as np

# What made a row of results: its own training, something built on one, or the trainings of all seeds together.
TRAINED, POST_HOC, ACROSS_SEEDS = "trained", "post-hoc", "across seeds"


class Spent(TypedDict):
    """``seconds`` by the clock on the wall, and ``cpu_seconds`` of processor time."""

    seconds: float
    cpu_seconds: float


class Stopwatch:
    """What was spent since it was made: ``seconds`` by the clock on the wall, which run while others have the machine,
    and ``cpu_seconds`` of processor time, of all threads of this process."""

    def __init__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def read(self) -> Spent:
        """Both."""
        wall, cpu = self.began
        return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


@dataclass(frozen=True)
class Predicted:
    """Predictive probabilities ``probs`` (n, C), ``labels`` (n,), the mutual information between label and draw (n,)
    where there are draws, and what it took, as a :class:`Stopwatch` has it."""

    probs: np.ndarray
    labels: np.ndarray
    mutual_information: np.ndarray | None = None
    seconds: float = 0.0
    cpu_seconds: float | None = None


Predict = Callable[[str], Predicted]  # of a split


class Predictor(NamedTuple):
    """What predicts: the ``label`` that tables call it by, how to ``predict`` a split, whether it averages ``draws`` of
    a posterior, and the numbers that were ``tuned``, by their column in the tidy table. A plain ``(label, predict)``
    will do where there are none."""

    label: str
    predict: Predict
    draws: bool = False
    tuned: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Trained:
    """What a training hands over.

    Attributes:
        network: The trained network, in evaluation mode.
        steps: Steps of the optimizer.
        seconds, cpu_seconds: What training took, evaluations for the curve included, as a :class:`Stopwatch` has it.
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
    cpu_seconds: float | None = None
    posterior: Any = None
