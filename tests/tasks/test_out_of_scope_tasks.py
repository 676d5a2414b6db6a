"""Tasks with inputs that belong to no class, on tiny files in the official layouts."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from bayeslora import InputError, load_task
from bayeslora.tasks.load import NAMED_TASKS
from tests.task_files import official_rows, write

INTENTS = ["translate", "oos", "weather", "alarm", "oos"]


def rows(name: str) -> list[dict]:
    numbers = {"alarm": 0, "translate": 1, "weather": 2, "oos": 150}
    return [
        {"text": f"{name} {intent} {index}", "intent": intent, "label": numbers[intent]}
        for index, intent in enumerate(INTENTS)
    ]


@pytest.fixture
def clinc(tmp_path):
    for split in ("train", "validation", "test"):
        write(tmp_path / "clinc_oos" / f"{split}.parquet", rows(split))
    return load_task("clinc_oos", tmp_path)


def test_out_of_scope_questions_have_splits_of_their_own(clinc):
    assert clinc.splits == ("train", "validation", "test", "validation_out_of_scope", "out_of_scope")
    assert clinc.out_of_scope_splits == ("validation_out_of_scope", "out_of_scope")
    assert clinc.label_names == ("alarm", "translate", "weather")
    assert clinc.split("test")["text"][:] == ["test translate 0", "test weather 2", "test alarm 3"]
    assert clinc.split("test")["intent"][:] == [1, 2, 0]
    assert clinc.split("out_of_scope")["text"][:] == ["test oos 1", "test oos 4"]
    assert clinc.split("train").num_rows == 3  # those of train are left out, not learnt
    assert [clinc.is_labelled(split) for split in clinc.splits] == [True, True, True, False, False]
    assert clinc.shift_splits == ()


def test_rows_are_those_of_the_file(clinc):
    """The texts are numbered as they stand in the file."""
    for split in ("test", "out_of_scope"):
        numbers = [int(text.rsplit(" ", 1)[1]) for text in clinc.split(split)["text"][:]]
        assert clinc.rows(split) == numbers
        assert clinc.rows(split, limit=2, seed=3) == [
            int(text.rsplit(" ", 1)[1]) for text in clinc.split(split, limit=2, seed=3)["text"][:]
        ]


def test_the_recipe_makes_the_task_again(clinc):
    again = load_task(**clinc.recipe)
    assert (again.splits, again.label_names) == (clinc.splits, clinc.label_names)
    assert again.split("test")["intent"][:] == clinc.split("test")["intent"][:]


def test_class_labels_of_the_hub_where_out_of_scope_is_number_42(tmp_path, monkeypatch):
    """A folder with the hub's own layout stands in for the hub's repository."""
    import datasets

    names = [f"intent_{index:03}" for index in range(42)] + ["oos", "weather"]
    features = datasets.Features(text=datasets.Value("string"), intent=datasets.ClassLabel(names=names))
    config = "configs:\n- config_name: plus\n  data_files:\n"
    for split, intents in {"train": [0, 43, 42, 7], "validation": [7], "test": [43, 42]}.items():
        data = {"text": [f"{split} {intent}" for intent in intents], "intent": intents}
        (tmp_path / "clinc" / "plus").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(data, features=features).to_parquet(tmp_path / "clinc" / "plus" / f"{split}.parquet")
        config += f"  - split: {split}\n    path: plus/{split}.parquet\n"
    (tmp_path / "clinc" / "README.md").write_text(f"---\n{config}---\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    known = replace(NAMED_TASKS["clinc_oos"], repository=str(tmp_path / "clinc"))
    monkeypatch.setitem(NAMED_TASKS, "clinc_oos", known)
    task = load_task("clinc_oos")
    assert task.label_names == ("intent_000", "intent_007", "weather")
    assert task.split("train")["intent"][:] == [0, 2, 1]
    assert task.split("out_of_scope")["text"][:] == ["test 42"]


def test_another_label_column_is_data_of_ones_own(tmp_path):
    numbered = [{**row, "label": index % 3} for index, row in enumerate(rows("train"))]
    write(tmp_path / "train.parquet", numbered)
    task = load_task("clinc_oos", tmp_path, label_column="label")
    assert (task.num_labels, task.splits) == (3, ("train",))


def test_numbers_do_not_say_which_is_out_of_scope(tmp_path):
    write(tmp_path / "train.csv", [{"text": "a", "intent": 1}, {"text": "b", "intent": 0}])
    with pytest.raises(InputError, match="label column 'intent' holds int64, expected names of classes"):
        load_task("clinc_oos", tmp_path)
    write(tmp_path / "train.csv", [{"text": "a", "purpose": "x"}])
    with pytest.raises(InputError, match="no column 'intent'; the columns are text, purpose"):
        load_task("clinc_oos", tmp_path)


@pytest.mark.parametrize("name", ["cola", "mrpc", "wic"])
def test_news_for_a_task_of_another_kind(name, tmp_path):
    write(tmp_path / name / "train.parquet", official_rows(name))
    write(tmp_path / "ag_news" / "test.parquet", official_rows("ag_news"))
    task = load_task(name, tmp_path)
    both = task.with_out_of_scope(load_task("ag_news", tmp_path))
    assert both.splits == ("train", "ag_news")
    assert (both.out_of_scope_splits, task.out_of_scope_splits) == (("ag_news",), ())
    assert both.split("ag_news").column_names == list(task.text_columns)
    for shift, column in enumerate(task.text_columns):
        texts = [f"text number {(index + shift) % 6}" for index in range(6)]
        assert both.split("ag_news")[column][:] == texts
    assert not both.is_labelled("ag_news")
    assert both.label_names == task.label_names
    with pytest.raises(InputError, match=f"task '{name}' has a split 'ag_news' already"):
        both.with_out_of_scope(load_task("ag_news", tmp_path))
    with pytest.raises(InputError, match="task 'ag_news' has no split 'train'; it has test"):
        task.with_out_of_scope(load_task("ag_news", tmp_path), "train")


def test_official_counts():
    folder = Path(os.environ.get("BAYESLORA_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (folder / "clinc_oos").is_dir():
        pytest.skip(f"no data sets in {folder}; set BAYESLORA_DATA to a folder with clinc_oos/train.parquet and so on")
    clinc = load_task("clinc_oos", folder)
    assert {split: clinc.split(split).num_rows for split in clinc.splits} == {
        "train": 15000,
        "validation": 3000,
        "test": 4500,
        "validation_out_of_scope": 100,
        "out_of_scope": 1000,
    }
    assert clinc.num_labels == 150
    assert "oos" not in clinc.label_names
    news = load_task("ag_news", folder)
    assert news.split("test").num_rows == 7600
    assert load_task("mrpc", folder).with_out_of_scope(news).split("ag_news").num_rows == 7600
