"""What every function of class probabilities asks of its arguments, checked at the door."""

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.errors import InputError

SUM_TOLERANCE = 1e-3  # float16 softmax rows are off by up to 5e-4; logits are off by far more


def check_probs(
    probs: ArrayLike, *, name: str = "probs", axes: tuple[str, ...] = ("examples", "classes")
) -> np.ndarray:
    """Probabilities as a float64 array, or an `InputError` that says what is wrong with them.

    Args:
        probs: Class probabilities, one axis per entry of ``axes``, summing to one over the last.
        name: What the caller calls them, for the message.
        axes: Names of the axes, for the message.

    Raises:
        InputError: Wrong number of axes, nothing in them, one class only, a value that is negative or not
            finite, or a row whose sum differs from one by more than 1e-3.
    """
    values = np.asarray(probs, dtype=np.float64)
    expected = f"({', '.join(axes)})"
    if values.ndim != len(axes):
        raise InputError(f"{name} must have shape {expected}, but has shape {values.shape}")
    for axis, size in zip(axes, values.shape, strict=True):
        if size == 0:
            raise InputError(f"{name} is empty: no {axis} in shape {expected} = {values.shape}")
    if values.shape[-1] < 2:
        raise InputError(f"{name} has one class; give one column per class, for example [1 - p, p]")
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds NaN or infinite values")
    if (values < 0).any():
        raise InputError(f"{name} holds negative values; take the exponential of log probabilities first")
    _check_sums(values, name)
    return values


def _check_sums(values: np.ndarray, name: str) -> None:
    """Rows over the last axis sum to one, within what a half-precision softmax can do."""
    gap = np.abs(values.sum(axis=-1) - 1.0)
    if gap.max() > SUM_TOLERANCE:
        row = tuple(int(i) for i in np.unravel_index(gap.argmax(), gap.shape))
        place = row[0] if len(row) == 1 else row
        raise InputError(
            f"{name} must sum to one in each row, but row {place} sums to {values[row].sum():.6g}; "
            "apply softmax to logits first"
        )


def check_labels(labels: ArrayLike, *, num_examples: int, num_classes: int, name: str = "labels") -> np.ndarray:
    """Class indices as an integer array of shape ``(num_examples,)``, each in ``0 .. num_classes - 1``.

    Raises:
        InputError: Wrong shape, fractions, or an index outside the classes (such as the -1 of an
            unlabelled test split).
    """
    values = np.asarray(labels)
    if values.shape != (num_examples,):
        raise InputError(
            f"{name} must have shape ({num_examples},), one per row of probabilities, but has shape {values.shape}"
        )
    if not np.issubdtype(values.dtype, np.integer) and not np.issubdtype(values.dtype, np.bool_):
        raise InputError(f"{name} must be class indices (integers), but their dtype is {values.dtype}")
    indices = values.astype(np.int64)
    outside = indices[(indices < 0) | (indices >= num_classes)]
    if outside.size:
        raise InputError(
            f"{name} must lie in 0 .. {num_classes - 1} for {num_classes} classes, but {outside.size} do not "
            f"(the first is {outside[0]}); leave unlabelled examples out"
        )
    return indices


def check_probs_and_labels(probs: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities ``(examples, classes)`` and a class index for each example, both checked."""
    values = check_probs(probs)
    num_examples, num_classes = values.shape
    return values, check_labels(labels, num_examples=num_examples, num_classes=num_classes)


def check_examples(values: ArrayLike, *, name: str, size: int | None = None) -> np.ndarray:
    """One finite number per example as a float64 array of shape ``(examples,)``.

    Raises:
        InputError: Another shape, nothing in it, or values that are not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or (size is not None and len(array) != size):
        expected = "(examples,)" if size is None else f"({size},)"
        raise InputError(f"{name} must have shape {expected}, but has shape {array.shape}")
    if not len(array):
        raise InputError(f"{name} is empty: no examples")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds NaN or infinite values")
    return array


def check_level(level: float, *, name: str = "level") -> float:
    """A share strictly between 0 and 1, such as a coverage level."""
    if not 0.0 < level < 1.0:
        raise InputError(f"{name} must lie between 0 and 1, for example 0.95, but is {level}")
    return level
