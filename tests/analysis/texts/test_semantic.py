"""What several texts say, and how much that differs."""

import math

import numpy as np
import pytest
from scipy.stats import entropy

from bayeslora import InputError
from bayeslora.analysis import normalized_answer, semantic_clusters, semantic_entropy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog, the Dog and AN apple!", "dog dog and apple"),
        ("  $1,234.50 ", "123450"),
        ("another theory", "another theory"),  # articles are words
        ("", ""),
    ],
)
def test_normalized_answer(text, expected):
    assert normalized_answer(text) == expected


def test_equal_answers_are_one_cluster():
    assert semantic_clusters([["Rome", "rome", "Paris", "the Rome."], ["a b", "b", "c b", "b"]]) == [
        [0, 0, 1, 0],
        [0, 0, 1, 0],
    ]


def test_entailment_must_hold_both_ways():
    """'a dog barked' entails 'an animal made a sound', and not the other way round."""
    entails = {("dog", "animal"), ("puppy", "dog"), ("dog", "puppy")}
    asked = []

    def model(one, other):
        asked.append((one, other))
        return (one, other) in entails

    assert semantic_clusters([["animal", "dog", "puppy", "dog"], ["dog", "animal", "puppy", "animal"]], model) == [
        [0, 1, 1, 1],
        [0, 1, 0, 1],
    ]
    assert ("dog", "dog") not in asked  # a text says what it says


def test_texts_are_compared_with_the_first_of_a_cluster_as_they_are():
    seen = set()
    semantic_clusters([["The A.", "the B!"]], lambda one, other: bool(seen.update({one, other})))
    assert seen == {"The A.", "the B!"}


@pytest.mark.parametrize("seed", range(5))
def test_entropy_is_that_of_the_shares(seed):
    rng = np.random.default_rng(seed)
    clusters, logs = rng.integers(0, 4, (7, 6)), rng.normal(-20, 5, (7, 6))
    by_hand, weighted = [], []
    for labels, log in zip(clusters, logs, strict=True):
        by_hand.append(entropy(np.unique(labels, return_counts=True)[1]))
        weighted.append(entropy([np.exp(log)[labels == label].sum() for label in set(labels.tolist())]))
    assert semantic_entropy(clusters.tolist()) == pytest.approx(by_hand, abs=1e-12)
    assert semantic_entropy(clusters.tolist(), logs) == pytest.approx(weighted, abs=1e-9)
    assert semantic_entropy(clusters.tolist(), logs - 1e4) == pytest.approx(weighted, abs=1e-9)  # of long texts


def test_bounds():
    found = semantic_entropy([list(range(8)), [3] * 8])
    assert found == pytest.approx([math.log(8), 0])
    assert (found >= 0).all()


@pytest.mark.parametrize("clusters", [[], [[]], [[0, 1], [0]]])
def test_unequal_numbers_of_texts(clusters):
    with pytest.raises(InputError, match="the same number of texts"):
        semantic_entropy(clusters)


@pytest.mark.parametrize("logs", [[[0.0]], [[0.0, np.nan]], [[0.0, -np.inf]]])
def test_likelihoods_that_do_not_fit(logs):
    with pytest.raises(InputError, match=r"shape \(1, 2\)"):
        semantic_entropy([[0, 1]], logs)
