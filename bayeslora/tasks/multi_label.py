"""Texts with several labels, of which each applies or does not: a column of lists of labels, or a column for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.errors import InputError
from bayeslora.tasks.base import Task
from bayeslora.tasks.labels import class_indices, names_from_values
from bayeslora.tasks.network import load_network
from bayeslora.tasks.reading import list_of, require_column

if TYPE_CHECKING:
    from datasets import Dataset

COLUMN = "labels applying"  # of lists of 0 and 1, which are made of what is read


def are_label_lists(splits: "dict[str, Dataset]", label_column: str | Sequence[str]) -> bool:
    """Whether labels come as lists, or in several columns."""
    if not isinstance(label_column, str):
        return True
    return any(label_column in data.column_names and list_of(data, label_column) for data in splits.values())


def prepare_label_lists(
    name: str, splits: "dict[str, Dataset]", label_column: str | Sequence[str], label_names: Sequence[str] | None
) -> "tuple[dict[str, Dataset], tuple[str, ...]]":
    """Splits with 0 or 1 for each label, in a column :data:`COLUMN`, and the names of the labels.

    Raises:
        InputError: naming the row that has no labels, or none of this kind.
    """
    reference = "train" if "train" in splits else next(iter(splits))
    where = f"task {name!r}, split {reference!r}"
    for column in [label_column] if isinstance(label_column, str) else label_column:
        require_column(where, splits[reference], column, "label_column")
    if isinstance(label_column, str):
        names = _names(where, splits[reference], label_column, label_names)
    else:
        names = tuple(label_names or label_column)
        if len(names) != len(label_column):
            raise InputError(f"{where}: {len(label_column)} label columns, but {len(names)} label_names")
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"{where}: the labels are {', '.join(names) or 'none'}; expected two or more different ones")
    prepared = {}
    for split, data in splits.items():
        values = _applying(f"task {name!r}, split {split!r}", data, label_column, names)
        prepared[split] = data if values is None else _with(data, values)
    if COLUMN not in prepared[reference].column_names:
        raise InputError(f"{where}: no row has labels: there is nothing to learn from")
    return prepared, names


def _with(data: "Dataset", values: list[list[int]]) -> "Dataset":
    from datasets import List, Value

    return data.add_column(COLUMN, values, feature=List(Value("int64")))


def _names(where: str, data: "Dataset", column: str, given: Sequence[str] | None) -> tuple[str, ...]:
    feature = getattr(data.features[column], "feature", None)
    if str(getattr(feature, "dtype", "")).startswith("float"):
        raise InputError(
            f"{where}: label column {column!r} holds lists of floats, expected the names or numbers of the labels that "
            "apply; of 0 and 1 give a column for each label"
        )
    values = [label for labels in data[column][:] for label in labels or ()]
    return tuple(given or getattr(feature, "names", None) or names_from_values(where, values))


def _applying(
    where: str, data: "Dataset", column: str | Sequence[str], names: tuple[str, ...]
) -> list[list[int]] | None:
    """0 or 1 for each label of each row; None for an unlabelled split."""
    if not data.num_rows:
        raise InputError(f"{where}: the data set is empty; expected at least one example")
    columns = [column] if isinstance(column, str) else list(column)
    present = [name for name in columns if name in data.column_names]
    if present and present != columns:
        require_column(where, data, next(name for name in columns if name not in present), "label_column")
    read = {name: data[name][:] for name in present}
    if all(value is None or value == -1 for values in read.values() for value in values):
        return None
    if isinstance(column, str):
        return [_of_list(f"{where}, row {row}", labels, names) for row, labels in enumerate(read[column])]
    return [
        [_of_flag(f"{where}, row {row}", name, flag) for name, flag in zip(columns, flags, strict=True)]
        for row, flags in enumerate(zip(*read.values(), strict=True))
    ]


def _of_list(where: str, labels: Sequence[Any] | None, names: tuple[str, ...]) -> list[int]:
    if labels is None:
        raise InputError(f"{where} has no labels: give an empty list where none applies")
    numbers = class_indices(where, labels, names, "label")
    if len(set(numbers)) < len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise InputError(
            f"{where} has the label {names[twice]!r} twice: labels that apply are listed once; of 0 and 1 give a "
            "column for each label"
        )
    return [int(number in numbers) for number in range(len(names))]


def _of_flag(where: str, name: str, flag: Any) -> int:
    if flag not in (0, 1):  # True and 1.0 are 1
        raise InputError(f"{where}: column {name!r} holds {flag!r}, expected 1 where the label applies, else 0")
    return int(flag)


@dataclass(frozen=True, eq=False)
class MultiLabelTask(Task):
    """A :class:`bayeslora.tasks.base.Task` whose examples have any number of the labels.

    Attributes:
        columns: The column of lists of labels, or one for each label, as it was read.
    """

    columns: str | tuple[str, ...] = ()
    scores_probabilities = False  # what is compared are probabilities of one label

    @property
    def kind(self) -> str:
        return "multi_label"

    @property
    def recipe(self) -> dict[str, Any]:
        columns = self.columns if isinstance(self.columns, str) else list(self.columns)
        return {**super().recipe, "label_column": columns, "kind": self.kind}

    def is_labelled(self, split: str) -> bool:
        return self.label_column in self.split(split).column_names

    def load_network(self, path: str | Path, **kwargs: Any) -> tuple[Any, Any]:
        """A pretrained network with an output for each label, and its tokenizer."""
        return load_network(path, self.label_names, kind=self.kind, **kwargs)
