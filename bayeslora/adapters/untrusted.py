"""Adapter folders come from others: LoRA's options and tensors are checked here before anything is built from them.

Hashes in a folder only detect accidents, since whoever edits a file can compute them again. So nothing read from it is
executed, imported, matched as a pattern or allocated: names are compared with the network's own, and every shape with
the network and with the file that has to hold it.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from reprlib import repr as shown
from typing import Any, NamedTuple

from peft import LoraConfig, TaskType
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayeslora.config import REFUSED_LORA_OPTIONS
from bayeslora.errors import InputError
from bayeslora.files.records import is_integer, is_names, is_number, is_object_of, read_json

FLOATS = ("F16", "BF16", "F32", "F64")
PREFIX = "base_model.model."  # PEFT's, before the name of a module of the base network
LARGEST = 1e12  # of a weight: products of larger ones overflow


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


def load_state(path: Path, module_state: Mapping[str, Tensor], unknown: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must be those of ``module_state``, in its dtypes.

    Raises:
        InputError: starting with ``unknown`` for other names or shapes; for NaN, infinite and enormous values.
    """
    header = read_header(path)
    for name in [*module_state, *header]:
        here = tuple(module_state[name].shape) if name in module_state else None
        there = header[name].shape if name in header else None
        if here != there:
            raise InputError(f"{unknown}: {name!r:.200} has shape {here} here, {there} in {path.name}")
    state = {name: value.to(module_state[name].dtype) for name, value in load_file(path).items()}
    for name, value in state.items():
        if not (value.abs() <= LARGEST).all():
            raise InputError(
                f"{path}: tensor {name!r:.200} holds NaN or infinity, or a number above {LARGEST:g}, which no training "
                "finds and from which outputs are none: use another copy"
            )
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


# Every entry of adapter_config.json that is honoured, and what it may be. The other patterns are kept but never run
# (one can be built to match for ever): the weights say which layers are adapted, and their ranks.
_LORA_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
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
_IGNORED_FIELDS = {
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
    """PEFT's ``adapter_config.json``: the fields we honour, by type; any other must be unused.

    Raises:
        InputError: naming the first field that is missing, of the wrong type, or cannot be honoured.
    """
    values = read_json(path)
    for field in ("peft_type", "r", "lora_alpha", "target_modules"):
        if field not in values:
            raise InputError(f"{path}: {field!r} is missing: expected the configuration of a LoRA adapter")
    check_lora_options(values, f"{path}: ")
    given = {field: values[field] for field in _LORA_FIELDS if field in values and field != "peft_type"}
    try:
        return LoraConfig(**given)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a LoRA configuration PEFT takes: {error}") from error


def is_same_base(path: Path, names: Collection[str]) -> bool:
    """Whether one of a network's ``names`` is the one in ``adapter_config.json``, or that says none. Folders of the two
    may differ: ``meta-llama/Llama-3.2-1B`` is the same as ``models/llama-3.2-1b``.

    Raises:
        InputError: for a file that is no configuration.
    """
    recorded = read_json(path).get("base_model_name_or_path")
    if not isinstance(recorded, str) or not recorded:
        return True
    return _last_part(recorded) in {_last_part(name) for name in names}


def _last_part(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()


def check_lora_options(values: Mapping[str, Any], where: str = "", *, except_for: Collection[str] = ()) -> None:
    """Refuse what a LoRA configuration says that an adapter folder could not be opened with.

    Args:
        values: As in ``adapter_config.json``.
        where: What the error begins with.
        except_for: Fields to pass over.

    Raises:
        InputError: naming the first field that is of the wrong type, or cannot be honoured.
    """
    defaults = LoraConfig().to_dict()
    for field, value in values.items():
        if field in except_for:
            continue
        if field in _LORA_FIELDS:
            fits, expected = _LORA_FIELDS[field]
            if not fits(value):
                raise InputError(f"{where}{field} must be {expected}, got {shown(value)}")
        elif field not in _IGNORED_FIELDS and value and value != defaults.get(field):
            reason = REFUSED_LORA_OPTIONS.get(field, "it is unknown here, or would change what the adapter computes")
            raise InputError(f"{where}{field!r:.100} cannot be combined with bayeslora: {reason}")


def adapter_ranks(
    network: nn.Module, lora: LoraConfig, header: Mapping[str, TensorHeader], unknown: str
) -> dict[str, int]:
    """Name of every layer that the file adapts, and its rank, once all shapes fit the network and the configuration.

    After this, building what the file describes takes no more memory than the file.

    Raises:
        InputError: starting with ``unknown``, naming the first tensor that does not fit.
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
            raise InputError(f"{unknown}: {type(network).__name__} has no linear layer {name!r:.200}")
        rank = shape[0] if shape else 0
        if rank not in allowed:
            raise InputError(f"{unknown}: {key!r:.200} has rank {rank}, {sorted(allowed)[:3]} in the configuration")
        other = key.replace(".lora_A.", ".lora_B.")
        for matrix, expected in ((key, (rank, sizes[0])), (other, (sizes[1], rank))):
            found = header[matrix].shape if matrix in header else None
            if found != expected:
                raise InputError(f"{unknown}: {matrix!r:.200} has shape {expected} here, {found} in the file")
        ranks[name] = rank
    if not ranks:
        raise InputError(f"{unknown}: it holds no lora_A at all")
    _check_saved_modules(modules, lora, header, unknown)
    return ranks


def _check_saved_modules(
    modules: Mapping[str, nn.Module], lora: LoraConfig, header: Mapping[str, TensorHeader], unknown: str
) -> None:
    """Modules saved whole are copied by PEFT, so the file must hold each of them."""
    for saved in lora.modules_to_save or ():
        matched = [name for name in modules if name.endswith(saved)]  # PEFT's own rule
        if not matched and saved not in ("classifier", "score"):  # PEFT lists both heads for every classifier
            raise InputError(f"{unknown}: the network has no module {saved!r:.200} of modules_to_save")
        for name in matched:
            for parameter, value in modules[name].state_dict().items():
                key = f"{PREFIX}{name}.{parameter}"
                if key not in header or header[key].shape != tuple(value.shape):
                    found = header[key].shape if key in header else None
                    raise InputError(
                        f"{unknown}: {key!r:.200} has shape {tuple(value.shape)} here, {found} in the file"
                    )


def linear_sizes(module: Any) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, quantised or not; None for anything else."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    return None
