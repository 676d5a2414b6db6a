"""A file of rows in, the same rows with what is predicted out: whatever the format, the chunks and the kind of task."""

import csv
import gzip
import io
import json
import tracemalloc

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from bayeslora import InputError
from bayeslora.bulk.predicting import predict_file
from bayeslora.models import Tuning
from tests.bulk.fitted_runs import LABELS, choice_run, sentences, text_run
from tests.language import OFFICIAL
from tests.task_files import write

QUICK = {"num_samples": 3, "progress": False}
ADDED = ["predicted_label", "probability", *(f"P({name})" for name in LABELS), "entropy", "mutual_information"]


@pytest.fixture(scope="module")
def run():
    return text_run()


def rows(count=23):
    """The text is neither the first column nor the last."""
    return [{"id": f"{n:03}", "text": text, "note": 'a "b", c\nd'} for n, text in enumerate(sentences(count))]


def read(path):
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def test_what_is_added_is_what_predict_says(run, tmp_path):
    given = rows()
    result = predict_file(run, write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl", rows_at_once=5, **QUICK)
    expected = run.predict([row["text"] for row in given], num_samples=3)
    said = read(tmp_path / "out.jsonl")
    assert (result.rows, result.written, result.skipped, result.resumed) == (23, 23, 0, 0)
    assert [list(row) for row in said] == [["id", "text", "note", *ADDED]] * 23
    assert [{name: row[name] for name in given[0]} for row in said] == given
    assert [row["predicted_label"] for row in said] == [LABELS[index] for index in expected.probs.argmax(1)]
    np.testing.assert_allclose([[row[f"P({name})"] for name in LABELS] for row in said], expected.probs, atol=2e-6)
    np.testing.assert_allclose([row["probability"] for row in said], expected.probs.max(1), atol=2e-6)
    np.testing.assert_allclose([row["entropy"] for row in said], expected.entropy, atol=2e-6)
    np.testing.assert_allclose([row["mutual_information"] for row in said], expected.mutual_information, atol=2e-6)
    assert not (tmp_path / "out.jsonl.parts").exists()


@pytest.mark.parametrize("rows_at_once", [1, 7, 1024])
def test_the_draws_are_those_of_any_chunk(run, tmp_path, rows_at_once):
    write(tmp_path / "in.jsonl", rows())
    for name, size in (("a", rows_at_once), ("b", 23)):
        predict_file(run, tmp_path / "in.jsonl", tmp_path / f"{name}.jsonl", rows_at_once=size, **QUICK)
    one, other = (np.array([[row[c] for c in ADDED[1:]] for row in read(tmp_path / f"{n}.jsonl")]) for n in "ab")
    np.testing.assert_allclose(one, other, atol=2e-6)


def as_file(kind, folder, given):
    path = folder / f"in.{kind}"
    if kind in ("csv", "jsonl", "parquet", "json"):
        return write(path, given)
    if kind == "csv.gz":
        plain = write(folder / "plain.csv", given)
        path.write_bytes(gzip.compress(plain.read_bytes()))
    elif kind == "tsv":
        text = io.StringIO()
        csv.writer(text, delimiter="\t").writerows([[*given[0]], *([*row.values()] for row in given)])
        path.write_text("\ufeff" + text.getvalue(), encoding="utf-8")
    elif kind == "arrow":
        table = pyarrow.Table.from_pylist(given)
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    else:
        datasets.Dataset.from_list(given).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv", "jsonl", "parquet", "json", "arrow", "saved"])
@pytest.mark.parametrize("output", ["csv", "jsonl", "parquet"])
def test_every_format(run, tmp_path, monkeypatch, kind, output):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    given = rows(9)
    out = tmp_path / f"out.{output}"
    predict_file(run, as_file(kind, tmp_path, given), out, rows_at_once=4, **QUICK)
    said = read(out)
    assert [{name: row[name] for name in given[0]} for row in said] == given
    probs = np.array([[float(row[f"P({name})"]) for name in LABELS] for row in said])
    expected = run.predict([row["text"] for row in given], num_samples=3).probs
    np.testing.assert_allclose(probs, expected, atol=2e-6)


def test_lines_of_text(run, tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(sentences(5)) + "\n", encoding="utf-8")
    predict_file(run, tmp_path / "in.txt", tmp_path / "out.csv", **QUICK)
    assert [row["text"] for row in read(tmp_path / "out.csv")] == sentences(5)


def test_types_of_parquet_stay(run, tmp_path):
    table = pyarrow.table(
        {
            "text": sentences(5),
            "count": pyarrow.array([1, None, 3, 4, 5], pyarrow.int16()),
            "when": pyarrow.array([0, 1, 2, 3, 4], pyarrow.timestamp("ms")),
            "tags": [["a"], [], None, ["b", "c"], []],
        }
    )
    parquet.write_table(table, tmp_path / "in.parquet")
    predict_file(run, tmp_path / "in.parquet", tmp_path / "out.parquet", rows_at_once=2, **QUICK)
    assert parquet.read_table(tmp_path / "out.parquet").select(table.column_names).equals(table)
    predict_file(run, tmp_path / "in.parquet", tmp_path / "out.csv", **QUICK)
    assert [row["tags"] for row in read(tmp_path / "out.csv")] == ['["a"]', "[]", "", '["b", "c"]', "[]"]


def test_values_of_json_lines_stay(run, tmp_path):
    given = [{"text": "a film", "x": {"y": [1, None, 2.5]}}, {"more": True, "text": "the plot", "x": 10**20}]
    predict_file(run, write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl", **QUICK)
    assert [{n: v for n, v in row.items() if n not in ADDED} for row in read(tmp_path / "out.jsonl")] == given


def test_no_common_type_is_told_before_the_end(run, tmp_path):
    given = [{"text": "a film", "x": 1}, {"text": "the plot", "x": 2.5}, {"text": "the plot", "x": "three"}]
    write(tmp_path / "in.jsonl", given)
    with pytest.raises(InputError, match=r"one type for each column.*write \.jsonl"):
        predict_file(run, tmp_path / "in.jsonl", tmp_path / "out.parquet", rows_at_once=1, **QUICK)
    write(tmp_path / "two.jsonl", given[:2])
    predict_file(run, tmp_path / "two.jsonl", tmp_path / "two.parquet", rows_at_once=1, **QUICK)
    assert [row["x"] for row in read(tmp_path / "two.parquet")] == [1.0, 2.5]


BROKEN = {
    "csv": (b'text,n\na film,1\nthe plot\n"a" b,2\n\xff,3\n"",4\nthe film,5\n', [1, 2, 3, 4]),
    "jsonl": (
        b'{"text": "a film"}\n{"text": \n[1]\n{"text": 3}\n{"other": ""}\n{"text": null}\n\n'
        b'{"text": "a", "text": "b"}\n{"text": "\\ud800"}\n'
        b'{"text": "\xff"}\n{"text": "a", "entropy": 1}\n{"text": "the film"}\n',
        [1, 2, 3, 4, 5, 6, 7, 8, 9],
    ),
    "txt": (b"a film\n\n\xff\nthe film", [1, 2]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_rows_that_cannot_be_read(run, tmp_path, kind, caplog):
    content, bad = BROKEN[kind]
    path = tmp_path / f"in.{kind}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"in\.{kind}, row {bad[0]}: .*--skip-errors"):
        predict_file(run, path, tmp_path / "out.jsonl", **QUICK)
    result = predict_file(run, path, tmp_path / "out.jsonl", skip_errors=True, **QUICK)
    assert (result.rows, result.written, result.skipped) == (2 + len(bad), 2, len(bad))
    assert [row["text"] for row in read(tmp_path / "out.jsonl")] == ["a film", "the film"]
    said = [record.message for record in caplog.records]
    assert [message.split("row ")[1].split(" ")[0] for message in said] == [str(number) for number in bad]


def test_a_quotation_mark_that_stays_open(run, tmp_path):
    (tmp_path / "in.csv").write_text('text\na film\n"the plot\na film\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"row 1: lines 3 to 4: unexpected end of data"):
        predict_file(run, tmp_path / "in.csv", tmp_path / "out.csv", **QUICK)


@pytest.mark.parametrize(
    ("name", "content", "options", "says"),
    [
        ("in.csv", "words\na film\n", {}, r"no column 'text'; the columns are words.*--text-columns"),
        ("in.csv", "text,entropy\na,1\n", {}, r"has a column 'entropy' itself: give the new ones a --prefix"),
        ("in.csv", "text,text\na,1\n", {}, r"names of its columns, each once"),
        ("in.csv", "", {}, r"names of its columns, each once"),
        ("in.csv", "text\n", {}, r"no row that can be read"),
        ("in.xlsx", "text\n", {}, r"does not say how to read it.*--input-format"),
        ("in.parquet", "text\n", {}, r"cannot be read as parquet"),
        ("in.json", "{", {}, r"breaks off, or is damaged|cannot be read by datasets"),
        ("in.csv.gz", "text\n", {}, r"breaks off, or is damaged|cannot be read"),
        ("in.csv", "text\na\n", {"num_samples": "auto"}, r"in chunks: give a number"),
        ("in.csv", "text\na\n", {"text_columns": ["a", "b"]}, r"the run reads 1 \(text\), got 2"),
        ("in.csv", "text\na\n", {"coverage": 0.9}, r"knows no such sets: tune it by labels first"),
        ("in.csv", "text\na\n", {"rows_at_once": 0}, r"at least 1"),
        ("in.csv", "text\na\n", {"input_format": "jsonl"}, r"row 0: line 1: no JSON"),
    ],
)
def test_what_is_refused(run, tmp_path, name, content, options, says):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=says):
        predict_file(run, tmp_path / name, tmp_path / "out.jsonl", **QUICK | options)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", ["out", "out.txt", "nowhere/out.csv"])
def test_outputs_that_are_refused(run, tmp_path, name):
    write(tmp_path / "in.jsonl", rows(3))
    with pytest.raises(InputError, match="output"):
        predict_file(run, tmp_path / "in.jsonl", tmp_path / name, **QUICK)
    (tmp_path / "there.csv").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"there\.csv exists"):
        predict_file(run, tmp_path / "in.jsonl", tmp_path / "there.csv", **QUICK)
    assert (tmp_path / "there.csv").read_text(encoding="utf-8") == "mine"


def test_the_names_of_columns(run, tmp_path):
    """A file's own name for the text, and names in the way."""
    given = [{"words": text, "entropy": 1} for text in sentences(3)]
    options = {"text_columns": ["words"], "prefix": "our_", **QUICK}
    predict_file(run, write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl", **options)
    assert list(read(tmp_path / "out.jsonl")[0]) == ["words", "entropy", *(f"our_{name}" for name in ADDED)]


@pytest.mark.parametrize("columns", [("one", "two"), ("word", "one", "two")])
def test_pairs_of_texts(tmp_path, columns):
    run = text_run(columns)
    of_columns = [sentences(6, seed) for seed in range(len(columns))]
    given = [dict(zip(columns, texts, strict=True)) for texts in zip(*of_columns, strict=True)]
    predict_file(run, write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl", **QUICK)
    before = [f"{row['word']}: " if "word" in row else "" for row in given]
    texts = [[word + row[name] for word, row in zip(before, given, strict=True)] for name in ("one", "two")]
    expected = run.posterior.predict(run.tokens(*texts), num_samples=3, progress=False).probs
    said = [[row[f"P({name})"] for name in LABELS] for row in read(tmp_path / "out.jsonl")]
    np.testing.assert_allclose(said, expected, atol=2e-6)


def test_numbers(tmp_path):
    run, texts = text_run(labels=()), sentences(6)
    write(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    predict_file(run, tmp_path / "in.jsonl", tmp_path / "out.csv", **QUICK)
    expected = run.predict(texts, num_samples=3)
    np.testing.assert_allclose([float(row["predicted_mean"]) for row in read(tmp_path / "out.csv")], expected.mean)
    np.testing.assert_allclose([float(row["predicted_std"]) for row in read(tmp_path / "out.csv")], expected.std)
    with pytest.raises(InputError, match="--top-uncertain is for classes"):
        predict_file(run, tmp_path / "in.jsonl", tmp_path / "top.csv", top_uncertain=2, **QUICK)


@pytest.mark.parametrize("style", ["options", "letters"])
def test_choices(tmp_path, style):
    """The official columns; without the answer, which is what is predicted."""
    run, row = choice_run(style=style), OFFICIAL["arc_easy"][0]
    given = [{name: row[name] for name in row if name != "answerKey"}, {**row, "answerKey": "Z"}]
    predict_file(run, write(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl", **QUICK)
    said = read(tmp_path / "out.jsonl")
    assert said[0]["P(D)"] == 0  # it has three options
    assert [said[0][name] for name in ("P(A)", "P(B)", "P(C)")] == [said[1][name] for name in ("P(A)", "P(B)", "P(C)")]
    assert sum(said[0][f"P({name})"] for name in "ABCD") == pytest.approx(1, abs=1e-5)
    five = {"text": ["ball"] * 5, "label": list("ABCDE")}
    write(tmp_path / "five.jsonl", [{"question": "which", "choices": five}])
    with pytest.raises(InputError, match="has 5 options, and the run was fitted to 4 at most"):
        predict_file(run, tmp_path / "five.jsonl", tmp_path / "five.csv", **QUICK)


def test_a_run_that_writes_is_refused(run, tmp_path):
    write(tmp_path / "in.jsonl", rows(3))
    run = choice_run("gsm8k")
    with pytest.raises(InputError, match="kind text: it writes"):
        predict_file(run, tmp_path / "in.jsonl", tmp_path / "out.csv", **QUICK)


def test_sets_of_a_tuned_run(tmp_path):
    run, given = text_run(), rows(20)
    write(tmp_path / "in.jsonl", given)
    run.posterior.tuning = Tuning(1.0, conformal={"0.8": 0.4, "0.9": 0.3, "0.99": 0.0})
    probs = run.predict([row["text"] for row in given], num_samples=3).probs
    for coverage, threshold in ((None, 0.3), (0.8, 0.4)):
        out = tmp_path / f"{coverage}.jsonl"
        predict_file(run, tmp_path / "in.jsonl", out, coverage=coverage, **QUICK)
        expected = [[n for n, p in zip(LABELS, row, strict=True) if p >= threshold] for row in probs]
        assert [row["conformal_set"] for row in read(out)] == expected
    for coverage, says in ((0.95, "knows no such sets, but 0.8, 0.9, 0.99"), (0.99, "too few")):
        with pytest.raises(InputError, match=says):
            predict_file(run, tmp_path / "in.jsonl", tmp_path / "no.csv", coverage=coverage, **QUICK)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(run, tmp_path):
    peaks = []
    for count in (2000, 8000, 16000):
        path = tmp_path / f"{count}.jsonl"
        write(path, [{"text": text, "filling": "x" * 1000} for text in sentences(count)])
        tracemalloc.start()
        predict_file(run, path, tmp_path / f"{count}.csv", num_samples=1, rows_at_once=500, progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 0.1 * 8000 * 1000  # bytes: a tenth of what 8000 more rows hold
