"""compare(): point-estimate LoRA against MonteCLoRA, from the same initialisation at equal budget."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm
from transformers import set_seed

from bayeslora.analysis import (
    apply_temperature,
    calibration_summary,
    comparison_table,
    fit_temperature,
    to_markdown,
)
from bayeslora.checkpoint import from_pretrained
from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError
from bayeslora.module import BayesLoRA
from bayeslora.predict import Prediction
from bayeslora.run_folder import ADAPTER_FOLDER, RUN_FILE, foreign_entry, lock_folder, write_json
from bayeslora.tasks import Task
from bayeslora.training import fit
from bayeslora.untrusted import read_json

SETTINGS_FILE = "comparison.json"
CELL_FILE = "scores.json"
PREDICTIONS_FILE = "predictions.npz"
TABLE_FILE = "comparison.md"
METRICS = ("accuracy", "nll", "ece", "brier")


@dataclass(frozen=True)
class Comparison:
    """``rows``, one per (method, split, seed) with its metrics; ``table`` over seeds; where the ``runs`` lie."""

    rows: list[dict[str, Any]]
    table: pd.DataFrame
    runs: dict[tuple[str, int], Path]

    def to_markdown(self) -> str:
        return to_markdown(self.table)

    def predictions(self, split: str, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Probabilities (n, C) and labels (n,) of every method on one split, as :func:`plot_calibration` takes them."""
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for (_, run_seed), run in self.runs.items():
            if run_seed == seed:
                with np.load(run / PREDICTIONS_FILE, allow_pickle=False) as arrays:
                    names = [key for key in arrays.files if key.startswith(f"{split}/") and "labels" not in key]
                    found |= {key.split("/", 1)[1]: (arrays[key], arrays[f"{split}/labels"]) for key in names}
        return found


def compare(
    model: str | Path,
    task: Task,
    config: MonteCLoRAConfig | None = None,
    *,
    output_dir: str | Path,
    seeds: Sequence[int] = (0,),
    train_examples: int | None = None,
    test_examples: int | None = None,
    test_split: str = "test",
    num_samples: int = 8,
    max_length: int = 64,
    progress: bool = True,
    **fit_options: Any,
) -> Comparison:
    """Train both methods on the same examples in the same order, and score them on the test set and its shifts.

    LoRA is ``config`` with ``sample_scaler=0``: the same code without the noise, which a test shows to be PEFT's
    plain LoRA. With a labelled validation split, LoRA after temperature scaling is scored too.

    Args:
        model: A folder, a hub name, or ``"demo"``.
        task: From :func:`bayeslora.load_task`; classification.
        config: MonteCLoRA's hyperparameters.
        output_dir: One run folder per method and seed, ``comparison.md`` and ``comparison.json``. Calling again
            with the same settings continues: finished runs are read, not repeated.
        seeds: One pair of runs each.
        train_examples, test_examples: Random subsets of these sizes; everything when ``None``.
        test_split: The split to score on besides ``task.shift_splits``; ``validation`` where it is unlabelled.
        num_samples: Draws of the posterior predictive.
        max_length: Tokens per example.
        progress: Show progress bars.
        fit_options: Passed to :func:`bayeslora.fit`: ``epochs``, ``batch_size``, ``learning_rate``, ...

    Raises:
        InputError: for a regression task, ``mode="post_hoc"``, or an ``output_dir`` that holds other settings or
            something else.
    """
    if task.is_regression:
        raise InputError(f"compare scores class probabilities; task {task.name!r} is a regression")
    config = config or MonteCLoRAConfig()
    if config.mode == "post_hoc":
        raise InputError("compare starts both methods from scratch, but mode='post_hoc' needs a trained LoRA")
    test_split = _labelled_split(task, test_split)
    output_dir = Path(output_dir)
    settings = {
        "model": str(model), "task": task.name, "config": config.to_dict(), "train_examples": train_examples,
        "test_examples": test_examples, "test_split": test_split, "num_samples": num_samples,
        "max_length": max_length, "fit": fit_options,
    }  # fmt: skip
    _check_folder(output_dir, settings)
    rows: list[dict[str, Any]] = []
    runs: dict[tuple[str, int], Path] = {}
    with lock_folder(output_dir):
        _check_folder(output_dir, settings)  # again: another comparison may have come and gone
        write_json(output_dir / SETTINGS_FILE, settings)
        for seed in seeds:
            for method, chosen in (
                ("LoRA", config.replace(sample_scaler=0.0)),
                ("MonteCLoRA", config),
            ):
                run = output_dir / f"{method.lower()}-seed{seed}"
                runs[method, seed] = run
                if progress:
                    tqdm.write(f"run {len(runs)} of {2 * len(seeds)}: {method}, seed {seed}, in {run}")
                if not (run / CELL_FILE).is_file():
                    _run_cell(model, task, chosen, run, seed, settings, method, progress)
                rows += json.loads((run / CELL_FILE).read_text(encoding="utf-8"))
        table = comparison_table(rows)
        (output_dir / TABLE_FILE).write_text(to_markdown(table) + "\n", encoding="utf-8")
    return Comparison(rows, table, runs)


