"""A run's folder opened from Python: what the command line says of it, in one line."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from bayeslora import InputError, open_run
from bayeslora.command.main import main

TEXTS = ["the film is good", "a dull plot"]


def test_from_folder_to_probabilities(run, capsys):
    prediction = open_run(run).predict(TEXTS, num_samples=4)
    assert main(["predict", str(run), "--text", *TEXTS, "--num-samples", "4"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert prediction.label_names == tuple(lines[0]["probs"])
    np.testing.assert_allclose(prediction.probs, [[*line["probs"].values()] for line in lines], atol=1e-6)
    np.testing.assert_allclose(prediction.entropy, [line["entropy"] for line in lines], atol=1e-6)


def test_what_a_run_holds(run):
    fitted = open_run(str(run))
    assert fitted.record == json.loads((run / "run.json").read_text())
    assert fitted.task.name == "reviews"
    assert fitted.network is fitted.posterior.network
    assert [entry["step"] for entry in fitted.history]
    assert len(fitted.training_data()) == 32
    assert fitted.labelled_split() == "test"
    (example,) = fitted.encode(["the film is good"])  # a text of the data too
    assert example["input_ids"] in [*fitted.data("test")["input_ids"]]
    assert "labels" not in fitted.data("test", labelled=False).column_names


def test_options_are_those_of_predict(run):
    fitted = open_run(run)
    same, again, other = (fitted.predict(TEXTS, num_samples=2, seed=seed).probs for seed in (0, 0, 1))
    np.testing.assert_array_equal(same, again)
    assert (same != other).all()


@pytest.mark.parametrize(
    ("texts", "pairs", "says"),
    [
        ("the film", None, r"give \[text\] for a single one"),
        (["the film"], ["a plot"], r"leave --text-pair out \(pairs=None\)"),
        ([], None, "give at least one"),
    ],
    ids=["one_string", "pairs", "nothing"],
)
def test_texts_that_are_not_the_tasks(run, texts, pairs, says):
    with pytest.raises(InputError, match=says):
        open_run(run).predict(texts, pairs)


def test_a_task_on_pairs_needs_pairs(run):
    fitted = open_run(run)
    pairs = replace(fitted, task=replace(fitted.task, text_columns=("text", "other")))
    with pytest.raises(InputError, match=r"on pairs: give --text-pair too \(pairs="):
        pairs.predict(TEXTS)
    with pytest.raises(InputError, match="2 texts but 1 in --text-pair"):
        pairs.predict(TEXTS, ["the plot"])
    assert pairs.predict(TEXTS, ["the plot", "a film"], num_samples=0).probs.shape == (2, 2)


def test_folders_that_are_no_finished_run(run, tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        open_run(tmp_path)
    shutil.copytree(run, tmp_path / "begun", ignore=shutil.ignore_patterns("adapter"))
    with pytest.raises(InputError, match="is not finished: continue it with fit --resume"):
        open_run(tmp_path / "begun")
    (tmp_path / "begun" / "run.json").write_text("{}")
    with pytest.raises(InputError, match="does not say which model and task"):
        open_run(tmp_path / "begun")


def test_model_and_data_that_moved(run, model, data, tmp_path):
    moved = shutil.copytree(data, tmp_path / "data")
    (moved / "extra.csv").write_text("text,label\nthe film is good,1\n", encoding="utf-8")
    fitted = open_run(run, model=shutil.copytree(model, tmp_path / "model"), data_dir=moved)
    assert "extra" in fitted.task.splits
    np.testing.assert_array_equal(
        fitted.predict(TEXTS, num_samples=2).probs, open_run(run).predict(TEXTS, num_samples=2).probs
    )
