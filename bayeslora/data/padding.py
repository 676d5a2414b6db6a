"""How examples of differing length can share a batch without changing each other's outputs, found by trying.

Nothing about a network says it: an attention mask is not all that keeps padding out. Some networks read the last
position (XLNet), or the last token that is no padding token (GPT-2, Llama); some normalise over the whole length
(Wav2Vec2), pool it, or take no mask.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bayeslora.adapters.drawing import clear_draw, one_at_a_time
from bayeslora.adapters.modes import evaluation_mode, is_compiled
from bayeslora.adapters.quantized import is_quantized
from bayeslora.data.batches import Collator, Padding, length_of, pad_token
from bayeslora.errors import InputError
from bayeslora.models.joint import JointModel
from bayeslora.models.network import plain

_Found = tuple[int | None, int, int, Padding]  # for which padding token, and between which lengths
_found: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()
_FAILURES = (ValueError, TypeError, IndexError, KeyError, RuntimeError)


class Placed(NamedTuple):
    """An example, and where it is found."""

    place: str
    example: Mapping[str, Any]


def find_padding(model: JointModel, shortest: Placed, longest: Placed) -> Padding:
    """How examples between these two can be put together, so that each has the outputs that it has alone.

    It is found once for the lengths in between.

    Raises:
        InputError: where the network cannot read one of the two.
    """
    least, most, token = length_of(shortest.example), length_of(longest.example), pad_token(model.network)
    if least == most and (token is not None or "input_ids" not in longest.example):
        return "right"  # nothing is padded
    known = _found.get(model.network)
    if known is None or known[0] != token or not known[1] <= least <= most <= known[2]:
        known = (token, least, most, _try(model, shortest, longest))
        _found[model.network] = known
    return known[3]


def _try(model: JointModel, shortest: Placed, longest: Placed) -> Padding:
    alone = [run_alone(model, one) for one in (longest, shortest)]
    sides: tuple[Padding, ...] = ("right", "left")
    for side in sides:
        if _agree(model, [longest.example, shortest.example], alone, side):
            return side
    return "none" if _agree(model, [shortest.example] * 2, [alone[1]] * 2, "none") else "alone"


def run_alone(model: JointModel, one: Placed) -> Tensor:
    """Outputs of one example at the mean, ``(...)``.

    Raises:
        InputError: where the network cannot read it.
    """
    try:
        return _run(model, [one.example], "right")[0]
    except (torch.OutOfMemoryError, InputError):
        raise
    except _FAILURES as error:
        lacking = "" if pad_token(model.network) is not None else " (its configuration has no pad_token_id)"
        kind = type(plain(model.network)).__name__
        raise InputError(f"{one.place}: {kind}{lacking} cannot read it: {error}") from error


def _run(model: JointModel, examples: Sequence[Mapping[str, Any]], padding: Padding) -> Tensor:
    """Outputs of a batch at the mean."""
    network: Any = model.network
    inputs = Collator.for_network(network, model.labelling, padding)(examples).to(network.device)
    labels = inputs.pop("labels", None)
    eager = torch.compiler.set_stance("force_eager") if is_compiled(network) else nullcontext()
    with one_at_a_time, eager, evaluation_mode(model), evaluation_mode(network), torch.no_grad():
        clear_draw(model.groups)
        return model.outputs(inputs, labels).float().nan_to_num()  # NaN is where nothing is said


def _agree(model: JointModel, pair: list, alone: list[Tensor], padding: Padding) -> bool:
    """Whether both examples have the outputs that they have alone, up to the network's rounding."""
    try:
        together = _run(model, pair, padding)
    except torch.OutOfMemoryError:
        raise
    except _FAILURES:  # transformers' refusals, and layers that the shapes do not suit
        return False
    rows = [_as_alone(row, one, padding) for row, one in zip(together, alone, strict=True)]
    if any(row.shape != one.shape for row, one in zip(rows, alone, strict=True)):
        return False
    found, expected = (torch.cat([output.flatten() for output in outputs]) for outputs in (rows, alone))
    moved = found != expected
    return bool((found - expected).norm() <= _rounding(model.network) * expected[moved].norm())


def _as_alone(row: Tensor, alone: Tensor, padding: Padding) -> Tensor:
    """Of an output for each token, those of the example's own tokens."""
    if row.shape == alone.shape or row.shape[1:] != alone.shape[1:]:
        return row
    return row[-len(alone) :] if padding == "left" else row[: len(alone)]


def _rounding(network: nn.Module) -> float:
    """How far outputs of other batches differ at most by rounding alone, relative to their size."""
    coarsest = max(torch.finfo(p.dtype).eps for p in network.parameters() if p.is_floating_point())
    return 0.1 if is_quantized(network) else min(max(1e-4, 10 * coarsest), 0.1)
