"""Calls that were interrupted go on, and the output is that of a call that was not."""

import json
import logging
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bayeslora import BayesLoRA, InputError
from bayeslora.bulk import predicting
from bayeslora.bulk.columns import rows_of
from bayeslora.bulk.predicting import predict_file
from bayeslora.command.main import main
from bayeslora.prediction import ClassPrediction
from tests.bulk.fitted_runs import sentences, text_run
from tests.task_files import write

QUICK = {"num_samples": 2, "progress": False, "rows_at_once": 4}


def rows(count=22):
    return [{"id": number, "text": text} for number, text in enumerate(sentences(count))]


class Stop(Exception):
    pass


def stopping_after(monkeypatch, calls):
    """``predict`` raises from the call with this number on."""
    made, own = [], BayesLoRA.predict

    def counted(*args, **options):
        if len(made) >= calls:
            raise Stop
        made.append(1)
        return own(*args, **options)

    monkeypatch.setattr(BayesLoRA, "predict", counted)
    return made


@pytest.mark.parametrize("output", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("options", [{}, {"top_uncertain": 5, "by": "batchbald"}], ids=["all", "top"])
def test_stopped_at_every_chunk(tmp_path, monkeypatch, output, options):
    run, path = text_run(), write(tmp_path / "in.jsonl", rows())
    whole, stopped = tmp_path / f"whole.{output}", tmp_path / f"stopped.{output}"
    predict_file(run, path, whole, **QUICK, **options)
    for call in range(5):
        with monkeypatch.context() as patched:
            made = stopping_after(patched, 1)
            with pytest.raises(Stop):
                predict_file(run, path, stopped, **QUICK, **options)
            assert len(made) == 1, call
        assert not stopped.exists()
    result = predict_file(run, path, stopped, **QUICK, **options)
    assert (result.rows, result.resumed) == (22, 20)
    assert stopped.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", stopped.name, whole.name]


@pytest.mark.parametrize("place", ["before its name", "after its name"])
def test_stopped_at_the_end(tmp_path, monkeypatch, place):
    run, path, out = text_run(), write(tmp_path / "in.jsonl", rows()), tmp_path / "out.csv"
    own = predicting.replacing

    def replacing(path):
        if place == "after its name":
            with own(path) as file:
                file.write(b"whole")
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(predicting, "replacing", replacing)
        with pytest.raises(Stop):
            predict_file(run, path, out, **QUICK)
    assert out.exists() == (place == "after its name")
    assert predict_file(run, path, out, **QUICK).written == 22
    assert len(out.read_text(encoding="utf-8").splitlines()) == (1 if place == "after its name" else 23)
    assert not (tmp_path / "out.csv.parts").exists()


def begun(tmp_path, monkeypatch, **options):
    run, path, out = text_run(), write(tmp_path / "in.jsonl", rows()), tmp_path / "out.csv"
    with monkeypatch.context() as patched:
        stopping_after(patched, 2)
        with pytest.raises(Stop):
            predict_file(run, path, out, **QUICK | options)
    return run, path, out


def test_other_rows_are_refused(tmp_path, monkeypatch):
    run, path, out = begun(tmp_path, monkeypatch)
    write(path, [{"id": 0, "text": "another film"}, *rows()[1:]])
    with pytest.raises(InputError, match=r"rows 0 to 3 of .*in\.jsonl are not those that were predicted before"):
        predict_file(run, path, out, **QUICK)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"seed": 1}, "another seed"), ({"num_samples": 3}, "another num_samples"), ({"prefix": "a"}, "another prefix")],
)
def test_other_options_are_refused(tmp_path, monkeypatch, options, says):
    run, path, out = begun(tmp_path, monkeypatch)
    with pytest.raises(InputError, match=says):
        predict_file(run, path, out, **QUICK | options)
    with pytest.raises(InputError, match="another posterior"):
        predict_file(text_run(seed=1), path, out, **QUICK)
    assert predict_file(run, path, out, **QUICK).resumed == 8


def test_a_mended_row_goes_on(tmp_path, monkeypatch, caplog):
    given = rows()
    path, out = write(tmp_path / "in.jsonl", [*given[:13], {"id": 13, "text": ""}, *given[14:]]), tmp_path / "out.jsonl"
    run = text_run()
    with pytest.raises(InputError, match="row 13: 'text' is empty"):
        predict_file(run, path, out, **QUICK)
    write(path, given)
    assert predict_file(run, path, out, **QUICK).resumed == 12
    assert [json.loads(line)["id"] for line in out.read_text(encoding="utf-8").splitlines()] == [*range(22)]


