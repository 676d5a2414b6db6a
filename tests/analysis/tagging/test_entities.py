"""Entities of tags, and their scores, as seqeval 1.2.2 has them."""

import numpy as np
import pytest

from bayeslora import InputError
from bayeslora.analysis import bootstrap_interval
from bayeslora.analysis.tagging.entities import are_entity_tags, entity_counts, entity_f1, entity_scores, entity_spans

# seqeval.metrics.sequence_labeling.get_entities of tags with and without mistakes
SPANS = [
    ("B-PER I-LOC O I-PER O", [("PER", 0, 0), ("LOC", 1, 1), ("PER", 3, 3)]),
    ("I-LOC O B-LOC I-PER B-PER I-LOC", [("LOC", 0, 0), ("LOC", 2, 2), ("PER", 3, 3), ("PER", 4, 4), ("LOC", 5, 5)]),
    ("B-PER I-PER I-PER B-PER", [("PER", 0, 2), ("PER", 3, 3)]),
    ("B-A E-A I-A S-A I-A E-A O", [("A", 0, 1), ("A", 2, 2), ("A", 3, 3), ("A", 4, 5)]),
    ("O O", []),
]


@pytest.mark.parametrize(("tags", "expected"), SPANS)
def test_spans_are_seqeval_s(tags, expected):
    assert entity_spans(tags.split()) == expected


def test_scores_are_seqeval_s():
    truth = [
        "B-PER I-LOC O I-PER O",
        "B-LOC B-LOC B-LOC B-LOC B-PER O B-LOC",
        "O B-LOC B-LOC",
        "I-LOC O B-LOC I-PER B-PER I-LOC",
    ]
    said = [
        "B-PER I-LOC O I-PER B-LOC",
        "B-LOC B-LOC B-LOC B-LOC B-PER O B-LOC",
        "O B-LOC B-LOC",
        "I-LOC O B-LOC I-PER B-PER I-PER",
    ]
    truth, said = ([sentence.split() for sentence in tags] for tags in (truth, said))
    assert entity_scores(truth, said) == {"entity_precision": 0.875, "entity_recall": 0.875, "entity_f1": 0.875}
    counts = entity_counts(truth, said)
    assert counts.sum(0).tolist() == [14, 16, 16]
    assert entity_f1(counts) == 0.875


def test_nothing_found_is_zero_and_other_words_are_refused():
    assert entity_scores([["B-A"]], [["O"]]) == {"entity_precision": 0.0, "entity_recall": 0.0, "entity_f1": 0.0}
    with pytest.raises(InputError, match="a tag for every word"):
        entity_scores([["B-A", "O"]], [["O"]])


def test_which_classes_are_tags_of_entities():
    assert are_entity_tags(["O", "B-PER", "I-PER"])
    assert are_entity_tags(["I-PER", "S-PER", "O"])
    assert not are_entity_tags(["NOUN", "VERB"])
    assert not are_entity_tags(["O"])
    assert not are_entity_tags(["O", "B-PER", "NOUN"])


def test_an_interval_draws_whole_groups():
    """Ten copies of each number tell as much as the numbers: the interval is theirs."""
    values = np.random.default_rng(0).normal(size=30)
    copies, groups = np.repeat(values, 10), np.repeat(np.arange(30), 10)
    alone = bootstrap_interval(np.mean, values)
    together = bootstrap_interval(np.mean, copies, groups=groups)
    assert together == pytest.approx(alone)
    narrow = bootstrap_interval(np.mean, copies)
    assert narrow.upper - narrow.lower < 0.5 * (together.upper - together.lower)
    with pytest.raises(InputError, match="groups have one number"):
        bootstrap_interval(np.mean, values, groups=[0, 1])
