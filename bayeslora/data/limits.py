"""What a network can read: how many positions and tokens, and which token ends a text."""

from typing import Any

from torch import nn

from bayeslora.models.network import plain

POSITION_TABLES = {"position_embeddings", "wpe", "embed_positions", "positions_embed"}


def position_limit(network: nn.Module) -> int | None:
    """Tokens that a network with a table of positions can read; None where positions are relative or computed."""
    return table_size(network, POSITION_TABLES, whole=False)


def table_size(network: nn.Module, names: set[str], *, whole: bool = True) -> int | None:
    """Rows of the smallest table of one of these names; only those in use, where not ``whole``."""
    sizes = []
    for path, table in plain(network).named_modules():
        if isinstance(table, nn.Embedding) and names & set(path.split(".")):
            offset = getattr(table, "offset", 0)  # of OPT and BART, added to each position
            first = 0 if whole or offset or table.padding_idx is None else table.padding_idx + 1  # RoBERTa's
            sizes.append(table.num_embeddings - offset - first)
    return min(sizes, default=None)


def end_of_text(network: Any) -> int | None:
    """The token at which a classifier with an encoder and a decoder reads, as BART and T5 do."""
    reads = getattr(network.config, "is_encoder_decoder", False) and hasattr(network, "classification_head")
    return network.config.eos_token_id if reads else None
