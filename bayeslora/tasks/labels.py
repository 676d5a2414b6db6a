"""Labels as they come in files, turned into class indices or floats and checked on the way."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bayeslora.errors import InputError
from bayeslora.tasks.reading import require_column

if TYPE_CHECKING:
    from datasets import Dataset

UNLABELLED = -1


def prepare_labels(
    name: str, splits: "dict[str, Dataset]", column: str, label_names: Sequence[str] | None
) -> "tuple[dict[str, Dataset], tuple[str, ...]]":
    """Turn the label column of every split into class indices, or into floats for regression.

    The training split decides: strings become their position in ``label_names`` or, without it, among the
    sorted labels; integers must be 0..C-1; booleans count as 0 and 1; floats mean regression unless there are
    ``label_names``. A split whose labels are all -1 stays as it is, and a held-out split whose labels are all
    null loses the column: both are unlabelled.

    Args:
        name: The task's name, for messages.
        splits: The data sets by split.
        column: The label column; held-out splits may lack it.
        label_names: Names of the classes in order, if they are known.

    Returns:
        The splits, and the names of the classes (empty for regression).

    Raises:
        InputError: there are no labels to learn the classes from, or a label is missing or not a class.
    """
    reference = _reference_split(splits, column)
    if reference is None and label_names:
        return dict(splits), tuple(label_names)
    reference = reference or next(iter(splits))
    where = f"task {name!r}, split {reference!r}"
    require_column(where, splits[reference], column, "label_column")
    names = _class_names(where, splits[reference], column, label_names)
    prepared = {
        split: _prepare_split(f"task {name!r}, split {split!r}", data, column, names, split == reference)
        for split, data in splits.items()
    }
    return prepared, names


def is_labelled(data: "Dataset", column: str) -> bool:
    """Whether the column is there and holds more than -1, the mark of an unlabelled official test split."""
    if column not in data.column_names:
        return False
    return any(value != UNLABELLED and not _is_missing(value) for value in data[column][:])


def _reference_split(splits: "dict[str, Dataset]", column: str) -> str | None:
    """The split that shows what labels look like: train, else the first with labels in it."""
    if "train" in splits:
        return "train"
    return next((split for split, data in splits.items() if is_labelled(data, column)), None)


def _class_names(where: str, data: "Dataset", column: str, label_names: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the classes; empty for regression."""
    from datasets import ClassLabel, Value

    feature = data.features[column]
    if not isinstance(feature, Value | ClassLabel):
        raise InputError(f"{where}: label column {column!r} holds {feature}, expected one label per row")
    if label_names:
        names = tuple(label_names)
    elif isinstance(feature, ClassLabel):
        names = tuple(feature.names)
    elif feature.dtype.startswith("float"):
        return ()
    else:
        names = names_from_values(where, data[column][:])
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"{where}: the classes are {_show(names)}; expected two or more different ones")
    return names


def names_from_values(where: str, values: Sequence[Any]) -> tuple[str, ...]:
    """Names of the classes that a data set's labels show.

    Raises:
        InputError: for numbers that are not 0..C-1.
    """
    seen = {value for value in values if not _is_missing(value)}
    if any(isinstance(value, str) for value in seen):
        return tuple(sorted(seen))
    if all(isinstance(value, bool) for value in seen):
        return ("False", "True")
    if seen != set(range(len(seen))):
        raise InputError(
            f"{where}: the labels are {_show(sorted(seen))}; expected the integers 0..C-1, all of them; "
            "renumber them, or give label_names=(...) if a class has no examples"
        )
    return tuple(str(value) for value in sorted(seen))


def _prepare_split(where: str, data: "Dataset", column: str, names: tuple[str, ...], is_reference: bool) -> "Dataset":
    from datasets import Value

    values = data[column][:] if column in data.column_names else []
    if all(value == UNLABELLED for value in values):
        return data
    if not is_reference and all(_is_missing(value) for value in values):
        return data.remove_columns(column)
    labels = _convert(where, values, names)
    feature = Value("int64" if names else "float64")
    if data.features[column] == feature:
        return data
    return data.remove_columns(column).add_column(column, labels, feature=feature)


def _convert(where: str, values: Sequence[Any], names: tuple[str, ...]) -> list[Any]:
    if names:
        return class_indices(where, values, names)
    return _checked(where, values, [_finite_float(value) for value in values], names, "row")


def class_indices(where: str, values: Sequence[Any], names: tuple[str, ...], each: str = "row") -> list[int]:
    """The place of each value, a name or a number, among the names of the classes.

    Raises:
        InputError: for one that is no class; ``each`` is what it is the label of.
    """
    positions = {class_name: index for index, class_name in enumerate(names)}
    return _checked(where, values, [_class_index(value, positions) for value in values], names, each)


def _checked(where: str, values: Sequence[Any], labels: list[Any], names: tuple[str, ...], each: str) -> list[Any]:
    if None in labels:
        row = labels.index(None)
        problem = "has no label" if _is_missing(values[row]) else f"has the label {values[row]!r}"
        raise InputError(f"{where}: {each} {row} {problem}, expected {_expected(names)}")
    return labels


def _expected(names: tuple[str, ...]) -> str:
    if not names:
        return "a finite number, or classes named with label_names=(...)"
    return f"one of the classes 0..{len(names) - 1} ({_show(names)}); label_names=(...) names others"


def _class_index(value: Any, positions: dict[str, int]) -> int | None:
    if isinstance(value, str):
        return positions.get(value)
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value) if 0 <= value < len(positions) else None
    return None


def _finite_float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or value != value


def _show(values: Sequence[Any]) -> str:
    shown = [str(value) for value in values[:8]]
    return ", ".join([*shown, "..."] if len(values) > 8 else shown) or "none"
