"""Weights that are packed, and how to read them."""

from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import Tensor, nn

from bayeslora.errors import InputError


def frozen_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer, or of the one under a LoRA layer; dequantised where it is packed, and all of one
    that lies in shards.

    Raises:
        InputError: for a quantisation that cannot be read back.
    """
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    weight = getattr(base, "weight", None)
    if weight is None:
        raise InputError(
            f"cannot read the weight of a {type(base).__name__}: of quantised networks, those of "
            "bitsandbytes and torchao are supported"
        )
    if get_bnb_param_type(weight):  # peft's dequantize_module_weight loses the scales of an eight-bit weight on a CPU
        return dequantize_bnb_weight(weight, state=getattr(base, "state", None))
    if is_quantized(base):
        return weight.detach().dequantize()
    return whole(weight.detach())


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that lies in shards: every process calls it then."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def keep_trainable(network: nn.Module) -> None:
    """Switch off what makes a bitsandbytes layer untrainable once it has run in eval mode on a CPU with AVX512-BF16.

    There it repacks its four-bit weight for a kernel that has no gradient, and stays so.
    """
    for name, module in network.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise InputError(
                    f"bitsandbytes has repacked {name!r} for prediction only, when the network ran in "
                    "eval mode: pass a freshly loaded network"
                )
            module.support_avx512bf16_for_cpu = False


def is_quantized(module: nn.Module) -> bool:
    """Whether any weight is packed, rather than a plain tensor of floats."""
    return any(map(is_packed, module.parameters()))


def is_packed(parameter: Tensor) -> bool:
    """Whether a parameter is not a plain tensor of floats."""
    return not parameter.is_floating_point() or type(parameter).__module__.startswith(("bitsandbytes.", "torchao."))
