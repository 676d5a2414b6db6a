"""What is predicted of a data set: one class of result for each kind of likelihood, on one base.

A likelihood's :meth:`~bayeslora.models.Likelihood.summarize` makes the result. A new kind of result is a frozen
dataclass on :class:`Prediction` with fields of its own, and what it says about them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bayeslora.analysis.metrics.registry import calibration_summary
from bayeslora.analysis.metrics.regression import regression_summary

if TYPE_CHECKING:
    import pandas

Array = Any  # a numpy array, or None where there is no such thing

_OF_SOME_KINDS = frozenset(
    {
        "label_names",
        "entity_counts",
        "label_probs",
        "label_truth",
        "predicted_labels",
        "probs",
        "entropy",
        "mutual_information",
        "sample_log_probs",
        "sample_probs",
        "mean",
        "std",
        "sample_means",
        "noise_scale",
        "text_log_likelihood",
        "num_tokens",
        "text_log_predictive",
        "nats_per_token",
        "perplexity",
    }
)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """With the probabilities of the classes in place of the mapping of them."""
    probs = row.get("probs", {})
    return {
        named: value
        for name, entry in row.items()
        for named, value in ([(f"P({k})", p) for k, p in probs.items()] if name == "probs" else [(name, entry)])
    }


@dataclass(frozen=True, repr=False)
class Prediction:
    """Posterior predictive of n examples; numpy arrays, float64 where they are averaged.

    ==================================================  ===============================================================
    labels are                                          it is a
    ==================================================  ===============================================================
    classes, or options to choose from                  :class:`ClassPrediction`
    numbers                                             :class:`NumberPrediction`
    texts                                               :class:`TextPrediction`
    a class for each word                               :class:`bayeslora.models.places.WordPrediction`
    several, each of which applies or not               :class:`bayeslora.models.places.LabelsPrediction`
    ==================================================  ===============================================================

    ``labels`` (n,) is ``None`` for unlabelled data, and for texts. An attribute of another kind is ``None``, and so are
    draws that were not kept. There are S draws; S is 1 at the mean (``num_samples=0``).

    ``monte_carlo_error`` (n,) is the standard error that S draws leave in the probability of an example's class (the
    largest over classes), or in the mean of a number: it falls as :math:`S^{-1/2}`. ``None`` for texts, and where
    fewer than two draws (or mirrored pairs) are independent.
    """

    labels: Array
    monte_carlo_error: Array = field(default=None, kw_only=True, repr=False)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_SOME_KINDS:
            return None
        raise AttributeError(f"a {type(self).__name__} has no {name!r}")

    @property
    def sample_outputs(self) -> Array:
        """What every draw predicts, ``(S, n, ...)``: what restarts are compared by."""
        return None

    @property
    def sample_log_likelihood(self) -> Array:
        """log p(y_i | draw s) in nats, ``(S, n)``; ``None`` without labels or draws."""
        return None

    @property
    def log_predictive(self) -> Array:
        """log p of each label under the posterior predictive, in nats, ``(n,)``; ``None`` without labels or draws."""
        draws = self.sample_log_likelihood
        return None if draws is None else np.logaddexp.reduce(draws, axis=0) - np.log(len(draws))

    @property
    def nll(self) -> Array:
        """Mean negative log-likelihood under the posterior predictive: nats per example, of texts per token."""
        log_predictive = self.log_predictive
        return None if log_predictive is None else float(-log_predictive.mean())

    def __repr__(self) -> str:
        """What it is, without its numbers: those are in its attributes, and in :meth:`to_pandas`."""
        said = self.sample_outputs
        parts = [f"{len(self)} examples", *self._shown(), *([] if said is None else [f"{len(said)} draws"])]
        return f"{type(self).__name__}({', '.join(parts)})"

    def __len__(self) -> int:
        """The number of examples."""
        return len(getattr(self, self._of_examples))

    def __bool__(self) -> bool:
        return True

    _of_examples: ClassVar[str] = "labels"  # a field with a row for each example, and never None

    def _shown(self) -> list[str]:
        """Further parts of the representation."""
        return []

    def row(self, index: int) -> dict[str, Any]:
        """What is predicted of one example, in words and numbers ready for JSON."""
        raise NotImplementedError(f"a {type(self).__name__} does not say what is predicted of one example")

    def to_pandas(self) -> "pandas.DataFrame":
        """One row for each example, with what :meth:`row` says, probabilities as ``P(name)``, and where they are known
        ``monte_carlo_error`` and ``truth``.

        Example:
            >>> prediction = bayes.predict(dataset, num_samples=4)
            >>> prediction.to_pandas().columns.tolist()[:4]
            ['label', 'P(LABEL_0)', 'P(LABEL_1)', 'entropy']
        """
        table = self._table()
        if self.monte_carlo_error is not None:
            table["monte_carlo_error"] = self.monte_carlo_error
        if self.labels is not None and self.labels.ndim == 1:
            table["truth"] = self._named(self.labels)
        return table

    def _table(self) -> "pandas.DataFrame":
        """The rows of :meth:`to_pandas`."""
        return self._as_table(self.row(index) for index in range(len(self)))

    @staticmethod
    def _as_table(rows: Iterable[dict[str, Any]]) -> "pandas.DataFrame":
        import pandas  # 100 MiB that a process that trains does without

        return pandas.DataFrame([_flat(row) for row in rows])

    def _named(self, labels: np.ndarray) -> Any:
        """Labels in words, where they have any."""
        return labels

    unit: ClassVar[str] = "examples"  # of what is scored

    @property
    def groups(self) -> Array:
        """Which of what is scored belongs to one example; None where an example is scored as one."""
        return None

    def of_texts(self, texts: Sequence[Any]) -> "Prediction":
        """With what can be said of it when its texts are known."""
        return self

    def shown(self, texts: Sequence[Any]) -> list[str]:
        """A text for whatever is scored, from that of each example."""
        return list(texts)

    def scores(self, task: Any) -> dict[str, float]:
        """How well it agrees with the labels: general measures, and those of a :class:`bayeslora.tasks.base.Task`."""
        raise NotImplementedError(f"a {type(self).__name__} has no scores")


@dataclass(frozen=True, repr=False)
class ClassPrediction(Prediction):
    """Of C classes.

    Attributes:
        label_names: Names of the classes, where they have any.
        probs: ``(n, C)``, the mean of the draws' probabilities.
        entropy: ``(n,)``, of ``probs``, in nats.
        mutual_information: ``(n,)``, between label and draw, in nats.
        sample_log_probs: ``(S, n, C)``.
    """

    label_names: tuple[str, ...] | None
    probs: np.ndarray
    entropy: np.ndarray
    mutual_information: np.ndarray
    sample_log_probs: Array = field(default=None, repr=False)

    _of_examples = "probs"

    def _shown(self) -> list[str]:
        names = ", ".join(self.label_names or ())
        return [f"{self.probs.shape[1]} classes" + (f": {names}" if 0 < len(names) <= 80 else "")]

    def _named(self, labels: np.ndarray) -> Any:
        return [self.label_names[int(label)] for label in labels] if self.label_names else labels

    @property
    def predicted_labels(self) -> list[str]:
        """The name of each example's most probable class, or its number where classes have no names."""
        return [self._names()[index] for index in self.probs.argmax(1)]

    def _names(self) -> tuple[str, ...]:
        return self.label_names or tuple(map(str, range(self.probs.shape[1])))

    @property
    def sample_probs(self) -> Array:
        """Probabilities of every draw, ``(S, n, C)``."""
        return None if self.sample_log_probs is None else np.exp(self.sample_log_probs)

    @property
    def sample_outputs(self) -> Array:
        """The probabilities of every draw."""
        return self.sample_probs

    @property
    def sample_log_likelihood(self) -> Array:
        """See :attr:`Prediction.sample_log_likelihood`."""
        if self.labels is None or self.sample_log_probs is None:
            return None
        return self.sample_log_probs[:, np.arange(len(self.labels)), self.labels.astype(int)]

    def row(self, index: int) -> dict[str, Any]:
        """The most probable class, all probabilities, and how uncertain it is."""
        probs = self.probs[index]
        names = self._names()
        return {
            "label": names[int(probs.argmax())],
            "probs": {name: round(float(p), 6) for name, p in zip(names, probs, strict=True)},
            "entropy": round(float(self.entropy[index]), 6),
            "mutual_information": round(float(self.mutual_information[index]), 6),
        }

    def scores(self, task: Any) -> dict[str, float]:
        """Accuracy and calibration, and the task's metrics."""
        return calibration_summary(self.probs, self.labels) | task.score(self.probs, self.labels)


