"""A PeftModel around a PeftModel: what training loops ask of the one, the other answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from bayeslora.adapters.blocks import repeated_blocks
from bayeslora.adapters.modes import checkpointable, refuse_reentrant
from bayeslora.errors import InputError


class WrappedNetwork(PeftModel):
    """Hands on to ``network``, an adapted one, what concerns the network alone, and nothing that it was not asked for.

    A subclass sets ``network`` once; it stays the same module.
    """

    _is_prompt_learning = False  # what PeftModel's own __init__, which would adapt the network again, sets

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get("_modules", {}).get(name, value)
        if name == "network" and before is not value and not self.__dict__.get("_is_replica"):
            raise InputError(
                "the model and the guide belong to this network: build a BayesLoRA on the other one, or "
                "change this one in place (bayes.compile(), bayes.network.set_adapter(...))"
            )
        super().__setattr__(name, value)

    @property
    def config(self) -> Any:
        """The network's own transformers configuration, where transformers looks for it."""
        return self.network.config

    def __getattr__(self, name: str) -> Any:
        """No more than a module has: what is true of the network (being quantised) is not true of the guide."""
        return nn.Module.__getattr__(self, name)

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """Where ``device_map`` put the network, which Trainer then leaves there; without one there is no such name."""
        return self.network.get_base_model().hf_device_map

    @property
    def base_model(self) -> nn.Module:
        """PEFT's tuner, where a PeftModel has it."""
        return self.network.base_model

    @property
    def generation_config(self) -> Any:
        """The network's own, where TRL looks for it."""
        return self.network.get_base_model().generation_config

    def add_model_tags(self, tags: Any) -> None:
        """Tags for the network's model card, which TRL adds."""
        self.network.get_base_model().add_model_tags(tags)

    def get_input_embeddings(self) -> nn.Module:
        """The network's own."""
        return self.network.get_base_model().get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The network's own."""
        return self.network.get_base_model().get_output_embeddings()

    def enable_input_require_grads(self) -> None:
        """What checkpointed blocks of a network with frozen embeddings need."""
        self.network.get_base_model().enable_input_require_grads()

    @property
    def device(self) -> torch.device:
        return self.network.device

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the network is the frozen base model (PEFT's own switch)."""
        trained = [(parameter, parameter.requires_grad) for parameter in self.network.parameters()]
        try:
            with self.network.disable_adapter():
                yield
        finally:
            for parameter, requires_grad in trained:  # PEFT makes the adapter trainable, in post_hoc mode too
                parameter.requires_grad_(requires_grad)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the network in place, with ``torch.compile``'s arguments; draws are inputs of the compiled graph.

        Blocks that repeat are compiled one by one and share their graph, so that a deep network takes no longer than
        one block. A second length of the inputs makes a second graph, for all lengths.
        """
        blocks = repeated_blocks(self.network)
        if blocks:
            self.enable_input_require_grads()  # as the others' inputs do: else the first block's graph is another
        for module in blocks or [self.network]:
            module.compile(*args, **options)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute activations in the backward pass; recomputed layers see the same draw.

        Raises:
            InputError: for ``use_reentrant=True``.
        """
        refuse_reentrant(activation_checkpointing_kwargs)
        if activation_checkpointing_kwargs is not None:  # torch's own default is the other
            activation_checkpointing_kwargs = {"use_reentrant": False, **activation_checkpointing_kwargs}
        base = self.network.get_base_model()
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable(activation_checkpointing_kwargs, **options)
        base.enable_input_require_grads()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed; TRL asks, and switches it off while a reference runs."""
        return any(layer.gradient_checkpointing for layer in checkpointable(self.network))

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        base = self.network.get_base_model()
        (getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable)()

    gradient_checkpointing_enable = activation_checkpointing_enable
