"""Draws to the disk in blocks, as many as there is room for there, with one block in memory at a time."""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bayeslora.analysis.draws.groups import Groups
from bayeslora.analysis.draws.inference_data import add_history, build_dataset, description, draw_groups
from bayeslora.errors import InputError
from bayeslora.files.writing import replacing_path

ZARR_FORMAT = 2  # in the third, text has no specification


def stream_arviz(
    bayes: Any,
    path: str | os.PathLike[str],
    dataset: Any = None,
    *,
    num_samples: int = 1000,
    block: int = 8,
    seed: int = 0,
    adapters: Sequence[str] = (),
    batch_size: int = 32,
    prior: bool = True,
    run: str | os.PathLike[str] | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Write what `to_arviz` returns to a file, ``block`` draws at a time.

    Memory holds some three blocks, whatever ``num_samples`` is; the draws are those of `to_arviz` with the same seed.
    The data set is run through the network once for each draw, as there. What is written appears under its name when
    it is complete; an interrupted call leaves nothing there.

    Args:
        bayes: A fitted model.
        path: Destination: ``<name>.nc`` (netCDF) or ``<name>.zarr`` (a folder; needs ``pip install zarr``).
        dataset: What to predict.
        num_samples: Number of draws.
        block: Draws at a time. Each holds r × n_in numbers per entry of ``adapters``, the width that of the widest.
        seed, adapters, batch_size, prior, run, history: As in `to_arviz`.

    Returns:
        The destination; ``load_arviz(path, lazy=True)`` opens it without reading the values.

    Raises:
        InputError: As in `to_arviz`; or the destination exists, has another ending, or its folder does not exist.

    Example:
        >>> path = stream_arviz(bayes, "draws.nc", num_samples=5, block=2)
        >>> load_arviz(path)["posterior"].sizes["draw"]
        5
    """
    path = Path(path)
    store = _check_destination(path)
    if num_samples < 1 or block < 1:
        raise InputError(f"num_samples and block must be at least 1, got {num_samples} and {block}")
    options: dict[str, Any] = {"seed": seed, "adapters": adapters, "batch_size": batch_size, "prior": prior}
    with replacing_path(path) as unfinished:
        for first in range(0, num_samples, block):
            count = min(block, num_samples - first)
            groups = draw_groups(bayes, dataset, num_samples=count, first_draw=first, **options)
            if first == 0:
                add_history(groups, run, history)
                store.create(unfinished, groups, description(bayes, num_samples, seed))
            else:
                store.append(unfinished, groups, first)
            del groups  # before the next block is drawn
    return path


class _NetCDF:
    """One HDF5 file, whose groups grow along their unlimited dimension ``draw``."""

    @staticmethod
    def create(path: Path, groups: Groups, attrs: Mapping[str, Any]) -> None:
        import xarray

        xarray.Dataset(attrs=attrs).to_netcdf(path, engine="h5netcdf")
        for group, variables in groups.variables.items():
            data = build_dataset(group, variables, groups.coords, groups.dims)
            growing = {"draw"} & set(data.dims)
            chunks = {name: {"chunksizes": v.shape} for name, v in data.variables.items() if growing & set(v.dims)}
            data.to_netcdf(path, mode="a", group=group, engine="h5netcdf", unlimited_dims=growing, encoding=chunks)

    @staticmethod
    def append(path: Path, groups: Groups, first_draw: int) -> None:
        import h5netcdf

        with h5netcdf.File(path, "a") as file:
            for group, data in _sampled(groups, first_draw):
                file[group].resize_dimension("draw", first_draw + data.sizes["draw"])
                for name, values in data.variables.items():
                    if "draw" in values.dims:
                        axis = values.dims.index("draw")
                        place = (*(slice(None),) * axis, slice(first_draw, None))
                        file[group].variables[name][place] = values.values


class _Zarr:
    """A folder of arrays, whose chunks are blocks of draws."""

    @staticmethod
    def create(path: Path, groups: Groups, attrs: Mapping[str, Any]) -> None:
        import xarray

        xarray.Dataset(attrs=attrs).to_zarr(path, consolidated=False, zarr_format=ZARR_FORMAT)
        for group, variables in groups.variables.items():
            data = build_dataset(group, variables, groups.coords, groups.dims)
            chunks = {name: {"chunks": v.shape} for name, v in data.variables.items() if "draw" in v.dims}
            data.to_zarr(path, group=group, mode="a", consolidated=False, zarr_format=ZARR_FORMAT, encoding=chunks)

    @staticmethod
    def append(path: Path, groups: Groups, first_draw: int) -> None:
        for group, data in _sampled(groups, first_draw):
            data.to_zarr(path, group=group, mode="a-", append_dim="draw", consolidated=False, zarr_format=ZARR_FORMAT)


def _sampled(groups: Groups, first_draw: int) -> list[tuple[str, Any]]:
    """The groups that have draws, as data sets."""
    built = [
        (group, build_dataset(group, variables, groups.coords, groups.dims, first_draw=first_draw))
        for group, variables in groups.variables.items()
    ]
    return [(group, data) for group, data in built if "draw" in data.sizes]


def _check_destination(path: Path) -> type[_NetCDF] | type[_Zarr]:
    stores: dict[str, type[_NetCDF] | type[_Zarr]] = {".nc": _NetCDF, ".zarr": _Zarr}
    if path.suffix not in stores:
        raise InputError(f"{path} must end in .nc (netCDF) or .zarr")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    if path.exists():
        raise InputError(f"{path} exists already: delete it, or choose another name")
    if path.suffix == ".zarr" and not find_spec("zarr"):
        raise InputError("a .zarr folder needs zarr: pip install zarr, or give a name that ends in .nc")
    return stores[path.suffix]
