"""Words with their classes, from files in columns and from lists: every class stands at its word's first piece."""

import json

import datasets
import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import BertTokenizer, BertTokenizerFast, RobertaTokenizerFast

from bayeslora import InputError, load_task
from bayeslora.analysis.tagging.words import split_words
from tests.conftest import tiny_network
from tests.task_files import write

COLUMNS = """-DOCSTART- -X- O

Angela NNP B-PER
Merkel NNP I-PER
spoke VBD O

Paris NNP B-LOC
waits VBZ O
"""
NAMES = ("B-LOC", "B-PER", "I-PER", "O")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """``merkel`` and ``paris`` have two pieces, and so has ``spoke``."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*specials, "angela", "mer", "##kel", "sp", "##oke", "par", "##is", "waits", "a", "b", "c"]
    file = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    file.write_text("\n".join(vocabulary), encoding="utf-8")
    return BertTokenizerFast(vocab=str(file))


def in_columns(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return folder


def listed(tags, tokens=("Angela", "Merkel", "spoke")):
    return {"id": "0", "tokens": list(tokens), "ner_tags": tags}


class TestFiles:
    @pytest.mark.parametrize("ending", ["conll", "bio", "iob2", "txt"])
    def test_columns(self, tmp_path, ending):
        folder = in_columns(tmp_path / "ner", **{f"train_{ending}": COLUMNS, f"valid_{ending}": COLUMNS})
        task = load_task("ner", tmp_path)
        assert task.splits == ("train", "validation")
        assert task.label_names == NAMES
        assert task.kind == "tokens"
        assert task.data["train"]["tokens"][:] == [["Angela", "Merkel", "spoke"], ["Paris", "waits"]]
        assert task.data["train"]["tags"][:] == [[1, 2, 3], [0, 3]]
        assert load_task("ner", folder, label_column="column2").label_names == ("NNP", "VBD", "VBZ")

    def test_tabs_part_words_with_spaces(self, tmp_path):
        in_columns(tmp_path, train_conll="New York\tB-LOC\r\nwaits\tO\r\n\r\n\r\na\tO\r\n")
        assert load_task("ner", tmp_path).data["train"]["tokens"][:] == [["New York", "waits"], ["a"]]

    def test_a_file_of_words_alone_is_an_unlabelled_split(self, tmp_path):
        in_columns(tmp_path, train_conll=COLUMNS, test_conll="Angela\nspoke\n")
        task = load_task("ner", tmp_path)
        assert task.is_labelled("train")
        assert not task.is_labelled("test")
        with pytest.raises(InputError, match="has no tags"):
            task.split("test", labelled=True)

    def test_a_torn_line_is_told_by_its_number(self, tmp_path):
        in_columns(tmp_path, train_conll=COLUMNS + "\nBerlin B-LOC\n")
        with pytest.raises(InputError, match="line 10: 2 columns where the first line has 3"):
            load_task("ner", tmp_path)

    def test_text_files_are_columns_in_a_folder_of_nothing_else(self, tmp_path):
        write(tmp_path / "train.csv", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
        in_columns(tmp_path, test_txt=COLUMNS)
        assert load_task("reviews", tmp_path, text_columns="text").splits == ("train",)

    @pytest.mark.parametrize("ending", ["jsonl", "parquet"])
    def test_lists(self, tmp_path, ending):
        write(tmp_path / f"train.{ending}", [listed(["B-PER", "I-PER", "O"])])
        task = load_task("ner", tmp_path, text_columns="tokens")
        assert task.label_names == ("B-PER", "I-PER", "O")
        assert task.label_column == "ner_tags"
        assert task.data["train"]["ner_tags"][:] == [[0, 1, 2]]

    def test_names_that_the_hub_s_files_carry(self, tmp_path):
        names = ["O", "B-PER", "I-PER", "B-LOC"]
        words, tags = datasets.Value("string"), datasets.ClassLabel(names=names)
        features = datasets.Features({"tokens": datasets.List(words), "ner_tags": datasets.List(tags)})
        rows = {"tokens": [["Angela", "Merkel"]], "ner_tags": [[1, 2]]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
        task = load_task("ner", tmp_path, text_columns="tokens")
        assert task.label_names == tuple(names)
        assert task.data["train"]["ner_tags"][:] == [[1, 2]]

    def test_numbers_without_names(self, tmp_path):
        write(tmp_path / "train.jsonl", [listed([0, 1, 2])])
        assert load_task("ner", tmp_path, text_columns="tokens").label_names == ("0", "1", "2")
        task = load_task("ner", tmp_path, text_columns="tokens", label_names=["O", "B-A", "I-A", "B-B"])
        assert task.label_names == ("O", "B-A", "I-A", "B-B")

    def test_its_recipe_makes_it_again(self, tmp_path):
        in_columns(tmp_path, train_conll=COLUMNS)
        task = load_task("ner", tmp_path)
        again = load_task(**json.loads(json.dumps(task.recipe)))
        assert (again.label_names, again.label_column, again.kind) == (task.label_names, task.label_column, task.kind)
        (tmp_path / "train.conll").unlink()
        write(tmp_path / "train.csv", [{"tokens": "a", "tags": "O"}, {"tokens": "b", "tags": "B-PER"}])
        with pytest.raises(InputError, match="was one of kind tokens"):
            load_task(**task.recipe)

    @pytest.mark.parametrize(
        ("rows", "says"),
        [
            ([listed(["O", "B-A"])], "row 0 has 3 words and 2 tags"),
            ([listed(["O", "B-A", "O"]), listed(["O", None, "O"])], "row 1: word 1 has no label"),
            ([listed(["O", "B-A", "O"]), listed([], tokens=[])], "row 1 has no words"),
            ([listed(["O", "O", "O"])], "two or more different"),
            ([listed(["O", "B-A", "O"]) | {"pos_tags": ["X", "Y", "X"]}], "say with label_column"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, tmp_path, rows, says):
        write(tmp_path / "train.jsonl", rows)
        with pytest.raises(InputError, match=says):
            load_task("ner", tmp_path, text_columns="tokens")

    def test_a_tag_that_training_lacks_is_refused(self, tmp_path):
        in_columns(tmp_path, train_conll=COLUMNS, test_conll="Rome NNP B-ORG\n")
        with pytest.raises(InputError, match="'test', row 0: word 0 has the label 'B-ORG'"):
            load_task("ner", tmp_path)


class TestPieces:
    @pytest.fixture
    def task(self, tmp_path):
        in_columns(tmp_path, train_conll=COLUMNS)
        return load_task("ner", tmp_path)

    def test_a_class_stands_at_the_first_piece(self, task, tokenizer):
        first, second = task.encode(tokenizer, "train")
        assert tokenizer.convert_ids_to_tokens(first["input_ids"]) == [
            "[CLS]",
            "angela",
            "mer",
            "##kel",
            "sp",
            "##oke",
            "[SEP]",
        ]
        assert first["labels"] == [-100, 1, 2, -100, 3, -100, -100]
        assert second["labels"] == [-100, 0, -100, 3, -100]
        unknown = task.encode(tokenizer, "train", labelled=False)[0]
        assert unknown["labels"] == [-100, -1, -1, -100, -1, -100, -100]

    def test_words_beyond_the_end_are_counted(self, task, tokenizer, caplog):
        first, second = task.encode(tokenizer, "train", max_length=5)
        assert first["labels"] == [-100, 1, 2, -100, -100]
        assert second["labels"] == [-100, 0, -100, 3, -100]
        assert "1 words of 1 sentences lie beyond max_length=5" in caplog.text
        assert task.left_out(tokenizer, "train", max_length=5) == {"words_left_out": 1}
        assert task.left_out(tokenizer, "train", max_length=7) == {"words_left_out": 0}

    def test_a_word_whose_end_is_cut_is_still_one(self, task, tokenizer):
        first = task.encode(tokenizer, "train", max_length=4)[0]
        assert first["labels"] == [-100, 1, 2, -100]
        assert task.left_out(tokenizer, "train", max_length=4) == {"words_left_out": 2}

    @pytest.mark.parametrize("words", [["a", "\u200d", "b"], ["a", "b", "\u200d"], ["\u200d", "a"]])
    def test_a_word_of_which_nothing_is_left_is_refused(self, task, tokenizer, words):
        with pytest.raises(InputError, match=rf"the tokenizer leaves nothing of word {words.index(chr(0x200D))}"):
            task.tokens(tokenizer, [["a"], words], None, 16)

    def test_texts_of_one_s_own(self, task, tokenizer):
        text, words = task.tokens(tokenizer, ["Angela Merkel spoke.", ["Angela", "Merkel"]], None, 16)
        assert text["labels"] == [-100, -1, -1, -100, -1, -100, -1, -100]
        assert words["labels"] == [-100, -1, -1, -100, -100]
        with pytest.raises(InputError, match="1 of its 3 words lie beyond the 5 pieces"):
            task.tokens(tokenizer, ["Angela Merkel spoke"], None, 5)
        for wrong in (["a", 3], [[1, 2]], [""], [["a", " "]]):
            with pytest.raises(InputError):
                task.unpaired(wrong, None)
        with pytest.raises(InputError, match="single sentences"):
            task.unpaired(["a"], ["b"])

    def test_a_tokenizer_that_knows_no_words_is_refused(self, task):
        class Slow(BertTokenizer):
            is_fast = False

        with pytest.raises(InputError, match="use a fast tokenizer"):
            task.tokens(Slow(), ["a b"], None, 16)


def test_words_of_a_text():
    assert split_words("The U.S. won't pay $1,000.50 (Reuters)!") == [
        "The",
        "U.S",
        ".",
        "won't",
        "pay",
        "$",
        "1,000.50",
        "(",
        "Reuters",
        ")",
        "!",
    ]
    assert split_words(["New York", "waits"]) == ["New York", "waits"]


def test_words_are_read_with_the_space_before_them(tmp_path):
    """RoBERTa's tokenizer takes a space for a part of the word: without it, words that come one by one are others."""
    trained = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(["a film was good"] * 20, vocab_size=300, special_tokens=specials)
    trained.save_model(str(tmp_path))
    vocabulary = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    merges = [tuple(line.split()) for line in (tmp_path / "merges.txt").read_text("utf-8").splitlines()[1:] if line]
    RobertaTokenizerFast(vocab=vocabulary, merges=merges).save_pretrained(tmp_path / "base")
    tiny_network("roberta", vocab_size=len(vocabulary)).roberta.save_pretrained(tmp_path / "base")
    in_columns(tmp_path / "data", train_conll="a O\nfilm B-A\n\nfilm B-A\n")
    task = load_task("ner", tmp_path / "data")
    network, tokenizer = task.load_network(tmp_path / "base")
    assert type(network).__name__ == "RobertaForTokenClassification"
    assert network.config.id2label == {0: "B-A", 1: "O"}
    film = tokenizer.convert_ids_to_tokens(task.encode(tokenizer, "train")[1]["input_ids"])
    assert film == ["<s>", "Ġfilm", "</s>"]
