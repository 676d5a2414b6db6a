"""What a data set must be, the same wherever one is taken: numbered rows, each a dict that the network can read.

What cannot be read is refused with the number of its row, before anything is trained or predicted.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bayeslora.data.batches import (
    LABELS,
    NOT_NUMBERS,
    OF_OPTIONS,
    Collator,
    Padding,
    as_array,
    batches_by_length,
    columns_read,
    depth,
    length_of,
    main_input,
    pad_token,
    used_columns,
)
from bayeslora.data.limits import POSITION_TABLES, end_of_text, position_limit, table_size
from bayeslora.data.padding import Placed, find_padding, run_alone
from bayeslora.data.rows import check_kind, rows_of
from bayeslora.errors import InputError, Where
from bayeslora.models.joint import JointModel
from bayeslora.models.likelihoods import NOT_SCORED, UNLABELLED
from bayeslora.models.network import plain, vocabulary_size

logger = logging.getLogger(__name__)

_PER_TOKEN = {"attention_mask", "token_type_ids", "position_ids", "answer_mask"}


@dataclass(frozen=True)
class Examples:
    """The rows of a data set, and how to put them into batches."""

    rows: list[dict[str, Any]]
    collate: Collator

    def batches(self, batch_size: int) -> tuple[list[list[dict[str, Any]]], np.ndarray]:
        """See :func:`bayeslora.data.batches.batches_by_length`."""
        return batches_by_length(self.rows, batch_size, self.collate.padding)


class _Row(NamedTuple):
    """Where a row lies, and its length."""

    name: str
    number: int
    length: int


def read_examples(model: JointModel, dataset: Any, name: str = "the data set") -> Examples:
    """The rows of a data set to predict; labels are optional, but for texts.

    Raises:
        InputError: naming the first row that the network cannot read, and why.
    """
    check_kind(dataset, name)
    rows = list(rows_of(dataset))
    ends = _check_rows(model, rows, name, learns=False)
    padding: Padding = "right"
    if len(rows) > 1:
        padding = find_padding(model, *(Placed(f"{name}, row {end.number}", rows[end.number]) for end in ends))
    return Examples(rows, Collator.for_network(model.network, model.labelling, padding))


def check_to_learn_from(model: JointModel, datasets: Mapping[str, Any], batch_size: int) -> Collator:
    """Check data sets to learn from, or to evaluate on while learning, and return what puts their rows into batches.

    Args:
        model: What is to learn.
        datasets: Data sets with labels by their names.
        batch_size: Examples of a training batch.

    Raises:
        InputError: naming the first row that cannot be learnt from, or where examples cannot share a batch.
    """
    network: Any = model.network
    ends: list[_Row] = []
    for name, dataset in datasets.items():
        check_kind(dataset, name)
        ends += _check_rows(model, rows_of(dataset), name, learns=True)
    padding: Padding = "right"
    if network.device.type != "meta":
        chosen = [choose(ends, key=lambda row: row.length) for choose in (min, max)]
        shortest, longest = (Placed(f"{row.name}, row {row.number}", datasets[row.name][row.number]) for row in chosen)
        for example in (shortest, longest):  # a failure now is none in the middle of training
            run_alone(model, example)
        if batch_size > 1:
            padding = find_padding(model, shortest, longest)
            _check_sharing(model, padding)
    return Collator.for_network(model.network, model.labelling, padding)


def _check_sharing(model: JointModel, padding: Padding) -> None:
    """Refuse training batches in which examples change each other's outputs."""
    if padding in ("right", "left"):
        return
    pad, size = pad_token(model.network), vocabulary_size(model.network)
    if pad is None:
        mend = "set network.config.pad_token_id to the tokenizer's"
    elif size is not None and not 0 <= pad < size:
        mend = (
            f"its padding token {pad} is outside its {size} tokens, so call "
            "network.resize_token_embeddings(len(tokenizer)) before BayesLoRA"
        )
    else:
        mend = "pad all examples to one length when they are encoded"
    raise InputError(
        f"what {type(plain(model.network)).__name__} says of an example depends on how far its batch is "
        f"padded: {mend}, or train with batch_size=1 and gradient_accumulation"
    )


