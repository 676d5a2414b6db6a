"""Adapter folders come from strangers: JSON and tensor headers are checked here before anything is built from them.

Hashes in a folder only detect accidents, since whoever edits a file can compute them again. So nothing read from it is
executed, imported, matched as a pattern or allocated: names are compared with the network's own, and every shape with
the network and with the file that has to hold it.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from reprlib import repr as shown
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, TaskType
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayeslora.config import REFUSED_LORA_OPTIONS
from bayeslora.errors import InputError

MAX_JSON_BYTES = 4 * 2**20
MAX_RUN_BYTES = 256 * 2**20  # run.json holds the log of every adapter
MAX_JSON_DEPTH = 20
FLOATS = ("F16", "BF16", "F32", "F64")
PREFIX = "base_model.model."  # PEFT's, before the name of a module of the base network


def read_json(path: Path, *, most_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: if it is not a regular file, or not one JSON object of reasonable size and depth with every name
            given once.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing or not a regular file")
    try:
        if path.stat().st_size > most_bytes:
            raise ValueError(f"more than {most_bytes} bytes")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}, not an object")
        if _deeper_than(value, MAX_JSON_DEPTH):
            raise ValueError(f"nested more than {MAX_JSON_DEPTH} deep")
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): use another copy") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def _deeper_than(value: Any, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_deeper_than(child, levels - 1) for child in children)


def is_integer(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**53


def is_number(value: Any) -> bool:
    """A finite number whose square is finite in float64 as well."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e100


def is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_object_of(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(holds(entry) for entry in value.values())


def is_path(value: Any) -> bool:
    """A path or a hub name; the home directory it starts with, if any, must exist."""
    return isinstance(value, str) and not (value.startswith("~") and os.path.expanduser(value) == value)


_RECIPE_WORDS: dict[str, Callable[[Any], bool]] = {
    "name": lambda v: isinstance(v, str),
    "data_dir": lambda v: v is None or is_path(v),
    "text_columns": lambda v: v is None or isinstance(v, str) or is_names(v),
    "label_column": lambda v: v is None or isinstance(v, str),
    "label_names": lambda v: v is None or is_names(v),
    "prompting": lambda v: v is None or is_object_of(v, lambda word: isinstance(word, str | bool)),
}


def _is_recipe(value: Any) -> bool:
    """What :func:`bayeslora.load_task` takes."""
    if not isinstance(value, dict) or "name" not in value or not value.keys() <= _RECIPE_WORDS.keys():
        return False
    return all(_RECIPE_WORDS[word](entry) for word, entry in value.items())


_RUN_WORDS: dict[str, Callable[[Any], bool]] = {
    "model": is_path,
    "task": _is_recipe,
    "max_length": lambda v: is_integer(v, 1) and v <= 2**20,
}


def read_run(path: Path) -> dict[str, Any]:
    """A run's ``run.json``, which must say which model and task it was fitted to.

    Raises:
        InputError: naming the first entry that is missing or of the wrong type.
    """
    record = read_json(path, most_bytes=MAX_RUN_BYTES)
    for word, fits in _RUN_WORDS.items():
        if not fits(record.get(word)):
            raise InputError(
                f"{path} does not say which model and task it was fitted to ({word!r} is missing or damaged): "
                "was it fitted from the command line?"
            )
    return record


class TensorHeader(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Name, dtype and shape of the tensors in a safetensors file, without reading them.

    Raises:
        InputError: if it is not a regular safetensors file of floating-point tensors.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing or not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no dict)
            header = {name: TensorHeader(p.get_dtype(), tuple(p.get_shape())) for name, p in parts.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error!s:.200}") from error
    for name, (dtype, _) in header.items():
        if dtype not in FLOATS:
            raise InputError(f"{path}: tensor {name!r:.200} has dtype {dtype}; expected one of {', '.join(FLOATS)}")
    return header


def load_state(path: Path, module_state: Mapping[str, Tensor], stranger: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must be those of ``module_state``, in its dtypes.

    Raises:
        InputError: starting with ``stranger`` for other names or shapes; for NaN or infinite values.
    """
    header = read_header(path)
    for name in [*module_state, *header]:
        here = tuple(module_state[name].shape) if name in module_state else None
        there = header[name].shape if name in header else None
        if here != there:
            raise InputError(f"{stranger}: {name!r:.200} has shape {here} here, {there} in {path.name}")
    state = {name: value.to(module_state[name].dtype) for name, value in load_file(path).items()}
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise InputError(f"{path}: tensor {name!r:.200} holds NaN or infinity: use another copy")
    return state


def _optional(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text_or_names(value: Any) -> bool:
    return isinstance(value, str) or is_names(value)


def _is_index_or_indices(value: Any) -> bool:
    return is_integer(value) or (isinstance(value, list) and all(map(is_integer, value)))


def _are_module_names(value: Any) -> bool:
    return is_names(value) and all(re.fullmatch(r"[\w.-]+", name) for name in value)


def _are_alphas(value: Any) -> bool:
    """By the literal end of a layer's name: PEFT runs these as patterns, and none here can take long."""
    return is_object_of(value, lambda alpha: is_number(alpha) and alpha > 0) and all(
        re.fullmatch(r"\^?(?:[\w-]|\\?\.)+\$?", name) for name in value
    )


# Every word of adapter_config.json that is honoured, and what it may be. The other patterns are kept but never run
# (one can be built to match for ever): the weights say which layers are adapted, and their ranks.
_LORA_WORDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda v: v == "LORA", '"LORA"'),
    "task_type": (_optional(lambda v: isinstance(v, str) and v in list(TaskType)), "null or a task type of PEFT's"),
    "r": (lambda v: is_integer(v, 1), "an integer of at least 1"),
    "lora_alpha": (lambda v: is_number(v) and v > 0, "a number greater than 0"),
    "lora_dropout": (lambda v: is_number(v) and 0 <= v < 1, "a number in [0, 1)"),
    "use_rslora": (_is_boolean, "true or false"),
    "lora_bias": (_is_boolean, "true or false"),
    "bias": (lambda v: v in ("none", "all", "lora_only"), '"none", "all" or "lora_only"'),
    "init_lora_weights": (
        lambda v: v in (True, False, "gaussian", "orthogonal"),
        'true, false, "gaussian" or "orthogonal": the others change the base weights, or need data to begin with',
    ),
    "target_modules": (_is_text_or_names, "a string or a list of them"),
    "exclude_modules": (_optional(_is_text_or_names), "null, a string or a list of them"),
    "layers_pattern": (_optional(_is_text_or_names), "null, a string or a list of them"),
    "layers_to_transform": (_optional(_is_index_or_indices), "null or a list of integers"),
    "modules_to_save": (_optional(_are_module_names), "null or a list of module names"),
    "rank_pattern": (lambda v: is_object_of(v, lambda rank: is_integer(rank, 1)), "an object of ranks"),
    "alpha_pattern": (_are_alphas, "an object of positive numbers by layer name, without wildcards"),
}
# What only says where the adapter came from, or how it is used at the moment.
_IGNORED_WORDS = {
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "revision",
    "runtime_config",
}


