"""How a network runs: its dropout, its cache, its graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Dropout off inside; every module's own mode afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def is_compiled(network: nn.Module) -> bool:
    """Whether the network or a part of it was compiled in place."""
    return any(module._compiled_call_impl is not None for module in network.modules())


@contextmanager
def without_cache(network: nn.Module) -> Iterator[None]:
    """No keys and values are kept inside, for no later token asks for them; one block's graph then fits all blocks."""
    config: Any = getattr(network, "config", None)
    caching = getattr(config, "use_cache", None)
    if caching:
        config.use_cache = False
    try:
        yield
    finally:
        if caching:
            config.use_cache = caching
