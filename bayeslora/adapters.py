"""PEFT puts the LoRA layers in; here their ``lora_A`` learns to use a drawn weight, and equal shapes form a group.

No parameter is renamed or added, so the network's state dict stays PEFT's own.
"""

import difflib
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError

one_at_a_time = threading.RLock()  # the draw in a network and Pyro's stack of handlers are shared by all threads


class Draw:
    """Holds the weight drawn for one layer; empty in every copy, so a network can be deep-copied at any time."""

    __slots__ = ("weight",)

    def __init__(self) -> None:
        self.weight: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> "Draw":
        return Draw()

    def __reduce__(self):
        return Draw, ()


class SampledLinear(nn.Linear):
    """``lora_A``: uses the drawn weight (r × n_in) while one is set, and its own weight, the mean μ, otherwise."""

    draw: Draw

    @classmethod
    def wrap(cls, linear: nn.Linear) -> "SampledLinear":
        """A sampled layer that shares ``linear``'s parameter."""
        new = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        new.weight = linear.weight
        new.draw = Draw()
        return new.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        drawn = self.draw.weight
        return nn.functional.linear(input, self.weight if drawn is None else drawn)


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
    """All adapters with one (r, n_in): one plate in the model, three sites for all of them together."""

    rank: int
    columns: int
    adapters: tuple[Adapter, ...]

    @property
    def name(self) -> str:
        return f"r{self.rank}_in{self.columns}"

    def __len__(self) -> int:
        return len(self.adapters)

    def mean(self) -> Tensor:
        """μ of every adapter in float32 (or wider), one column a row: shape ``(adapters, columns, r)``."""
        stacked = torch.stack([adapter.lora_A.weight for adapter in self.adapters])
        return stacked.to(torch.promote_types(stacked.dtype, torch.float32)).mT


def adapt(network: nn.Module, config: MonteCLoRAConfig) -> PeftModel:
    """Inject LoRA through PEFT (unless ``network`` is a PeftModel already) and make every ``lora_A`` samplable.

    Raises:
        InputError: for targets that match nothing, and for adapters that cannot be honoured.
    """
    if hasattr(network, "_orig_mod"):
        raise InputError("torch.compile(network) hides the network's class and the names of its layers: "
                         "pass the network itself, then call bayes.compile()")  # fmt: skip
    keep_trainable(network)
    if not isinstance(network, PeftModel):
        check_targets(network, config)
        check_heads(network, config)
        try:
            network = get_peft_model(network, lora_config(network, config))
        except ValueError as error:
            raise InputError(f"PEFT cannot adapt {type(network).__name__}: {error}") from error
    make_samplable(network)
    return network


def lora_config(network: nn.Module, config: MonteCLoRAConfig) -> LoraConfig:
    """The PEFT configuration, with the task type read off the network's class."""
    name = type(network).__name__
    task_type = TaskType.SEQ_CLS if name.endswith("ForSequenceClassification") else None
    targets = config.target_modules
    options = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": list(targets) if isinstance(targets, tuple) else targets,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "modules_to_save": list(config.modules_to_save) if config.modules_to_save else None,
        "layers_to_transform": list(config.layers_to_transform) if config.layers_to_transform else None,
        "rank_pattern": dict(config.rank_pattern),
        "task_type": task_type,
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in network.modules()),
        **config.lora_options,
    }
    try:
        return LoraConfig(**options)
    except TypeError as error:
        raise InputError(f"peft.LoraConfig does not take this option: {error}") from error


def check_targets(network: nn.Module, config: MonteCLoRAConfig) -> None:
    """Refuse target names that match no layer, and layers that have no linear ``lora_A``."""
    targets = config.target_modules
    if targets is None or targets == "all-linear":
        return
    modules = dict(network.named_modules())
    patterns = [targets] if isinstance(targets, str) else list(targets)
    for target in patterns:
        matched = [name for name in modules if _matches(name, target, is_pattern=isinstance(targets, str))]
        if not matched:
            raise InputError(f"target module {target!r} matches no layer of {type(network).__name__}; "
                             f"{_suggest(target, modules)}")  # fmt: skip
        for name in matched:
            if isinstance(modules[name], nn.Embedding):
                raise InputError(
                    f"target module {target!r} matches the embedding {name!r}: embeddings keep lora_A as a bare "
                    "parameter looked up by index, so a draw has no input to multiply; target linear layers"
                )


def check_heads(network: nn.Module, config: MonteCLoRAConfig) -> None:
    """Refuse quantised layers that would have to be trained whole: the head, and ``modules_to_save``."""
    heads = {"classifier", "score", *(config.modules_to_save or ())}
    for name, module in network.named_modules():
        if name.rsplit(".", 1)[-1] in heads and is_quantized(module):
            raise InputError(
                f"{name!r} is quantised and cannot be trained: load the network without quantising it, for instance "
                f"with BitsAndBytesConfig(..., llm_int8_skip_modules=[{name!r}])"
            )


def _matches(name: str, target: str, *, is_pattern: bool) -> bool:
    if is_pattern:
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith("." + target)


