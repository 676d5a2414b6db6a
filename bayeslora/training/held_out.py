"""Examples that a width is tuned on: given, or held out of training."""

from numbers import Real
from typing import Any

import numpy as np
from torch.utils.data import Subset

from bayeslora.data.rows import check_kind
from bayeslora.errors import InputError
from bayeslora.inference.tuning import LEAST_EXAMPLES


def hold_out(dataset: Any, tune: Any, seed: int) -> tuple[Any, Any]:
    """What to train on, and what to tune on.

    Args:
        dataset: Numbered training examples.
        tune: None for nothing; labelled examples of their own; or the share of ``dataset`` to hold out, in (0, 1).
        seed: Decides which examples those are.

    Raises:
        InputError: for a share out of range, or too few examples.

    Example:
        >>> train, held = hold_out([{"labels": i} for i in range(100)], 0.2, seed=0)
        >>> len(train), len(held)
        (80, 20)
    """
    if tune is None:
        return dataset, None
    if tune is dataset:
        raise InputError(
            "tune is the training data itself, by which less noise looks better: pass other examples, or a share such "
            "as tune=0.1 that is held out of training"
        )
    if isinstance(tune, bool) or not isinstance(tune, Real):
        return dataset, tune
    check_kind(dataset)
    share = float(tune)
    if not 0 < share < 1:
        raise InputError(f"tune is a share of the training examples, above 0 and below 1, or a data set, got {tune!r}")
    count = round(share * len(dataset))
    if count < LEAST_EXAMPLES or len(dataset) - count < 1:
        raise InputError(
            f"tune={share:g} holds out {count} of {len(dataset)} training examples, and a width needs at least "
            f"{LEAST_EXAMPLES}: hold out more, or pass a data set"
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    return _taken(dataset, np.sort(order[count:])), _taken(dataset, np.sort(order[:count]))


def _taken(dataset: Any, places: np.ndarray) -> Any:
    if hasattr(dataset, "select"):
        return dataset.select(places)
    if isinstance(dataset, list):
        return [dataset[place] for place in places]
    return Subset(dataset, places.tolist())  # what makes its rows anew goes on doing so
