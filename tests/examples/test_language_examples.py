"""The scripts about language models, on a tiny one."""

import math

import numpy as np
import pytest
import transformers
from datasets import Dataset

from tests.language import OFFICIAL, tiny_language_model, tiny_tokenizer, write
from tests.scripts import script

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path):
    """A model, and data in the official layouts."""
    tiny_language_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for split in ("train", "validation", "test"):
        for name in ("arc_easy", "openbookqa"):
            write(tmp_path, name, split, [OFFICIAL[name][0]] * 6)
        write(tmp_path, "gsm8k", split, [{"question": "where is the cat?", "answer": "up\n#### 1"}] * 6)
    return tmp_path


def test_llama_commonsense(place, capsys):
    sizes = {"train_examples": 4, "test_examples": 4, "validation_examples": 4, "num_samples": 2}
    script("studies/llama_commonsense").main(
        str(place), str(place / "out"), model=str(place / "model"), seeds=(0,), **sizes
    )
    printed = capsys.readouterr().out
    assert printed.count("| LoRA + temperature*") == printed.count("| MonteCLoRA, 2 draws + temperature*") == 2
    assert printed.index("arc_easy\n") < printed.index("openbookqa\n")


def test_gsm8k(place, capsys):
    sizes = {"training": 8, "testing": 4, "questions": 2, "num_samples": 2}
    found = script("examples/gsm8k").main(str(place), str(place / "out"), model=str(place / "model"), **sizes)
    assert set(found) == {"LoRA", "MonteCLoRA"}
    assert all(math.isfinite(value) for numbers in found.values() for value in numbers.values())
    assert found["LoRA"]["mutual information"] == 0  # of one model with itself
    assert found["MonteCLoRA"]["mutual information"] > 0
    assert "nats a token" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # TRL's own
def test_how_sure_is_the_reward(tmp_path, capsys):
    config = tiny_language_model().config
    config.num_labels = 1
    network = transformers.AutoModelForSequenceClassification.from_config(config)
    pairs = Dataset.from_list([{"chosen": "where is the cat? up", "rejected": "where is the cat? down"}] * 8)
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    mean, std = script("examples/how_sure_is_the_reward").main(
        network, tiny_tokenizer(), pairs, pairs, num_samples=8, max_steps=4, output_dir=str(tmp_path), **quiet
    )
    assert mean.shape == std.shape == (16,)
    assert (std > 0).all()
    np.testing.assert_allclose(std[:8], std[0], rtol=1e-3)  # one text, in each draw the same reward
    printed = capsys.readouterr().out
    assert printed.count("reward ") == 10
    assert "of 8 pairs" in printed
