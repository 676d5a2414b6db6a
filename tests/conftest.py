"""Tiny networks of real architectures, made on the spot; nothing is downloaded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pyro
import pytest
import torch
import transformers

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # tiny networks: a second thread costs more than it gives
VOCABULARY = 64


@pytest.fixture(autouse=True)
def _fresh_start():
    """A fixed seed and an empty parameter store before each test."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


def tiny_network(kind: str = "bert", *, layers: int = 2, num_labels: int = 2, seed: int = 0, **options):
    """A sequence classifier with random weights: hidden size 16, ``layers`` blocks."""
    small = {"vocab_size": VOCABULARY, "num_labels": num_labels, "pad_token_id": 0, **options}
    encoder = {
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    configs = {
        "bert": lambda: transformers.BertConfig(**small, **encoder, max_position_embeddings=40),
        "roberta": lambda: transformers.RobertaConfig(**small, **encoder, max_position_embeddings=40),
        "gpt2": lambda: transformers.GPT2Config(**small, n_embd=16, n_layer=layers, n_head=2, n_positions=40),
        "llama": lambda: transformers.LlamaConfig(**small, **encoder, num_key_value_heads=1),
    }
    torch.manual_seed(seed)
    return transformers.AutoModelForSequenceClassification.from_config(configs[kind]())


def tiny_batch(size: int = 6, *, length: int = 7, num_labels: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens, the last example padded, and labels."""
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "input_ids": torch.randint(3, VOCABULARY, (size, length), generator=generator),
        "attention_mask": torch.ones(size, length, dtype=torch.long),
        "labels": torch.randint(num_labels, (size,), generator=generator),
    }
    batch["attention_mask"][-1, length // 2 :] = 0
    batch["input_ids"][-1, length // 2 :] = 0
    return batch


def tiny_dataset(size: int = 24, *, rule: str = "first", seed: int = 0) -> list[dict]:
    """Examples of differing length whose label can be learnt (``"first"``: is the first token large?) or not."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(size):
        length = 4 + index % 4
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        label = int(tokens[0] > VOCABULARY // 2)
        if rule == "flipped":
            label = 1 - label
        elif rule == "random":
            label = int(torch.randint(2, (), generator=generator))
        examples.append({"input_ids": tokens, "attention_mask": [1] * length, "labels": label})
    return examples
