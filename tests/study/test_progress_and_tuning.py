"""What a user waits for in a study is shown, and the search for a width can be left out."""

import pytest

from bayeslora.command.main import main
from bayeslora.study.entries import MethodSpec
from bayeslora.study.methods.base import all_methods, make_method, without_tuning
from bayeslora.study.methods.monteclora import TUNED, PosteriorOptions
from bayeslora.study.runner import run_study

SEARCH = {"bayesianized", "tfb"}  # which are nothing but a search


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_every_method_without_a_search(name):
    left = without_tuning([MethodSpec(name)])
    assert [spec.name for spec in left] == ([] if name in SEARCH else [name])
    for spec in left:
        method = make_method(spec)
        assert method.label == make_method(MethodSpec(name)).label
        if isinstance(method, PosteriorOptions):
            assert not {*method.predictions} & {*TUNED}


def test_a_method_that_is_left_without_predictions_is_left_out():
    assert without_tuning([MethodSpec("monteclora", {"predictions": ["tuned", "agreement"]})]) == []
    kept = MethodSpec("monteclora", {"predictions": ["mean", "tuned"], "r": 3})
    assert without_tuning([kept])[0].options == {"predictions": ["mean"], "r": 3}


@pytest.fixture
def command(place, tmp_path):
    """``bayeslora compare`` of the reviews, with further words."""
    words = ["--model", place / "model", "--task", "reviews", "--data-dir", place / "reviews", "--text-columns", "text"]
    small = ["--rank", 2, "--batch-size", 8, "--max-length", 12, "--num-samples", 2, "--max-steps", 2]
    output = ["--output", tmp_path / "out", "--in-process", "--target-modules", "query", "value"]
    return lambda *more: main([*map(str, ["compare", *words, *small, *output, *more])])


def test_no_tuning_leaves_the_search_out(command, tmp_path, capsys):
    assert command("--methods", "lora", "bayesianized", "monteclora", "--no-tuning") == 0
    table = (tmp_path / "out" / "results.csv").read_text(encoding="utf-8")
    assert "MonteCLoRA, 2 draws + temperature*" in table
    assert "tuned" not in {line.split(",")[1] for line in table.splitlines()[1:]}
    assert "bayesianized" not in table
    assert " tuned*" not in table


def test_no_tuning_where_nothing_searches_is_refused(command, tmp_path, capsys):
    assert command("--no-tuning") == 2
    assert "--no-tuning does nothing here: none of the methods searches" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_takes_time_is_told_as_it_ends(study, tmp_path, capsys):
    run_study(study("lora", "temperature", {"name": "monteclora", "predictions": ["draws"]}), tmp_path)
    said = capsys.readouterr().out
    for words in (
        "  LoRA: 6 steps in ",
        "  MonteCLoRA, 3 draws: predicted in ",
        "  LoRA + temperature*: predicted in ",
    ):
        assert words in said
    again = tmp_path / "again"
    run_study(study("lora"), again, progress=False)
    assert "steps in" not in capsys.readouterr().out
