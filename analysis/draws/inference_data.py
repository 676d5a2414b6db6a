"""Posterior draws as ArviZ data. The one file that knows ArviZ's two shapes.

ArviZ before 1.0 keeps groups in an ``InferenceData``; from 1.0 on (Python 3.12 and later) in an
``xarray.DataTree``. Both answer to ``data["posterior"]``, ``data.posterior`` and ``data.attrs``, which is all
this library uses.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeslora.analysis.draws.groups import Groups, posterior_groups, prediction_groups
from bayeslora.analysis.draws.training_history import history_group, read_history
from bayeslora.errors import InputError
from bayeslora.files.writing import replacing_path

if TYPE_CHECKING:
    import xarray

ENGINE = "h5netcdf"
UNSAMPLED = ("observed_data", "constant_data")


def to_arviz(
    bayes: Any,
    dataset: Any = None,
    *,
    num_samples: int = 64,
    seed: int = 0,
    adapters: Sequence[str] = (),
    batch_size: int = 32,
    prior: bool = True,
    run: str | os.PathLike[str] | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
) -> Any:
    """Draws from the posterior and the prior, and from their predictions on a data set, as ArviZ data.

    Groups and variables, with ``chain = 1`` and ``draw = num_samples`` in front of those that are sampled:

    ==========================  =====================================================================
    posterior, prior            ``mixture_weights[adapter, component]``,
                                ``covariance[adapter, rank, rank_other]``,
                                ``noise_scale[adapter]`` (root mean square of the noise on A),
                                ``noise_to_signal[adapter]`` (that, over ``mean_scale``), and the same
                                numbers as ``noise_to_signal_map[layer, projection]``;
                                for each of ``adapters``, ``A[<name>][rank, column]``
    constant_data               ``mean_scale[adapter]`` (root mean square of the mean of A),
                                ``layer_of[adapter]``, ``projection_of[adapter]``
    posterior_predictive,       ``class_probs[example, class]``, or ``mean[example]`` for regression;
    prior_predictive            ``labels[example]`` drawn from that
    log_likelihood              ``labels[example]``, pointwise, in nats
    observed_data               ``labels[example]``; of texts neither this nor the predictive groups
    sample_stats                what the run logged, over training steps instead of draws:
                                ``elbo_task[step]``, ``elbo_kl_site[step, site]``, ...; see
                                :func:`bayeslora.analysis.draws.training_history.history_group`
    ==========================  =====================================================================

    Layer −1 is outside the stack of layers. Adapters of unequal rank or width share the axes of the largest; entries
    that do not exist are NaN. ``noise_to_signal`` is NaN where the mean of A is zero. The draws are independent, so
    the single chain needs no convergence check. The prior is that of A around the fitted mean μ, which has no prior
    of its own.

    Args:
        bayes: A fitted model, such as `BayesLoRA`.
        dataset: What to predict; without it there are only ``posterior``, ``prior`` and ``constant_data``. Without
            labels there is neither ``log_likelihood`` nor ``observed_data``.
        num_samples: Number of draws.
        seed: Decides the draws; posterior and predictions use the same one, so draw s is one network in both.
        adapters: Names of the adapters whose whole matrix A is kept.
        batch_size: Rows of one forward pass, see :func:`bayeslora.inference.predict.predict`.
        prior: Draw from the prior as well, which doubles the time.
        run: The finished run's folder, for ``sample_stats``.
        history: The run's log, ``fit(...).history``, instead.

    Returns:
        ``arviz.InferenceData``, or ``xarray.DataTree`` with ArviZ 1.0 and later. Its attributes hold
        ``config``, ``versions`` and, where a width was tuned, ``tuning`` (JSON), ``seed`` and ``num_samples``.

    Raises:
        InputError: The labels do not fit the predictions, the task has no such groups, the seed is None, or the
            run has no history of these adapters.

    Example:
        >>> data = to_arviz(bayes, dataset, num_samples=8)
        >>> data["posterior"]["mixture_weights"].dims
        ('chain', 'draw', 'adapter', 'component')
        >>> data["posterior_predictive"]["class_probs"].shape  # chain, draw, example, class
        (1, 8, 8, 2)
    """
    options: dict[str, Any] = {"seed": seed, "adapters": adapters, "batch_size": batch_size, "prior": prior}
    groups = draw_groups(bayes, dataset, num_samples=num_samples, **options)
    add_history(groups, run, history)
    return build_inference_data(*groups, description(bayes, num_samples, seed))


def draw_groups(
    bayes: Any,
    dataset: Any,
    *,
    num_samples: int,
    seed: int,
    adapters: Sequence[str],
    batch_size: int,
    prior: bool,
    first_draw: int = 0,
) -> Groups:
    """Draws ``first_draw .. first_draw + num_samples - 1`` of the groups that `to_arviz` samples."""
    if seed is None:
        raise InputError("seed=None would draw other networks for the predictions; give a number, such as 0")
    block = {"num_samples": num_samples, "seed": seed, "first_draw": first_draw}
    groups = posterior_groups(bayes.posterior_draws(**block, adapters=adapters))
    if prior:
        groups.update(posterior_groups(bayes.prior_draws(**block, adapters=adapters), group="prior"))
    if dataset is not None:
        for of_prior in (False, True) if prior else (False,):
            prediction = bayes.predict(dataset, **block, batch_size=batch_size, prior=of_prior)
            groups.update(prediction_groups(prediction, seed, first_draw=first_draw, prior=of_prior))
    return groups


def add_history(
    groups: Groups, run: str | os.PathLike[str] | None, history: Sequence[Mapping[str, Any]] | None
) -> None:
    """Add ``sample_stats`` where a run or its log is given."""
    if run is not None and history is not None:
        raise InputError("give run= or history=, not both")
    if run is not None:
        history = read_history(run)
    if history is not None:
        groups.update(history_group(history, groups.coords["adapter"]))


def description(bayes: Any, num_samples: int, seed: int) -> dict[str, Any]:
    """The attributes that say how the data were made."""
    versions = dict(bayes.version_info())
    tuning = getattr(bayes, "tuning", None)
    return ({} if tuning is None else {"tuning": json.dumps(tuning.to_dict())}) | {
        "inference_library": "bayeslora",
        "inference_library_version": versions["bayeslora"],
        "config": json.dumps(bayes.monteclora_config.to_dict(), sort_keys=True),
        "versions": json.dumps(versions, sort_keys=True),
        "seed": int(seed),
        "num_samples": int(num_samples),
    }


def build_inference_data(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    coords: Mapping[str, Any],
    dims: Mapping[str, Sequence[str]],
    attrs: Mapping[str, Any],
) -> Any:
    """Named arrays as ArviZ data, whichever ArviZ is installed.

    Args:
        groups: Group name to variable name to array. Sampled groups have shape ``(chain, draw, ...)``,
            ``observed_data`` and ``constant_data`` have no leading axes, nor has a variable over ``step``.
        coords: Dimension name to the values along it.
        dims: Variable name to its dimensions, without chain and draw.
        attrs: Attributes of the whole; strings and numbers, so that netCDF can hold them.

    Returns:
        ``arviz.InferenceData``, or ``xarray.DataTree`` with ArviZ 1.0 and later.

    Example:
        >>> groups = {"posterior": {"noise": np.ones((1, 4, 2))}}
        >>> data = build_inference_data(groups, {"adapter": ["a", "b"]}, {"noise": ["adapter"]}, {"seed": 0})
        >>> dict(data["posterior"].sizes)
        {'chain': 1, 'draw': 4, 'adapter': 2}
    """
    datasets = {name: build_dataset(name, variables, coords, dims) for name, variables in groups.items()}
    return _as_arviz(datasets, dict(attrs))


def build_dataset(
    group: str,
    variables: Mapping[str, np.ndarray],
    coords: Mapping[str, Any],
    dims: Mapping[str, Sequence[str]],
    *,
    first_draw: int = 0,
) -> "xarray.Dataset":
    """One group of `build_inference_data`, its draws numbered from ``first_draw`` on."""
    import xarray

    arrays = {}
    for name, values in variables.items():
        axes = dims.get(name, ())
        sampled = group not in UNSAMPLED and "step" not in axes
        arrays[name] = (("chain", "draw", *axes) if sampled else tuple(axes), values)
    data = xarray.Dataset(arrays)
    numbered = {axis: np.arange(size) for axis, size in data.sizes.items() if axis not in coords}
    if "draw" in numbered:
        numbered["draw"] += first_draw
    return data.assign_coords(numbered | {axis: values for axis, values in coords.items() if axis in data.sizes})


def _as_arviz(datasets: Mapping[str, Any], attrs: dict[str, Any]) -> Any:
    import arviz

    if has_data_tree(arviz):
        import xarray

        return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=attrs), **datasets})
    return arviz.InferenceData(attrs=attrs, **datasets)


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

    Example:
        >>> save_arviz(to_arviz(bayes, num_samples=4), "draws.nc").name
        'draws.nc'
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"cannot save {path}: there is no folder {path.parent}; make it first")
    with replacing_path(path) as unfinished:
        data.to_netcdf(str(unfinished), engine=ENGINE)
    return path


def load_arviz(path: str | os.PathLike[str], *, lazy: bool = False) -> Any:
    """Read what `save_arviz` or `stream_arviz` wrote.

    Args:
        path: A netCDF file, written by either generation of ArviZ, or a Zarr folder.
        lazy: Read values when they are used, and leave the file open; else all of it is in memory, and the file closed.

    Returns:
        ``arviz.InferenceData``, or ``xarray.DataTree`` with ArviZ 1.0 and later.

    Raises:
        InputError: There is no such file.

    Example:
        >>> path = save_arviz(to_arviz(bayes, num_samples=4), "draws.nc")
        >>> int(load_arviz(path).attrs["num_samples"])
        4
    """
    path = Path(path)
    if not path.is_file() and not (path / ".zgroup").is_file():
        raise InputError(f"there is no file {path}; write one with save_arviz(data, path)")
    import arviz

    if path.is_dir():
        data = _open_zarr(path)
    elif has_data_tree(arviz):
        import xarray

        data = xarray.open_datatree(path, engine=ENGINE)
    else:
        with arviz.rc_context({"data.load": "lazy" if lazy else "eager"}):
            return arviz.from_netcdf(str(path), engine=ENGINE)
    if lazy:
        return data
    data.load()
    data.close()
    return data


def _open_zarr(path: Path) -> Any:
    """Group by group, as ArviZ 0.23 cannot open what zarr 3 writes."""
    import xarray

    options: dict[str, Any] = {"consolidated": False, "chunks": None}
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    datasets = {name: xarray.open_zarr(path, group=name, **options) for name in names}
    return _as_arviz(datasets, dict(xarray.open_zarr(path, **options).attrs))


def has_data_tree(arviz: Any) -> bool:
    return int(arviz.__version__.split(".")[0]) >= 1
