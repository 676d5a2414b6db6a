"""From the rows of a data set to the batches that a network reads: which columns, as what, and padded where."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bayeslora.errors import InputError
from bayeslora.models.network import plain, vocabulary_size

LABELS = ("labels", "label", "label_ids")  # what transformers' collators take for the labels; the first that is there
OF_OPTIONS = ("input_ids", "attention_mask", "answer_mask")  # lists of lists where an example is a choice of texts

Padding = Literal["right", "left", "none", "alone"]
"""Where a batch's shorter examples are padded: after or before their tokens; "none": only examples of one length share
a batch; "alone": no two examples do."""


class Labelling(Protocol):
    """What is asked of a :class:`bayeslora.models.Likelihood` here."""

    label_type: Literal["class", "number"] | None

    def columns_read(self, arguments: frozenset[str]) -> frozenset[str] | None: ...


def columns_read(network: nn.Module, labelling: Labelling) -> frozenset[str] | None:
    """Names of the columns that a network's ``forward`` takes; None where they cannot be known."""
    names = _arguments(network)
    return labelling.columns_read(names) if main_input(network) in names else None


def _arguments(network: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(plain(network).forward).parameters)


def main_input(network: Any) -> str:
    """Name of the column that no example can lack: the tokens, the picture or the sound."""
    return getattr(plain(network), "main_input_name", "input_ids")


def pad_token(network: Any) -> int | None:
    """The padding token as transformers' classifiers look for it; it may lie outside the vocabulary."""
    config = network.config
    return getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "pad_token_id", None)


def filling(network: Any) -> int:
    """A token to pad with that the network can embed."""
    pad, most = pad_token(network), vocabulary_size(network)
    return pad if pad is not None and 0 <= pad < (most or pad + 1) else 0


def used_columns(example: Mapping[str, Any], columns: frozenset[str] | None) -> dict[str, Any]:
    """What of a row goes into a batch: no text, no column without a value, and none that the network does not read.

    Labels are called ``labels``, as transformers' collators call them.
    """
    label = next((name for name in LABELS if name in example), "labels")
    used = {}
    for name, value in example.items():
        taken = name == label if name in LABELS else columns is None or name in columns
        if taken and value is not None and (name == label or not isinstance(value, str)):
            used["labels" if name == label else name] = value
    return used


def depth(value: Any) -> int:
    """Dimensions of a number, an array, or lists of possibly unequal length."""
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype != object):
        return value.ndim
    if isinstance(value, list | tuple | np.ndarray):
        return 1 + (depth(value[0]) if len(value) else 0)
    return 0


NOT_NUMBERS = (ValueError, TypeError, OverflowError, RuntimeError)


def as_array(value: Any) -> np.ndarray:
    """Numbers, truth values included, as numpy's; one of ``NOT_NUMBERS`` is raised for anything else."""
    if isinstance(value, Tensor):
        value = (value.float() if value.dtype is torch.bfloat16 else value).detach().cpu()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{array.dtype} is no type of numbers")
    return array


def as_tensor(value: Any) -> Tensor:
    """A column's value in one row: whole numbers and truth values as int64, others in the default precision."""
    tensor = value if isinstance(value, Tensor) else torch.tensor(np.asarray(value))
    if not tensor.is_floating_point():
        return tensor.long()
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor


