"""``bayeslora watch``: a file beside what a run was fitted to."""

import csv
import json
import shutil

import pytest

from bayeslora import open_run
from bayeslora.command.main import main


@pytest.fixture
def stream(tmp_path):
    """Writes rows of text to a file."""

    def write(texts, name="stream.csv"):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "id"])
            rows.writerows([text, number] for number, text in enumerate(texts))
        return tmp_path / name

    return write


@pytest.fixture
def more(data, tmp_path):
    """The data with a larger validation split."""
    folder = shutil.copytree(data, tmp_path / "reviews")
    header, *rows = (folder / "validation.csv").read_text("utf-8").splitlines()
    (folder / "validation.csv").write_text("\n".join([header, *rows * 8]) + "\n", encoding="utf-8")
    return folder


def test_the_split_itself_does_not_differ(run, more, stream, capsys):
    file = stream(open_run(run, data_dir=more).task.texts("validation"))
    assert main(["watch", str(run), "--data-dir", str(more), "--input", str(file), "--num-samples", "4"]) == 0
    said = capsys.readouterr().out
    assert "no difference seen at level 0.01" in said
    assert all(name in said for name in ("mean entropy", "mean mutual information", "predicted '"))


def test_rows_of_one_text_differ(run, more, stream, capsys):
    opened = open_run(run, data_dir=more)
    texts = opened.task.texts("validation")
    probs = opened.predict(texts, num_samples=4).probs
    surest = texts[int(probs.max(1).argmax())]
    command = ["watch", str(run), "--data-dir", str(more), "--input", str(stream([surest] * 200)), "--json"]
    assert main([*command, "--num-samples", "4"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["differs"]
    assert said["rows"] == 200
    entropy = next(test for test in said["tests"] if test["measure"] == "entropy")
    expected = opened.predict([surest], num_samples=4).entropy[0]
    assert entropy["stream"] == pytest.approx(expected, abs=1e-4)
    assert entropy["reference"] == pytest.approx(opened.predict(texts, num_samples=4).entropy.mean(), abs=1e-4)
    assert entropy["difference"] < 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--split", "train"], "--split train is what it was fitted to"),
        (["--split", "elsewhere"], "no split 'elsewhere'"),
        (["--input", "absent.csv"], "there is no absent.csv"),
    ],
)
def test_what_cannot_be_compared_is_told(run, stream, capsys, options, says):
    command = ["watch", str(run), "--input", str(stream(["a film"] * 30)), "--num-samples", "2"]
    assert main([*command, *options]) == 2
    assert says in capsys.readouterr().err


def test_a_file_of_few_rows_is_refused(run, more, stream, capsys):
    few = str(stream(["a film"] * 3))
    assert main(["watch", str(run), "--data-dir", str(more), "--input", few, "--num-samples", "2"]) == 2
    assert "has 3 examples" in capsys.readouterr().err
