"""``bayeslora tune``: what it keeps, who uses it, and which splits it refuses."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from bayeslora import open_run
from bayeslora.command.main import main
from bayeslora.files.writing import sha256_of
from bayeslora.models import Tuning

LABELLED = 24


@pytest.fixture
def tunable(run, data, tmp_path):
    """A copy of the run, whose validation split has enough examples."""
    shutil.copytree(data, tmp_path / "reviews")
    rows = (data / "validation.csv").read_text().splitlines()
    text = "\n".join([rows[0], *rows[1:] * (LABELLED // len(rows[1:]))]) + "\n"
    (tmp_path / "reviews" / "validation.csv").write_text(text)
    folder = shutil.copytree(run, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    record["task"]["data_dir"] = str(tmp_path / "reviews")
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def answer(capsys, *words):
    """The JSON object on standard output."""
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def complaint(capsys, *words):
    capsys.readouterr()
    assert main(list(map(str, words))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def set_width(folder, **options):
    posterior = open_run(folder).posterior
    posterior.tuning = Tuning(**options)
    posterior.save_pretrained(folder / "adapter")


def test_is_kept_and_used(tunable, capsys):
    before = {path.name: sha256_of(path) for path in (tunable / "adapter").iterdir()}
    plain = answer(capsys, "evaluate", tunable, "--split", "validation")
    found = answer(capsys, "tune", tunable, "--with-temperature")
    assert (found["split"], found["examples"], found["num_samples"]) == ("validation", LABELLED, 16)
    assert found["nll"] <= min(found["nll_at_mean"], found["nll_untuned"])
    after = {path.name: sha256_of(path) for path in (tunable / "adapter").iterdir()}
    assert after.keys() == before.keys()
    assert after["bayeslora.json"] != before["bayeslora.json"]
    assert all(after[name] == before[name] for name in after if name.endswith(".safetensors"))
    assert not (tunable / "run.lock").exists()
    tuned = answer(capsys, "evaluate", tunable, "--split", "validation")
    assert tuned["nll"] == pytest.approx(found["nll"], rel=1e-5)
    assert (tuned["tuned_width"], tuned["tuned_temperature"]) == (found["width"], found["temperature"])
    assert answer(capsys, "evaluate", tunable, "--split", "validation", "--untuned") == plain
    assert answer(capsys, "tune", tunable, "--with-temperature") == found  # begins anew


def answer_differently(folder):
    """A head by which the network does not answer all reviews alike, as it does after two epochs."""
    fitted = open_run(folder)
    posterior = fitted.posterior
    torch.manual_seed(0)
    parameters = dict(posterior.network.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
        (bias,) = (p for name, p in parameters.items() if "modules_to_save" in name and p.dim() == 1)
        probs = posterior.predict(fitted.data("validation"), num_samples=0, progress=False).probs
        bias[0] += float(np.median(np.log(probs[:, 1] / probs[:, 0])))
    posterior.save_pretrained(folder / "adapter")


def test_answers_that_are_all_alike_say_nothing(tunable, capsys):
    error = complaint(capsys, "tune", tunable, "--agreement", "0.9")
    assert "leaves 100.0% of the answers alone: they say nothing about a width" in error
    assert open_run(tunable).posterior.tuning is None


def test_without_labels(tunable, capsys):
    answer_differently(tunable)
    found = answer(capsys, "tune", tunable, "--agreement", "0.9")
    assert found["agreement"] >= 0.9
    assert found["nll"] is None
    assert main(["tune", str(tunable), "--agreement", "1"]) == 0
    assert "agreement                1.0000" in capsys.readouterr().out
    assert "keeping 100.0% of the mean network's answers" in str(open_run(tunable).posterior.tuning)
    assert "a temperature needs labels" in complaint(capsys, "tune", tunable, "--agreement", "1", "--with-temperature")
    (tunable.parent / "reviews" / "validation.csv").rename(tunable.parent / "reviews" / "fresh.csv")
    (tunable.parent / "reviews" / "test.csv").unlink(missing_ok=True)
    assert answer(capsys, "tune", tunable, "--agreement", "0.9", "--split", "fresh")["split"] == "fresh"


def test_for_people(tunable, capsys):
    assert main(["tune", str(tunable), "--num-samples", "4", "--max-examples", "20", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    lines = dict(line.split(None, 1) for line in captured.out.splitlines() if not line.startswith(("nll", "kept")))
    tuning = open_run(tunable).posterior.tuning
    assert lines == {"split": "validation, 20 examples", "width": f"{tuning.width:.4f}", "temperature": "none"}
    for name, nll in (("tuned", tuning.nll), ("as fitted", tuning.nll_untuned)):
        assert f"{f'nll, {name}':24} {nll:.4f}\n" in captured.out
    assert captured.out.endswith(f"next: bayeslora evaluate {tunable}\n")


def test_predict_says_so(tunable, capsys):
    words = ["predict", str(tunable), "--text", "the film is good", "--num-samples", "4"]
    assert main(words) == 0
    plain = capsys.readouterr()
    set_width(tunable, width=0.0, temperature=2.0, examples=30)
    assert main(words) == 0
    tuned = capsys.readouterr()
    assert "width tuned to 0, temperature to 2, on 30 examples (--untuned leaves that out)\n" in tuned.err
    assert json.loads(tuned.out)["mutual_information"] == 0
    assert main([*words, "--untuned"]) == 0
    assert (capsys.readouterr().out, "tuned" in plain.err) == (plain.out, False)


@pytest.mark.parametrize("width", [0.0, 0.5])
def test_report_says_so(tunable, tmp_path, capsys, width):
    set_width(tunable, width=width, examples=30)
    words = ["report", str(tunable), "--num-samples", "2", "--no-diagnostics", "--output", str(tmp_path / "page.html")]
    assert main(words) == 0
    tuned = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"width tuned to {width:g}, on 30 examples" in tuned
    assert main([*words, "--untuned"]) == 0
    untuned = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "width tuned" not in untuned
    of_both = [re.search(r"relative noise ρ.*?([\d.e-]+) to ", page, re.S)[1] for page in (tuned, untuned)]
    assert float(of_both[0]) == pytest.approx(width * float(of_both[1]), rel=0.05)


def test_diagnose_says_that_it_is_left_aside(tunable, capsys):
    words = ["diagnose", tunable, "--num-samples", "25", "--steps", "2"]
    plain = answer(capsys, *words)
    set_width(tunable, width=0.0)
    assert answer(capsys, *words) == plain
    assert main([*map(str, words), "--json"]) == 0
    assert "width tuned to 0: left aside" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ("test", "is what it is judged by"),
        ("train", "is what it was fitted to"),
        ("unlabelled", "label"),
        ("nowhere", "no split 'nowhere'"),
    ],
)
def test_splits_that_are_refused(tunable, capsys, split, says):
    before = sha256_of(tunable / "adapter" / "bayeslora.json")
    assert says in complaint(capsys, "tune", tunable, "--split", split)
    assert sha256_of(tunable / "adapter" / "bayeslora.json") == before
    assert not (tunable / "run.lock").exists()


def test_too_few_examples(run, capsys):
    assert "at least 20 examples to be tuned on, got 8" in complaint(capsys, "tune", run)


def test_no_run(tmp_path, capsys):
    assert "is not a run folder" in complaint(capsys, "tune", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_split_that_is_all_there_is_to_judge_by(tunable, capsys):
    record = json.loads((tunable / "run.json").read_text())
    folder = record["task"]["data_dir"]
    shutil.copy(f"{folder}/unlabelled.csv", f"{folder}/test.csv")
    assert main(["tune", str(tunable), "--num-samples", "2", "--json"]) == 0
    assert "evaluate judges by validation too" in capsys.readouterr().err


class TestFit:
    """``bayeslora fit --tune``."""

    def fit(self, model, data, folder, *words):
        command = ["fit", "--model", str(model), "--task", "reviews", "--data-dir", str(data), "--text-columns", "text"]
        small = ["--rank", "2", "--target-modules", "query", "value", "--max-length", "16", "--max-steps", "2"]
        return main([*command, "--output", str(folder / "fitted"), *small, *words])

    def test_by_the_validation_split(self, tunable, model, tmp_path, capsys):
        assert self.fit(model, tmp_path / "reviews", tmp_path, "--tune") == 0
        tuning = open_run(tmp_path / "fitted").posterior.tuning
        assert tuning.examples == LABELLED
        assert str(tuning) in capsys.readouterr().out

    def test_by_a_share_of_the_training_examples(self, model, data, tmp_path):
        assert self.fit(model, data, tmp_path, "--tune", "0.75") == 0
        record = json.loads((tmp_path / "fitted" / "run.json").read_text())
        held = record["training"]["tuning_examples"]
        assert held == open_run(tmp_path / "fitted").posterior.tuning.examples >= 20
        assert held == round(0.75 * (held + record["train_examples"]))

    def test_without_a_validation_split(self, model, data, tmp_path, capsys):
        alone = tmp_path / "alone"
        alone.mkdir()
        shutil.copy(data / "train.csv", alone)
        assert self.fit(model, alone, tmp_path, "--tune") == 2
        assert "has no labelled validation split" in capsys.readouterr().err
        assert not (tmp_path / "fitted").exists()

    @pytest.mark.parametrize("share", ["0", "1", "2", "test"])
    def test_a_share_is_a_share(self, model, data, tmp_path, capsys, share):
        assert self.fit(model, data, tmp_path, "--tune", share) == 2
        assert "--tune" in capsys.readouterr().err


def test_as_many_draws_as_it_takes(tunable, capsys):
    set_width(tunable, width=64.0)  # of next to no noise
    loose, tight = (
        answer(capsys, "evaluate", tunable, "--split", "validation", "--num-samples", "auto", "--tolerance", tolerance)
        for tolerance in (0.5, 1e-9)
    )
    assert loose["num_samples"] == 16
    assert tight["num_samples"] == 256
    assert tight["monte_carlo_error"] < loose["monte_carlo_error"]
    assert main(["predict", str(tunable), "--text", "a good film", "--num-samples", "8"]) == 0
    assert "8 draws: Monte Carlo error 0.0" in capsys.readouterr().err
    said = complaint(capsys, "evaluate", tunable, "--num-samples", "auto", "--generate")
    assert "give one for --num-samples" in said
