"""How a network runs: its dropout, its cache, its graph, its checkpoints."""

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from bayeslora.errors import InputError


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
def quiet_deprecations() -> Iterator[None]:
    """Inside, PEFT asks transformers for what transformers has renamed, without a warning that no user can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


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


def checkpointable(network: nn.Module) -> tuple[nn.Module, ...]:
    """The layers that transformers can run again in the backward pass, instead of keeping their activations."""
    return tuple(module for module in network.modules() if hasattr(module, "gradient_checkpointing"))


def recomputes(layers: Iterable[Any]) -> bool:
    """Whether any of these layers runs again in the backward pass.

    Raises:
        InputError: for reentrant checkpointing.
    """
    active = [layer for layer in layers if layer.gradient_checkpointing]
    for function in (getattr(layer, "_gradient_checkpointing_func", None) for layer in active):
        if isinstance(function, functools.partial):
            refuse_reentrant({"use_reentrant": True} | function.keywords)  # torch's default, not transformers'
    return bool(active)


def refuse_reentrant(options: Mapping[str, Any] | None) -> None:
    """Refuse arguments of ``torch.utils.checkpoint`` that ask for a backward pass a block.

    Raises:
        InputError: saying what to pass.
    """
    if options and options.get("use_reentrant"):
        raise InputError(
            "reentrant gradient checkpointing runs a backward pass for each block, and the first would free the graph "
            "of the draw that all blocks share: pass use_reentrant=False, which is transformers' default"
        )
