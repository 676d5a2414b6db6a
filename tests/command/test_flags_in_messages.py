"""The library's messages name its arguments; at the command line they name flags."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import bayeslora
from bayeslora.command.flags import as_flags
from bayeslora.command.main import main
from bayeslora.command.parser import build_parser

LEAST = {
    "fit": "--model m --task t --output o",
    "bayesianize": "a --model m --task t --output o",
    "predict": "run --text a",
    "evaluate": "run",
    "tune": "run",
    "compare": "--output o",
    "report": "run",
}
SOURCES = sorted(
    file
    for folder in ("bayeslora", "models", "guides", "analysis")
    for file in (Path(bayeslora.__file__).parents[1] / folder).rglob("*.py")
)


def given(command):
    return build_parser().parse_args([command, *LEAST[command].split()])


def flags_of(command):
    """Name of an argument to its flag, of all that a command takes."""
    commands = next(a for a in build_parser()._actions if a.choices and command in a.choices)
    actions = [a for a in commands.choices[command]._actions if a.option_strings and a.dest not in ("help", "bits")]
    return {action.dest: action.option_strings[-1] for action in actions}


@cache
def messages():
    """Every text of an InputError in the sources, with X for what is put in."""
    said = []
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "InputError" and node.args:
                texts = getattr(node.args[0], "values", [node.args[0]])  # of an f-string, or one text
                said.append("".join(text.value if isinstance(text, ast.Constant) else "X" for text in texts))
    return said


@pytest.mark.parametrize("command", LEAST)
def test_every_argument_is_called_by_its_flag(command):
    for name, flag in flags_of(command).items():
        assert as_flags(f"pass {name}=3, or so", given(command)) == f"pass {flag} 3, or so"
        assert as_flags(f"it is in '{name}=3', {name}/x and {name}.csv", given(command)).count("--") == 0
        if "_" in name:
            assert as_flags(f"a longer {name}", given(command)) == f"a longer {flag}"


@pytest.mark.parametrize("command", LEAST)
def test_no_message_of_the_library_keeps_an_argument_that_has_a_flag(command):
    names = "|".join(flags_of(command))
    kept, found = [], 0
    for message in messages():
        said = as_flags(message, given(command))
        found += said != message
        kept += re.findall(rf"(?<![\w'\"(.])(?:{names})=(?!=|\w+\()[^\n]*", said)
    assert kept == []
    assert found >= {"fit": 20}.get(command, 1)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("use noise_schedule='entropy' here", "use --noise-schedule entropy here"),
        ("target_modules=['query', 'value']", "--target-modules query value"),
        ("continue it with resume=True, or", "continue it with --resume, or"),
        ("began with best_metric=None, not 'loss'", "began with no --best-metric, not 'loss'"),
        ("use chat=False, or style='options'", "use --prompting chat=false, or --prompting style=options"),
        ("r=4 is too much", "--rank 4 is too much"),
        ("output_dir runs/x is a file", "--output runs/x is a file"),
        ("the tokenizer's words and a task's max_length", "the tokenizer's words and a task's --max-length"),
        ("model, task and seed are words", "model, task and seed are words"),
    ],
)
def test_values_and_words(message, says):
    assert as_flags(message, given("fit")) == says


def test_a_run_that_began_otherwise(run, model, data, capsys):
    begun = ["fit", "--model", model, "--task", "reviews", "--data-dir", data, "--text-columns", "text"]
    begun += ["--output", run]
    same = ["--rank", "2", "--target-modules", "query", "value", "--max-length", "16", "--epochs", "2"]
    assert main([*map(str, begun), *same, "--batch-size", "4", "--resume"]) == 2
    assert "began with --batch-size 8, not 4: resume it with the same settings" in capsys.readouterr().err
    assert main([*map(str, begun), *same, "--batch-size", "8"]) == 2
    assert "holds a run already; continue it with --resume, or" in capsys.readouterr().err


def test_entries_of_a_study_file_keep_their_names(tmp_path, capsys):
    file = tmp_path / "study.yaml"
    file.write_text("model: m\ntasks: [sst2]\nmethods: [lora]\nnum_samples: 0\n", encoding="utf-8")
    assert main(["compare", str(file), "--output", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert "num_samples" in said
    assert "--num-samples" not in said