def _check_rows(model: JointModel, rows: Any, name: str, *, learns: bool) -> tuple[_Row, _Row]:
    """The shortest row and the longest."""
    check: _RowCheck | None = None
    labels: list[float] = []
    lengths: list[int] = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(f"{name}, row {number} is a {type(row).__name__}: expected a dict from column to value")
        check = check or _RowCheck(model, row, name, learns=learns)
        used = check(number, row)
        lengths.append(length_of(used))
        if check.labelled:
            labels.append(check.label(number, used))
        elif "labels" in used:
            raise Where(name, number).refused("it has a label, and row 0 has none: give all of them one, or none")
    if check is None:
        raise InputError(f"{name} is empty: nothing to {'learn from' if learns else 'predict'}")
    if check.labelled:
        check.labelling.check_labels(np.array(labels), name, check.network, learns=learns)
    ends = int(np.argmin(lengths)), int(np.argmax(lengths))
    return _Row(name, ends[0], lengths[ends[0]]), _Row(name, ends[1], lengths[ends[1]])


class _RowCheck:
    """Checks rows, one by one, against the network and against the first of them."""

    def __init__(self, model: JointModel, first: Mapping[str, Any], name: str, *, learns: bool):
        self.name, self.learns = name, learns
        self.network: Any = plain(model.network)
        self.kind = type(self.network).__name__
        self.labelling = model.labelling
        self.columns = columns_read(self.network, self.labelling)
        self.first = used_columns(first, self.columns)
        self.labelled = learns or "labels" in self.first
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.vocabulary = vocabulary_size(self.network)
        self.positions = None if "position_ids" in first else position_limit(self.network)
        self.tables = {
            "token_type_ids": table_size(self.network, {"token_type_embeddings"}),
            "position_ids": table_size(self.network, POSITION_TABLES),
        }
        self.end, self.ends = end_of_text(self.network), 0
        self._find_labels(first)
        self._name_unread(first)

    def _refused(self, number: int, why: str) -> InputError:
        return Where(self.name, number).refused(why)

    def _find_labels(self, first: Mapping[str, Any]) -> None:
        if any(name in first for name in LABELS):
            return
        if self.learns:
            raise InputError(
                f"{self.name} has no labels: there is no column 'labels' (it has {', '.join(first)}); "
                "is it an unlabelled split?"
            )
        unseen = "its outputs are of given labels: give every row a column 'labels'"
        why = self.labelling.without_labels or (unseen if self.labelling.evaluates_labels else None)
        if why is not None:
            raise InputError(why)

    def _name_unread(self, first: Mapping[str, Any]) -> None:
        """Say which columns of numbers nobody reads; transformers' Trainer leaves them out too."""
        unread = [
            name for name in first.keys() - self.first.keys() - set(LABELS) if not isinstance(first[name], str | None)
        ]
        if unread:
            logger.warning("%s: %s does not read the columns %s", self.name, self.kind, ", ".join(sorted(unread)))

    def __call__(self, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        """What of a row goes into a batch.

        Raises:
            InputError: where the network cannot read it.
        """
        used = used_columns(row, self.columns)
        self._check_columns(number, used)
        lengths: dict[str, list[int]] = {}
        for name, value in used.items():
            if name == "labels":
                continue
            options = self.labelling.takes_options and name in OF_OPTIONS and depth(value) == 2
            parts = [self._array(number, name, part) for part in (value if options else [value])]
            lengths[name] = [len(part) if part.ndim else 0 for part in parts]
            for part in parts:
                self._check_part(number, name, part)
            if not options:
                self._check_size(number, name, parts[0], length_of(used))
        self._check_lengths(number, lengths)
        return used

    def _check_columns(self, number: int, used: Mapping[str, Any]) -> None:
        main = main_input(self.network)
        if self.columns is not None and main not in used and "inputs_embeds" not in used:
            raise self._refused(
                number,
                f"{self.kind} reads {main!r}, and there is no such column (there are "
                f"{', '.join(used) or 'none that it reads'})",
            )
        if (used.keys() ^ self.first.keys()) - {"labels"}:
            raise self._refused(
                number,
                f"it has {', '.join(used)}, and row 0 has {', '.join(self.first)}: give every row the same columns",
            )

    def _array(self, number: int, name: str, value: Any) -> np.ndarray:
        try:
            array = as_array(value)
        except NOT_NUMBERS:
            raise self._refused(number, f"{name} must be numbers, got {str(value)[:40]!r}") from None
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise self._refused(number, f"{name} has a value that is NaN or infinite")
        return array

    def _check_part(self, number: int, name: str, part: np.ndarray) -> None:
        """A column of an example, or of one option of a choice."""
        most = self.tables.get(name)
        if name == "input_ids":
            self._check_tokens(number, part)
        elif most is not None and part.size and not 0 <= part.min() <= part.max() < most:
            raise self._refused(
                number,
                f"{name} go from 0 to {most - 1} in this network, got {part.min():g} to "
                f"{part.max():g}: encode with the network's own tokenizer",
            )
        elif name == "input_values" and part.size == 0:
            raise self._refused(number, "the sound is empty: leave it out")
        elif name == "attention_mask" and not part.any():
            raise self._refused(number, "attention_mask is 0 everywhere: leave the example out")

    def _check_tokens(self, number: int, tokens: np.ndarray) -> None:
        if tokens.ndim != 1:
            raise self._refused(
                number,
                f"input_ids are one list of tokens, got {tokens.ndim} dimensions: encode texts without return_tensors",
            )
        if len(tokens) == 0:
            raise self._refused(number, "the text is empty: leave it out, or give it a token")
        if tokens.dtype.kind == "f":
            raise self._refused(number, f"tokens are whole numbers, got {tokens[0]:g}")
        if self.vocabulary is not None and not 0 <= tokens.min() <= tokens.max() < self.vocabulary:
            outside = tokens[(tokens < 0) | (tokens >= self.vocabulary)]
            raise self._refused(
                number,
                f"token {outside[0]} is outside the network's {self.vocabulary} tokens: encode "
                "with the network's own tokenizer",
            )
        if self.positions is not None and len(tokens) > self.positions:
            raise self._refused(
                number,
                f"it has {len(tokens)} tokens, and the network has {self.positions} positions: "
                f"encode with truncation to max_length={self.positions}",
            )
        if self.end is not None:
            self._check_ends(number, int((tokens == self.end).sum()))

    def _check_ends(self, number: int, ends: int) -> None:
        self.ends = self.ends or ends
        if ends != self.ends or ends == 0:
            raise self._refused(
                number,
                f"{self.kind} reads at the end-of-text token {self.end}: each text needs as "
                f"many as row 0 ({max(self.ends, 1)}), and this one has {ends}",
            )

    def _check_size(self, number: int, name: str, array: np.ndarray, length: int) -> None:
        """That of the first row, but for the length."""
        varies = array.ndim == 1 or (array.ndim > 1 and len(array) == length)
        size = array.shape[1:] if varies else array.shape
        if self.sizes.setdefault(name, size) != size:
            raise self._refused(
                number,
                f"{name} has the shape {array.shape}, unlike that of the rows before: give all examples one size",
            )

    def _check_lengths(self, number: int, lengths: Mapping[str, list[int]]) -> None:
        """Masks and the like have one entry for each token."""
        main = lengths.get("input_ids", lengths.get("input_values"))
        for name in lengths.keys() & _PER_TOKEN if main is not None else ():
            if lengths[name] != main:
                raise self._refused(
                    number, f"{name} has {lengths[name]} entries, and the example {main}: one is needed for each"
                )

    def label(self, number: int, used: Mapping[str, Any]) -> float:
        """The label of a row; -1 where it is several, none of them known, and NaN where it is not one number.

        Raises:
            InputError: where it is no label for this likelihood.
        """
        label = used.get("labels")
        try:
            values = as_array(label)
        except NOT_NUMBERS:
            values = np.array(np.nan)
        if not np.isfinite(values).all():
            raise self._refused(number, f"every label must be a finite number, got {str(label)[:40]}")
        self.labelling.check_label(values, used, Where(self.name, number), self.network)
        if values.size == 1:
            return values.item()
        return UNLABELLED if np.isin(values, (UNLABELLED, NOT_SCORED)).all() else np.nan
