"""Words with their classes, from the files to the report, through the command line and back into Python."""

import json
import random

import numpy as np
import pytest
from transformers import BertTokenizerFast

from bayeslora import InputError, open_run
from bayeslora.command.main import main
from tests.conftest import VOCABULARY, tiny_network

THINGS, OTHERS = ("film", "plot"), ("the", "a", "is", "was", "good", "bad", "dull", "not")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny BERT without a head; ``film`` has two pieces."""
    folder = tmp_path_factory.mktemp("model")
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*OTHERS, "plot", "fil", "##m", "very", "."]
    filler = [f"w{i}" for i in range(VOCABULARY - len(specials) - len(words))]
    (folder / "vocab.txt").write_text("\n".join([*specials, *words, *filler]), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    tiny_network(layers=1, initializer_range=0.3).bert.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Things, perhaps of two words, among other words."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    for split, size in (("train", 48), ("dev", 20), ("test", 12)):
        sentences = []
        for _ in range(size):
            lines = []
            for word in draw.choices([*THINGS, *OTHERS], k=draw.randint(2, 6)):
                lines.append(f"{word} {'B-THING' if word in THINGS else 'O'}")
                if word == "plot":
                    lines.append("very I-THING")
            sentences.append("\n".join(lines))
        (folder / f"{split}.conll").write_text("\n\n".join(sentences) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "things"
    command = ["fit", "--model", str(model), "--task", "things", "--data-dir", str(data), "--output", str(folder)]
    small = ["--rank", "2", "--max-length", "8", "--batch-size", "8", "--learning-rate", "2e-2", "--epochs", "5"]
    assert main([*command, *small]) == 0
    return folder


def test_evaluate_scores_words_and_entities_and_says_what_is_left_out(run, capsys, caplog):
    assert main(["evaluate", str(run), "--num-samples", "2", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    opened = open_run(run)
    found = opened.posterior.predict(opened.data("test"), num_samples=2, progress=False)
    assert scores["words"] == len(found.labels)
    assert scores["accuracy"] == pytest.approx((found.probs.argmax(1) == found.labels).mean())
    assert scores["words_left_out"] == sum(map(len, opened.task.texts("test"))) - len(found.labels) > 0
    assert f"{scores['words_left_out']} words of" in caplog.text
    assert 0 <= scores["entity_f1"] <= 1


def test_predict_names_words_and_entities(run, capsys):
    assert main(["predict", str(run), "--text", "the film was bad.", "--num-samples", "2"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [word["word"] for word in said["words"]] == ["the", "film", "was", "bad", "."]
    assert said["words"][1]["probs"].keys() == {"B-THING", "I-THING", "O"}
    opened = open_run(run)
    prediction = opened.predict([["the", "film", "was", "bad", "."], "a plot very dull"], num_samples=2, progress=False)
    assert prediction.row(0)["words"] == said["words"]
    assert prediction.words[1] == ("a", "plot", "very", "dull")
    assert prediction.predicted_labels[1] == said["words"][1]["label"]
    with pytest.raises(InputError, match="split it, sentence by sentence"):
        opened.predict(["the film is dull and " * 4], progress=False)


def test_a_split_is_predicted_row_by_row(run, capsys):
    assert main(["predict", str(run), "--split", "test", "--max-examples", "3", "--num-samples", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = open_run(run).task.data["test"]["tokens"][:]
    for row in rows:
        assert [word["word"] for word in row["words"]] == texts[row["index"]][: len(row["words"])]


def test_it_opens_without_its_data(run, data, tmp_path):
    here = open_run(run, data_dir=tmp_path)
    known = open_run(run)
    assert here.label_names == ("B-THING", "I-THING", "O")
    options = {"num_samples": 3, "progress": False}
    one, other = (each.predict(["the film is dull"], **options) for each in (here, known))
    np.testing.assert_array_equal(one.sample_probs, other.sample_probs)


def test_the_report_has_entities_and_intervals_over_sentences(run, tmp_path):
    page = tmp_path / "page.html"
    command = ["report", str(run), "--output", str(page), "--num-samples", "2", "--no-diagnostics"]
    assert main(command) == 0
    text = page.read_text("utf-8")
    assert "entity F1" in text
    assert "nats per word" in text
    assert "words, 12 examples" in text
    assert "test words right" in text
    assert "[film]" in text or "[plot]" in text or "[the]" in text
    assert "onformal" not in text  # words of one sentence are not exchangeable


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            ["predict", "{run}", "--input", "{data}/test.conll", "--output", "{new}"],
            "one label each",
        ),
        (["predict", "{run}", "--text", "a film", "--text-pair", "b"], "single sentences"),
        (
            ["compare", "--model", "{model}", "--task", "things", "--data-dir", "{data}", "--output", "{new}"],
            "is of kind tokens",
        ),
        (["report", "{run}", "--costs", "{data}/test.conll", "--output", "{new}"], "for one class an example"),
    ],
)
def test_what_does_not_fit_is_refused(run, data, model, tmp_path, capsys, command, says):
    places = {"run": run, "data": data, "model": model, "new": tmp_path / "new.csv"}
    assert main([part.format(**places) for part in command]) == 2
    assert says in capsys.readouterr().err
