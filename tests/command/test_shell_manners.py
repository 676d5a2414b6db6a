"""The command line in any shell: terminals of any encoding, readers that leave early, and options out of range."""

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertTokenizerFast

from bayeslora.command.main import main
from bayeslora.command.parser import build_parser
from bayeslora.errors import InputError
from bayeslora.tasks.encoding import encode_options
from bayeslora.tasks.load import load_task
from tests.conftest import VOCABULARY, tiny_network

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "demo": [],
    "fit": ["--model", "nowhere", "--task", "mrpc", "--output", "out"],
    "evaluate": ["nowhere"],
    "predict": ["nowhere", "--text", "a film"],
    "tune": ["nowhere"],
    "diagnose": ["nowhere"],
    "compare": ["--model", "nowhere", "--task", "mrpc", "--output", "out"],
    "report": ["nowhere"],
}
NEVER = ["", " ", "five", "nan", "inf", "-inf", "1e400", "-1e400", str(10**30), str(-(10**30)), "-1"]
ENCODINGS = ("ascii", "cp1252", "cp437", "latin-1", "utf-8")


def options(command):
    commands = next(a for a in build_parser()._actions if isinstance(a.choices, dict))
    return [action for action in commands.choices[command]._actions if action.nargs != 0]


def is_number(action):
    """Whether it turns a number into something else than a text or a path."""
    if action.type in (int, float):
        return True
    try:
        return action.type is not None and not isinstance(action.type("1"), str | Path)
    except argparse.ArgumentTypeError:  # out of its range, so it has one
        return True


NUMBERS = [(command, action) for command in COMMANDS for action in options(command) if is_number(action)]
WORDS = [
    (command, action)
    for command in COMMANDS
    for action in options(command)
    if action.option_strings and not is_number(action)
]


def one_line(capsys):
    """What a mistake leaves: nothing on standard output, one line on standard error."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("bayeslora: ")
    return captured.err


def test_the_walk_finds_every_number():
    found = {action.option_strings[0] for _, action in NUMBERS}
    assert {
        "--seed",
        "--seeds",
        "--rank",
        "--epochs",
        "--batch-size",
        "--num-samples",
        "--max-length",
        "--steps",
        "--learning-rate",
        "--top-p",
        "--warmup",
        "--max-examples",
    } <= found
    assert len(NUMBERS) > 60
    assert not [action for _, action in WORDS if action.type is None and action.choices is None]


@pytest.mark.parametrize(("command", "action"), NUMBERS, ids=lambda v: v if isinstance(v, str) else v.dest)
def test_a_number_out_of_range_is_refused_in_one_line(command, action, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    option = action.option_strings[0]
    takes_fractions = isinstance(action.type("0.5") if _accepts(action, "0.5") else 0, float)
    bad = [*NEVER, *(() if takes_fractions else ("1.5", "2.0", "1e1")), *([] if _accepts(action, "0") else ["0"])]
    for value in bad:
        values = ["1", value] if action.nargs == "+" and _accepts(action, "1") else [value]
        assert main([command, *COMMANDS[command], option, *values]) == 2
        said = one_line(capsys)
        optional = len(values) > 1 or action.nargs == "?"
        assert option in said or (optional and f"unrecognized arguments: {value}" in said)  # such as -inf
    assert not list(tmp_path.iterdir())


def _accepts(action, text):
    try:
        action.type(text)
    except argparse.ArgumentTypeError:
        return False
    return True


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("fit", "--epochs", "0"),
        ("fit", "--learning-rate", "0"),
        ("fit", "--batch-size", "0"),
        ("fit", "--rank", "0"),
        ("fit", "--rank", "65537"),
        ("fit", "--num-components", "1025"),
        ("fit", "--lora-alpha", "0"),
        ("fit", "--warmup", "1"),
        ("fit", "--max-length", "1"),
        ("fit", "--seed", str(2**32)),
        ("evaluate", "--top-p", "0"),
        ("evaluate", "--top-p", "1.5"),
        ("evaluate", "--max-new-tokens", "0"),
        ("evaluate", "--max-examples", "0"),
        ("diagnose", "--num-samples", "24"),
        ("diagnose", "--steps", "0"),
        ("compare", "--num-samples", "0"),
        ("demo", "--num-samples", "0"),
        ("demo", "--train-examples", "0"),
    ],
)
def test_the_ends_of_ranges(command, option, value, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([command, *COMMANDS[command], option, value]) == 2
    assert f"argument {option}: " in one_line(capsys)


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("fit", "--kl-weight", "0"),
        ("fit", "--max-grad-norm", "0"),
        ("fit", "--warmup", "0"),
        ("fit", "--seed", "0"),
        ("fit", "--learning-rate", "1e-3"),
        ("evaluate", "--num-samples", "0"),
        ("evaluate", "--temperature", "0"),
        ("evaluate", "--top-p", "1"),
        ("diagnose", "--num-samples", "25"),
        ("fit", "--epochs", "0.5"),
    ],
)
def test_what_is_in_range_stays(command, option, value):
    parsed = build_parser().parse_args([command, *COMMANDS[command], option, value])
    assert vars(parsed)[option[2:].replace("-", "_")] == float(value)


@pytest.mark.parametrize(("command", "action"), WORDS, ids=lambda v: v if isinstance(v, str) else v.dest)
def test_an_empty_word_is_refused(command, action, capsys, tmp_path, monkeypatch):
    """As an unset variable of the shell leaves it: an empty path would be this folder."""
    monkeypatch.chdir(tmp_path)
    for value in ("", "  "):
        required = [] if action.dest == "text" else COMMANDS[command]
        assert main([command, *required, action.option_strings[0], value]) == 2
        assert action.option_strings[0] in one_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["fitt"], "invalid choice: 'fitt'"),
        (["fit"], "--model"),
        (["evaluate", "x", "--jsn"], "--jsn"),
        (["predict", "x"], "--text"),
        (["predict", "x", "--split", "test", "--text-pair", "b"], "--text-pair"),
        (["predict", "x", "--text", "a", "--max-examples", "3"], "--max-examples"),
        (["predict", "x", "--text", "a", "--split", "test"], "not allowed with"),
        (["predict", "x", "--text", "caf\udce9"], "not valid Unicode"),
    ],
)
def test_usage_is_one_line_too(arguments, says, capsys):
    assert main(arguments) == 2
    assert says in one_line(capsys)


# ---- encodings and pipes ----


def shell(*arguments, encoding="utf-8", stdout=subprocess.PIPE, **options):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    environment.pop("PYTHONUNBUFFERED", None)
    return subprocess.run(
        [sys.executable, *arguments], stdout=stdout, stderr=subprocess.PIPE, env=environment, check=False, **options
    )


ALL_HELP = """
import sys
from bayeslora.command.main import main
for words in sys.argv[1:] + [""]:
    try:
        main([*words.split(), "--help"])
    except SystemExit as end:
        assert not end.code
