"""Texts with several labels, from lists of them and from a column for each."""

import json

import datasets
import pytest

from bayeslora import InputError, load_task
from tests.task_files import write


def rows(*labels):
    return [{"text": f"text {number}", "label": of} for number, of in enumerate(labels)]


def applying(task, split="train"):
    return task.data[split][task.label_column][:]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_lists_of_names(tmp_path, ending):
    write(tmp_path / f"train.{ending}", rows(["war", "art"], [], ["art"]))
    task = load_task("topics", tmp_path, text_columns="text")
    assert task.kind == "multi_label"
    assert task.label_names == ("art", "war")
    assert applying(task) == [[1, 1], [0, 0], [1, 0]]


def test_lists_of_numbers_and_the_names_that_the_hub_s_files_carry(tmp_path):
    write(tmp_path / "a" / "train.jsonl", rows([0, 2], [1]))
    task = load_task("topics", tmp_path / "a", text_columns="text", label_names=["x", "y", "z"])
    assert (task.label_names, applying(task)) == (("x", "y", "z"), [[1, 0, 1], [0, 1, 0]])
    labels = datasets.List(datasets.ClassLabel(names=["art", "war", "law"]))
    features = datasets.Features({"text": datasets.Value("string"), "label": labels})
    (tmp_path / "b").mkdir()
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [[2], [0, 1]]}, features=features)
    data.to_parquet(tmp_path / "b" / "train.parquet")
    task = load_task("topics", tmp_path / "b", text_columns="text")
    assert (task.label_names, applying(task)) == (("art", "war", "law"), [[0, 0, 1], [1, 1, 0]])


def test_a_column_for_each(tmp_path):
    columns = [{"text": "a b", "war": 1, "art": 0}, {"text": "c", "war": 1, "art": 1}]
    write(tmp_path / "train.csv", columns)
    write(tmp_path / "test.csv", [{"text": "a"}])
    task = load_task("topics", tmp_path, text_columns="text", label_column=["war", "art"])
    assert (task.label_names, applying(task)) == (("war", "art"), [[1, 0], [1, 1]])
    assert task.is_labelled("train")
    assert not task.is_labelled("test")
    again = load_task(**json.loads(json.dumps(task.recipe)))
    assert (again.kind, again.label_names, applying(again)) == (task.kind, task.label_names, applying(task))


@pytest.mark.parametrize(
    ("labels", "options", "says"),
    [
        ([["a", "b"], None], {}, "row 1 has no labels: give an empty list"),
        ([["a", "b", "a"]], {}, "row 0 has the label 'a' twice"),
        ([[1, 0, 1], [0, 0, 0]], {}, "row 0 has the label '1' twice"),
        ([[0.5, 1.0]], {}, "lists of floats"),
        ([["a"], []], {}, "two or more different ones"),
        ([["a", "b"]], {"label_names": ["a", "c"]}, "label 1 has the label 'b'"),
        ([["a", "b"]], {"label_column": "topics"}, "no column 'topics'"),
        ([["a", "b"]], {"label_column": ["label", "text"]}, "column 'label' holds"),
        ([["a", "b"]], {"label_column": ["label", "other"]}, "no column 'other'"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_row(tmp_path, labels, options, says):
    write(tmp_path / "train.jsonl", rows(*labels))
    with pytest.raises(InputError, match=says):
        load_task("topics", tmp_path, text_columns="text", **options)


def test_a_label_that_training_lacks_and_a_torn_split_are_refused(tmp_path):
    write(tmp_path / "train.jsonl", rows(["a", "b"]))
    write(tmp_path / "test.jsonl", rows(["c"]))
    with pytest.raises(InputError, match="'test', row 0: label 0 has the label 'c'"):
        load_task("topics", tmp_path, text_columns="text")
    write(tmp_path / "test.jsonl", rows(["a"], None))
    with pytest.raises(InputError, match="'test', row 1 has no labels"):
        load_task("topics", tmp_path, text_columns="text")


def test_a_named_task_has_one_label(tmp_path):
    write(tmp_path / "train.csv", [{"sentence": "a", "label": 0}, {"sentence": "b", "label": 1}])
    with pytest.raises(InputError, match="has one label column"):
        load_task("sst2", tmp_path, label_column=["label", "sentence"])