@dataclass(frozen=True, repr=False)
class NumberPrediction(Prediction):
    """Of one number for each example.

    Attributes:
        mean: ``(n,)``.
        std: ``(n,)``, of the predictive, the noise included.
        noise_scale: The likelihood's σ.
        sample_means: ``(S, n)``.
    """

    mean: np.ndarray
    std: np.ndarray
    noise_scale: float
    sample_means: Array = field(default=None, repr=False)

    _of_examples = "mean"

    @property
    def sample_outputs(self) -> Array:
        """The mean of every draw."""
        return None if self.sample_means is None else self.sample_means[..., None]

    @property
    def sample_log_likelihood(self) -> Array:
        """See :attr:`Prediction.sample_log_likelihood`."""
        if self.labels is None or self.sample_means is None:
            return None
        standard = (self.labels - self.sample_means) / self.noise_scale
        return -(standard**2) / 2 - np.log(self.noise_scale) - np.log(2 * np.pi) / 2

    def row(self, index: int) -> dict[str, Any]:
        """Mean and standard deviation."""
        return {"mean": float(self.mean[index]), "std": float(self.std[index])}

    def scores(self, task: Any) -> dict[str, float]:
        """The task's metrics, and how honest the predictive is: NLL and CRPS are of the mixture of draws."""
        drawn = {"sample_means": self.sample_means, "noise_scale": self.noise_scale}
        nll = {} if self.nll is None else {"nll": self.nll}
        return task.score(self.mean, self.labels) | nll | regression_summary(self.labels, self.mean, self.std, **drawn)