"""


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_help_can_be_shown(encoding):
    done = shell("-c", ALL_HELP, *COMMANDS, encoding=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode(encoding)
    epsilon, times = (
        ("ε" if encoding in ("utf-8", "cp437") else "epsilon"),
        ("x" if encoding in ("ascii", "cp437") else "×"),
    )
    assert f"{epsilon}, the scale of the noise" in text
    assert f"default 10 {times} the other" in text
    assert "?" not in text


def test_a_terminal_of_the_c_locale():
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"} | plain
    done = subprocess.run(
        [sys.executable, "-m", "bayeslora", "fit", "--help"],
        capture_output=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"epsilon" in done.stdout


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_mistake_with_any_letters(encoding):
    done = shell("-m", "bayeslora", "evaluate", "run", "--Läufe-ελ😀", encoding=encoding)
    assert done.returncode == 2
    assert done.stderr.decode(encoding).count("\n") == 1
    assert b"unrecognized arguments" in done.stderr


class Reader:
    """A pipe whose reader has gone."""

    def __enter__(self):
        reading, self.writing = os.pipe()
        os.close(reading)
        return self.writing

    def __exit__(self, *_):
        os.close(self.writing)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"], ["--version"]])
@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
def test_a_reader_that_leaves_gets_no_traceback(words, unbuffered):
    with Reader() as pipe:
        done = shell(*unbuffered, "-m", "bayeslora", *words, stdout=pipe)
    assert done.stderr == b""
    assert done.returncode == (0 if unbuffered else 141)  # argparse sees the broken pipe itself, and goes on


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["--version"], ["fit", "--help"]])
def test_a_full_disk_behind_the_output_is_one_line(words):
    with open("/dev/full", "wb") as full:
        done = shell("-m", "bayeslora", *words, stdout=full)
    assert (done.returncode, done.stderr) == (2, b"bayeslora: standard output: No space left on device\n")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")
def test_no_output_at_all():
    for words, code in (("--help", 0), ("fit --rank 0", 2)):
        command = f'"{sys.executable}" -m bayeslora {words} >&- 2>&-'
        assert subprocess.run(command, shell=True, cwd=ROOT, check=False).returncode == code


# ---- a fitted run ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "plot", "the", "is"]
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"w{i}" for i in range(VOCABULARY - len(words)))]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    tiny_network().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    row = [("good", "the film", "the plot", 1), ("bad", "the plot", "the film", 0)]
    lines = ["word,first,second,label", *(",".join(map(str, one)) for one in row * 4)]
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def fit_words(model, data, columns, *more):
    return [
        "fit",
        "--model",
        str(model),
        "--task",
        "pairs",
        "--data-dir",
        str(data),
        "--text-columns",
        *columns,
        "--rank",
        "2",
        "--target-modules",
        "query",
        "--max-steps",
        "1",
        *more,
    ]


@pytest.fixture(scope="module")
def runs(model, data, tmp_path_factory):
    """By their number of text columns."""
    folder = tmp_path_factory.mktemp("runs")
    for columns in (["first"], ["first", "second"], ["word", "first", "second"]):
        assert main(fit_words(model, data, columns, "--output", str(folder / str(len(columns))))) == 0
    return folder


@pytest.mark.parametrize(
    ("columns", "words", "says"),
    [
        (1, ["--text", "a", "--text-pair", "b"], "leave --text-pair out"),
        (2, ["--text", "a"], "give --text-pair too"),
        (2, ["--text", "a", "b", "--text-pair", "c"], "as many of each"),
        (3, ["--text", "a"], "3 text columns"),
        (3, ["--text", "a", "--text-pair", "b"], "3 text columns"),
        (1, ["--text", "a", ""], "--text"),
        (2, ["--text", "a", "--text-pair", " "], "--text-pair"),
    ],
)
def test_texts_that_are_not_the_tasks(runs, columns, words, says, capsys):
    assert main(["predict", str(runs / str(columns)), *words]) == 2
    assert says in one_line(capsys)


def test_a_word_of_the_prompting_twice(model, capsys):
    words = [
        "fit",
        "--model",
        str(model),
        "--task",
        "arc_easy",
        "--output",
        "out",
        "--prompting",
        "chat=true",
        "chat=no",
    ]
    assert main(words) == 2
    assert "chat twice" in one_line(capsys)


def test_a_task_without_labels_to_judge_by(runs, data, tmp_path, capsys):
    (tmp_path / "train.csv").write_text((data / "train.csv").read_text())
    assert main(["evaluate", str(runs / "1"), "--data-dir", str(tmp_path)]) == 2
    assert "name one with --split" in one_line(capsys)


def test_texts_that_are_the_tasks(runs, capsys):
    assert main(["predict", str(runs / "1"), "--text", "the film", "--num-samples", "2"]) == 0
    assert main(["predict", str(runs / "2"), "--text", "a", "--text-pair", "b", "--num-samples", "2"]) == 0
    assert main(["predict", str(runs / "3"), "--split", "test", "--num-samples", "2", "--max-examples", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize(("columns", "least"), [(1, 3), (2, 5), (3, 5)])
def test_a_length_that_cuts_everything(model, data, columns, least, capsys, tmp_path):
    names = ["word", "first", "second"][3 - columns :]
    words = fit_words(model, data, names, "--output", str(tmp_path / "out"))
    for length in range(2, least):
        assert main([*words, "--max-length", str(length)]) == 2
        assert f"give at least {least}" in one_line(capsys)
    assert not (tmp_path / "out").exists()
    task, tokenizer = load_task("pairs", data, text_columns=names), BertTokenizerFast.from_pretrained(model)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for tokens in task.encode(tokenizer, "test", max_length=least)["input_ids"]:
        assert len([token for token in tokens if token not in special]) == (2 if columns > 1 else 1)
        assert len(tokens) == least


def test_a_length_that_cuts_what_stands_before_an_option(model):
    tokenizer = BertTokenizerFast.from_pretrained(model)
    tokenizer.bos_token = "[CLS]"
    with pytest.raises(InputError, match="give more than 2"):
        encode_options(tokenizer, ["the film is"], [" good good"], max_length=2)
    kept = encode_options(tokenizer, ["the film is"], [" good good"], max_length=3)
    assert kept["answer_mask"] == [[0, 1, 1]]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_answers_are_valid_json_in_any_encoding(runs, encoding, monkeypatch):
    texts = ["the film is gööd", "ε ≈ λ × 0.1", "😀 film"]
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["predict", str(runs / "1"), "--num-samples", "0", "--text", *texts]) == 0
    lines = stdout.buffer.getvalue().decode(encoding).splitlines()
    assert [json.loads(line)["text"] for line in lines] == texts
    assert ("😀" in lines[2]) == (encoding == "utf-8")
    assert stdout.errors == "strict"  # as it was


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_head_ends_a_command_quietly(runs):
    with Reader() as pipe:
        words = ["predict", str(runs / "3"), "--split", "test", "--num-samples", "0"]
        done = shell("-m", "bayeslora", *words, stdout=pipe)
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr
