"""Which network an adapter was fitted to, and whether another is the same."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from bayeslora.adapters.groups import adapter_state, find_groups
from bayeslora.adapters.provenance import Sketch, base_tensors, first_difference, not_in_checkpoint, sketch
from bayeslora.adapters.quantized import frozen_weight, is_quantized
from bayeslora.adapters.untrusted import PREFIX, linear_sizes
from bayeslora.errors import InputError
from bayeslora.storage.manifest import MANIFEST, PROBES


def check_taken_from_base(folder: Path, manifest: dict[str, Any], network: PeftModel) -> None:
    """Refuse a base network that differs in anything the adapter does not bring along.

    Where one of the two is quantised, only what both have in full precision is compared.
    """
    brought = {*adapter_state(network), *manifest["kept"]}
    if "sketches" not in manifest["base"]:
        return _check_nothing_lost(folder, brought, network)
    expected = {name: Sketch.from_list(value) for name, value in manifest["base"]["sketches"].items()}
    tensors = [t for t in base_tensors(network) if PREFIX + t.key not in brought]
    loose = {t.name for t in tensors if t.is_buffer}
    if manifest["base"].get("quantized", False) or is_quantized(network):
        loose |= expected.keys() ^ {t.name for t in tensors}
    different = first_difference(expected, {t.name: sketch(t.tensor) for t in tensors}, loose)
    if different:
        raise InputError(
            f"{folder} is for another base model: {different!r:.200} is not the one it was fitted on "
            f"({manifest['base']['name']!r:.200}); load that checkpoint, and change it as it was changed before fitting"
        )


def _check_nothing_lost(folder: Path, brought: Collection[str], network: PeftModel) -> None:
    """An adapter of an earlier version may lack what the checkpoint of its base lacks too."""
    missing = not_in_checkpoint(network)
    lost = [t.name for t in base_tensors(network) if t.name in missing and PREFIX + t.key not in brought]
    if lost:
        raise InputError(
            f"{folder} was written by an earlier version, which did not keep {lost[0]!r}; the checkpoint "
            "does not hold it either, so the network cannot be had again: fit it anew"
        )


def check_base(folder: Path, manifest: dict[str, Any], network: nn.Module) -> None:
    """Refuse a base network other than the one the adapter was fitted to."""
    modules = dict(network.named_modules())
    for name, (_, columns) in manifest["adapters"].items():
        sizes = linear_sizes(modules.get(name))
        if sizes is None:
            raise InputError(f"{folder} is for another base model: {type(network).__name__} has no layer {name!r:.200}")
        if sizes[0] != columns:
            raise InputError(f"{folder} is for another base model: layer {name!r} has {sizes[0]} inputs, not {columns}")
    rounded = manifest["base"].get("quantized", False) != is_quantized(network)  # on one of the two sides
    for name, expected in manifest["base"]["weights"].items():
        if name not in manifest["adapters"]:
            raise InputError(f"{folder / MANIFEST} is damaged (its 'base'): use another copy of the folder")
        found = _probe(frozen_weight(modules[name]))
        scale = np.sqrt(np.mean(np.square(expected))) or 1.0
        distance = np.abs(found - np.array(expected)) / scale
        # four bits are some 0.2 away from the original (root mean square), another checkpoint is 1.4 away
        if np.sqrt(np.mean(distance**2)) > 0.5 if rounded else np.max(distance) > 0.02:
            raise InputError(
                f"{folder} is for another base model: the frozen weight of {name!r} differs from the one it was "
                f"fitted to ({manifest['base']['name']!r:.200}); load that checkpoint"
            )


def fingerprint(network: PeftModel) -> dict[str, Any]:
    """Name of the base model and a few entries of three adapted weights: enough to tell checkpoints apart."""
    adapters = [adapter for group in find_groups(network) for adapter in group.adapters]
    chosen = {a.name: a for a in (adapters[0], adapters[len(adapters) // 2], adapters[-1])}
    return {
        "class": type(network.get_base_model()).__name__,
        "name": str(getattr(network.config, "name_or_path", "") or "unnamed"),
        "quantized": is_quantized(network),
        "weights": {n: _probe(frozen_weight(a.layer)).tolist() for n, a in chosen.items()},
    }


def _probe(weight: Tensor) -> np.ndarray:
    """:data:`PROBES` evenly spaced entries of a weight, as float64."""
    flat = weight.detach().flatten()
    index = torch.linspace(0, flat.numel() - 1, PROBES, dtype=torch.float64, device=flat.device).long()
    return flat[index].double().cpu().numpy()
