"""Which tensors of a network come from its checkpoint: the others come back only if they are saved with the adapter.

A checkpoint often lacks a part of the network: a new head, the pooler of a base that was pretrained without one, rows
that were added to the embeddings. transformers fills those in at random each time it loads. What the checkpoint does
hold is taken from there again, and a sketch of every tensor tells whether it is still the same.
"""

import copy
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from bayeslora.adapters.quantized import is_packed, whole

logger = logging.getLogger(__name__)

_PROJECTIONS = 4
_WIDTH = 4096
_ROWS = 4096  # of _WIDTH numbers each, taken to float32 at a time


class BaseTensor(NamedTuple):
    """A parameter or persistent buffer of the base network: its ``name`` there, and its ``key`` in the network's own
    state dict, which PEFT's wrappers change."""

    name: str
    key: str
    tensor: Tensor
    module: nn.Module

    @property
    def is_buffer(self) -> bool:
        return not isinstance(self.tensor, nn.Parameter)


def base_tensors(network: nn.Module) -> Iterator[BaseTensor]:
    """Every tensor of the base network that a checkpoint can hold in full precision, once each.

    Left out are adapters, the copies of modules that PEFT trains whole, and weights that are packed or elsewhere.
    """
    base = network.get_base_model() if isinstance(network, PeftModel) else network
    seen: set[int] = set()
    skipped = tuple(_inner_modules(base))
    for prefix, module in base.named_modules():
        dotted = f"{prefix}." if prefix else ""
        if dotted.startswith(skipped):
            continue
        own = {
            **module._parameters,
            **{n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set},
        }
        if any(parameter is not None and is_packed(parameter) for parameter in module._parameters.values()):
            continue
        own.pop("num_batches_tracked", None)  # counts the steps of training, and nothing depends on it by default
        for name, tensor in own.items():
            if tensor is not None and not tensor.is_meta and id(tensor) not in seen:
                seen.add(id(tensor))
                key = f"{dotted}{name}"
                yield BaseTensor(key.replace(".base_layer.", "."), key, tensor, module)


def _inner_modules(base: nn.Module) -> Iterator[str]:
    """Beginnings of the names of what PEFT has put into the network."""
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            own = {*module.adapter_layer_names, *module.other_param_names}
            yield from (f"{name}.{child}." for child, _ in module.named_children() if child in own)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            yield f"{name}."


def not_in_checkpoint(network: nn.Module) -> set[str]:
    """Names of the base network's tensors that its checkpoint does not hold as they are.

    transformers marks what it has read from a checkpoint. Where nothing is marked, in a copy for instance, the
    checkpoint that the network names is asked; a network that names none counts as known, but for a classifier's head.
    """
    tensors = list(base_tensors(network))
    base: Any = network.get_base_model() if isinstance(network, PeftModel) else network
    marks = {t.name: getattr(t.tensor, "_is_hf_initialized", None) for t in tensors}
    lacking = {name for name, mark in marks.items() if mark is False} | _resized(base, tensors)
    if any(marks.values()):
        return lacking | {name for name, mark in marks.items() if mark is None}
    asked = _missing_keys(base)
    if asked is not None:
        return lacking | (asked & marks.keys())
    if isinstance(network, PeftModel):  # what was trained whole is in its adapter already
        return lacking
    return lacking | {t.name for t in tensors if _is_head(base, t.name)}


def mark_changed(tensor: Tensor) -> None:
    """Say that a tensor of the base network is no longer what the checkpoint holds."""
    tensor._is_hf_initialized = False  # type: ignore[attr-defined]


def _resized(base: Any, tensors: Iterable[BaseTensor]) -> set[str]:
    """Names of the embeddings, and of the output layer, if they have other rows than in the checkpoint."""
    if not getattr(base, "name_or_path", None) or not hasattr(base, "get_input_embeddings"):
        return set()
    try:
        stored = type(base.config).from_pretrained(base.name_or_path, local_files_only=True)
        rows = stored.get_text_config().vocab_size
        vocabulary = [base.get_input_embeddings(), base.get_output_embeddings()]
    except (OSError, ValueError, AttributeError, NotImplementedError):  # no checkpoint, or a network without words
        return set()
    words = [module for module in vocabulary if isinstance(module, nn.Embedding | nn.Linear)]  # of images: convolutions
    weights = {id(tensor) for module in words for tensor in module.parameters()}
    return {t.name for t in tensors if id(t.tensor) in weights and len(t.tensor) != rows}


def _missing_keys(base: Any) -> set[str] | None:
    """What transformers misses in the checkpoint that the network names; None if that cannot be read."""
    place = getattr(base, "name_or_path", None)
    if not place or not hasattr(base, "from_pretrained"):
        return None
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        _, report = type(base).from_pretrained(
            place, config=copy.deepcopy(base.config), device_map="meta", local_files_only=True, output_loading_info=True
        )
    except Exception:  # whatever is wrong with the checkpoint: it has not been asked for
        logger.debug("%s cannot be read again", place, exc_info=True)
        return None
    finally:
        transformers_logging.set_verbosity(verbosity)
    return set(report["missing_keys"])


CLASSIFIERS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForImageClassification",
    "ForAudioClassification",
)


def _is_head(base: nn.Module, name: str) -> bool:
    """Whether a classifier's tensor lies outside the backbone."""
    if not type(base).__name__.endswith(CLASSIFIERS):
        return False
    backbone: str = getattr(base, "base_model_prefix", "")
    sizes = {n: sum(p.numel() for p in child.parameters()) for n, child in base.named_children()}
    if backbone not in sizes:
        backbone = max(sizes, key=lambda n: sizes[n])
    return not name.startswith(f"{backbone}.")