def _suggest(target: str, modules: Mapping[str, nn.Module]) -> str:
    linear = {name.rsplit(".", 1)[-1] for name, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
    close = difflib.get_close_matches(target, sorted(linear), n=3, cutoff=0.4)
    if close:
        return "closest names: " + ", ".join(close)
    return "its linear layers: " + ", ".join(sorted(linear))


def make_samplable(network: PeftModel) -> None:
    """Wrap ``lora_A`` of every layer of the active adapter; wrapping twice changes nothing.

    Raises:
        InputError: with the reason, where a layer does not multiply its input by a plain ``lora_A``.
    """
    key = active_adapter(network)
    found = False
    for name, layer in _lora_layers(network):
        variant = getattr(layer, "lora_variant", {}).get(key)
        if variant is not None:
            raise InputError(f"layer {name!r} uses {type(variant).__name__}, which bypasses lora_A: not supported")
        if key in layer.lora_embedding_A:
            raise InputError(f"layer {name!r} is an embedding: its lora_A has no input to multiply; "
                             "target linear layers")  # fmt: skip
        if key not in layer.lora_A:
            continue
        lora_a = layer.lora_A[key]
        found = True
        if isinstance(lora_a, SampledLinear):
            continue
        if type(lora_a) is not nn.Linear or lora_a.bias is not None:
            raise InputError(
                f"layer {name!r}: lora_A is a {type(lora_a).__name__}, and only linear layers (nn.Linear, "
                "Conv1D) can be sampled; leave convolutions and parallel layers out of target_modules"
            )
        layer.lora_A[key] = SampledLinear.wrap(lora_a)
    if not found:
        raise InputError(f"the network has no LoRA layer for its active adapter {key!r}: nothing to sample")


def active_adapter(network: PeftModel) -> str:
    """The one active adapter's name; several at once cannot be sampled."""
    active = network.active_adapters
    if len(active) != 1:
        raise InputError(f"exactly one active adapter can be sampled, found {active}; call set_adapter(name)")
    return active[0]


def check_in_use(groups: tuple[AdapterGroup, ...]) -> None:
    """Make sure that the network uses these adapters, where a draw reaches it.

    Raises:
        InputError: when another adapter is active, or one is merged into the frozen weights.
    """
    for group in groups:
        for adapter in group.adapters:
            if adapter.layer.active_adapters != [adapter.key]:
                raise InputError(
                    f"the network now uses the adapter {', '.join(adapter.layer.active_adapters)}, and this posterior "
                    f"is over {adapter.key!r}: call bayes.network.set_adapter({adapter.key!r})"
                )
            if adapter.layer.merged:
                raise InputError(
                    "the adapter is merged into the frozen weights, where no draw can reach it: call "
                    "bayes.network.unmerge_adapter()"
                )


def frozen_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer, or of the one under a LoRA layer; dequantised where it is packed.

    Raises:
        InputError: for a quantisation that cannot be read back.
    """
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    weight = getattr(base, "weight", None)
    if weight is None:
        raise InputError(f"cannot read the weight of a {type(base).__name__}: of quantised networks, those of "
                         "bitsandbytes and torchao are supported")  # fmt: skip
    if get_bnb_param_type(weight):
        return dequantize_bnb_weight(weight, state=getattr(base, "state", None))
    if is_quantized(base):
        return weight.detach().dequantize()
    return weight.detach()


def keep_trainable(network: nn.Module) -> None:
    """Switch off what makes a bitsandbytes layer untrainable once it has run in eval mode on a CPU with AVX512-BF16.

    There it repacks its four-bit weight for a kernel that has no gradient, and stays so.
    """
    for name, module in network.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise InputError(f"bitsandbytes has repacked {name!r} for prediction only, when the network ran in "
                                 "eval mode: pass a freshly loaded network")  # fmt: skip
            module.support_avx512bf16_for_cpu = False


def is_quantized(module: nn.Module) -> bool:
    """Whether any weight is packed, rather than a plain tensor of floats."""
    return any(
        not parameter.is_floating_point() or type(parameter).__module__.startswith(("bitsandbytes.", "torchao."))
        for parameter in module.parameters()
    )


def _lora_layers(network: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in network.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def find_groups(network: PeftModel) -> tuple[AdapterGroup, ...]:
    """The samplable adapters by shape, in network order."""
    key = active_adapter(network)
    shapes: dict[tuple[int, int], list[Adapter]] = {}
    for name, layer in _lora_layers(network):
        if key in layer.lora_A:
            adapter = Adapter(name, layer, layer.lora_A[key], key)
            shapes.setdefault((adapter.rank, adapter.columns), []).append(adapter)
    return tuple(AdapterGroup(*shape, tuple(adapters)) for shape, adapters in shapes.items())


def set_draw(groups: tuple[AdapterGroup, ...], weights: Mapping[str, Tensor]) -> None:
    """Give every adapter its drawn weight.

    Args:
        weights: Group name to drawn A, one column a row, shape ``(adapters, columns, r)``.
    """
    check_in_use(groups)
    for group in groups:
        drawn = weights[group.name].mT.to(group.adapters[0].lora_A.weight.dtype)
        for adapter, weight in zip(group.adapters, drawn.unbind(), strict=True):
            adapter.lora_A.draw.weight = weight


def clear_draw(groups: tuple[AdapterGroup, ...]) -> None:
    """Back to the means."""
    for group in groups:
        for adapter in group.adapters:
            adapter.lora_A.draw.weight = None


@contextmanager
def using_draw(groups: tuple[AdapterGroup, ...], weights: Mapping[str, Tensor], *, keep: bool = False):
    """Run the network as one draw; ``keep`` leaves it set, for checkpointed layers that recompute in backward."""
    set_draw(groups, weights)
    try:
        yield
    finally:
        if not keep:
            clear_draw(groups)
