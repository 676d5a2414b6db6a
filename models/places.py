"""What is predicted of examples with several labels: a class for each word, or of each label whether it applies.

One :class:`~bayeslora.prediction.ClassPrediction` over the places of all examples, so that all that is known of class
probabilities (scores, calibration, temperatures, reports) holds for them as it stands.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from bayeslora.analysis.metrics.labels import best_thresholds, f1_macro, f1_micro, mean_average_precision
from bayeslora.analysis.metrics.registry import calibration_summary
from bayeslora.analysis.tagging.entities import are_entity_tags, entity_counts, entity_scores, entity_spans
from bayeslora.analysis.tagging.words import split_words
from bayeslora.errors import InputError
from bayeslora.prediction import Array, ClassPrediction

if TYPE_CHECKING:
    import pandas

AROUND = 6  # words that are shown on either side of one


@dataclass(frozen=True, repr=False)
class PlacesPrediction(ClassPrediction):
    """Of C classes at the N places of n examples: every array is over the places, example after example.

    Attributes:
        rows: ``(N,)``, the number of each place's example.
        numbers: ``(N,)``, which of that example's places it is, from 0.
    """

    rows: np.ndarray = field(kw_only=True, repr=False)
    numbers: np.ndarray = field(kw_only=True, repr=False)

    unit: ClassVar[str] = "labels"

    def __len__(self) -> int:
        """The number of examples."""
        return int(self.rows[-1]) + 1

    def _shown(self) -> list[str]:
        return [f"{len(self.probs)} {self.unit}", *super()._shown()]

    @property
    def groups(self) -> np.ndarray:
        """The example of each place: what a resampling has to take as one."""
        return self.rows

    def by_example(self, values: Sequence[Any] | np.ndarray) -> list[np.ndarray]:
        """N values, one for each place, as one array for each example."""
        return np.split(np.asarray(values), np.flatnonzero(np.diff(self.rows)) + 1)

    def row(self, index: int) -> dict[str, Any]:
        """What is predicted of one example."""
        return {self.unit: [self.place(int(place)) for place in np.flatnonzero(self.rows == index)]}

    def place(self, index: int) -> dict[str, Any]:
        """What is predicted at one place."""
        return super().row(index)

    def _table(self) -> "pandas.DataFrame":
        table = self._as_table(self.place(index) for index in range(len(self.probs)))
        table.insert(0, "row", self.rows)
        return table

    def scores(self, task: Any) -> dict[str, float]:
        """Accuracy and calibration over all places."""
        return {self.unit: len(self.probs), **calibration_summary(self.probs, self.labels)}


class Entity(NamedTuple):
    """An entity that is predicted: the words ``first`` to ``last`` of example ``row``.

    ``probability``: that all its words have these tags at once, averaged over the draws; words are independent given a
    draw, and not without. ``entropy`` and ``mutual_information``, in nats: the largest of its words', as an entity is
    wrong if one of them is.

    References:
        Culotta and McCallum (2004), *Confidence Estimation for Information Extraction* (the probability of all tags of
        a field at once; here an average of products, as a draw's words have no transitions).
    """

    row: int
    type: str
    first: int
    last: int
    probability: float
    entropy: float
    mutual_information: float


def entities_of(found: "WordPrediction", log_probs: np.ndarray) -> tuple[Entity, ...]:
    """The entities that the most probable tags make.

    Args:
        found: The tags.
        log_probs: Of every draw, ``(S, N, C)``.
    """
    best = found.probs.argmax(1)
    chosen = log_probs[:, np.arange(len(best)), best]
    entities = []
    start = 0
    for row, tags in enumerate(found.tags(best)):
        for span in entity_spans(tags):
            words = slice(start + span.first, start + span.last + 1)
            probability = float(np.exp(chosen[:, words].sum(1)).mean())
            doubts = float(found.entropy[words].max()), float(found.mutual_information[words].max())
            entities.append(Entity(row, *span, probability, *doubts))
        start += len(tags)
    return tuple(entities)


@dataclass(frozen=True, repr=False)
class WordPrediction(PlacesPrediction):
    """Of a class for each word.

    Attributes:
        words: The words of each example, where they are known; a run that is asked for sentences knows them.
        entities: Where the classes are tags of entities (O, B-PER, I-PER, ...), what they say, sentence by sentence.
    """

    words: tuple[tuple[str, ...], ...] | None = field(default=None, kw_only=True, repr=False)
    entities: tuple[Entity, ...] | None = field(default=None, kw_only=True, repr=False)

    unit: ClassVar[str] = "words"

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, or their numbers."""
        return self._names()

    def tags(self, classes: np.ndarray) -> list[list[str]]:
        """Names of N classes, sentence by sentence."""
        return [[self.names[int(number)] for number in of] for of in self.by_example(classes)]

    def of_texts(self, texts: Sequence[str | Sequence[str]]) -> "WordPrediction":
        """With the words that these texts have, in place of their numbers.

        Raises:
            InputError: for other texts than were predicted.
        """
        words = [split_words(text) for text in texts]
        counts = np.bincount(self.rows)
        if len(words) != len(counts) or any(len(of) < count for of, count in zip(words, counts, strict=False)):
            raise InputError("these are not the texts that were predicted: they have other words")
        return replace(self, words=tuple(tuple(of[:count]) for of, count in zip(words, counts, strict=True)))

    def shown(self, texts: Sequence[str | Sequence[str]]) -> list[str]:
        """Each word, marked, among those around it."""
        named = self.of_texts(texts).words
        assert named is not None
        return [_among(named[row], number) for row, number in zip(self.rows, self.numbers, strict=True)]

    def place(self, index: int) -> dict[str, Any]:
        """The word (its number, where words are not known), its most probable class, all probabilities, and how
        uncertain it is."""
        row, number = int(self.rows[index]), int(self.numbers[index])
        return {"word": number if self.words is None else self.words[row][number], **super().place(index)}

    def row(self, index: int) -> dict[str, Any]:
        """Its words, and its entities where there are such classes."""
        said = super().row(index)
        if self.entities is None:
            return said
        found = [self._entity(entity) for entity in self.entities if entity.row == index]
        return {"entities": found, **said}

    def _entity(self, entity: Entity) -> dict[str, Any]:
        said = {name: value for name, value in entity._asdict().items() if name != "row"}
        rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in said.items()}
        if self.words is None:
            return rounded
        return {"text": " ".join(self.words[entity.row][entity.first : entity.last + 1]), **rounded}

    @property
    def entity_counts(self) -> Array:
        """Of each example, how many entities were found, predicted, and there are, ``(n, 3)``; None without labels or
        entities."""
        if self.labels is None or self.entities is None:
            return None
        return entity_counts(self.tags(self.labels), self.tags(self.probs.argmax(1)))

    def scores(self, task: Any) -> dict[str, float]:
        """Accuracy and calibration over words, and precision, recall and F1 of whole entities where there are such
        classes."""
        found = super().scores(task)
        if not are_entity_tags(self.names):
            return found
        return found | entity_scores(self.tags(self.labels), self.tags(self.probs.argmax(1)))