def new_modules(network: Any) -> list[str]:
    """Names of the outermost modules that are new altogether, which must be trained; embeddings are not among them."""
    missing = not_in_checkpoint(network)
    by_module: dict[str, list[bool]] = {}
    for tensor in base_tensors(network):
        if not tensor.is_buffer:
            for parent in _parents(tensor.name):
                by_module.setdefault(parent, []).append(tensor.name in missing)
    modules = dict(network.named_modules())
    output = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    lists = (nn.ModuleList, nn.ModuleDict, nn.Sequential)

    def is_new(name: str) -> bool:
        module = modules[name]
        vocabulary = any(isinstance(part, nn.Embedding) or part is output for part in module.modules())
        return all(by_module[name]) and not vocabulary and not isinstance(module, lists)

    found = [name for name in by_module if name and is_new(name)]
    return [name for name in found if not any(parent in found for parent in _parents(name))]


def _parents(name: str) -> Iterator[str]:
    """Names of the modules around a parameter or a module."""
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


def kept_keys(network: PeftModel, missing: Iterable[str]) -> frozenset[str]:
    """Keys of the tensors that are saved as they are beside PEFT's: what is missing in the checkpoint and not trained
    whole, and the running statistics that training changes."""
    missing = set(missing)
    tensors = [t for t in base_tensors(network) if t.tensor.is_floating_point()]
    untrained = sorted(t.name for t in tensors if t.name in missing and not t.is_buffer)
    if untrained:
        logger.warning(
            "%s of %s not in its checkpoint: kept with the adapter, and not trained unless named in modules_to_save",
            untrained[0] if len(untrained) == 1 else f"{len(untrained)} weights, such as {untrained[0]},",
            f"{type(network.get_base_model()).__name__} {'is' if len(untrained) == 1 else 'are'}",
        )
    return frozenset(t.key for t in tensors if t.name in missing or _is_running(t))


def _is_running(tensor: BaseTensor) -> bool:
    """Whether a batch normalisation updates it."""
    return tensor.is_buffer and isinstance(tensor.module, nn.modules.batchnorm._NormBase)


class Sketch(NamedTuple):
    """What tells one tensor from another: its type, its norm and four projections."""

    dtype: str
    norm: float
    projections: tuple[float, ...]

    def differs(self, other: "Sketch") -> bool:
        """Whether the tensors are not the same; in two types, up to a rounding to sixteen bits."""
        allowed = (1e-4 if self.dtype == other.dtype else 0.02) * max(self.norm, other.norm)
        pairs = zip((self.norm, *self.projections), (other.norm, *other.projections), strict=True)
        return any(abs(one - two) > allowed for one, two in pairs)

    def to_list(self) -> list[str | float]:
        return [self.dtype, self.norm, *self.projections]

    @classmethod
    def from_list(cls, values: list) -> "Sketch":
        return cls(values[0], values[1], tuple(values[2:]))

    @staticmethod
    def is_list(values: Any) -> bool:
        """Whether a value from a file is what :meth:`to_list` makes."""
        if not isinstance(values, list) or len(values) != 2 + _PROJECTIONS or not isinstance(values[0], str):
            return False
        return all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= 1e100 for v in values[1:])


@torch.no_grad()
def sketch(tensor: Tensor) -> Sketch:
    """The sketch of a tensor: a difference δ moves each projection by about ‖δ‖.

    The entries, in rows of 4096, are weighted by cosines of their row and of their place in it.
    """
    flat = whole(tensor.detach()).flatten()
    width = min(_WIDTH, max(len(flat), 1))
    rows = nn.functional.pad(flat, (0, -len(flat) % width)).view(-1, width)
    squares, sums = 0.0, torch.zeros(_PROJECTIONS, dtype=torch.float64)
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS].float()
        norm = float(part.norm())
        if not norm < 1e18:  # a mask holds infinity, or the lowest number there is
            part = part.nan_to_num(0.0).clamp(-1e9, 1e9)
            norm = float(part.norm())
        left, right = _waves(0, start, len(part)), _waves(1, 0, width)
        squares += norm**2
        sums += 2 * ((left.to(part.device) @ part).cpu() * right).sum(-1).double()
    return Sketch(str(tensor.dtype).removeprefix("torch."), math.sqrt(squares), tuple(sums.tolist()))


_FREQUENCIES = ((2, 3, 5, 7), (11, 13, 17, 19))  # of rows and of places: π times the square root


def _waves(axis: int, start: int, length: int) -> Tensor:
    """Cosines of four frequencies at ``length`` places from ``start`` on, ``(4, length)``."""
    places = torch.arange(start + 1, start + length + 1, dtype=torch.float64)
    frequencies = math.pi * torch.tensor(_FREQUENCIES[axis], dtype=torch.float64).sqrt()
    return torch.cos(frequencies[:, None] * places).float()


def first_difference(expected: Mapping[str, Sketch], found: Mapping[str, Sketch], buffers: Collection[str]) -> str:
    """Name of the first tensor that differs; empty where all agree.

    Args:
        expected: Of the network that was fitted.
        found: Of the network now.
        buffers: Names that one of the two may lack, as versions of transformers differ in what they register.
    """
    for name in sorted(expected.keys() | found.keys()):
        if name not in expected or name not in found:
            if name not in buffers:
                return name
        elif expected[name].differs(found[name]):
            return name
    return ""
