"""The folder on disk: PEFT's two files, the posterior's tensors, and one JSON that ties them together.

``adapter_config.json`` and ``adapter_model.safetensors`` open in plain ``peft.PeftModel.from_pretrained`` as the
posterior mean. ``posterior.safetensors`` holds the guide (and the likelihood's parameters); ``bayeslora.json`` the
configuration, versions, a fingerprint of the base network and the other files' SHA-256. Nothing is pickled.
"""

import copy
import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayeslora._version import __version__
from bayeslora.adapters.drawing import check_in_use
from bayeslora.adapters.groups import active_adapter, find_groups
from bayeslora.adapters.inject import carries_adapter
from bayeslora.adapters.provenance import (
    Sketch,
    base_tensors,
    first_difference,
    mark_changed,
    not_in_checkpoint,
    sketch,
)
from bayeslora.adapters.quantized import frozen_weight, is_quantized
from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError
from bayeslora.models.likelihoods import as_likelihood
from bayeslora.models.selection import described_likelihood
from bayeslora.posterior import Posterior
from bayeslora.untrusted import (
    PREFIX,
    adapter_ranks,
    is_integer,
    is_names,
    is_number,
    is_object_of,
    linear_sizes,
    load_state,
    read_header,
    read_json,
    read_lora_config,
)

Module = TypeVar("Module", bound=Posterior)

MANIFEST = "bayeslora.json"
POSTERIOR = "posterior.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, POSTERIOR)
FORMAT = 1
PROBES = 16


