"""What a network of transformers says of itself."""

from typing import Any

from torch import nn


def plain(network: Any) -> Any:
    """The transformers network itself, where PEFT has wrapped it."""
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def is_causal(network: nn.Module) -> bool:
    """Whether the network is a causal language model, by its class."""
    return type(network).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def is_seq2seq(network: nn.Module) -> bool:
    """Whether the network reads a sequence with an encoder and writes another one with a decoder."""
    reads_and_writes = type(network).__name__.endswith(("ForConditionalGeneration", "MTModel"))
    return reads_and_writes and bool(getattr(network.config, "is_encoder_decoder", False))


def vocabulary_size(network: Any) -> int | None:
    """Rows of the embedding of tokens; None where there is no such table."""
    try:
        return getattr(plain(network).get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):  # no network of transformers, or one without tokens
        return None
