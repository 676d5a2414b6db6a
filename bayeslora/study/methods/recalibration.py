"""What is fitted to a finished method's probabilities on labelled validation examples, and to nothing else."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from bayeslora.analysis import apply_temperature, fit_temperature
from bayeslora.errors import InputError
from bayeslora.study.methods.base import PostHocMethod, register
from bayeslora.study.outcome import Predict, Predicted, Predictor, Trained

if TYPE_CHECKING:
    from bayeslora.study.experiment import Experiment

Map = Callable[[np.ndarray], np.ndarray]  # from probabilities (n, C) to others
SMALLEST = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Recalibration(PostHocMethod):
    """Something fitted to a method's probabilities on the validation split."""

    def predictors(self, trained: Trained, experiment: "Experiment", predict: Predict) -> Iterator[Predictor]:
        if not experiment.has_validation:
            raise InputError(
                f"{self.label!r} needs a labelled validation split besides what is scored; "
                "set hold_out to take one from the training examples"
            )
        yield self.recalibrated(experiment.on_top(self.label), predict)

    @abstractmethod
    def recalibrated(self, label: str, predict: Predict) -> Predictor:
        """What predicts through it."""


@dataclass(frozen=True)
class ByMap(Recalibration):
    """A map of probabilities."""

    def recalibrated(self, label: str, predict: Predict) -> Predictor:
        held_out = predict("validation")
        return Predictor(label, mapped(predict, self.fit(held_out.probs, held_out.labels)))

    @abstractmethod
    def fit(self, probs: np.ndarray, labels: np.ndarray) -> Map:
        """The map, from probabilities (n, C) and labels (n,)."""


@register
@dataclass(frozen=True)
class Temperature(Recalibration):
    """One number that divides the logits (Guo et al. 2017), fitted to validation labels only."""

    name: ClassVar[str] = "temperature"
    title: ClassVar[str] = "temperature*"

    def recalibrated(self, label: str, predict: Predict) -> Predictor:
        return tempered(label, predict)


@dataclass(frozen=True)
class ClassByClass(ByMap):
    """Each class against the rest, on its own probability; then each example's numbers are divided by their sum.

    For two classes one map serves both. No probability leaves [1/(n + 2), (n + 1)/(n + 2)], Laplace's rule of
    succession for n validation examples: a class that was never wrong there is not thereby certain.
    """

    def fit(self, probs: np.ndarray, labels: np.ndarray) -> Map:
        classes, least = probs.shape[1], 1 / (len(labels) + 2)
        of_class = {
            k: self.fit_one(probs[:, k], (labels == k).astype(np.float64)) for k in range(classes == 2, classes)
        }

        def apply(new: np.ndarray) -> np.ndarray:
            found = {k: np.clip(one(new[:, k]), least, 1 - least) for k, one in of_class.items()}
            mapped = np.stack([found[k] if k in found else 1 - found[1] for k in range(classes)], -1)
            return mapped / mapped.sum(-1, keepdims=True)

        return apply

    @abstractmethod
    def fit_one(self, scores: np.ndarray, hits: np.ndarray) -> Map:
        """From a class's probability (n,) to the share of it, given where it is right (n,)."""


@register
@dataclass(frozen=True)
class Isotonic(ClassByClass):
    """The rising step function with the least squared error (Zadrozny and Elkan 2002), by scikit-learn."""

    name: ClassVar[str] = "isotonic"
    title: ClassVar[str] = "isotonic*"

    def fit_one(self, scores: np.ndarray, hits: np.ndarray) -> Map:
        return IsotonicRegression(out_of_bounds="clip").fit(scores, hits).predict


@register
@dataclass(frozen=True)
class Histogram(ClassByClass):
    """The share of a class among the validation examples of a bin (Zadrozny and Elkan 2001).

    ``bins`` hold equally many validation examples, their ten. Fewer where probabilities are tied.
    """

    bins: int = 10

    name: ClassVar[str] = "histogram"
    title: ClassVar[str] = "histogram*"

    def fit_one(self, scores: np.ndarray, hits: np.ndarray) -> Map:
        inner = np.unique(np.quantile(scores, np.linspace(0, 1, self.bins + 1)[1:-1]))
        bins = np.searchsorted(inner, scores, side="right")
        counts = np.bincount(bins, minlength=len(inner) + 1)
        hit = np.bincount(bins, hits, minlength=len(inner) + 1)
        shares = np.divide(hit, counts, out=np.full(len(counts), hits.mean()), where=counts > 0)
        return lambda new: shares[np.searchsorted(inner, new, side="right")]


@register
@dataclass(frozen=True)
class Dirichlet(ByMap):
    """softmax(W log p + b) (Kull et al. 2019, Dirichlet calibration, in its linear form), by scikit-learn.

    A logistic regression on the logarithms of the probabilities, with an L2 penalty on W whose strength has the lowest
    log-loss in a stratified cross-validation of ``folds`` on the validation examples. Its authors' ODIR penalty, on
    what lies off the diagonal alone, needs a program of its own.
    """

    folds: int = 5

    name: ClassVar[str] = "dirichlet"
    title: ClassVar[str] = "Dirichlet*"

    def fit(self, probs: np.ndarray, labels: np.ndarray) -> Map:
        classes, counts = np.unique(labels, return_counts=True)
        if len(classes) < probs.shape[1] or counts.min() < self.folds:
            raise InputError(
                f"{self.label!r} needs {self.folds} validation examples of each of the {probs.shape[1]} classes, and "
                f"finds {counts.min() if len(classes) == probs.shape[1] else 0} of one: set validation_examples higher"
            )
        folds = StratifiedKFold(self.folds, shuffle=True, random_state=0)
        strengths = {"C": np.logspace(-4, 4, 9)}
        found = GridSearchCV(LogisticRegression(max_iter=1000), strengths, cv=folds, scoring="neg_log_loss")
        found.fit(_log(probs), labels)
        return lambda new: found.predict_proba(_log(new))


def tempered(label: str, base: Predict, *, draws: bool = False) -> Predictor:
    """The same with a temperature that is fitted to the labels of the validation split, and to no other."""
    held_out = base("validation")
    temperature = fit_temperature(held_out.probs, held_out.labels)
    predict = mapped(base, lambda probs: apply_temperature(probs, temperature))
    return Predictor(label, predict, draws, {"temperature": temperature})


def mapped(base: Predict, apply: Map) -> Predict:
    """The same through a map of probabilities."""

    def predict(split: str) -> Predicted:
        predicted = base(split)
        return replace(predicted, probs=apply(predicted.probs))

    return predict


def _log(probs: np.ndarray) -> np.ndarray:
    return np.log(np.clip(probs, SMALLEST, None))