def version_info() -> dict[str, str]:
    """Installed versions of bayeslora and of what its numbers depend on."""
    versions = {"bayeslora": __version__}
    for package in ("torch", "pyro-ppl", "peft", "transformers", "arviz"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def save_pretrained(bayes: Posterior, folder: str | Path) -> None:
    """Write the adapter and its posterior; the folder appears complete or not at all.

    An existing adapter folder is replaced; anything else in the way is refused.

    Raises:
        InputError: if ``folder`` exists and holds something other than an adapter.
    """
    folder = Path(folder)
    if folder.exists() and not is_adapter_folder(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and holds something other than an adapter; choose another folder")
    foreign = sorted({p.name for p in folder.iterdir()} - {MANIFEST, *FILES}) if folder.is_dir() else []
    if foreign:
        raise InputError(f"{folder} also holds {foreign[0]!r}, which saving would delete; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        write_adapter(bayes, new)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise


def write_adapter(bayes: Posterior, folder: Path) -> None:
    """Write the four files into ``folder``; the manifest comes last, and names the others' hashes."""
    check_in_use(bayes.model.groups)
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder) as scratch:
        written = Path(scratch)
        write_peft_files(bayes, written)
        state = {f"guide.{name}": value for name, value in bayes.guide.state_dict().items()}
        state |= {f"model.{name}": value for name, value in bayes.model.state_dict().items()}
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, written / POSTERIOR)
        (written / MANIFEST).write_text(json.dumps(_manifest(bayes, written), indent=2) + "\n", encoding="utf-8")
        for name in (*FILES, MANIFEST):
            _sync(written / name)
            os.replace(written / name, folder / name)


def write_peft_files(bayes: Posterior, folder: Path, *, lora_A: Mapping[str, Tensor] | None = None) -> None:
    """What PEFT's own ``save_pretrained`` writes, but for the model card, which takes longer than all the rest; with
    the tensors beside that the base network's checkpoint does not hold.

    Args:
        bayes: Whose network it is.
        folder: Where to.
        lora_A: Name of each adapted layer to its A, ``(r, n_in)``, in place of the mean.
    """
    network = bayes.network
    tensors = _adapter_state(network)
    for name, matrix in (lora_A or {}).items():
        entry = f"{PREFIX}{name}.lora_A.weight"
        tensors[entry] = matrix.to(tensors[entry].dtype)
    tensors |= kept_tensors(bayes)
    separate = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(separate, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    base, lora = network.get_base_model(), copy.copy(network.peft_config[active_adapter(network)])
    lora.inference_mode = True
    if lora.init_lora_weights == "eva":  # how A began no longer matters, and only PEFT's own words can be opened
        lora.init_lora_weights = True
    lora.alpha_pattern = _exact_alphas(bayes, lora)
    if lora.base_model_name_or_path is None:
        lora.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    origin = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    lora.save_pretrained(str(folder), auto_mapping_dict=origin if lora.task_type is None else None)


def _exact_alphas(bayes: Posterior, lora: LoraConfig) -> dict[str, float]:
    """α of each layer where patterns give it another: no pattern from a file is ever run."""
    if not lora.alpha_pattern:
        return {}
    adapters = [adapter for group in bayes.model.groups for adapter in group.adapters]
    alphas = {adapter.name: adapter.layer.lora_alpha[adapter.key] for adapter in adapters}
    return {f"^{name.replace('.', chr(92) + '.')}": alpha for name, alpha in alphas.items() if alpha != lora.lora_alpha}


def _adapter_state(network: PeftModel) -> dict[str, Tensor]:
    """The tensors that PEFT saves for the active adapter."""
    return get_peft_model_state_dict(network, adapter_name=active_adapter(network), save_embedding_layers=False)


def kept_tensors(bayes: Posterior) -> dict[str, Tensor]:
    """What is saved beside PEFT's own tensors, by PEFT's kind of name: what the base network's checkpoint does not
    hold, and whatever else is trained."""
    peft = _adapter_state(bayes.network).keys()
    found = {}
    for entry in base_tensors(bayes.network):
        name = PREFIX + entry.key
        if name not in peft and (entry.key in bayes.kept_keys or entry.tensor.requires_grad):
            found[name] = entry.tensor
    return found


def _manifest(bayes: Posterior, folder: Path) -> dict[str, Any]:
    kept = sorted(kept_tensors(bayes))
    manifest = {
        "format": FORMAT,
        "config": bayes.monteclora_config.to_dict(),
        "guide": type(bayes.guide).__name__,
        "num_examples": bayes.num_examples,
        "versions": version_info(),
        "base": fingerprint(bayes.network) | {"sketches": _sketches(bayes, kept)},
        "kept": kept,
        "adapters": _adapter_shapes(bayes),
        "sha256": {name: _sha256(folder / name) for name in FILES},
    }
    described = as_likelihood(bayes.model.likelihood).describe()
    if described is not None:
        manifest["likelihood"] = described
    return manifest | {"digest": _digest(manifest)}


def _sketches(bayes: Posterior, kept: Collection[str]) -> dict[str, list]:
    """What tells each tensor that is taken from the base network from another; each is made once, as none changes."""
    brought = {*_adapter_state(bayes.network), *kept}
    taken = [entry for entry in base_tensors(bayes.network) if PREFIX + entry.key not in brought]
    for entry in taken:
        if entry.name not in bayes.sketches:
            bayes.sketches[entry.name] = sketch(entry.tensor)
    return {entry.name: bayes.sketches[entry.name].to_list() for entry in taken}


def _adapter_shapes(bayes: Posterior) -> dict[str, list[int]]:
    return {a.name: [a.rank, a.columns] for g in bayes.model.groups for a in g.adapters}


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest's other entries: a damaged ε would load without complaint otherwise."""
    entries = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def is_adapter_folder(folder: Path) -> bool:
    """Whether ``folder`` holds what :func:`save_pretrained` writes."""
    return (folder / MANIFEST).is_file()


def from_pretrained(
    cls: type[Module], folder: str | Path, network: nn.Module, *, guide: Any = None, likelihood: Any = None
) -> Module:
    """Open an adapter folder on a freshly loaded base network.

    Args:
        cls: What to make: the class of the posterior.
        folder: What :func:`save_pretrained` wrote.
        network: The same base model the adapter was fitted to, without an adapter.
        guide, likelihood: The guide's class and the likelihood used when fitting, where they were not the configured
            ones; next-token and choice likelihoods are stored with the adapter.

    Raises:
        InputError: for a folder that is missing, incomplete or damaged, or that belongs to another network.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if carries_adapter(network):
        raise InputError("pass the plain base network, freshly loaded: this one carries an adapter already")
    config = MonteCLoRAConfig.from_dict(manifest["config"])
    read_header(folder / POSTERIOR)
    _check_base(folder, manifest, network)
    peft_network = open_peft_adapter(folder, network)
    _check_taken_from_base(folder, manifest, peft_network)
    if likelihood is None and "likelihood" in manifest:
        likelihood = described_likelihood(manifest["likelihood"])
    bayes = cls(peft_network, config, guide=guide, likelihood=likelihood)
    if guide is None and type(bayes.guide).__name__ != manifest["guide"]:
        raise InputError(f"{folder} was fitted with the guide {manifest['guide']:.100}; pass its class as guide=")
    if _adapter_shapes(bayes) != manifest["adapters"]:
        raise InputError(f"{folder / MANIFEST} lists other adapters than {ADAPTER_WEIGHTS} holds: use another copy")
    bayes.num_examples = manifest["num_examples"]
    load_posterior(bayes, folder)
    return bayes.eval()


def load_adapter(bayes: Posterior, folder: Path) -> None:
    """Read μ, B, the head and the posterior of ``folder`` into an existing module of the same shape."""
    manifest = read_manifest(folder)
    _check_base(folder, manifest, bayes.network.get_base_model())
    _load_adapter_weights(bayes.network, folder)
    _check_taken_from_base(folder, manifest, bayes.network)
    load_posterior(bayes, folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after checking that every file it names is there and whole."""
    if not folder.is_dir():
        raise InputError(f"no adapter folder at {folder}: give the folder that save_pretrained wrote")
    if not is_adapter_folder(folder):
        if (folder / ADAPTER_CONFIG).is_file():
            raise InputError(
                f"{folder} is a plain PEFT adapter without a posterior: open it with peft.PeftModel.from_pretrained "
                "and pass the result to BayesLoRA to put one on it"
            )
        raise InputError(f"{folder} holds no {MANIFEST}: it is not a folder that save_pretrained wrote")
    manifest = read_json(folder / MANIFEST)
    known = manifest.get("format")
    if is_integer(known) and known != FORMAT:
        raise InputError(f"{folder} has format {known}, this bayeslora reads {FORMAT}: use a matching version")
    for name, fits in _MANIFEST_ENTRIES.items():
        if not fits(manifest.get(name, [] if name == "kept" else None)) or name not in {*manifest, "kept"}:
            raise InputError(f"{folder / MANIFEST} is damaged (its {name!r}): use another copy of the folder")
    if manifest["digest"] != _digest(manifest):
        raise InputError(f"{folder / MANIFEST} is damaged or was edited: use another copy of the folder")
    manifest.setdefault("kept", [])  # earlier adapters have no such entry
    for name in FILES:
        if not (folder / name).is_file():
            raise InputError(f"{folder} is incomplete: {name} is missing or not a regular file")
        try:
            whole = _sha256(folder / name) == manifest["sha256"].get(name)
        except OSError as error:
            raise InputError(f"{folder / name} cannot be read: {error}") from error
        if not whole:
            raise InputError(f"{folder / name} is truncated or was changed since it was saved: use another copy")
    return manifest


def _is_base(value: Any) -> bool:
    """A record of the base network as :func:`fingerprint` makes it."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and is_object_of(
            value.get("weights"), lambda w: isinstance(w, list) and len(w) == PROBES and all(map(is_number, w))
        )
        and is_object_of(value.get("sketches", {}), Sketch.is_list)
    )


# What each entry of the manifest must be, apart from the configuration's own fields.
_MANIFEST_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "format": is_integer,
    "digest": lambda v: isinstance(v, str),
    "config": lambda v: isinstance(v, dict),
    "guide": lambda v: isinstance(v, str),
    "num_examples": lambda v: v is None or is_integer(v, 1),
    "adapters": lambda v: is_object_of(v, lambda a: isinstance(a, list) and len(a) == 2 and all(map(is_integer, a))),
    "base": _is_base,
    "kept": is_names,
    "sha256": lambda v: is_object_of(v, lambda digest: isinstance(digest, str)),
}


def load_posterior(bayes: Posterior, folder: Path) -> None:
    """Read the guide's and the likelihood's parameters."""
    modules: dict[str, nn.Module] = {"guide.": bayes.guide, "model.": bayes.model}
    expected = {prefix + name: v for prefix, module in modules.items() for name, v in module.state_dict().items()}
    path = folder / POSTERIOR
    state = load_state(path, expected, f"{path} does not fit this network: it belongs to another model or guide")
    for prefix, module in modules.items():
        module.load_state_dict({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
    _check_posterior(bayes, path)


def _check_posterior(bayes: Posterior, path: Path) -> None:
    """Finite numbers in the file can still stand for a v, α or σ that no float holds."""
    with torch.no_grad():
        values = bayes.sample(1, seed=0) | dict(bayes.model.named_pyro_params())
    for name, value in values.items():
        if not torch.isfinite(value).all():
            raise InputError(f"{path}: {name} is out of the range of {value.dtype}: use another copy")


def open_peft_adapter(folder: Path, network: nn.Module) -> PeftModel:
    """Put the LoRA adapter in ``folder``, ours or plain PEFT's, on ``network``, ready to be trained further.

    Raises:
        InputError: if there is no adapter, or it does not fit the network.
    """
    config_file, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    if not config_file.is_file():
        raise InputError(f"no adapter in {folder}: it holds no {ADAPTER_CONFIG}")
    lora = read_lora_config(config_file)
    ranks = adapter_ranks(network, lora, read_header(weights), f"{folder} does not fit this network")
    exact = _exactly(lora, ranks)
    exact.fan_in_fan_out = any(isinstance(module, Conv1D) for module in network.modules())
    try:
        peft_network = get_peft_model(network, exact)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise InputError(f"{config_file} does not fit {type(network).__name__}: {error}") from error
    _load_adapter_weights(peft_network, folder)
    for word in _PATTERNS:
        setattr(exact, word, getattr(lora, word))
    return peft_network


_PATTERNS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern")


def _exactly(lora: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """The configuration with these layers and ranks in place of its patterns."""

    def any_of(names: Iterable[str]) -> str:
        return f"({'|'.join(map(re.escape, names))})"

    by_rank: dict[int, list[str]] = {}
    for name, rank in ranks.items():
        by_rank.setdefault(rank, []).append(name)
    exact: dict[str, Any] = dict.fromkeys(_PATTERNS)
    exact["target_modules"] = any_of(ranks)
    exact["rank_pattern"] = {f"^{any_of(names)}": rank for rank, names in by_rank.items() if rank != lora.r}
    return dataclasses.replace(lora, **exact)


def _load_adapter_weights(network: PeftModel, folder: Path) -> None:
    """Read what the file holds: PEFT's tensors, and beside them tensors of the base network that came with it."""
    expected = dict(_adapter_state(network))
    base = {PREFIX + entry.key: entry.tensor for entry in base_tensors(network)}
    beside = [name for name in read_header(folder / ADAPTER_WEIGHTS) if name not in expected and name in base]
    expected |= {name: base[name] for name in beside}
    tensors = load_state(folder / ADAPTER_WEIGHTS, expected, f"{folder} does not fit this network")
    with torch.no_grad():
        for name in beside:
            base[name].copy_(tensors.pop(name))
            mark_changed(base[name])
    set_peft_model_state_dict(network, tensors)


def _check_taken_from_base(folder: Path, manifest: dict[str, Any], network: PeftModel) -> None:
    """Refuse a base network that differs in anything the adapter does not bring along.

    Where one of the two is quantised, only what both have in full precision is compared.
    """
    brought = {*_adapter_state(network), *manifest["kept"]}
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
        raise InputError(f"{folder} was written by an earlier version, which did not keep {lost[0]!r}; the checkpoint "
                         "does not hold it either, so the network cannot be had again: fit it anew")  # fmt: skip


def _check_base(folder: Path, manifest: dict[str, Any], network: nn.Module) -> None:
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
