"""What a run logged while it trained, as arrays over its steps."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bayeslora.analysis.draws.groups import Groups
from bayeslora.errors import InputError
from bayeslora.files.records import MAX_RUN_BYTES, read_json

SITE = "elbo/kl_"  # before the name of a site, in the names that KLs are logged under
ADAPTER = "noise_to_signal/"  # before the name of an adapter
NOT_OF_A_STEP = {"step", "epoch", "total_flos"}


def read_history(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The log of a finished run.

    Args:
        run: A folder that ``fit`` wrote.

    Raises:
        InputError: There is no ``run.json``, it is damaged, or the run has not finished.
    """
    path = Path(run) / "run.json"
    history = read_json(path, most_bytes=MAX_RUN_BYTES).get("history")
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise InputError(f"{path} holds no history: it is written when a run ends; resume it, or pass history=")
    return history


def history_group(history: Sequence[Mapping[str, Any]], adapters: Sequence[str]) -> Groups:
    """The group ``sample_stats``: every number that was logged, over the dimension ``step``.

    ``elbo/task`` becomes ``elbo_task[step]``; the KLs of the sites, ``elbo_kl_site[step, site]``; and
    ``noise_to_signal/<adapter>``, ``noise_to_signal_trace[step, adapter]``. NaN where a number was not logged. Where a
    step was logged twice the first counts: ``fit`` evaluates the best checkpoint once more at the end. Durations and
    totals of a whole run are left out.

    Args:
        history: A run's log: ``fit(...).history``, or ``history`` in ``run.json``.
        adapters: Names of the network's adapters.

    Raises:
        InputError: The history holds no number at any step, or is that of a network with other adapters.
    """
    logged: dict[str, dict[int, float]] = {}
    for entry in history:
        if not _is_number(entry.get("step")):
            continue
        for name, value in entry.items():
            if _is_number(value) and not _is_of_run(name):
                logged.setdefault(name, {}).setdefault(int(entry["step"]), float(value))
    if not logged:
        raise InputError("the history holds no number of any step: give fit(...).history, or history in run.json")
    steps = sorted({step for values in logged.values() for step in values})
    traces = {name: np.array([values.get(step, np.nan) for step in steps]) for name, values in logged.items()}
    sites = [name for name in traces if name.startswith(SITE)]
    noise = [name for name in traces if name.startswith(ADAPTER)]
    variables = {name.replace("/", "_"): values for name, values in traces.items() if name not in {*sites, *noise}}
    dims = {name: ["step"] for name in variables}
    coords: dict[str, Any] = {"step": np.array(steps)}
    if sites:
        variables["elbo_kl_site"] = np.stack([traces[name] for name in sites], axis=-1)
        dims["elbo_kl_site"] = ["step", "site"]
        coords["site"] = [name.removeprefix(SITE) for name in sites]
    if noise:
        if set(noise) != {ADAPTER + name for name in adapters}:
            raise InputError("the history is that of a network with other adapters: give the run of this one")
        variables["noise_to_signal_trace"] = np.stack([traces[ADAPTER + name] for name in adapters], axis=-1)
        dims["noise_to_signal_trace"] = ["step", "adapter"]
    return Groups({"sample_stats": variables}, coords, dims)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_of_run(name: str) -> bool:
    return name in NOT_OF_A_STEP or name.startswith("train_") or name.endswith(("_runtime", "_per_second"))
