"""Data sets are taken as transformers takes them, or refused with the row: alike wherever one is given."""

import datasets
import numpy as np
import pandas
import pytest
import torch
import transformers
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, diagnose, fit
from bayeslora.analysis import to_arviz
from bayeslora.data.batches import Collator
from bayeslora.data.checks import check_to_learn_from
from bayeslora.data.limits import position_limit
from bayeslora.inference.attribution import attribute_variance
from bayeslora.inference.diagnostics import log_importance_weights
from bayeslora.inference.generation import token_uncertainty
from bayeslora.models import CategoricalLikelihood, GaussianLikelihood, NextTokenLikelihood, likelihood_for
from bayeslora.tasks.encoding import pack
from tests.architectures import ARCHITECTURES
from tests.conftest import VOCABULARY, tiny_batch, tiny_dataset, tiny_network
from tests.language import tiny_language_model
from tests.modules import randomize_b

TEXTS = [name for name, kind in ARCHITECTURES.items() if kind.inputs == "text"]


def new(kind="bert", **options):
    return randomize_b(BayesLoRA(tiny_network(kind, **options), MonteCLoRAConfig(r=2, sample_scaler=0.3)))


def learns(bayes, data, tmp_path, **options):
    return fit(bayes, data, output_dir=tmp_path / "run", max_steps=1, batch_size=4, progress=False, **options)


