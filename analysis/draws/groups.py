"""Which draws go into which ArviZ group, and what their axes are called. Plain arrays, no ArviZ."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bayeslora.analysis.draws.adapter_names import short_names
from bayeslora.analysis.metrics.checks import check_labels
from bayeslora.errors import InputError

Variables = dict[str, np.ndarray]

DIMS = {
    "mixture_weights": ["adapter", "component"],
    "covariance": ["adapter", "rank", "rank_other"],
    "noise_scale": ["adapter"],
    "noise_to_signal": ["adapter"],
    "noise_to_signal_map": ["layer", "projection"],
    "mean_scale": ["adapter"],
    "layer_of": ["adapter"],
    "projection_of": ["adapter"],
    "class_probs": ["example", "class"],
    "mean": ["example"],
    "labels": ["example"],
}
NOT_IN_STACK = -1  # the layer of an adapter outside the stack of layers


class Groups(NamedTuple):
    """What ArviZ data are made of: variables by group, values along each dimension, dimensions of each variable.

    Sampled groups have shape ``(chain, draw, ...)``; ``dims`` leaves those two out.
    """

    variables: dict[str, Variables]
    coords: dict[str, Any]
    dims: dict[str, list[str]]

    def update(self, other: "Groups") -> None:
        self.variables.update(other.variables)
        self.coords.update(other.coords)
        self.dims.update(other.dims)


def posterior_groups(draws: Any, *, group: str = "posterior") -> Groups:
    """The variables that need no data set.

    Args:
        draws: What ``BayesLoRA.posterior_draws`` (or ``prior_draws``) returned, for S draws of K adapters.
        group: ``"posterior"`` or ``"prior"``.
    """
    mixture_weights = np.asarray(draws.mixture_weights)  # (S, K, N)
    covariance = np.asarray(draws.covariance)  # (S, K, r, r)
    noise_scale = np.asarray(draws.noise_scale)  # (S, K)
    mean_scale = np.asarray(draws.mean_scale)  # (K,)
    noise_to_signal = noise_scale / np.where(mean_scale > 0, mean_scale, np.nan)
    names = short_names(draws.adapters)
    layers = [NOT_IN_STACK if name.layer is None else name.layer for name in names]
    places = _Places(layers, [name.kind for name in names])
    matrices = _matrices(draws.A, rank=covariance.shape[-1])
    sampled = {
        "mixture_weights": mixture_weights,
        "covariance": covariance,
        "noise_scale": noise_scale,
        "noise_to_signal": noise_to_signal,
        "noise_to_signal_map": places.arrange(noise_to_signal),
        **matrices,
    }
    constant = {
        "mean_scale": mean_scale,
        "layer_of": np.array(layers),
        "projection_of": np.array([name.kind for name in names]),
    }
    coords = {
        "adapter": list(draws.adapters),
        "layer": places.layers,
        "projection": places.projections,
        "component": np.arange(mixture_weights.shape[-1]),
        "rank": np.arange(covariance.shape[-1]),
        "rank_other": np.arange(covariance.shape[-1]),
    }
    dims = {**DIMS, **{name: ["rank", "column"] for name in matrices}}
    return Groups({group: _one_chain(sampled), "constant_data": constant}, coords, dims)


class _Places:
    """Where each adapter lies in the grid of layers and projections; a place holds one adapter at most."""

    def __init__(self, layers: Sequence[int], projections: Sequence[str]):
        self.layers = sorted(set(layers))
        self.projections = list(dict.fromkeys(projections))
        self._rows = [self.layers.index(layer) for layer in layers]
        self._columns = [self.projections.index(projection) for projection in projections]

    def arrange(self, values: np.ndarray) -> np.ndarray:
        """``(S, K)`` as ``(S, layers, projections)``, NaN where there is no adapter."""
        grid = np.full((len(values), len(self.layers), len(self.projections)), np.nan, dtype=values.dtype)
        grid[:, self._rows, self._columns] = values
        return grid


def prediction_groups(prediction: Any, seed: int, *, first_draw: int = 0, prior: bool = False) -> Groups:
    """The variables that come from a data set; of texts there is only their log-likelihood.

    Args:
        prediction: What ``BayesLoRA.predict`` returned, for S draws of n examples.
        seed: Decides the labels that are drawn; those of draw s depend on it and s alone.
        first_draw: Number of the first draw.
        prior: They are draws of the prior: only ``prior_predictive``.

    Raises:
        InputError: The task is none that is known, or the labels do not fit.
    """
    if getattr(prediction, "text_log_likelihood", None) is not None:
        return _text_groups(prediction, prior)
    random = [np.random.default_rng([seed, prior, first_draw + s]) for s in range(_num_draws(prediction))]
    if getattr(prediction, "sample_log_probs", None) is not None:
        groups = _classification_groups(prediction, random)
    else:
        groups = _regression_groups(prediction, random)
    if prior:
        predictive = groups.variables["posterior_predictive"]
        return groups._replace(variables={"prior_predictive": predictive})
    return groups


def _num_draws(prediction: Any) -> int:
    for name in ("sample_log_probs", "sample_means"):
        draws = getattr(prediction, name, None)
        if draws is not None:
            return len(draws)
    raise InputError(
        "predict() returned neither sample_log_probs (classification) nor sample_means (regression); "
        "ArviZ data hold one of the two, so leave dataset=None for other tasks"
    )


def _classification_groups(prediction: Any, random: list[np.random.Generator]) -> Groups:
    log_probs = np.asarray(prediction.sample_log_probs)  # (S, n, C)
    num_examples, num_classes = log_probs.shape[1:]
    probs = np.exp(log_probs)
    groups = {"posterior_predictive": _one_chain({"class_probs": probs, "labels": _draw_labels(probs, random)})}
    names = prediction.label_names
    coords = {
        "example": np.arange(num_examples),
        "class": np.arange(num_classes) if names is None else [str(name) for name in names],
    }
    if prediction.labels is not None:
        labels = check_labels(prediction.labels, num_examples=num_examples, num_classes=num_classes)
        pointwise = log_probs[:, np.arange(num_examples), labels]  # (S, n)
        groups["log_likelihood"] = _one_chain({"labels": pointwise})
        groups["observed_data"] = {"labels": labels}
    return Groups(groups, coords, dict(DIMS))


def _regression_groups(prediction: Any, random: list[np.random.Generator]) -> Groups:
    means = np.asarray(prediction.sample_means)  # (S, n)
    sampled = {"mean": means}
    if getattr(prediction, "noise_scale", None) is not None:
        noise = np.stack([generator.standard_normal(means.shape[1]) for generator in random])
        sampled["labels"] = means + prediction.noise_scale * noise
    groups = {"posterior_predictive": _one_chain(sampled)}
    pointwise = getattr(prediction, "sample_log_likelihood", None)
    if pointwise is not None:
        groups["log_likelihood"] = _one_chain({"labels": np.asarray(pointwise)})
    if prediction.labels is not None:
        groups["observed_data"] = {"labels": np.asarray(prediction.labels)}
    return Groups(groups, {"example": np.arange(means.shape[1])}, dict(DIMS))


def _text_groups(prediction: Any, prior: bool) -> Groups:
    pointwise = np.asarray(prediction.text_log_likelihood)  # (S, n)
    groups = {} if prior else {"log_likelihood": _one_chain({"labels": pointwise})}
    return Groups(groups, {"example": np.arange(pointwise.shape[1])}, dict(DIMS))


def _draw_labels(probs: np.ndarray, random: list[np.random.Generator]) -> np.ndarray:
    """One class index per draw and example, ``(S, n)``, by inverting the cumulative probabilities."""
    cumulative = probs.cumsum(axis=-1, dtype=np.float64)  # (S, n, C)
    uniform = np.stack([generator.random(probs.shape[1]) for generator in random])  # (S, n)
    threshold = uniform * cumulative[..., -1]  # a row that sums to 1 - 1e-7 must not yield class C
    return (threshold[..., None] >= cumulative).sum(axis=-1)


def _one_chain(variables: Mapping[str, np.ndarray]) -> Variables:
    """Independent draws are one chain: ``(S, ...)`` becomes ``(1, S, ...)``."""
    return {name: values[None] for name, values in variables.items()}


def _matrices(by_adapter: Mapping[str, np.ndarray], *, rank: int) -> Variables:
    """One variable per requested adapter, all as large as the largest, NaN where there is no entry.

    netCDF reads a slash in a name as a group, so none may stay.
    """
    columns = max((matrix.shape[-1] for matrix in by_adapter.values()), default=0)
    return {
        f"A[{name.replace('/', '.')}]": _pad(np.asarray(matrix), rank, columns) for name, matrix in by_adapter.items()
    }


def _pad(matrix: np.ndarray, rank: int, columns: int) -> np.ndarray:
    """``(S, r, n_in)`` in the corner of ``(S, rank, columns)``, NaN elsewhere; itself where it is as large."""
    missing = (rank - matrix.shape[1], columns - matrix.shape[2])
    if missing == (0, 0):
        return matrix
    return np.pad(matrix, ((0, 0), (0, missing[0]), (0, missing[1])), constant_values=np.nan)
