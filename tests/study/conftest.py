"""A study on a tiny network that can be learned in some ten steps."""

import pytest
from transformers import BertTokenizerFast

from bayeslora.study import Study
from tests.conftest import VOCABULARY, tiny_network

WORDS = ("good", "bad", "film", "plot", "the", "is", "fine", "dull")


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A tiny BERT, and reviews whose last word decides."""
    folder = tmp_path_factory.mktemp("study")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary = [*words, *(f"w{i}" for i in range(VOCABULARY - len(words)))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "model")
    tiny_network(hidden_dropout_prob=0.1, initializer_range=0.1).save_pretrained(folder / "model")
    (folder / "reviews").mkdir()
    rows = [
        (f"the {noun} is {word}", int(word in ("good", "fine")))
        for noun in ("film", "plot")
        for word in ("good", "fine", "bad", "dull")
    ]
    for split, repeats in (("train", 4), ("validation", 2), ("test", 3)):
        labelled = rows * repeats
        if split == "validation":
            labelled[0] = (labelled[0][0], 1 - labelled[0][1])  # one mistake: another temperature than the test's
        lines = ["text,label", *(f"{text},{label}" for text, label in labelled)]
        (folder / "reviews" / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def study(place):
    """Makes studies of given methods on the reviews."""

    def make(*methods, **changes) -> Study:
        return Study.from_dict(
            {
                "model": str(place / "model"),
                "tasks": [{"name": "reviews", "data_dir": str(place / "reviews"), "text_columns": "text"}],
                "methods": list(methods),
                "learning_rates": [0.01],
                "batch_sizes": [8],
                "ranks": [2],
                "max_length": 12,
                "num_samples": 3,
                "training": {"max_steps": 6},
                "lora": {"target_modules": ["query", "value"]},
                **changes,
            }
        )

    return make
