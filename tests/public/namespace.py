"""What an example in a docstring finds at hand, beside every public name."""

import csv
import importlib
import itertools
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bayeslora import BayesLoRA, MonteCLoRAConfig
from bayeslora.command.main import main
from tests.conftest import VOCABULARY, tiny_batch, tiny_dataset, tiny_network
from tests.modules import randomize_b

PACKAGES = ("bayeslora", "bayeslora.guides", "bayeslora.models", "bayeslora.analysis", "bayeslora.study")


def public(package):
    """The public names of a package and what they stand for."""
    module = importlib.import_module(package)
    return {name: getattr(module, name) for name in module.__all__}


def namespace(source):
    """What ``source`` names, as the docstring of ``bayeslora`` describes it, made anew."""
    names = {name: value for package in PACKAGES for name, value in public(package).items()}
    modules = {"np": np, "torch": torch, "pyro": pyro, "dist": pyro.distributions}
    made = {
        "network": tiny_network,
        "tokenizer": tiny_tokenizer,
        "dataset": lambda: tiny_dataset(8),
        "batch": tiny_batch,
        "bayes": fitted,
        "results": study_table,
    }
    return names | modules | {name: make() for name, make in made.items() if re.search(rf"\b{name}\b", source)}


def fitted():
    """A posterior whose adapters have an effect."""
    return randomize_b(BayesLoRA(tiny_network(), MonteCLoRAConfig(r=2, alpha_init="ones", sample_scaler=0.02))).eval()


def tiny_tokenizer():
    words = ["[PAD]", "[UNK]", "good", "bad", "film", "a", *(f"word{i}" for i in range(VOCABULARY - 6))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def study_table():
    """Two methods at two learning rates with two seeds: MonteCLoRA is as accurate and better calibrated."""
    methods = {"LoRA": (0.6, 0.2, 10.0), "MonteCLoRA": (0.4, 0.1, 12.0)}  # NLL, loss at the higher rate, seconds
    grid = itertools.product(("validation", "test"), methods, (1e-3, 3e-3), (0, 1))
    return pd.DataFrame([_row(split, name, rate, seed, *methods[name]) for split, name, rate, seed in grid])


def _row(split, method, rate, seed, nll, loss, seconds):
    worse = loss * (rate > 1e-3)
    setting = {"learning_rate": rate, "batch_size": 16, "rank": 8, "seed": seed}
    scores = {"accuracy": 0.8 - worse / 2, "nll": nll + worse, "ece": nll / 5 + worse, "brier": nll / 2 + worse}
    cost = {"train_seconds": seconds, "predict_seconds": seconds / 10, "peak_memory_mb": 800.0, "examples": 500}
    cost |= {"train_cpu_seconds": seconds, "predict_cpu_seconds": seconds / 10, "host": "here", "workers": 1}
    return {"task": "reviews", "method": method, "split": split, **setting, **scores, **cost}


def write_files(folder: Path):
    """A base model ``base/`` and a task's data ``reviews/``, as an example may read them."""
    tiny_network().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "reviews").mkdir()
    for split, size in (("train", 8), ("validation", 4), ("test", 4)):
        with (folder / "reviews" / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([f"a {word} film word{n}", word] for n in range(size // 2) for word in ("bad", "good"))


def write_run(folder: Path):
    """A run ``runs/reviews`` on those files, of one step."""
    data = ["--task", "reviews", "--data-dir", str(folder / "reviews"), "--text-columns", "text"]
    places = ["--model", str(folder / "base"), "--output", str(folder / "runs" / "reviews")]
    assert main(["fit", *places, *data, "--max-steps", "1"]) == 0
