"""Several labels for a text, from a file to the report."""

import json

import numpy as np
import pytest

from bayeslora import open_run
from bayeslora.command.main import main
from tests.conftest import tiny_network

WORDS = ("film", "plot", "good", "bad")


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """Whether a word occurs is a label."""
    folder, draw = tmp_path_factory.mktemp("topics"), np.random.default_rng(0)
    base = folder / "base"
    tiny_network(layers=1, initializer_range=0.3).bert.save_pretrained(base)
    for file in model.glob("*token*"):
        (base / file.name).write_bytes(file.read_bytes())
    for split, size in (("train", 48), ("validation", 16), ("test", 12)):
        lines = ["text,film,plot,good"]
        for _ in range(size):
            words = draw.choice(WORDS, 3).tolist()
            lines.append(",".join([" ".join(words), *(str(int(name in words)) for name in WORDS[:3])]))
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = ["fit", "--model", str(base), "--task", "topics", "--data-dir", str(folder), "--text-columns", "text"]
    small = ["--rank", "2", "--batch-size", "8", "--learning-rate", "2e-2", "--epochs", "3"]
    labels = ["--label-column", "film", "plot", "good"]
    assert main([*command, *small, *labels, "--output", str(folder / "run")]) == 0
    return folder / "run"


def test_it_is_evaluated_and_predicted_as_opened_in_python(run, capsys):
    assert main(["evaluate", str(run), "--num-samples", "2", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    opened = open_run(run)
    found = opened.posterior.predict(opened.data("test"), num_samples=2, progress=False)
    assert scores["labels"] == 36
    assert scores["map"] == pytest.approx(found.scores(opened.task)["map"])
    assert main(["predict", str(run), "--text", "film bad bad", "--num-samples", "2"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["probs"].keys() == {"film", "plot", "good"}
    assert opened.predict(["film bad bad"], num_samples=2, progress=False).row(0)["probs"] == said["probs"]


def test_the_report_has_scores_of_labels(run, tmp_path):
    page = tmp_path / "page.html"
    command = ["report", str(run), "--output", str(page), "--num-samples", "2", "--no-diagnostics"]
    assert main(command) == 0
    text = page.read_text("utf-8")
    assert "mAP" in text
    assert "36 labels, 12 examples" in text
    assert "film? " in text or "plot? " in text or "good? " in text


def test_a_file_is_refused(run, tmp_path, capsys):
    data = run.parent / "test.csv"
    assert main(["predict", str(run), "--input", str(data), "--output", str(tmp_path / "new.csv")]) == 2
    assert "one label each" in capsys.readouterr().err
