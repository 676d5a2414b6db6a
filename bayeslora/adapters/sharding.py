"""A network's frozen weights in shards over processes, gathered block by block as it runs: PyTorch's ``fully_shard``.

What is trained, the adapter, and all that is saved with it stay whole in every process. A draw is made of all
``lora_A`` before the first block runs, and averaging, optimizer, checkpoints and logs are those of whole copies.
"""

import inspect
from collections.abc import Collection, Iterable
from typing import Any

from peft import PeftModel
from torch import nn

from bayeslora.adapters.modes import is_compiled
from bayeslora.adapters.placement import is_split
from bayeslora.adapters.provenance import base_tensors
from bayeslora.adapters.quantized import is_quantized
from bayeslora.errors import InputError


def shard_frozen(network: PeftModel, kept_keys: Collection[str], blocks: Iterable[nn.Module], mesh: Any) -> None:
    """Shard every block, and then what lies outside of the blocks, in place.

    All is freed again after a forward pass. torch would leave the part outside of the blocks gathered; reading a state
    dict frees it, and a process that saves alone would then be the only one that has to gather it.

    Args:
        network: The network with its adapter.
        kept_keys: Keys of the base network's tensors that are saved with the adapter; they stay whole.
        blocks: What is gathered and freed again together, inner ones last.
        mesh: A ``DeviceMesh``, of one dimension, or of two: copies, and shards of a copy.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise InputError("sharding needs a torch whose fully_shard has ignored_params: install torch>=2.7")
    frozen = {
        t.tensor
        for t in base_tensors(network)
        if not t.is_buffer and not t.tensor.requires_grad and t.key not in kept_keys
    }
    whole = set(network.parameters()) - frozen
    for module in (*reversed(list(blocks)), network):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    register_fsdp_forward_method(network, "generate")


def check_shardable(network: PeftModel) -> None:
    """Refuse what could not be put into shards, or would not run alike in every process.

    Raises:
        InputError: naming the reason.
    """
    if is_sharded(network):
        raise InputError("the network is in shards already")
    if is_quantized(network):
        raise InputError(
            "a quantised network cannot be put into shards: load it in bfloat16, or keep whole copies (without FSDP)"
        )
    if is_split(network):
        raise InputError("device_map has split the network over the devices of one process: load it without device_map")
    if is_compiled(network):
        raise InputError("a compiled network has not been tried in shards: leave bayes.compile() (torch_compile) out")
    config: dict[str, Any] = network.get_base_model().config.to_dict()
    left_out = sorted(name for name, value in config.items() if "layerdrop" in name and value)
    if left_out:
        raise InputError(
            f"{left_out[0]}={config[left_out[0]]} leaves out blocks at random, other ones in each process, which would "
            f"wait for each other forever: set network.config.{left_out[0]} = 0"
        )


def is_sharded(network: nn.Module) -> bool:
    """Whether any weight of a network lies in shards."""
    return any(hasattr(parameter, "full_tensor") for parameter in network.parameters())


def refuse_in_shards(network: nn.Module, purpose: str) -> None:
    """Raises:
    InputError: where the network's weights lie in shards.
    """
    if is_sharded(network):
        raise InputError(
            f"the network's weights lie in shards, and {purpose} needs all of them: save the adapter, and open it in "
            "one process"
        )