@dataclass(frozen=True, repr=False)
class TextPrediction(Prediction):
    """Of texts that are given: how probable they are.

    Attributes:
        text_log_likelihood: ``(S, n)``, of their scored tokens, in nats.
        num_tokens: ``(n,)``, how many those are.
    """

    text_log_likelihood: np.ndarray = field(repr=False)
    num_tokens: np.ndarray

    _of_examples = "num_tokens"

    @property
    def text_log_predictive(self) -> np.ndarray:
        """log p of each text under the posterior predictive, one draw for a whole text, in nats, ``(n,)``."""
        return self.log_predictive

    @property
    def nats_per_token(self) -> float:
        """−log p of all texts under the posterior predictive, over the number of their scored tokens."""
        return float(-self.text_log_predictive.sum() / self.num_tokens.sum())

    @property
    def nll(self) -> float:
        """:attr:`nats_per_token`."""
        return self.nats_per_token

    @property
    def perplexity(self) -> float:
        """exp of :attr:`nats_per_token`."""
        return float(np.exp(self.nats_per_token))

    @property
    def sample_log_likelihood(self) -> np.ndarray:
        """See :attr:`Prediction.sample_log_likelihood`; of a text, the sum over its scored tokens."""
        return self.text_log_likelihood

    def row(self, index: int) -> dict[str, Any]:
        """The log-likelihood of a text, and how many tokens it is over."""
        return {
            "log_likelihood": round(float(self.text_log_predictive[index]), 6),
            "tokens": int(self.num_tokens[index]),
        }

    def scores(self, task: Any) -> dict[str, float]:
        """Nats per token and perplexity; how good texts are that it writes is judged elsewhere."""
        return {"nats_per_token": self.nats_per_token, "perplexity": self.perplexity}
