"""Named entities from the tags of words, and how many of them are found.

Of the libraries that count entities, ``seqeval`` has had no release since 2020 and no wheel, and ``nervaluate`` gives
counts without the entities. Their spans are needed here anyway, for the uncertainty of each, and with them the scores
are three sums.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from bayeslora.errors import InputError


class Span(NamedTuple):
    """The words ``first`` to ``last`` of a sentence, counted from 0, both included, and what they are."""

    type: str
    first: int
    last: int


_CLOSED = "OES"  # after such a tag no entity goes on


def are_entity_tags(names: Iterable[str]) -> bool:
    """Whether classes are tags of entities: O, and B-TYPE, I-TYPE (IOB, IOB2), perhaps E-TYPE and S-TYPE (IOBES).

    Example:
        >>> are_entity_tags(["O", "B-PER", "I-PER"]), are_entity_tags(["NOUN", "VERB"])
        (True, False)
    """
    names = tuple(names)
    return any(name != "O" for name in names) and all(name == "O" or name[:2] in _PREFIXES for name in names)


_PREFIXES = ("B-", "I-", "E-", "S-")


def entity_spans(tags: Sequence[str]) -> list[Span]:
    """The entities that a sentence's tags say, as ``seqeval`` and the CoNLL-2000 script read them.

    An entity begins at B or S, and at any other tag that follows O, E, S or another type: tags that break the scheme
    (an I after an O) are entities too.

    Example:
        >>> entity_spans(["B-PER", "I-PER", "O", "I-LOC"])
        [Span(type='PER', first=0, last=1), Span(type='LOC', first=3, last=3)]
    """
    spans: list[Span] = []
    before = "O"
    for place, tag in enumerate(tags):
        if tag != "O":
            if tag[0] in "BS" or before[0] in _CLOSED or before[2:] != tag[2:]:
                spans.append(Span(tag[2:], place, place))
            else:
                spans[-1] = spans[-1]._replace(last=place)
        before = tag
    return spans


def entity_counts(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> np.ndarray:
    """Of each sentence, how many entities were found exactly (words and type), were predicted, and there are:
    ``(sentences, 3)``.

    Raises:
        InputError: where sentences or their words are not equally many.
    """
    if [*map(len, truth)] != [*map(len, predicted)]:
        raise InputError("tags and predicted tags need the same sentences, each with a tag for every word")
    counts = []
    for known, said in zip(truth, predicted, strict=True):
        true, found = set(entity_spans(known)), set(entity_spans(said))
        counts.append((len(true & found), len(found), len(true)))
    return np.array(counts, dtype=int).reshape(-1, 3)


def entity_f1(counts: np.ndarray) -> float:
    """Harmonic mean of precision and recall, over the entities of all sentences; 0 where none is found.

    Args:
        counts: As :func:`entity_counts` gives them.
    """
    found, predicted, true = np.asarray(counts).sum(0)
    return float(2 * found / max(predicted + true, 1))


def entity_scores(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities, over those of all sentences, as ``seqeval`` has them (micro average).

    An entity counts where its words and its type are all right; a share of nothing is 0.

    Args:
        truth: Tags of each sentence.
        predicted: The same, as predicted.

    Raises:
        InputError: where they do not belong together.

    Example:
        >>> entity_scores([["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "I-PER", "O", "O"]])["entity_recall"]
        0.5

    References:
        Tjong Kim Sang and De Meulder (2003), *Introduction to the CoNLL-2003 Shared Task*, section 2.
    """
    counts = entity_counts(truth, predicted)
    found, said, true = counts.sum(0)
    return {
        "entity_precision": float(found / max(said, 1)),
        "entity_recall": float(found / max(true, 1)),
        "entity_f1": entity_f1(counts),
    }
