"""Posterior draws as ArviZ data. The one file that imports ArviZ, and the one that knows its two shapes.

ArviZ before 1.0 keeps groups in an ``InferenceData``; from 1.0 on (Python 3.12 and later) in an
``xarray.DataTree``. Both answer to ``data["posterior"]``, ``data.posterior`` and ``data.attrs``, which is all
this library uses.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bayeslora.analysis.groups import posterior_groups, prediction_groups
from bayeslora.errors import InputError

ENGINE = "h5netcdf"


def to_arviz(
    bayes: Any,
    dataset: Any = None,
    *,
    num_samples: int = 64,
    seed: int = 0,
    adapters: Sequence[str] = (),
    batch_size: int = 32,
) -> Any:
    """Draws from the posterior, and from its predictions on a data set, as ArviZ data.

    Groups and variables, with ``chain = 1`` and ``draw = num_samples`` in front of those that are sampled:

    ==========================  =====================================================================
    posterior                   ``mixture_weights[adapter, component]``,
                                ``covariance[adapter, rank, rank_other]``,
                                ``noise_scale[adapter]`` (root mean square of the noise on A),
                                ``noise_to_signal[adapter]`` (that, over ``mean_scale``);
                                for each of ``adapters``, ``A[<name>][rank, column]``
    constant_data               ``mean_scale[adapter]`` (root mean square of the mean of A)
    posterior_predictive        ``class_probs[example, label]``, or ``mean[example]`` for regression;
                                ``labels[example]`` drawn from that
    log_likelihood              ``labels[example]``, pointwise, in nats
    observed_data               ``labels[example]``
    ==========================  =====================================================================

    Adapters of unequal rank or width share the axes of the largest; entries that do not exist are NaN.
    ``noise_to_signal`` is NaN where the mean of A is zero. The draws are independent, so the single
    chain needs no convergence check.

    Args:
        bayes: A fitted model, such as `BayesLoRA`.
        dataset: What to predict; without it only ``posterior`` and ``constant_data`` exist. Without labels
            there is neither ``log_likelihood`` nor ``observed_data``.
        num_samples: Number of draws.
        seed: Decides the draws; posterior and predictions use the same one, so draw s is one network in both.
        adapters: Names of the adapters whose whole matrix A is kept.
        batch_size: Rows of one forward pass, see :func:`bayeslora.predict.predict`.

    Returns:
        ``arviz.InferenceData``, or ``xarray.DataTree`` with ArviZ 1.0 and later. Its attributes hold
        ``config`` and ``versions`` (JSON), ``seed`` and ``num_samples``.

    Raises:
        InputError: The labels do not fit the predictions, the task has no such groups, or the seed is None.
    """
    if seed is None:
        raise InputError("seed=None would draw other networks for the predictions; give a number, such as 0")
    draws = bayes.posterior_draws(num_samples=num_samples, seed=seed, adapters=adapters)
    groups, coords, dims = posterior_groups(draws)
    if dataset is not None:
        prediction = bayes.predict(dataset, num_samples=num_samples, seed=seed, batch_size=batch_size)
        more_groups, more_coords = prediction_groups(prediction, seed)
        groups.update(more_groups)
        coords.update(more_coords)
    attrs = {
        "config": json.dumps(bayes.monteclora_config.to_dict(), sort_keys=True),
        "versions": json.dumps(dict(bayes.version_info()), sort_keys=True),
        "seed": int(seed),
        "num_samples": int(num_samples),
    }
    return build_inference_data(groups, coords, dims, attrs)


def build_inference_data(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    coords: Mapping[str, Any],
    dims: Mapping[str, Sequence[str]],
    attrs: Mapping[str, Any],
) -> Any:
    """Named arrays as ArviZ data, whichever ArviZ is installed.

    Args:
        groups: Group name to variable name to array. Sampled groups have shape ``(chain, draw, ...)``,
            ``observed_data`` and ``constant_data`` have no leading axes.
        coords: Dimension name to the values along it.
        dims: Variable name to its dimensions, without chain and draw.
        attrs: Attributes of the whole; strings and numbers, so that netCDF can hold them.

    Returns:
        ``arviz.InferenceData``, or ``xarray.DataTree`` with ArviZ 1.0 and later.
    """
    import arviz

    names = {variable: list(axes) for variable, axes in dims.items()}
    if _has_data_tree(arviz):
        return arviz.from_dict(groups, coords=dict(coords), dims=names, attrs={"/": dict(attrs)})
    return arviz.from_dict(**groups, coords=dict(coords), dims=names, attrs=dict(attrs))


def save_arviz(data: Any, path: str | os.PathLike[str]) -> Path:
    """Write ArviZ data to a netCDF file, whole or not at all.

    The file is written beside its destination and then renamed, so an interrupted save leaves the old one.

    Args:
        data: What `to_arviz` or `load_arviz` returned.
        path: Destination; its folder must exist.

    Returns:
        The destination.

    Raises:
        InputError: The folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"cannot save {path}: there is no folder {path.parent}; make it first")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        data.to_netcdf(str(unfinished), engine=ENGINE)
        os.replace(unfinished, path)
    return path


def load_arviz(path: str | os.PathLike[str]) -> Any:
    """Read what `save_arviz` wrote; all of it is in memory and the file is closed.

    Args:
        path: A netCDF file written by either generation of ArviZ.

    Returns:
        ``arviz.InferenceData``, or ``xarray.DataTree`` with ArviZ 1.0 and later.

    Raises:
        InputError: There is no such file.
    """
    import arviz

    if not Path(path).is_file():
        raise InputError(f"there is no file {path}; write one with save_arviz(data, path)")
    if _has_data_tree(arviz):
        import xarray

        with xarray.open_datatree(path, engine=ENGINE) as tree:
            return tree.load()
    with arviz.rc_context({"data.load": "eager"}):
        return arviz.from_netcdf(str(path), engine=ENGINE)


def _has_data_tree(arviz: Any) -> bool:
    return int(arviz.__version__.split(".")[0]) >= 1
