"""Where a network's parts lie: on one device, or on several, as ``device_map`` splits it."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from bayeslora.errors import InputError


def check_resident(network: nn.Module) -> None:
    """Make sure that every weight is on a device and stays there.

    Raises:
        InputError: for modules that accelerate loads anew for each call (``device_map`` with ``"cpu"`` beside an
            accelerator, or with ``"disk"``; ``cpu_offload``), and for weights that were never loaded, or lie in shards.
    """
    offloaded = [name for name, module in network.named_modules() if any(hook.offload for hook in _hooks(module))]
    if offloaded:
        raise InputError(
            f"accelerate offloads {offloaded[0]!r} and {len(offloaded) - 1} other modules, and their weights are not "
            "there when a posterior is made or saved: load the network onto devices alone (a device_map over "
            "accelerators, without 'cpu' and 'disk'), quantised or in bfloat16 where it does not fit"
        )
    weights = dict(network.named_parameters())
    if any(hasattr(weight, "full_tensor") for weight in weights.values()):
        raise InputError(
            "the network's weights lie in shards, and a posterior is made of whole ones: load the network whole in "
            "every process, and shard it afterwards (fit's fsdp=, or bayeslora.training.engines.shard)"
        )
    missing = [name for name, weight in weights.items() if weight.device.type == "meta"]
    if 0 < len(missing) < len(weights):
        raise InputError(
            f"{missing[0]!r} and {len(missing) - 1} other weights were never loaded (they are on the meta device): "
            "load the network, and its adapter, without low_cpu_mem_usage"
        )


def is_split(network: nn.Module) -> bool:
    """Whether the network's weights lie on more than one device."""
    return len({weight.device for weight in network.parameters()}) > 1


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Those of accelerate that move weights."""
    hook = getattr(module, "_hf_hook", None)
    yield from (one for one in getattr(hook, "hooks", (hook,)) if hasattr(one, "offload"))
