"""Rows of whatever holds them: a list, a data set of the library, torch's."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from bayeslora.errors import InputError

_CHUNK = 1000  # rows fetched at a time


def check_kind(dataset: Any, name: str = "the data set") -> None:
    """Refuse what has no numbered rows that are dicts: a table by columns, splits, a stream.

    Raises:
        InputError: saying what to pass instead.
    """
    if isinstance(dataset, Mapping):
        raise InputError(
            f"{name} is a mapping of {', '.join(map(str, dataset))}: of several splits pass one, and of "
            "columns datasets.Dataset.from_dict(...)"
        )
    if hasattr(dataset, "iloc"):
        raise InputError(f"{name} is a table of pandas: pass datasets.Dataset.from_pandas(...)")
    numbered = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not numbered or isinstance(dataset, str | Tensor | IterableDataset):
        raise InputError(
            f"{name} is a {type(dataset).__name__}, which has no numbered rows: pass a list of dicts, a "
            "datasets.Dataset or the like (list(...) makes one of a stream)"
        )
    if len(dataset) and isinstance(dataset[0], str):
        raise InputError(
            f"{name} holds texts: tokenize each first, or open_run(folder).predict(texts), which does it as in the fit"
        )
    if len(dataset) and not isinstance(dataset[0], Mapping):
        raise InputError(f"{name}, row 0 is a {type(dataset[0]).__name__}: expected a dict from column to value")


def rows_of(dataset: Any) -> Iterator[Any]:
    several = getattr(dataset, "__getitems__", None)  # as torch's loaders fetch them
    for start in range(0, len(dataset), _CHUNK):
        numbers = list(range(start, min(start + _CHUNK, len(dataset))))
        yield from several(numbers) if several is not None else (dataset[number] for number in numbers)