def read_lora_config(path: Path) -> LoraConfig:
    """PEFT's ``adapter_config.json``: the words we honour, by type; any other must be unused.

    Raises:
        InputError: naming the first word that is missing, of the wrong type, or cannot be honoured.
    """
    values = read_json(path)
    for word in ("peft_type", "r", "lora_alpha", "target_modules"):
        if word not in values:
            raise InputError(f"{path}: {word!r} is missing: expected the configuration of a LoRA adapter")
    check_lora_words(values, f"{path}: ")
    words = {word: values[word] for word in _LORA_WORDS if word in values and word != "peft_type"}
    try:
        return LoraConfig(**words)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a LoRA configuration PEFT takes: {error}") from error


def check_lora_words(values: Mapping[str, Any], where: str = "", *, except_for: Collection[str] = ()) -> None:
    """Refuse what a LoRA configuration says that an adapter folder could not be opened with.

    Args:
        values: As in ``adapter_config.json``.
        where: What the error begins with.
        except_for: Words to pass over.

    Raises:
        InputError: naming the first word that is of the wrong type, or cannot be honoured.
    """
    defaults = LoraConfig().to_dict()
    for word, value in values.items():
        if word in except_for:
            continue
        if word in _LORA_WORDS:
            fits, expected = _LORA_WORDS[word]
            if not fits(value):
                raise InputError(f"{where}{word} must be {expected}, got {shown(value)}")
        elif word not in _IGNORED_WORDS and value and value != defaults.get(word):
            reason = REFUSED_LORA_OPTIONS.get(word, "it is unknown here, or would change what the adapter computes")
            raise InputError(f"{where}{word!r:.100} cannot be combined with bayeslora: {reason}")


def adapter_ranks(
    network: nn.Module, lora: LoraConfig, header: Mapping[str, TensorHeader], stranger: str
) -> dict[str, int]:
    """Name of every layer that the file adapts, and its rank, once all shapes fit the network and the configuration.

    After this, building what the file describes takes no more memory than the file.

    Raises:
        InputError: starting with ``stranger``, naming the first tensor that does not fit.
    """
    modules = dict(network.named_modules())
    allowed = {lora.r, *lora.rank_pattern.values()}
    ranks = {}
    for key, (_, shape) in header.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        sizes = linear_sizes(modules.get(name))
        if sizes is None or not key.startswith(PREFIX):
            raise InputError(f"{stranger}: {type(network).__name__} has no linear layer {name!r:.200}")
        rank = shape[0] if shape else 0
        if rank not in allowed:
            raise InputError(f"{stranger}: {key!r:.200} has rank {rank}, {sorted(allowed)[:3]} in the configuration")
        other = key.replace(".lora_A.", ".lora_B.")
        for matrix, expected in ((key, (rank, sizes[0])), (other, (sizes[1], rank))):
            found = header[matrix].shape if matrix in header else None
            if found != expected:
                raise InputError(f"{stranger}: {matrix!r:.200} has shape {expected} here, {found} in the file")
        ranks[name] = rank
    if not ranks:
        raise InputError(f"{stranger}: it holds no lora_A at all")
    _check_saved_modules(modules, lora, header, stranger)
    return ranks


def _check_saved_modules(
    modules: Mapping[str, nn.Module], lora: LoraConfig, header: Mapping[str, TensorHeader], stranger: str
) -> None:
    """Modules saved whole are copied by PEFT, so the file must hold each of them."""
    for saved in lora.modules_to_save or ():
        matched = [name for name in modules if name.endswith(saved)]  # PEFT's own rule
        if not matched and saved not in ("classifier", "score"):  # PEFT lists both heads for every classifier
            raise InputError(f"{stranger}: the network has no module {saved!r:.200} of modules_to_save")
        for name in matched:
            for parameter, value in modules[name].state_dict().items():
                key = f"{PREFIX}{name}.{parameter}"
                if key not in header or header[key].shape != tuple(value.shape):
                    found = header[key].shape if key in header else None
                    raise InputError(
                        f"{stranger}: {key!r:.200} has shape {tuple(value.shape)} here, {found} in the file"
                    )


def linear_sizes(module: Any) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, quantised or not; None for anything else."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    return None
