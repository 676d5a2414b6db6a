"""Which draws go into which ArviZ group, and what their axes are called. Plain arrays, no ArviZ."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bayeslora.analysis.checks import check_labels
from bayeslora.errors import InputError

Groups = dict[str, dict[str, np.ndarray]]
Coords = dict[str, Any]

DIMS = {
    "mixture_weights": ["adapter", "component"],
    "covariance": ["adapter", "rank", "rank_other"],
    "noise_scale": ["adapter"],
    "noise_to_signal": ["adapter"],
    "mean_scale": ["adapter"],
    "class_probs": ["example", "label"],
    "mean": ["example"],
    "labels": ["example"],
}


def posterior_groups(draws: Any) -> tuple[Groups, Coords, dict[str, list[str]]]:
    """Groups, coordinates and dimensions of the variables that need no data set.

    Args:
        draws: What ``BayesLoRA.posterior_draws`` returned, for S draws of K adapters.
    """
    mixture_weights = np.asarray(draws.mixture_weights)  # (S, K, N)
    covariance = np.asarray(draws.covariance)  # (S, K, r, r)
    noise_scale = np.asarray(draws.noise_scale)  # (S, K)
    mean_scale = np.asarray(draws.mean_scale)  # (K,)
    matrices = _matrices(draws.A, rank=covariance.shape[-1])
    sampled = {
        "mixture_weights": mixture_weights,
        "covariance": covariance,
        "noise_scale": noise_scale,
        "noise_to_signal": noise_scale / np.where(mean_scale > 0, mean_scale, np.nan),
        **matrices,
    }
    coords = {
        "adapter": list(draws.adapters),
        "component": np.arange(mixture_weights.shape[-1]),
        "rank": np.arange(covariance.shape[-1]),
        "rank_other": np.arange(covariance.shape[-1]),
    }
    groups = {"posterior": _one_chain(sampled), "constant_data": {"mean_scale": mean_scale}}
    return groups, coords, {**DIMS, **{name: ["rank", "column"] for name in matrices}}


def prediction_groups(prediction: Any, seed: int) -> tuple[Groups, Coords]:
    """Groups and coordinates of the variables that come from a data set.

    Args:
        prediction: What ``BayesLoRA.predict`` returned, for S draws of n examples.
        seed: Decides the labels that are drawn.

    Raises:
        InputError: The task is neither classification nor regression, or the labels do not fit.
    """
    if getattr(prediction, "sample_log_probs", None) is not None:
        return _classification_groups(prediction, seed)
    if getattr(prediction, "sample_means", None) is not None:
        return _regression_groups(prediction, seed)
    raise InputError(
        "predict() returned neither sample_log_probs (classification) nor sample_means (regression); "
        "ArviZ data hold one of the two, so leave dataset=None for other tasks"
    )


def _classification_groups(prediction: Any, seed: int) -> tuple[Groups, Coords]:
    log_probs = np.asarray(prediction.sample_log_probs)  # (S, n, C)
    num_examples, num_classes = log_probs.shape[1:]
    probs = np.exp(log_probs)
    sampled = {"class_probs": probs, "labels": _draw_labels(probs, seed)}
    groups = {"posterior_predictive": _one_chain(sampled)}
    names = prediction.label_names
    coords = {
        "example": np.arange(num_examples),
        "label": np.arange(num_classes) if names is None else [str(name) for name in names],
    }
    if prediction.labels is not None:
        labels = check_labels(prediction.labels, num_examples=num_examples, num_classes=num_classes)
        pointwise = log_probs[:, np.arange(num_examples), labels]  # (S, n)
        groups["log_likelihood"] = _one_chain({"labels": pointwise})
        groups["observed_data"] = {"labels": labels}
    return groups, coords


def _regression_groups(prediction: Any, seed: int) -> tuple[Groups, Coords]:
    means = np.asarray(prediction.sample_means)  # (S, n)
    sampled = {"mean": means}
    if getattr(prediction, "noise_scale", None) is not None:
        noise = np.random.default_rng(seed).standard_normal(means.shape)
        sampled["labels"] = means + prediction.noise_scale * noise
    groups = {"posterior_predictive": _one_chain(sampled)}
    pointwise = getattr(prediction, "sample_log_likelihood", None)
    if pointwise is not None:
        groups["log_likelihood"] = _one_chain({"labels": np.asarray(pointwise)})
    if prediction.labels is not None:
        groups["observed_data"] = {"labels": np.asarray(prediction.labels)}
    return groups, {"example": np.arange(means.shape[1])}


def _draw_labels(probs: np.ndarray, seed: int) -> np.ndarray:
    """One class index per draw and example, ``(S, n)``, by inverting the cumulative probabilities."""
    cumulative = probs.cumsum(axis=-1, dtype=np.float64)  # (S, n, C)
    uniform = np.random.default_rng(seed).random(probs.shape[:-1])  # (S, n)
    threshold = uniform * cumulative[..., -1]  # a row that sums to 1 - 1e-7 must not yield class C
    return (threshold[..., None] >= cumulative).sum(axis=-1)


def _one_chain(variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Independent draws are one chain: ``(S, ...)`` becomes ``(1, S, ...)``."""
    return {name: values[None] for name, values in variables.items()}


def _matrices(by_adapter: Mapping[str, np.ndarray], *, rank: int) -> dict[str, np.ndarray]:
    """One variable per requested adapter, all as large as the largest, NaN where there is no entry.

    netCDF reads a slash in a name as a group, so none may stay.
    """
    columns = max((matrix.shape[-1] for matrix in by_adapter.values()), default=0)
    return {
        f"A[{name.replace('/', '.')}]": _pad(np.asarray(matrix), rank, columns) for name, matrix in by_adapter.items()
    }


def _pad(matrix: np.ndarray, rank: int, columns: int) -> np.ndarray:
    """``(S, r, n_in)`` in the corner of ``(S, rank, columns)``, NaN elsewhere."""
    missing = ((0, 0), (0, rank - matrix.shape[1]), (0, columns - matrix.shape[2]))
    return np.pad(matrix, missing, constant_values=np.nan)
