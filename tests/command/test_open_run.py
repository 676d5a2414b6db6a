"""A run's folder opened from Python: what the command line says of it, in one line."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, pipeline

from bayeslora import BayesLoRA, InputError, open_run
from bayeslora.command.main import main
from bayeslora.storage.manifest import digest_of

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
    task = fitted.record["task"] | {"text_columns": ["text", "other"]}
    pairs = replace(fitted, record=fitted.record | {"task": task})
    with pytest.raises(InputError, match=r"on pairs: give --text-pair too \(pairs="):
        pairs.predict(TEXTS)
    with pytest.raises(InputError, match="2 texts but 1 in --text-pair"):
        pairs.predict(TEXTS, ["the plot"])
    said = pairs.predict(TEXTS, ["the plot", "a film"], num_samples=0).probs
    assert said.shape == (2, 2)
    both = [(TEXTS[0], "the plot"), (TEXTS[1], "a film")]
    np.testing.assert_array_equal(pairs.predict(both, num_samples=0).probs, said)
    with pytest.raises(InputError, match="a text is a string, or all of them are pairs"):
        pairs.predict([both[0], "the plot"])


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


@pytest.fixture
def elsewhere(run, tmp_path):
    """The run on a machine that has the base model's weights, and neither the data nor the model's tokenizer."""
    folder = shutil.copytree(run, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    base = shutil.copytree(record["model"], tmp_path / "base", ignore=shutil.ignore_patterns("*token*", "vocab*"))
    record["task"]["data_dir"] = str(tmp_path / "nowhere")
    (folder / "run.json").write_text(json.dumps(record | {"model": str(base)}))
    return folder


def test_texts_need_no_data(run, elsewhere, capsys):
    expected = open_run(run).predict(TEXTS, num_samples=2)
    fitted = open_run(elsewhere, model=json.loads((run / "run.json").read_text())["model"])
    np.testing.assert_array_equal(fitted.predict(TEXTS, num_samples=2).probs, expected.probs)
    assert fitted.label_names == expected.label_names
    words = ["predict", str(elsewhere), "--model", str(fitted.network.name_or_path), "--num-samples", "2"]
    assert main([*words, "--text", *TEXTS]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    np.testing.assert_allclose([[*line["probs"].values()] for line in lines], expected.probs, atol=1e-6)
    assert main([*words, "--split", "test"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_a_run_folder_stands_for_its_adapter(run, model):
    network = AutoModelForSequenceClassification.from_pretrained(model)
    network.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    bayes = BayesLoRA.from_pretrained(run, network)
    tokens = [dict(bayes.tokenizer(text)) for text in TEXTS]
    prediction, expected = bayes.predict(tokens, num_samples=2), open_run(run).predict(TEXTS, num_samples=2)
    np.testing.assert_array_equal(prediction.probs, expected.probs)
    assert prediction.label_names == expected.label_names == ("0", "1")


def test_the_tokenizer_stays_with_the_adapter(run, model, tmp_path):
    """Also where the adapter is written again, and a damaged one is refused."""
    folder = shutil.copytree(run / "adapter", tmp_path / "adapter")
    bayes = BayesLoRA.from_pretrained(folder, AutoModelForSequenceClassification.from_pretrained(model))
    bayes.save_pretrained(folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (run / "adapter").iterdir())
    assert "tokenizer_config.json" in names
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer_config\.json is truncated or was changed"):
        BayesLoRA.from_pretrained(folder, AutoModelForSequenceClassification.from_pretrained(model))


@pytest.mark.parametrize("name", ["../run.json", "/etc/hostname", "a/../../b", "a/b/c", ""])
def test_files_outside_the_folder_are_not_its_own(run, model, tmp_path, name):
    folder = shutil.copytree(run / "adapter", tmp_path / "adapter")
    manifest = json.loads((folder / "bayeslora.json").read_text())
    manifest["tokenizer"] = [name]
    manifest["digest"] = digest_of(manifest)
    (folder / "bayeslora.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"damaged \(its 'tokenizer'\)"):
        BayesLoRA.from_pretrained(folder, AutoModelForSequenceClassification.from_pretrained(model))


def test_a_prediction_as_a_table(run):
    fitted = open_run(run)
    table = fitted.predict(TEXTS, num_samples=4).to_pandas()
    assert [*table] == ["label", "P(0)", "P(1)", "entropy", "mutual_information", "monte_carlo_error"]
    np.testing.assert_allclose(table[["P(0)", "P(1)"]].sum(axis=1), 1, atol=1e-5)
    prediction = fitted.posterior.predict(fitted.data("test"), num_samples=4)
    assert prediction.to_pandas()["truth"].tolist() == [str(label) for label in prediction.labels]
    assert repr(prediction) == "ClassPrediction(16 examples, 2 classes: 0, 1, 4 draws)"
    assert bool(prediction)


def test_several_threads_at_once(run):
    """Each has its own answer, by texts of its own length and number: tokenizer and draws are shared."""
    fitted = open_run(run)
    asked = [[" ".join(["the film is good"] * (1 + i % 5))] * (1 + i % 3) for i in range(24)]
    expected = [fitted.predict(texts, num_samples=2, seed=i % 4).probs for i, texts in enumerate(asked)]
    with ThreadPoolExecutor(8) as pool:
        said = pool.map(lambda i: fitted.predict(asked[i], num_samples=2, seed=i % 4), range(24))
        for found, probs in zip(said, expected, strict=True):
            np.testing.assert_array_equal(found.probs, probs)


def test_labels_by_name(run):
    prediction = open_run(run).predict(TEXTS, num_samples=2)
    assert prediction.predicted_labels == prediction.to_pandas()["label"].tolist()


def test_the_mean_in_a_pipeline(run):
    """What the documentation says of transformers' own."""
    fitted = open_run(run)
    classify = pipeline("text-classification", model=fitted.posterior.merge(), tokenizer=fitted.tokenizer, top_k=None)
    said = [{one["label"]: one["score"] for one in scores} for scores in classify(TEXTS)]
    expected = fitted.predict(TEXTS, num_samples=0)
    np.testing.assert_allclose(
        [[row[name] for name in expected.label_names] for row in said], expected.probs, atol=1e-5
    )


def test_texts_for_a_posterior_say_how(run):
    with pytest.raises(InputError, match=r"holds texts: tokenize each first, or open_run\(folder\)"):
        open_run(run).posterior.predict(TEXTS)
