"""What results of each kind say: of one example, of all of them, and of attributes that they do not have."""

import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest

from bayeslora.prediction import ClassPrediction, NumberPrediction, Prediction, TextPrediction

SAMPLE_PROBS = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.5], [0.4, 0.6]]])
CLASSES = ClassPrediction(
    np.array([0, 0]),
    ("no", "yes"),
    np.array([[0.7, 0.3], [0.3, 0.7]]),
    np.array([0.61086430, 0.61086430]),
    np.array([0.1, 0.2]),
    np.log(SAMPLE_PROBS),
)
NUMBERS = NumberPrediction(
    np.array([1.0, 4.0]), np.array([1.0, 2.0]), np.array([0.5, 0.6]), 0.5, np.array([[0.5, 2.0]])
)
TEXTS = TextPrediction(None, np.log([[0.5, 0.25], [0.25, 0.25]]), np.array([2.0, 3.0]))


class Scorer:
    """Stands for a task: says what it was given."""

    def score(self, predictions, labels):
        return {"given": float(np.sum(predictions)), "labels": float(np.sum(labels))}


@pytest.mark.parametrize(
    ("result", "row"),
    [
        (CLASSES, {"label": "yes", "probs": {"no": 0.3, "yes": 0.7}, "entropy": 0.610864, "mutual_information": 0.2}),
        (NUMBERS, {"mean": 2.0, "std": 0.6}),
        (TEXTS, {"log_likelihood": round(math.log(0.25), 6), "tokens": 3}),
    ],
)
def test_of_one_example(result, row):
    assert json.loads(json.dumps(result.row(1))) == row


def test_classes_without_names_are_numbers():
    unnamed = dataclasses.replace(CLASSES, label_names=None)
    assert unnamed.row(0)["label"] == "0"
    assert unnamed.row(0)["probs"] == {"0": 0.7, "1": 0.3}


def test_scores():
    scores = CLASSES.scores(Scorer())
    assert scores["accuracy"] == 0.5
    assert scores["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.3)) / 2)
    assert scores["brier"] == pytest.approx((2 * 0.3**2 + 2 * 0.7**2) / 2)
    assert scores["given"] == pytest.approx(2.0)
    assert {"given": 3.0, "labels": 5.0}.items() <= NUMBERS.scores(Scorer()).items()
    log_predictive = math.log((0.5 + 0.25) / 2) + math.log(0.25)
    assert TEXTS.scores(Scorer()) == {
        "nats_per_token": pytest.approx(-log_predictive / 5),
        "perplexity": pytest.approx(math.exp(-log_predictive / 5)),
    }


def test_what_each_draw_says_of_the_labels():
    np.testing.assert_allclose(CLASSES.sample_log_likelihood, np.log(SAMPLE_PROBS[:, :, 0]))
    standard = (np.array([[1.0, 4.0]]) - [[0.5, 2.0]]) / 0.5
    np.testing.assert_allclose(NUMBERS.sample_log_likelihood, -(standard**2) / 2 - math.log(0.5 * math.sqrt(2 * np.pi)))
    np.testing.assert_array_equal(TEXTS.sample_log_likelihood, TEXTS.text_log_likelihood)
    np.testing.assert_allclose(CLASSES.sample_outputs, SAMPLE_PROBS)
    np.testing.assert_array_equal(NUMBERS.sample_outputs, [[[0.5], [2.0]]])


@pytest.mark.parametrize("result", [CLASSES, NUMBERS, TEXTS])
def test_attributes_of_other_kinds_are_none_and_of_no_kind_an_error(result):
    own = {"probs", "entropy"} if result is CLASSES else {"mean", "std"} if result is NUMBERS else {"num_tokens"}
    for name in ("probs", "entropy", "mean", "std", "num_tokens"):
        assert (getattr(result, name) is not None) == (name in own)
    assert (result.perplexity is not None) == (result is TEXTS)
    assert isinstance(result, Prediction)
    with pytest.raises(AttributeError, match="Prediction has no 'prob'"):
        _ = result.prob
    again = pickle.loads(pickle.dumps(copy.deepcopy(result)))
    assert repr(again) == repr(result)
