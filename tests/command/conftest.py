"""A fitted run of the command line: a tiny network and a folder of reviews."""

import pytest
from transformers import BertTokenizerFast

from bayeslora.command.main import main
from tests.conftest import VOCABULARY, tiny_network

WORDS = ("good", "bad", "film", "plot", "the", "a", "is", "was", "fine", "dull", "very", "not")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny BERT with a tokenizer of twelve words, saved as transformers saves it."""
    folder = tmp_path_factory.mktemp("model")
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    filler = [f"w{i}" for i in range(VOCABULARY - len(specials) - len(WORDS))]
    (folder / "vocab.txt").write_text("\n".join([*specials, *WORDS, *filler]), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    tiny_network().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Two-word reviews, positive where they say good or fine."""
    folder = tmp_path_factory.mktemp("data") / "reviews"
    folder.mkdir()
    rows = [
        (f"the {noun} is {word}", int(word in ("good", "fine")))
        for noun in ("film", "plot")
        for word in ("good", "fine", "bad", "dull")
    ]
    for split, repeats in (("train", 4), ("validation", 1), ("test", 2)):
        lines = ["text,label", *(f"{text},{label}" for text, label in rows * repeats)]
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "unlabelled.csv").write_text("text,label\na film,-1\na plot,-1\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def run(model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "reviews"
    command = ["fit", "--model", str(model), "--task", "reviews", "--data-dir", str(data), "--text-columns", "text"]
    small = ["--rank", "2", "--target-modules", "query", "value", "--max-length", "16", "--batch-size", "8"]
    assert main([*command, "--output", str(folder), "--epochs", "2", *small]) == 0
    return folder