class Collator:
    """Pads a list of encoded examples to the longest of them and stacks the rest; text columns are left out.

    ``attention_mask`` is 0 in the padding, and made where the examples have none, unless ``position_ids`` tell the
    texts of a row apart; labels of tokens are -100 there. Lists of lists, the options of a choice, become
    ``(batch, C, T)``: an option that an example lacks is one token that answers nothing. Labels may be called ``label``
    or ``label_ids``.

    Args:
        pad_token_id: What to pad ``input_ids`` with.
        padding: ``"left"`` pads before the tokens, anything else after them.
        columns: Which columns to take; all but texts if None.
        mask: Make the attention masks that are missing.
        labels: What a row's label is: a ``"class"``, a ``"number"``, or anything, as it stands, if None.
    """

    def __init__(
        self,
        pad_token_id: int = 0,
        *,
        padding: Padding = "right",
        columns: frozenset[str] | None = None,
        mask: bool = True,
        labels: Literal["class", "number"] | None = None,
    ):
        self.filling = {"input_ids": pad_token_id, "labels": -100, "letter_ids": -1}
        self.padding, self.columns, self.mask, self.labels = padding, columns, mask, labels

    @classmethod
    def for_network(
        cls, network: Any, labelling: Labelling | None = None, padding: Padding | None = None
    ) -> "Collator":
        """For a network and what its labels follow from; without that, labels are taken as they stand.

        Without ``padding`` it is right, but left for a network that reads the last position (XLNet).
        """
        if padding is None:
            padding = "left" if getattr(network.config, "summary_type", None) == "last" else "right"
        labels = None if labelling is None else labelling.label_type
        columns = None if labelling is None else columns_read(network, labelling)
        mask = "attention_mask" in _arguments(network)
        return cls(filling(network), padding=padding, columns=columns, mask=mask, labels=labels)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> "Batch":
        rows = [used_columns(example, self.columns) for example in examples]
        batch = Batch()
        for name in rows[0]:
            if not all(name in row for row in rows):
                raise InputError(f"some examples of a batch have a column {name!r}, and others have none")
            values = [row[name] for row in rows]
            batch[name] = self._labels(values) if name == "labels" else self._stacked(name, values)
        if self.mask and batch.keys() & _SEQUENCES and not batch.keys() & {"attention_mask", "position_ids"}:
            masks = [_mask_of(row) for row in rows]
            if None not in masks:
                batch["attention_mask"] = self._stacked("attention_mask", masks)
        return batch

    def _labels(self, values: list[Any]) -> Tensor:
        if self.labels is None:
            return self._stacked("labels", values)
        labels = torch.stack([as_tensor(value).reshape(()) for value in values])
        return labels.long() if self.labels == "class" else labels

    def _stacked(self, name: str, values: list[Any]) -> Tensor:
        fill = self.filling.get(name, 0)
        if name in OF_OPTIONS and depth(values[0]) == 2:
            return _pad_options(values, name, fill)
        tensors = [as_tensor(value) for value in values]
        if len({tensor.shape for tensor in tensors}) == 1:
            return torch.stack(tensors)
        side = "left" if self.padding == "left" else "right"
        return pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side)


_SEQUENCES = frozenset({"input_ids", "input_values"})  # what examples differ in length by


def _mask_of(row: Mapping[str, Any]) -> list | None:
    """An attention mask that leaves nothing out; None for a spectrogram."""
    sequence = row.get("input_ids", row.get("input_values"))
    if depth(sequence) == 2:
        return [[1] * len(option) for option in sequence] if "input_ids" in row else None
    return [1] * len(sequence)


def _pad_options(examples: Sequence[Any], name: str, fill: int) -> Tensor:
    """Options of the examples as ``(batch, C, T)``."""
    most = max(len(options) for options in examples)
    length = max(len(tokens) for options in examples for tokens in options)
    padded = torch.full((len(examples), most, length), fill)
    if name == "attention_mask":
        padded[:, :, 0] = 1  # of an absent option: a row must attend to something
    for row, options in zip(padded, examples, strict=True):
        for place, tokens in zip(row, options, strict=False):
            place[: len(tokens)] = as_tensor(tokens)
    return padded


class Batch(dict):
    """Tensors by name, movable together."""

    def to(self, device: Any) -> "Batch":
        return Batch({name: value.to(device) for name, value in self.items()})


def batches_by_length(
    dataset: Any, batch_size: int, padding: Padding = "right"
) -> tuple[list[list[dict[str, Any]]], np.ndarray]:
    """Batches of similar length, longest first, and the order that undoes the sorting."""
    examples = [dataset[index] for index in range(len(dataset))]
    lengths = np.array([length_of(example) for example in examples])
    by_length = np.argsort(-lengths, kind="stable")
    groups = [by_length]
    if padding == "none":
        groups = np.split(by_length, np.flatnonzero(np.diff(lengths[by_length])) + 1)
    size = 1 if padding == "alone" else batch_size
    batches = [
        [examples[index] for index in group[start : start + size]]
        for group in groups
        for start in range(0, len(group), size)
    ]
    return batches, np.argsort(by_length)


def length_of(example: Mapping[str, Any]) -> int:
    """Tokens of a text, or of the longest option; samples of a sound; 0 where examples have no length."""
    sequence = next((example[name] for name in _SEQUENCES if name in example), None)
    if sequence is None or depth(sequence) == 0:
        return 0
    return max(map(len, sequence), default=0) if depth(sequence) == 2 else len(sequence)
