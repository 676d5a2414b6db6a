"""The rows that people should look at are those of a prediction of all rows at once, whatever the chunks."""

import json
import logging

import numpy as np
import pytest

from bayeslora import InputError
from bayeslora.analysis import select_batchbald
from bayeslora.bulk import selection
from bayeslora.bulk.predicting import predict_file
from tests.bulk.fitted_runs import sentences, text_run
from tests.task_files import write

QUICK = {"num_samples": 8, "progress": False}


@pytest.fixture(scope="module")
def run():
    return text_run(noise=2.0)


@pytest.fixture(scope="module")
def said(run):
    return run.predict(sentences(60), num_samples=8)


def chosen(run, tmp_path, count, by, size=9, texts=None):
    texts = texts or sentences(60)
    path = write(tmp_path / "in.jsonl", [{"id": n, "text": text} for n, text in enumerate(texts)])
    out = tmp_path / f"{by}-{size}.jsonl"
    result = predict_file(run, path, out, top_uncertain=count, by=by, rows_at_once=size, **QUICK)
    assert (result.rows, result.written) == (60, min(count, 60))
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("by", ["entropy", "mutual_information"])
@pytest.mark.parametrize("size", [1, 9, 60])
def test_the_largest(run, said, tmp_path, by, size):
    rows = chosen(run, tmp_path, 7, by, size)
    scores = getattr(said, by)
    ranks = np.argsort(np.argsort(-scores, kind="stable"))
    assert [int(ranks[row["row"]]) for row in rows] == [*range(7)] or np.ptp(np.sort(scores)[-8:]) < 1e-5
    assert [row["id"] for row in rows] == [row["row"] for row in rows]
    np.testing.assert_allclose([row[by] for row in rows], [scores[row["row"]] for row in rows], atol=2e-6)


@pytest.mark.parametrize("size", [4, 60])
def test_batches(run, tmp_path, size):
    """Of a text that is there thrice, mutual information takes all copies."""
    texts = sentences(20) * 3
    probs = run.predict(texts, num_samples=8).sample_probs
    rows = chosen(run, tmp_path, 9, "batchbald", size, texts)
    taken = [row["id"] for row in rows]
    expected = select_batchbald(probs, 9)
    np.testing.assert_allclose(select_batchbald(probs[:, taken], 9).gains, expected.gains, atol=1e-3)
    assert len({texts[row] for row in taken}) > 3
    largest = [row["id"] for row in chosen(run, tmp_path, 9, "mutual_information", size, texts)]
    assert len({texts[row] for row in largest}) == 3


def test_a_pool_that_was_too_small_says_so(run, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    chosen(run, tmp_path, 6, "batchbald", 60)
    assert "choose fewer rows" not in caplog.text
    monkeypatch.setattr(selection, "POOL", 6)
    chosen(run, tmp_path, 6, "batchbald", 10)
    assert "choose fewer rows" in caplog.text


def test_more_than_there_are(run, tmp_path):
    assert {row["row"] for row in chosen(run, tmp_path, 100, "entropy")} == {*range(60)}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_uncertain": 0}, "at least 1"),
        ({"top_uncertain": 2, "by": "margin"}, "one of entropy, mutual_information, batchbald"),
        ({"top_uncertain": 2, "num_samples": 0}, "disagreement of draws, and there is none here"),
    ],
)
def test_what_is_refused(run, tmp_path, options, says):
    path = write(tmp_path / "in.jsonl", [{"text": "a film"}])
    with pytest.raises(InputError, match=says):
        predict_file(run, path, tmp_path / "out.csv", **QUICK | options)
