"""Inputs that belong to no class of a task: those a data set brings itself, and those of another data set.

References:
    Larson et al. (2019), *An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction* (CLINC150).
    Zhang, Zhao and LeCun (2015), *Character-level Convolutional Networks for Text Classification* (AG News).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bayeslora.errors import InputError
from bayeslora.tasks.reading import require_column

if TYPE_CHECKING:
    from datasets import Dataset


def separate(
    name: str, splits: "dict[str, Dataset]", column: str, label: str
) -> "tuple[dict[str, Dataset], dict[str, list[int]]]":
    """Examples labelled out of scope in splits of their own, unlabelled.

    Those of ``test`` become ``out_of_scope``, those of ``validation`` ``validation_out_of_scope``, and so on; those
    of ``train`` are left out, so that nothing is learnt about them.

    Args:
        name: The task's name, for messages.
        splits: Data sets by split.
        column: The label column: strings, or integers that the file itself names.
        label: The name that marks an example as out of scope.

    Returns:
        The same splits without those examples, and after them the new ones; and of each the rows that it had.

    Raises:
        InputError: there is no such column, or its labels are numbers without names.
    """
    inside, outside, origin = {}, {}, {}
    for split, data in splits.items():
        data = _named(f"task {name!r}, split {split!r}", data, column)
        foreign = [value == label for value in data[column][:]]
        origin[split] = [row for row, is_foreign in enumerate(foreign) if not is_foreign]
        inside[split] = data.select(origin[split])
        if any(foreign) and split != "train":
            title = "out_of_scope" if split == "test" else f"{split}_out_of_scope"
            origin[title] = [row for row, is_foreign in enumerate(foreign) if is_foreign]
            outside[title] = data.select(origin[title]).remove_columns(column)
    return inside | outside, origin


def borrow(texts: Sequence[str], columns: Sequence[str]) -> "Dataset":
    """Texts of another data set as unlabelled examples with these text columns.

    The first column holds each text; where a task is on several, the next ones hold the texts that follow it.
    """
    from datasets import Dataset

    texts = list(texts)
    return Dataset.from_dict(
        {column: texts[shift % len(texts) :] + texts[: shift % len(texts)] for shift, column in enumerate(columns)}
    )


def _named(where: str, data: "Dataset", column: str) -> "Dataset":
    """Labels as strings."""
    from datasets import ClassLabel, Value

    require_column(where, data, column, "label_column")
    feature = data.features[column]
    if isinstance(feature, ClassLabel):
        names = [None if value is None else feature.int2str(value) for value in data[column][:]]
        return data.remove_columns(column).add_column(column, names, feature=Value("string"))
    if getattr(feature, "dtype", "") not in ("string", "large_string"):
        raise InputError(
            f"{where}: label column {column!r} holds {getattr(feature, 'dtype', feature)}, expected names of classes, "
            "one of which says out of scope"
        )
    return data
