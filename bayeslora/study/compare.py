"""compare(): point-estimate LoRA against MonteCLoRA, from the same initialisation at equal budget."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from bayeslora.analysis import to_markdown
from bayeslora.analysis.metrics.registry import METRICS
from bayeslora.config import MonteCLoRAConfig, default_preset
from bayeslora.errors import InputError
from bayeslora.study.experiment import check_comparable
from bayeslora.study.predictions import read_predictions
from bayeslora.study.runner import run_study
from bayeslora.study.spec import LORA_FIELDS, Cell, Study
from bayeslora.study.summary import headline
from bayeslora.tasks.base import Task
from bayeslora.training.budget import TrainingBudget

TABLE_FILE = "comparison.md"
METHODS = ("LoRA", "MonteCLoRA")


@dataclass(frozen=True)
class Comparison:
    """``rows``, one per (method, split, seed) with its metrics; ``table`` over seeds; where the ``runs`` lie; the
    methods that predict ``at_mean``, with the posterior's mean."""

    rows: list[dict[str, Any]]
    table: pd.DataFrame
    runs: dict[tuple[str, int], Path]
    at_mean: frozenset[str] = frozenset()

    def to_markdown(self) -> str:
        return to_markdown(self.table)

    def predictions(self, split: str, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Probabilities (n, C) and labels (n,) of every method on one split, as :func:`plot_calibration` takes them."""
        by_method: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for (_, run_seed), run in self.runs.items():
            if run_seed == seed:
                by_method |= read_predictions(run, split)
        return by_method


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
    num_samples: int = 16,
    max_length: int = 64,
    progress: bool = True,
    batch_size: int = TrainingBudget.batch_size,
    learning_rate: float = TrainingBudget.learning_rate,
    **training: Any,
) -> Comparison:
    """Train both methods on the same examples in the same order, and score them on the test set and its shifts.

    It is a small :class:`bayeslora.study.Study`, with LoRA from PEFT; with a labelled validation split, LoRA after
    temperature scaling is scored too.

    Args:
        model: A folder, a hub name, or ``"demo"``.
        task: From :func:`bayeslora.load_task`; classification.
        config: MonteCLoRA's hyperparameters, the preset ``"learned"`` if ``None``; its adapter is LoRA's too.
        output_dir: A study's folder, with one run folder per method and seed, and ``comparison.md``. Calling again with
            the same settings continues: finished runs are read, not repeated.
        seeds: One pair of runs each.
        train_examples, test_examples: Random subsets of these sizes; everything when ``None``.
        test_split: The split to score on besides ``task.shift_splits``; ``validation`` where it is unlabelled.
        num_samples: Draws of the posterior predictive.
        max_length: Tokens per example.
        progress: Say what runs.
        batch_size, learning_rate: As in :func:`bayeslora.fit`.
        training: Further options of :func:`bayeslora.fit`: ``epochs`` (its default), ``warmup``, ...

    Raises:
        InputError: for a regression task, ``mode="post_hoc"``, an ``output_dir`` that holds other settings or something
            else, and where a run fails.

    Example:
        >>> task = load_task("reviews", "reviews", text_columns="text")
        >>> result = compare("base", task, output_dir="compared", num_samples=2, progress=False, max_steps=1)
        >>> result.table["seeds"]["count"].xs("test").to_dict()
        {'LoRA': 1, 'LoRA + temperature*': 1, 'MonteCLoRA, mean': 1, 'MonteCLoRA, 2 draws': 1}
    """
    config = config or MonteCLoRAConfig.preset(default_preset(task.kind))
    if config.mode == "post_hoc":
        raise InputError("compare starts both methods from scratch, but mode='post_hoc' needs a trained LoRA")
    check_comparable(task)
    study = Study.from_dict(
        {
            "model": str(model),
            "tasks": [task.recipe],
            **two_methods(config, task, test_split),
            "seeds": list(seeds),
            "learning_rates": [learning_rate],
            "batch_sizes": [batch_size],
            "train_examples": train_examples,
            "test_examples": test_examples,
            "test_split": test_split,
            "num_samples": num_samples,
            "max_length": max_length,
            "training": training_by_default([task], training, train_examples, batch_size, progress),
            "keep_adapters": True,
        }
    )
    result = run_study(study, output_dir, isolate=False, progress=progress)
    if len(result.failures):
        raise InputError(f"a run of the comparison failed: {result.failures['error'].iloc[0]}")
    table = headline(result.results)
    output_dir = Path(output_dir)
    (output_dir / TABLE_FILE).write_text(to_markdown(table) + "\n", encoding="utf-8")
    tested = result.results[result.results["split"].isin(table.index.get_level_values("split"))]
    rows = tested[["method", "split", "seed", *METRICS]]
    setting = study.learning_rates[0], study.batch_sizes[0], study.ranks[0]
    runs = {
        (method, seed): output_dir / Cell(task.name, method, *setting, seed).folder
        for seed in seeds
        for method in METHODS
    }
    undrawn = (tested["trained"] == METHODS[1]) & tested["mutual_information"].isna()
    return Comparison(rows.to_dict("records"), table, runs, frozenset(tested["method"][undrawn]))


def training_by_default(
    tasks: Sequence[Task], given: Mapping[str, Any], train_examples: int | None, batch_size: int, progress: bool = True
) -> dict[str, Any]:
    """A study's ``training`` where it may name no epochs: those of :func:`bayeslora.fit` for the largest task."""
    if given.get("epochs") is not None:
        return dict(given)
    sizes = [len(task.split("train", labelled=True)) for task in tasks]
    size = min(max(sizes), train_examples or max(sizes))
    options = {name: given[name] for name in ("max_steps", "gradient_accumulation") if given.get(name) is not None}
    budget = TrainingBudget(batch_size=batch_size, **options).settled(size)
    if progress and not budget.max_steps:
        steps = budget.total_steps(size)
        tqdm.write(f"{budget.epochs:g} epochs = {steps} steps (the default for {size} examples)", file=sys.stderr)
    return {**given, "epochs": budget.epochs}


def two_methods(config: MonteCLoRAConfig, task: Task, test_split: str) -> dict[str, Any]:
    """The entries of a study of LoRA, its temperature where there are labels for one, and MonteCLoRA as configured."""
    values, defaults = config.to_dict(), MonteCLoRAConfig.preset("constant").to_dict()
    changed = {name: value for name, value in values.items() if value != defaults[name] and name != "r"}
    own = {name: value for name, value in changed.items() if name not in LORA_FIELDS}
    ours = {"name": "monteclora", "label": METHODS[1], "preset": "constant", "predictions": ["mean", "draws"], **own}
    labelled = {split for split in (test_split, "validation") if split in task.splits and task.is_labelled(split)}
    temperature = ["temperature"] if test_split != "validation" and labelled == {test_split, "validation"} else []
    return {
        "methods": ["lora", *temperature, ours],
        "ranks": [config.r],
        "lora": {name: value for name, value in changed.items() if name in LORA_FIELDS},
    }
