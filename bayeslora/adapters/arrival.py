"""Whether a draw reaches the layers that it was set for; kernels that read ``lora_A.weight`` themselves miss it."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayeslora.adapters.drawing import keeping_draw, set_draw
from bayeslora.adapters.groups import Adapter, AdapterGroup
from bayeslora.adapters.modes import evaluation_mode
from bayeslora.errors import InputError

SWITCH_OFF = (
    "switch it off (Unsloth: load the network with transformers; axolotl: lora_mlp_kernel, lora_qkv_kernel and "
    "lora_o_kernel: false)"
)


def unreached(groups: tuple[AdapterGroup, ...]) -> list[Adapter]:
    """Adapters that have not used the draw that was last set for them."""
    return [adapter for group in groups for adapter in group.adapters if not adapter.lora_A.draw.is_reached]


def check_reached(groups: tuple[AdapterGroup, ...]) -> None:
    """Make sure that every layer used the draw that was last set for it, unless its adapter is switched off.

    Raises:
        InputError: naming layers that did not run: a kernel reads their ``lora_A.weight`` itself, or the network never
            gets to them.
    """
    left_out = [adapter for adapter in unreached(groups) if not adapter.layer.disable_adapters]
    if left_out:
        raise InputError(
            f"the draw did not arrive in {_named(left_out)} (of {sum(map(len, groups))} adapted layers): either the "
            "network does not run them, then leave them out of target_modules; or a fused kernel reads lora_A.weight "
            f"itself, as Unsloth's and axolotl's do, then {SWITCH_OFF}"
        )


class Arrival:
    """Asks after each training batch whether its draw arrived.

    That is one flag a layer, and costs nothing beside a step. Some networks leave out layers at random while they are
    trained (LayerDrop), so a batch that left some out is looked at again: at the 1st, 2nd, 4th, 8th, ... of them. A
    kernel that is patched in later is so found after as many more batches as went before, in any other network at the
    next.
    """

    def __init__(self) -> None:
        self.left_out = 0  # batches that left out a layer

    def check(self, network: nn.Module, groups: tuple[AdapterGroup, ...], run: Callable[[], Tensor]) -> bool:
        """:func:`check_reached` after a training batch; ``run`` gives the batch's outputs again.

        Returns:
            False where adapters are switched off: what would be trained is the posterior's KL alone.

        Raises:
            InputError: naming the layers.
        """
        missing = unreached(groups)
        if not missing:
            return True
        if any(adapter.layer.disable_adapters for adapter in missing):
            return False
        self.left_out += 1
        if self.left_out & (self.left_out - 1):
            return True
        with keeping_draw(groups), _keeping_state(network, groups[0].device):
            set_draw(groups, {group.name: group.mean().detach() for group in groups})
            with evaluation_mode(network), torch.no_grad():
                run()
                check_reached(groups)
            if self.left_out == 1:
                _check_unread(missing, run)
        return True


def refuse_switched_off(*_: Any) -> None:
    """For a training step of adapters that are switched off.

    Raises:
        InputError: saying how to switch them on.
    """
    raise InputError(
        "the adapter is switched off, so nothing would be learned from the data: call "
        "bayes.network.enable_adapter_layers(), or leave its disable_adapter() before training"
    )


def _check_unread(adapters: list[Adapter], run: Callable[[], Tensor]) -> None:
    """For layers that run in evaluation mode and not in training: nothing may read their ``lora_A.weight`` itself.

    With a draw set that is detached from it, the weight gets a gradient only from what goes past the draw.
    """
    weights = [adapter.lora_A.weight for adapter in adapters]
    trained = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            outputs = run()
            asked = outputs.requires_grad
            gradients = torch.autograd.grad(outputs.float().sum(), weights, allow_unused=True) if asked else ()
    finally:
        for weight, before in zip(weights, trained, strict=True):
            weight.requires_grad_(before)
    read = [adapter for adapter, found in zip(adapters, gradients, strict=False) if found is not None]
    if read:
        raise InputError(
            f"the draw did not arrive in {_named(read)}: in training a fused kernel reads lora_A.weight itself; "
            f"{SWITCH_OFF}"
        )


def _named(adapters: list[Adapter]) -> str:
    names = [adapter.name for adapter in adapters]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _keeping_state(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Running statistics and random generators are afterwards what they were before."""
    buffers = [(module, dict(module._buffers)) for module in network.modules()]
    generators = random.getstate(), np.random.get_state()  # noqa: NPY002  (what transformers masks speech with)
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type if accelerators else None):
        try:
            for module, own in buffers:  # not in place: the step's graph may hold them
                module._buffers.update({n: b if b is None else b.clone() for n, b in own.items()})
            yield
        finally:
            for module, own in buffers:
                module._buffers.update(own)
            random.setstate(generators[0])
            np.random.set_state(generators[1])  # noqa: NPY002