def _among(words: Sequence[str], number: int) -> str:
    before, after = words[max(number - AROUND, 0) : number], words[number + 1 : number + 1 + AROUND]
    parts = ["…"] * int(number > AROUND) + [*before, f"[{words[number]}]", *after]
    return " ".join([*parts, *["…"] * int(number + 1 + AROUND < len(words))])


LABEL_CLASSES = ("no", "yes")


@dataclass(frozen=True, repr=False)
class LabelsPrediction(PlacesPrediction):
    """Of whether each of K labels applies: the two classes of every label of every example are "no" and "yes".

    Attributes:
        of: Names of the K labels.
    """

    of: tuple[str, ...] = field(kw_only=True)

    def _shown(self) -> list[str]:
        return [f"{len(self.of)} labels"]

    def _square(self, values: np.ndarray) -> np.ndarray:
        """One number for each label of each example, ``(n, K)``; NaN where a label is not known."""
        square = np.full((len(self), len(self.of)), np.nan)
        square[self.rows, self.numbers] = values
        return square

    @property
    def label_probs(self) -> np.ndarray:
        """That each label applies, ``(n, K)``; NaN where it was not known and so not asked for."""
        return self._square(self.probs[:, 1])

    @property
    def label_truth(self) -> Array:
        """Whether each label applies, 0 or 1, ``(n, K)``, NaN where it is not known; None without labels."""
        return None if self.labels is None else self._square(self.labels)

    def applying(self, thresholds: Any = 0.5) -> list[list[str]]:
        """The names of the labels that are said to apply, for each example.

        Args:
            thresholds: From which probability on: one, or one for each label, such as
                :func:`bayeslora.analysis.best_thresholds` finds on held-out examples.
        """
        applies = self.label_probs >= np.asarray(thresholds)
        return [[name for name, one in zip(self.of, row, strict=True) if one] for row in applies]

    def place(self, index: int) -> dict[str, Any]:
        """Which label, whether it applies, both probabilities, and how uncertain that is."""
        return {"of": self.of[int(self.numbers[index])], **super().place(index)}

    def row(self, index: int) -> dict[str, Any]:
        """The labels that apply with a probability of a half and more, and of each its probability and how uncertain
        that is, in nats."""
        places = np.flatnonzero(self.rows == index)
        names = [self.of[int(self.numbers[place])] for place in places]
        values = {"probs": self.probs[:, 1], "entropy": self.entropy, "mutual_information": self.mutual_information}
        said = {
            name: {label: round(float(of[place]), 6) for label, place in zip(names, places, strict=True)}
            for name, of in values.items()
        }
        return {"labels": [name for name in names if said["probs"][name] >= 0.5], **said}

    def by_label(self) -> "pandas.DataFrame":
        """A line for each label: how many examples it applies to, and the scores of its probabilities.

        Raises:
            InputError: without labels.
        """
        import pandas

        if self.labels is None:
            raise InputError("these examples have no labels: there is nothing to score")
        lines = []
        for number, name in enumerate(self.of):
            of = self.numbers == number
            probs, labels = self.probs[of], self.labels[of]
            one = {"average_precision": mean_average_precision, "f1": f1_macro}
            own = {title: score(probs[:, 1:], labels[:, None]) for title, score in one.items()}
            threshold = float(best_thresholds(probs[:, 1:], labels[:, None])[0])
            lines.append(
                {
                    "label": name,
                    "examples": int(labels.sum()),
                    **own,
                    **calibration_summary(probs, labels),
                    "best_threshold": threshold,
                }
            )
        return pandas.DataFrame(lines).set_index("label")

    def shown(self, texts: Sequence[str]) -> list[str]:
        """Each text once for each label, which stands before it."""
        return [f"{self.of[number]}? {texts[row]}" for row, number in zip(self.rows, self.numbers, strict=True)]

    def scores(self, task: Any) -> dict[str, float]:
        """Accuracy and calibration over the decisions whether a label applies, and scikit-learn's scores of labels."""
        pair = self.label_probs, self.label_truth
        own = {"map": mean_average_precision(*pair), "f1_micro": f1_micro(*pair), "f1_macro": f1_macro(*pair)}
        return super().scores(task) | own
