"""The adapted layers of a network, and those of equal shape together."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from bayeslora.adapters.sampled import SampledLinear
from bayeslora.errors import InputError


@dataclass(frozen=True)
class Adapter:
    """One adapted layer: its name in the base network, its LoRA layer and its samplable A; ``key`` is PEFT's name
    of the adapter, the same for all layers."""

    name: str
    layer: LoraLayer
    lora_A: SampledLinear
    key: str

    @property
    def rank(self) -> int:
        return self.lora_A.out_features

    @property
    def columns(self) -> int:
        return self.lora_A.in_features

    @property
    def kind(self) -> str:
        """The name without block numbers, e.g. ``encoder.layer.attention.self.query``."""
        return ".".join(part for part in self.name.split(".") if not part.isdigit())

    @property
    def block(self) -> int:
        """Index of the transformer block the layer sits in; 0 outside blocks."""
        return next((int(part) for part in self.name.split(".") if part.isdigit()), 0)


@dataclass(frozen=True)
class AdapterGroup:
    """All adapters with one (r, n_in): one plate in the model, three sites for all of them together.

    Where a network, ``home``, is split over devices, its posterior and every draw are made on the first one, to which
    inputs and outputs belong, and each A then goes to its layer: sites, files and seeds do not depend on the split.
    """

    rank: int
    columns: int
    adapters: tuple[Adapter, ...]
    home: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"r{self.rank}_in{self.columns}"

    def __len__(self) -> int:
        return len(self.adapters)

    @property
    def device(self) -> torch.device:
        return next((self.home or self.adapters[0].lora_A).parameters()).device

    def weights(self) -> Tensor:
        """``lora_A.weight`` of every adapter, on the group's device: shape ``(adapters, r, columns)``."""
        device = self.device
        return torch.stack([adapter.lora_A.weight.to(device) for adapter in self.adapters])

    def mean(self) -> Tensor:
        """μ of every adapter in float32 (or wider), one column a row: shape ``(adapters, columns, r)``."""
        stacked = self.weights()
        return stacked.to(torch.promote_types(stacked.dtype, torch.float32)).mT

    def mean_scale(self) -> Tensor:
        """Root mean square of the entries of μ, without gradient: shape ``(adapters,)``."""
        norms = torch._foreach_norm([adapter.lora_A.weight.detach() for adapter in self.adapters])
        return torch.stack([norm.to(self.device) for norm in norms]).float() / math.sqrt(self.columns * self.rank)


def active_adapter(network: PeftModel) -> str:
    """The one active adapter's name; several at once cannot be sampled."""
    active = network.active_adapters
    if len(active) != 1:
        raise InputError(f"exactly one active adapter can be sampled, found {active}; call set_adapter(name)")
    return active[0]


def adapter_state(network: PeftModel) -> dict[str, Tensor]:
    """The tensors that PEFT saves for the active adapter."""
    return get_peft_model_state_dict(network, adapter_name=active_adapter(network), save_embedding_layers=False)


def lora_layers(network: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in network.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def find_groups(network: PeftModel) -> tuple[AdapterGroup, ...]:
    """The samplable adapters by shape, in network order."""
    key = active_adapter(network)
    shapes: dict[tuple[int, int], list[Adapter]] = {}
    for name, layer in lora_layers(network):
        if key in layer.lora_A:
            adapter = Adapter(name, layer, layer.lora_A[key], key)
            shapes.setdefault((adapter.rank, adapter.columns), []).append(adapter)
    home = network.get_base_model()
    return tuple(AdapterGroup(*shape, tuple(adapters), home) for shape, adapters in shapes.items())
