"""PEFT's two files: an adapter folder opens in plain PEFT with them, and a plain PEFT adapter opens here."""

import copy
import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayeslora.adapters.groups import active_adapter, adapter_state, find_groups
from bayeslora.adapters.modes import quiet_deprecations
from bayeslora.adapters.provenance import base_tensors, mark_changed
from bayeslora.adapters.untrusted import PREFIX, adapter_ranks, load_state, read_header, read_lora_config
from bayeslora.errors import InputError
from bayeslora.storage.manifest import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from bayeslora.storage.run_folder import adapter_in


def write_peft_files(
    network: PeftModel, kept_keys: Collection[str], folder: Path, *, lora_A: Mapping[str, Tensor] | None = None
) -> None:
    """What PEFT's own ``save_pretrained`` writes, but for the model card, which takes longer than all the rest; with
    the tensors beside that the base network's checkpoint does not hold.

    Args:
        network: The network with its adapter.
        kept_keys: Keys of the base network's tensors that its checkpoint does not hold.
        folder: Where to.
        lora_A: Name of each adapted layer to its A, ``(r, n_in)``, in place of the mean.
    """
    tensors = adapter_state(network)
    for name, matrix in (lora_A or {}).items():
        entry = f"{PREFIX}{name}.lora_A.weight"
        tensors[entry] = matrix.to(tensors[entry].dtype)
    tensors |= kept_tensors(network, kept_keys)
    separate = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(separate, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    base, lora = network.get_base_model(), copy.copy(network.peft_config[active_adapter(network)])
    lora.inference_mode = True
    if lora.init_lora_weights == "eva":  # how A began no longer matters, and only PEFT's own options can be opened
        lora.init_lora_weights = True
    lora.alpha_pattern = _exact_alphas(network, lora)
    if lora.base_model_name_or_path is None:
        lora.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    origin = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    lora.save_pretrained(str(folder), auto_mapping_dict=origin if lora.task_type is None else None)


def _exact_alphas(network: PeftModel, lora: LoraConfig) -> dict[str, float]:
    """α of each layer where patterns give it another: no pattern from a file is ever run."""
    if not lora.alpha_pattern:
        return {}
    adapters = [adapter for group in find_groups(network) for adapter in group.adapters]
    alphas = {adapter.name: adapter.layer.lora_alpha[adapter.key] for adapter in adapters}
    return {f"^{name.replace('.', chr(92) + '.')}": alpha for name, alpha in alphas.items() if alpha != lora.lora_alpha}


def kept_tensors(network: PeftModel, kept_keys: Collection[str]) -> dict[str, Tensor]:
    """What is saved beside PEFT's own tensors, by PEFT's kind of name: what the base network's checkpoint does not
    hold, and whatever else is trained."""
    peft = adapter_state(network).keys()
    kept = {}
    for entry in base_tensors(network):
        name = PREFIX + entry.key
        if name not in peft and (entry.key in kept_keys or entry.tensor.requires_grad):
            kept[name] = entry.tensor
    return kept


def open_peft_adapter(folder: Path, network: nn.Module) -> PeftModel:
    """Put the LoRA adapter in ``folder``, ours or plain PEFT's, on ``network``, ready to be trained further.

    Raises:
        InputError: if there is no adapter, or it does not fit the network.
    """
    folder = adapter_in(folder)
    config_file, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    if not config_file.is_file():
        raise InputError(f"no adapter in {folder}: it holds no {ADAPTER_CONFIG}")
    lora = read_lora_config(config_file)
    ranks = adapter_ranks(network, lora, read_header(weights), f"{folder} does not fit this network")
    exact = _exactly(lora, ranks)
    exact.fan_in_fan_out = any(isinstance(module, Conv1D) for module in network.modules())
    try:
        with quiet_deprecations():
            peft_network = get_peft_model(network, exact)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise InputError(f"{config_file} does not fit {type(network).__name__}: {error}") from error
    load_adapter_weights(peft_network, folder)
    for name in _PATTERN_FIELDS:
        setattr(exact, name, getattr(lora, name))
    return peft_network


_PATTERN_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern")


def _exactly(lora: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """The configuration with these layers and ranks in place of its patterns."""

    def any_of(names: Iterable[str]) -> str:
        return f"({'|'.join(map(re.escape, names))})"

    by_rank: dict[int, list[str]] = {}
    for name, rank in ranks.items():
        by_rank.setdefault(rank, []).append(name)
    exact: dict[str, Any] = dict.fromkeys(_PATTERN_FIELDS)
    exact["target_modules"] = any_of(ranks)
    exact["rank_pattern"] = {f"^{any_of(names)}": rank for rank, names in by_rank.items() if rank != lora.r}
    return dataclasses.replace(lora, **exact)


def load_adapter_weights(network: PeftModel, folder: Path) -> None:
    """Read what the file holds: PEFT's tensors, and beside them tensors of the base network that came with it."""
    expected = dict(adapter_state(network))
    base = {PREFIX + entry.key: entry.tensor for entry in base_tensors(network)}
    beside = [name for name in read_header(folder / ADAPTER_WEIGHTS) if name not in expected and name in base]
    expected |= {name: base[name] for name in beside}
    tensors = load_state(folder / ADAPTER_WEIGHTS, expected, f"{folder} does not fit this network")
    with torch.no_grad():
        for name in beside:
            base[name].copy_(tensors.pop(name))
            mark_changed(base[name])
    set_peft_model_state_dict(network, tensors)
