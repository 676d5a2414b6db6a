"""PEFT puts the LoRA layers in; here their ``lora_A`` learns to use a drawn weight.

No parameter is renamed or added, so the network's state dict stays PEFT's own.
"""

import dataclasses
import difflib
import logging
import re
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from bayeslora.adapters.groups import active_adapter, lora_layers
from bayeslora.adapters.modes import quiet_deprecations
from bayeslora.adapters.placement import check_resident
from bayeslora.adapters.provenance import new_modules
from bayeslora.adapters.quantized import is_quantized, keep_trainable
from bayeslora.adapters.sampled import SampledLinear
from bayeslora.adapters.untrusted import check_lora_options
from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError

logger = logging.getLogger(__name__)


def adapt(network: nn.Module, config: MonteCLoRAConfig) -> PeftModel:
    """Inject LoRA through PEFT (unless ``network`` is a PeftModel already) and make every ``lora_A`` samplable.

    Raises:
        InputError: for targets that match nothing, and for adapters that cannot be honoured.
    """
    if hasattr(network, "_orig_mod"):
        raise InputError(
            "torch.compile(network) hides the network's class and the names of its layers: "
            "pass the network itself, then call bayes.compile()"
        )
    check_resident(network)
    keep_trainable(network)
    if not isinstance(network, PeftModel):
        if carries_adapter(network):
            raise InputError(
                f"this {type(network).__name__} carries an adapter already, put into it in place: load the network "
                "anew, or, to go on with that adapter, pass its PeftModel (bayes.network of a BayesLoRA)"
            )
        check_targets(network, config)
        lora = lora_config(network, config)
        # patterns are written out when the adapter is saved, and PEFT knows the usual targets of a network
        given = {"alpha_pattern"} if lora.target_modules else {"alpha_pattern", "target_modules"}
        check_lora_options(_as_json(lora), except_for=given)
        check_heads(network, lora)
        try:
            with quiet_deprecations():
                network = get_peft_model(network, lora)
        except ValueError as error:
            raise InputError(f"PEFT cannot adapt {type(network).__name__}: {error}") from error
    else:
        lora = network.peft_config[active_adapter(network)]
        # EVA decides how A begins and how large it is, both of which are in the adapter by now
        given = {"init_lora_weights"} if lora.init_lora_weights == "eva" else set()
        check_lora_options(_as_json(lora), except_for={"alpha_pattern", *given})
    make_samplable(network)
    return network


def with_lora_fields(config: MonteCLoRAConfig, network: PeftModel) -> MonteCLoRAConfig:
    """The configuration with LoRA's fields as the network's adapter has them."""
    lora = network.peft_config[network.active_adapters[0]]
    shared = {f.name for f in dataclasses.fields(config)} & {f.name for f in dataclasses.fields(lora)}
    values = {name: getattr(lora, name) for name in shared - {"mode"}}
    return config.replace(**{n: tuple(sorted(v)) if isinstance(v, set) else v for n, v in values.items()})


def carries_adapter(network: nn.Module) -> bool:
    """Whether PEFT, transformers or a BayesLoRA has put an adapter into it."""
    return isinstance(network, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in network.modules())


def _as_json(lora: LoraConfig) -> dict[str, Any]:
    """A configuration as ``adapter_config.json`` holds it."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in lora.to_dict().items()}


def lora_config(network: nn.Module, config: MonteCLoRAConfig) -> LoraConfig:
    """The PEFT configuration, with the task type read off the network's class."""
    name = type(network).__name__
    task_types = {
        "ForSequenceClassification": TaskType.SEQ_CLS,
        "ForCausalLM": TaskType.CAUSAL_LM,
        "LMHeadModel": TaskType.CAUSAL_LM,
    }
    task_type = next((known for ending, known in task_types.items() if name.endswith(ending)), None)
    targets = config.target_modules
    options = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": list(targets) if isinstance(targets, tuple) else targets,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "modules_to_save": _saved_modules(network, config, task_type) or None,
        "layers_to_transform": list(config.layers_to_transform) if config.layers_to_transform else None,
        "rank_pattern": dict(config.rank_pattern),
        "task_type": task_type,
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in network.modules()),
        **config.lora_options,
    }
    try:
        return LoraConfig(**options)
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"peft.LoraConfig does not take an option: {error}") from error


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
            raise InputError(
                f"target module {target!r} matches no layer of {type(network).__name__}; {_suggest(target, modules)}"
            )
        for name in matched:
            if isinstance(modules[name], nn.Embedding):
                raise InputError(
                    f"target module {target!r} matches the embedding {name!r}: embeddings keep lora_A as a bare "
                    "parameter looked up by index, so a draw has no input to multiply; target linear layers"
                )


def _saved_modules(network: nn.Module, config: MonteCLoRAConfig, task_type: TaskType | None) -> list[str]:
    """Names of the modules to train whole: those asked for, a classifier's head, and whatever is new."""
    from_peft = ("classifier", "score") if task_type == TaskType.SEQ_CLS else ()  # it adds these itself
    asked, new = [*(config.modules_to_save or ()), *from_peft, *_head_of_tokens(network)], new_modules(network)
    backbone = [name for name in new if "." in name and "pooler" not in name]
    if backbone:
        logger.warning(
            "the checkpoint of this %s lacks %s: trained whole, and saved with the adapter",
            type(network).__name__,
            ", ".join(backbone),
        )
    # PEFT takes every module whose name ends like this, but would put LoRA into those it was not told of
    ending = [name for name, _ in network.named_modules() if any(name.endswith(saved) for saved in asked)]
    outermost = [name for name in ending if not any(name.startswith(f"{other}.") for other in [*ending, *new])]
    return [name for name in dict.fromkeys([*asked, *outermost, *new]) if name not in from_peft]


def _head_of_tokens(network: nn.Module) -> list[str]:
    """A classifier of tokens has no task type here: PEFT's own puts LoRA into its head before it trains that whole."""
    of_tokens = type(network).__name__.endswith("ForTokenClassification")
    return [name for name, _ in network.named_children() if of_tokens and name in ("classifier", "score")]


def check_heads(network: nn.Module, lora: LoraConfig) -> None:
    """Refuse quantised layers that would have to be trained whole: the head, and ``modules_to_save``."""
    saved = (*(lora.modules_to_save or ()), *(("classifier", "score") if lora.task_type == TaskType.SEQ_CLS else ()))
    for name, module in network.named_modules():
        if name.endswith(saved) and is_quantized(module):
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
    found: dict[int, str] = {}  # a weight, and the first layer that has it
    for name, layer in lora_layers(network):
        variant = getattr(layer, "lora_variant", {}).get(key)
        if variant is not None:
            raise InputError(f"layer {name!r} uses {type(variant).__name__}, which bypasses lora_A: not supported")
        if key in layer.lora_embedding_A:
            raise InputError(
                f"layer {name!r} is an embedding: its lora_A has no input to multiply; target linear layers"
            )
        if key not in layer.lora_A:
            continue
        if isinstance(layer, ParamWrapper):
            raise InputError(
                f"layer {name!r} ({type(layer.get_base_layer()).__name__}) is adapted at its bare "
                "parameters, as PEFT does with mixtures of experts, where no draw reaches it: name linear "
                "layers in target_modules, those of the attention for instance"
            )
        lora_a = layer.lora_A[key]
        if found.setdefault(id(lora_a.weight), name) != name:
            raise InputError(
                f"layers {found[id(lora_a.weight)]!r} and {name!r} share one lora_A, which would have two draws at "
                "once: adapt one of them, or give each its own"
            )
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