class Rows(torch.utils.data.Dataset):
    """A map-style data set of torch."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(tiny_dataset(4))

    def __len__(self):
        return 4


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def with_numpy(rows):
    return [{name: np.asarray(value) for name, value in row.items()} for row in rows]


DOORS = {
    "fit": learns,
    "evaluation": lambda bayes, data, tmp_path: learns(bayes, tiny_dataset(8), tmp_path, eval_dataset=data),
    "predict": lambda bayes, data, tmp_path: bayes.predict(data, num_samples=2),
    "arviz": lambda bayes, data, tmp_path: to_arviz(bayes, data, num_samples=2),
    "diagnose": lambda bayes, data, tmp_path: diagnose(bayes, data, num_samples=25, steps=1, progress=False),
    "importance": lambda bayes, data, tmp_path: log_importance_weights(bayes, data, num_samples=2),
    "attribution": lambda bayes, data, tmp_path: attribute_variance(bayes, data, num_samples=2, progress=False),
}

TAKEN = {
    "list": list,
    "tuple": tuple,
    "map-style": Rows,
    "subset": lambda rows: Subset(Rows([*rows, {}]), range(len(rows))),
    "concatenation": lambda rows: ConcatDataset([Rows(rows[:3]), Rows(rows[3:])]),
    "tensors": lambda rows: [{name: torch.tensor(value) for name, value in row.items()} for row in rows],
    "arrays": with_numpy,
    "small integers": lambda rows: [{n: torch.tensor(v, dtype=torch.int32) for n, v in r.items()} for r in rows],
    "encodings": lambda rows: [transformers.BatchEncoding(row) for row in rows],
    "datasets": datasets.Dataset.from_list,
    "datasets as torch": lambda rows: datasets.Dataset.from_list(rows).with_format("torch"),
    "datasets as numpy": lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
    "transformed": lambda rows: datasets.Dataset.from_list(rows).with_transform(lambda batch: batch),
    "label": lambda rows: [{"label" if n == "labels" else n: v for n, v in row.items()} for row in rows],
    "label_ids": lambda rows: [{"label_ids" if n == "labels" else n: v for n, v in row.items()} for row in rows],
    "labels of shape (n, 1)": lambda rows: [row | {"labels": [row["labels"]]} for row in rows],
    "labels 0.0 and 1.0": lambda rows: [row | {"labels": float(row["labels"])} for row in rows],
    "true and false": lambda rows: [row | {"labels": bool(row["labels"])} for row in rows],
    "texts and indices": lambda rows: [row | {"text": "so", "idx": i, "tags": ["a"]} for i, row in enumerate(rows)],
    "a column of None": lambda rows: [row | {"token_type_ids": None} for row in rows],
    "without masks": lambda rows: [{n: v for n, v in row.items() if n != "attention_mask"} for row in rows],
}


@pytest.mark.parametrize("kind", TAKEN)
def test_taken_alike(kind):
    rows = tiny_dataset(8)
    data, bayes = TAKEN[kind](rows), new()
    expected = bayes.predict(rows, num_samples=2)
    found = bayes.predict(data, num_samples=2, batch_size=3)
    np.testing.assert_allclose(found.sample_probs, expected.sample_probs, atol=1e-6)
    np.testing.assert_allclose(found.sample_log_likelihood, expected.sample_log_likelihood, atol=1e-5)
    of_fit = check_to_learn_from(bayes.model, {"train_dataset": data}, batch_size=4)(
        [data[index] for index in range(8)]
    )
    assert of_fit.keys() == {"input_ids", "attention_mask", "labels"}
    for name, value in Collator()(rows).items():
        assert torch.equal(of_fit[name], value)
        assert of_fit[name].dtype is torch.long


@pytest.mark.parametrize("kind", ["subset", "datasets as torch", "label", "labels 0.0 and 1.0"])
def test_trained_on_alike(kind, tmp_path):
    rows = tiny_dataset(8)
    data = TAKEN[kind](rows)
    result = learns(new(), data, tmp_path, eval_dataset=data, learning_rate=1e-12)
    nll = -new().predict(rows, num_samples=0).sample_log_likelihood.mean()
    assert result.metrics["eval_loss"] == pytest.approx(nll, rel=1e-5)
    assert "eval_accuracy" in result.metrics


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["subset", "label", "labels of shape (n, 1)", "texts and indices"])
def test_taken_at_every_door(door, kind, tmp_path):
    DOORS[door](new(), TAKEN[kind](tiny_dataset(8)), tmp_path)


REFUSED = {
    "columns": (columns, r"is a mapping of input_ids, attention_mask, labels: .*Dataset.from_dict"),
    "splits": (lambda rows: datasets.DatasetDict(train=datasets.Dataset.from_list(rows)), "a mapping of train: .*one"),
    "pandas": (pandas.DataFrame, "table of pandas: pass datasets.Dataset.from_pandas"),
    "generator": (lambda rows: (row for row in rows), r"is a generator, .*list\(...\)"),
    "stream": (lambda rows: Stream(), "is a Stream, which has no numbered rows"),
    "stream of datasets": (lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(), "is a IterableDataset"),
    "loader": (lambda rows: DataLoader(Rows(rows)), "is a DataLoader"),
    "tuples": (lambda rows: TensorDataset(torch.ones(3, 2)), "row 0 is a tuple: expected a dict"),
    "as pandas": (lambda rows: datasets.Dataset.from_list(rows).with_format("pandas"), "row 0 is a DataFrame"),
    "as arrow": (lambda rows: datasets.Dataset.from_list(rows).with_format("arrow"), "row 0 is a Table"),
    "empty": (lambda rows: [], "is empty: nothing to"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_alike(kind, door, tmp_path):
    change, message = REFUSED[kind]
    with pytest.raises(InputError, match=message):
        DOORS[door](new(), change(tiny_dataset(6)), tmp_path)
    assert not (tmp_path / "run").exists()


def without(name):
    return lambda row: {column: value for column, value in row.items() if column != name}


ROWS = {
    "no mask": (without("attention_mask"), "it has input_ids, labels, and row 0 has input_ids, attention_mask, labels"),
    "one column more": (lambda row: row | {"token_type_ids": [0] * len(row["input_ids"])}, "the same columns"),
    "None": (lambda row: row | {"attention_mask": None}, "the same columns"),
    "no tokens": (without("input_ids"), r"reads 'input_ids', and there is no such column \(there are attention_mask"),
    "empty": (lambda row: row | {"input_ids": [], "attention_mask": []}, "the text is empty"),
    "too long": (
        lambda row: row | {"input_ids": [3] * 41, "attention_mask": [1] * 41},
        r"it has 41 tokens, and the network has 40 positions: encode with truncation to max_length=40",
    ),
    "unknown token": (
        lambda row: row | {"input_ids": [VOCABULARY] * len(row["input_ids"])},
        r"token 64 is outside the network's 64 tokens",
    ),
    "negative token": (lambda row: row | {"input_ids": [-1] * len(row["input_ids"])}, "token -1 is outside"),
    "half a token": (lambda row: row | {"input_ids": [3.5] * len(row["input_ids"])}, "whole numbers, got 3.5"),
    "not a list": (lambda row: row | {"input_ids": 3}, "one list of tokens, got 0 dimensions"),
    "of one batch": (lambda row: row | {"input_ids": [row["input_ids"]]}, "got 2 dimensions: .*without return_tensors"),
    "words": (lambda row: row | {"input_ids": ["a"] * len(row["input_ids"])}, r"input_ids must be numbers, got .\['a'"),
    "short mask": (lambda row: row | {"attention_mask": [1]}, "attention_mask has .1. entries, and the example .6."),
    "nothing to read": (lambda row: row | {"attention_mask": [0] * len(row["input_ids"])}, "mask is 0 everywhere"),
    "token type": (
        lambda row: row | {"token_type_ids": [2] * len(row["input_ids"])},
        "token_type_ids go from 0 to 1 in this network, got 2 to 2",
    ),
    "position": (
        lambda row: row | {"position_ids": [40] * len(row["input_ids"])},
        "position_ids go from 0 to 39 in this network, got 40 to 40",
    ),
    "no label": (without("labels"), "every label must be a finite number, got None"),
    "label None": (lambda row: row | {"labels": None}, "every label must be a finite number, got None"),
    "label NaN": (lambda row: row | {"labels": float("nan")}, "every label must be a finite number, got nan"),
    "label in words": (lambda row: row | {"labels": "good"}, "every label must be a finite number, got good"),
    "half a label": (lambda row: row | {"labels": 0.5}, "whole numbers, found 0.5"),
    "label ignored": (lambda row: row | {"labels": -100}, "label -100 is outside the network's 2 classes 0..1"),
    "label unknown": (lambda row: row | {"labels": -1}, "label -1 is outside the network's 2 classes"),
    "label of others": (lambda row: row | {"labels": 2}, "label 2 is outside the network's 2 classes"),
    "two labels": (lambda row: row | {"labels": [0, 1]}, r"an example has one label, got labels of shape \(2,\)"),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("door", ["fit", "evaluation", "predict"])
def test_the_row_is_named(kind, door, tmp_path):
    change, message = ROWS[kind]
    data = tiny_dataset(8)
    if kind in ("token type", "position"):
        column = {"token type": "token_type_ids", "position": "position_ids"}[kind]
        data = [row | {column: [0] * len(row["input_ids"])} for row in data]
    data[2] = change(data[2])
    name = {"fit": "train_dataset", "evaluation": "eval_dataset", "predict": "the data set"}[door]
    with pytest.raises(InputError, match=f"{name}, row 2: .*{message}"):
        DOORS[door](new(), data, tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["empty", "label of others", "too long"])
@pytest.mark.parametrize("door", DOORS)
def test_the_row_is_named_at_every_door(kind, door, tmp_path):
    data = tiny_dataset(8)
    data[2] = ROWS[kind][0](data[2])
    with pytest.raises(InputError, match=f"row 2: .*{ROWS[kind][1]}"):
        DOORS[door](new(), data, tmp_path)


def test_columns_that_nobody_reads_are_named(caplog):
    new().predict(TAKEN["texts and indices"](tiny_dataset(4)), num_samples=0)
    assert "BertForSequenceClassification does not read the columns idx, tags" in caplog.text


@pytest.mark.parametrize("name", TEXTS)
def test_as_many_tokens_as_there_are_positions(name):
    """The longest text that is taken is the longest that the network can read."""
    network = ARCHITECTURES[name].network()
    limit = position_limit(network)
    tokens = torch.full((1, (limit or 200) + 1), 5)
    tokens[:, -1] = 2
    assert network(input_ids=tokens[:, 1:]).logits.isfinite().all()
    if limit is not None:
        with pytest.raises((IndexError, RuntimeError)):
            network(input_ids=tokens)
    else:
        assert network(input_ids=tokens).logits.isfinite().all()


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("door", ["fit", "predict"])
def test_end_of_text_where_it_is_read(name, door, tmp_path):
    data = ARCHITECTURES[name].examples(6)
    for ends, row in (
        (0, {"input_ids": [5, 6], "attention_mask": [1, 1]}),
        (2, {"input_ids": [5, 2, 2], "attention_mask": [1, 1, 1]}),
    ):
        bayes = BayesLoRA(ARCHITECTURES[name].network(), MonteCLoRAConfig(r=2))
        with pytest.raises(InputError, match=rf"row 3: .*end-of-text token 2: .* \(1\), and this one has {ends}"):
            DOORS[door](bayes, [*data[:3], row | {"labels": 0}, *data[3:]], tmp_path)


class TestPicturesAndSounds:
    @pytest.mark.parametrize(
        ("name", "column", "value", "message"),
        [
            ("vit", "pixel_values", torch.zeros(3, 8, 9), r"pixel_values has the shape \(3, 8, 9\), unlike"),
            ("vit", "pixel_values", torch.zeros(1, 8, 8), r"pixel_values has the shape \(1, 8, 8\), unlike"),
            ("vit", "pixel_values", torch.full((3, 8, 8), float("nan")), "pixel_values has a value that is NaN"),
            ("vit", "picture", torch.zeros(3, 8, 8), "reads 'pixel_values', and there is no such column"),
            ("whisper", "input_features", torch.zeros(8, 15), r"input_features has the shape \(8, 15\)"),
            ("wav2vec2", "input_values", [], "the sound is empty"),
        ],
    )
    def test_the_row_is_named(self, name, column, value, message, tmp_path):
        data = ARCHITECTURES[name].examples(4)
        data[2] = {column: value, "labels": 0}
        for door in ("fit", "predict"):
            bayes = BayesLoRA(ARCHITECTURES[name].network(), MonteCLoRAConfig(r=2))
            with pytest.raises(InputError, match=f"row 2: .*{message}"):
                DOORS[door](bayes, data, tmp_path)

    @pytest.mark.parametrize("name", ["whisper", "wav2vec2"])
    def test_what_the_network_refuses_is_refused_before_training(self, name, tmp_path):
        column, value = ("input_features", torch.ones(8, 15)) if name == "whisper" else ("input_values", [0.1] * 5)
        bayes = BayesLoRA(ARCHITECTURES[name].network(), MonteCLoRAConfig(r=2))
        with pytest.raises(InputError, match=r"train_dataset, row \d: .* cannot read it"):
            learns(bayes, [{column: value, "labels": 0}] * 3, tmp_path)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("name", ["vit", "whisper", "wav2vec2"])
    def test_lists_and_double_precision(self, name, tmp_path):
        """Lists of lists of a data set are numbers with a fraction, not the options of a choice."""
        data = ARCHITECTURES[name].examples(4)
        table = datasets.Dataset.from_list(
            [{k: np.asarray(v).tolist() if k != "labels" else v for k, v in row.items()} for row in data]
        )
        bayes = BayesLoRA(ARCHITECTURES[name].network(), MonteCLoRAConfig(r=2))
        expected = bayes.predict(data, num_samples=0).probs
        for given in (table, table.with_format("numpy"), table.with_format("torch")):
            np.testing.assert_allclose(bayes.predict(given, num_samples=0).probs, expected, atol=1e-6)


class TestLabels:
    """The likelihood itself, for those who bring their own loop."""

    def test_one_column_of_labels_is_not_scored_against_all(self):
        bayes, batch = new().eval(), tiny_batch()
        expected = bayes(**batch).loss
        assert torch.equal(bayes(**batch | {"labels": batch["labels"][:, None]}).loss, expected)
        bayes.train()
        losses = []
        for labels in (batch["labels"], batch["labels"][:, None]):
            torch.manual_seed(0)
            bayes.network.eval()
            losses.append(bayes(**batch | {"labels": labels}).loss)
        assert torch.equal(*losses)

    @pytest.mark.parametrize("likelihood", [CategoricalLikelihood, GaussianLikelihood])
    @pytest.mark.parametrize("shape", [(6, 2), (5,), (1, 5), (6, 6)])
    def test_other_shapes(self, likelihood, shape):
        logits = torch.zeros(6, 2 if likelihood is CategoricalLikelihood else 1)
        with pytest.raises(InputError, match="6 examples need one label each, got labels of shape"):
            likelihood()(logits, torch.zeros(shape, dtype=torch.long))

    def test_fractions_for_a_classifier(self):
        with pytest.raises(InputError, match=r"labels of a classifier are whole numbers .* got torch.float32"):
            CategoricalLikelihood()(torch.zeros(2, 2), torch.tensor([0.0, 0.6]))

    def test_several_numbers_to_learn(self):
        with pytest.raises(InputError, match=r"one number is learnt for each example, and the network gives \(2, 3\)"):
            GaussianLikelihood()(torch.zeros(2, 3), torch.zeros(2))
        with pytest.raises(InputError, match="problem_type='regression' with num_labels=3: one number is learnt"):
            likelihood_for(tiny_network("bert", num_labels=3, problem_type="regression"))

    @pytest.mark.parametrize("labels", [np.float64(0.5), [0.5], torch.tensor([0.5]), 1])
    def test_numbers_to_learn(self, labels):
        data, bayes = [row | {"labels": labels} for row in tiny_dataset(6)], new(num_labels=1)
        found = bayes.predict(data, num_samples=2)
        assert found.labels.shape == (6,)
        assert found.sample_log_likelihood.shape == (2, 6)
        batch = check_to_learn_from(bayes.model, {"train_dataset": data}, batch_size=6)(data)
        assert batch["labels"].shape == (6,)
        assert bayes.train()(**batch).loss.isfinite()

    @pytest.mark.parametrize("labels", [None, -1])
    def test_unlabelled(self, labels):
        data = [row | {"labels": labels} for row in tiny_dataset(5)]
        assert new().predict(data, num_samples=2).labels is None
        with pytest.raises(InputError, match=r"row (4: every label must be|4: it has a label|0: label -1 is outside)"):
            new().predict([*data[:4], data[4] | {"labels": 1}])


class TestTexts:
    TEXT = {"input_ids": [3, 4, 5], "attention_mask": [1, 1, 1], "labels": [3, 4, 5]}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"labels": [3, 4]}, r"one for each; text 1 has 3 tokens and labels of shape \(2,\)"),
            ({"labels": [3, -100, -100]}, "no token of text 1 is scored"),
            ({"labels": [3, 4, 96]}, "row 1: labels of a text are tokens, 0 to 95, or -100"),
            ({"labels": None}, "row 1: every label must be a finite number, got None"),
            ({"input_ids": [3, 4, 96]}, "row 1: token 96 is outside the network's 96 tokens"),
            ({"input_ids": [], "attention_mask": [], "labels": []}, "row 1: the text is empty"),
        ],
    )
    def test_the_row_is_named(self, change, message, tmp_path):
        data = [self.TEXT, self.TEXT | change]
        doors = {"fit": learns, "predict": DOORS["predict"], "tokens": lambda bayes, d, _: token_uncertainty(bayes, d)}
        for door in doors.values():
            bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=2), likelihood=NextTokenLikelihood())
            with pytest.raises(InputError, match=message):
                door(bayes, data, tmp_path)

    def test_rows_of_several_texts_may_be_longer_than_the_positions(self):
        bayes = BayesLoRA(tiny_language_model("gpt2"), MonteCLoRAConfig(r=2))
        text = {"input_ids": [3] * 200, "labels": [3] * 200}
        (row,) = pack([text, text], 400)
        assert bayes.predict([row], num_samples=0).num_tokens.tolist() == [398]
        with pytest.raises(InputError, match="row 0: it has 400 tokens, and the network has 256 positions"):
            bayes.predict([{name: row[name] for name in ("input_ids", "labels")}])

    def test_without_labels(self):
        bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=2))
        for door in (bayes.predict, lambda data: token_uncertainty(bayes, data)):
            with pytest.raises(InputError, match="the texts have no labels"):
                door([{"input_ids": [3, 4]}])

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ([3, 96], "prompt 1 is not a list of tokens of the network, whole numbers below 96"),
            ([3.5], "prompt 1 is not"),
            ([[3, 4]], "prompt 1 is not"),
            ([3] * 254, "prompt 1 has 254 tokens, and the network has 256 positions"),
        ],
    )
    def test_prompts(self, prompt, message):
        bayes = BayesLoRA(tiny_language_model("gpt2"), MonteCLoRAConfig(r=2))
        with pytest.raises(InputError, match=message):
            bayes.generate([[3, 4], prompt], max_new_tokens=4)
        written = bayes.generate([[3] * 253, torch.tensor([5, 6])], max_new_tokens=4, num_samples=0, progress=False)
        assert written.num_tokens.max() <= 4


def test_a_collator_alone_makes_the_mask():
    rows = [{"input_ids": [5, 6, 7], "label": 1}, {"input_ids": [8], "label": 0}]
    batch = Collator()(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    of_xlnet = Collator.for_network(ARCHITECTURES["xlnet"].network())(rows)
    assert of_xlnet["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]  # it reads the last position
    packed = Collator()([row | {"position_ids": [0] * len(row["input_ids"])} for row in rows])
    assert "attention_mask" not in packed  # the positions tell the texts of a row apart
    with pytest.raises(InputError, match="some examples of a batch have a column 'input_ids'"):
        Collator()([{"input_ids": [3]}, {"labels": 1}])