def _run_cell(
    model: str | Path,
    task: Task,
    config: MonteCLoRAConfig,
    run: Path,
    seed: int,
    settings: dict[str, Any],
    method: str,
    progress: bool,
) -> None:
    """Train one method with one seed, unless its adapter is there already, and write its scores."""
    set_seed(seed)  # before the network: head and LoRA start the same for both methods
    network, tokenizer = task.load_network(model)
    length = settings["max_length"]
    if (run / ADAPTER_FOLDER).is_dir():
        bayes = from_pretrained(run / ADAPTER_FOLDER, network)
    else:
        bayes = BayesLoRA(network, config)
        train = task.encode(tokenizer, "train", max_length=length, limit=settings["train_examples"], labelled=True)
        fit(
            bayes, train, output_dir=run, seed=seed, progress=progress, resume=(run / RUN_FILE).is_file(),
            metadata={"model": str(model), "task": task.recipe, "max_length": length}, **settings["fit"],
        )  # fmt: skip

    def predict(split: str, num_samples: int) -> Prediction:
        data = task.encode(tokenizer, split, max_length=length, limit=settings["test_examples"], labelled=True)
        return bayes.predict(data, num_samples=num_samples, progress=progress)

    temperature = None
    if method == "LoRA" and _has_validation(task, settings["test_split"]):
        held_out = predict("validation", 0)
        temperature = fit_temperature(held_out.probs, held_out.labels)
    rows: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    for split in (settings["test_split"], *task.shift_splits):
        for name, probs, labels in _predictions(predict, split, method, settings["num_samples"], temperature):
            rows.append({"method": name, "split": split, "seed": seed} | calibration_summary(probs, labels))
            arrays |= {f"{split}/{name}": probs, f"{split}/labels": labels}
    np.savez_compressed(run / PREDICTIONS_FILE, **arrays)  # type: ignore[arg-type]
    write_json(run / CELL_FILE, rows)


def _predictions(
    predict: Any, split: str, method: str, num_samples: int, temperature: float | None
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, probabilities and labels of each way to predict with one fitted method."""
    mean = predict(split, 0)
    if method == "LoRA":
        yield "LoRA", mean.probs, mean.labels
        if temperature is not None:
            yield "LoRA + temperature*", apply_temperature(mean.probs, temperature), mean.labels
        return
    yield "MonteCLoRA, mean", mean.probs, mean.labels
    drawn = predict(split, num_samples)
    yield f"MonteCLoRA, {num_samples} draws", drawn.probs, drawn.labels


def _labelled_split(task: Task, wanted: str) -> str:
    for split in (wanted, "validation"):
        if split in task.splits and task.is_labelled(split):
            return split
    raise InputError(f"task {task.name!r} has no labelled {wanted!r} or 'validation' split to score on")


def _has_validation(task: Task, test_split: str) -> bool:
    return test_split != "validation" and "validation" in task.splits and task.is_labelled("validation")


def _check_folder(output_dir: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder with anything in it but a comparison with these settings."""
    file = output_dir / SETTINGS_FILE
    if file.is_file():
        found = read_json(file)
        plain = json.loads(json.dumps(settings))
        changed = [name for name in plain if found.get(name) != plain[name]]
        if changed:
            raise InputError(
                f"{output_dir} holds a comparison with another {changed[0]} ({found.get(changed[0])!r}); "
                "use the same settings to continue it, or another folder"
            )
    elif output_dir.is_dir() and foreign_entry(output_dir, SETTINGS_FILE):
        raise InputError(f"{output_dir} holds something else already; give a new or empty folder")