def test_skipped_rows_are_counted_over_all_calls(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    given = [row | {"text": ""} if row["id"] % 5 == 0 else row for row in rows()]
    path, out, run = write(tmp_path / "in.jsonl", given), tmp_path / "out.csv", text_run()
    with monkeypatch.context() as patched:
        stopping_after(patched, 3)
        with pytest.raises(Stop):
            predict_file(run, path, out, skip_errors=True, **QUICK)
    result = predict_file(run, path, out, skip_errors=True, **QUICK)
    assert (result.rows, result.skipped, result.written) == (22, 5, 17)


def test_a_zero_has_no_sign():
    """Rounding alone decides between 0.0 and -0.0."""
    said = ClassPrediction(None, ("a", "b"), np.array([[0.5, 0.5]]), np.array([-1e-17]), np.array([-1e-17]))
    (row,) = rows_of(said, None, None)
    assert [str(row[name]) for name in ("entropy", "mutual_information")] == ["0.0", "0.0"]


@pytest.mark.slow
def test_killed_at_random_moments(run, tmp_path):
    """A real process, killed without warning while it predicts: in the end no row is missing, repeated or different."""
    path = write(tmp_path / "in.csv", rows(8_000))
    whole, killed = tmp_path / "whole.csv", tmp_path / "killed.csv"
    words = [sys.executable, "-m", "bayeslora", "predict", str(run)]
    words += ["--input", str(path), "--num-samples", "4", "--output"]
    subprocess.run([*words, str(whole)], check=True, capture_output=True)
    random, parts = np.random.default_rng(0), tmp_path / "killed.csv.parts"
    kills = 0
    for _ in range(30):
        before = len([*parts.glob("part-*.parquet")]) if parts.exists() else 0
        process = subprocess.Popen([*words, str(killed)], stderr=subprocess.PIPE)
        while process.poll() is None and (not parts.exists() or len([*parts.glob("part-*.parquet")]) <= before):
            time.sleep(0.01)
        try:
            process.wait(timeout=random.uniform(0, 0.5))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        said = process.communicate()[1].decode()
        if killed.exists() and not parts.exists():  # whether it ended by itself or was killed after its last line
            break
        assert process.returncode == -signal.SIGKILL, said
    assert kills >= 2
    assert killed.read_bytes() == whole.read_bytes()
    assert not parts.exists()


def test_from_the_command_line(run, tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "in.csv", [*rows(6), {"id": 6, "text": ""}])
    words = ["predict", str(run), "--input", str(path), "--num-samples", "2"]
    assert main([*words, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "row 6: 'text' is empty" in capsys.readouterr().err
    assert main([*words, "--output", str(tmp_path / "out.jsonl"), "--skip-errors"]) == 0
    assert f"7 rows read, 1 skipped; 6 written to {tmp_path / 'out.jsonl'}" in capsys.readouterr().err
    assert main([*words, "--output", str(tmp_path / "top.csv"), "--skip-errors", "--top-uncertain", "2"]) == 0
    assert len((tmp_path / "top.csv").read_text(encoding="utf-8").splitlines()) == 3


def test_standard_input(run, tmp_path):
    words = ["predict", str(run), "--input", "-", "--input-format", "text", "--num-samples", "2", "--output"]
    done = subprocess.run(
        [sys.executable, "-m", "bayeslora", *words, str(tmp_path / "out.csv")],
        input="a film\nthe plot\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "2 rows read; 2 written" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--input in.csv", "--input needs --output"),
        ("--input in.csv --output out.csv --num-samples auto", "in chunks: give a number"),
        ("--text a --output out.csv", "--output does nothing without --input"),
        ("--input in.csv --output out.csv --by entropy", "--by does nothing without --top-uncertain"),
        ("--input in.csv --output out.csv --max-examples 3", "--max-examples does nothing beside --text or --input"),
        ("--input in.csv --output out.csv --text a", "not allowed with argument"),
        ("--input - --output out.csv", "say what standard input carries"),
        ("--input in.csv --output out.csv", "there is no in.csv"),
    ],
)
def test_commands_that_are_refused(run, words, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(run), *words.split()]) == 2
    assert says in capsys.readouterr().err
