"""Run folders in, one HTML page out; see :mod:`bayeslora.analysis.report.page` for what is on it."""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from bayeslora.analysis.report.page import report_html
from bayeslora.analysis.report.results import ComparedMethods, RunResults, SplitResults
from bayeslora.analysis.tables.comparison import table_cells
from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError, StorageError
from bayeslora.files.costs import read_costs
from bayeslora.files.records import read_json
from bayeslora.inference.diagnostics import diagnose
from bayeslora.options import flags
from bayeslora.prediction import Prediction
from bayeslora.runs import FittedRun, check_is_run, open_run
from bayeslora.storage.kept_diagnostics import diagnosed_once, fingerprint
from bayeslora.storage.run_folder import RUN_FILE
from bayeslora.study.spec import SETTINGS_FILE
from bayeslora.study.summary import headline
from bayeslora.study.table import RESULTS_FILE
from bayeslora.tasks.base import Task
from bayeslora.training.budget import RECORDED
from bayeslora.training.monitor import relative_noise_by_adapter

SPREAD_DRAWS = 32
CALIBRATION = "validation"  # thresholds of conformal sets are found on it
METHOD_FACTS = tuple(field.name for field in flags(MonteCLoRAConfig))
TRAINING_FACTS = (*(name for name in RECORDED if name != "eval_steps"), "train_examples", "processes")


def run(arguments: argparse.Namespace) -> None:
    page = report(
        arguments.run_dirs,
        arguments.output,
        split=arguments.split,
        num_samples=arguments.num_samples,
        max_examples=arguments.max_examples,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        diagnostics=not arguments.no_diagnostics,
        untuned=arguments.untuned,
        model=arguments.model,
        data_dir=arguments.data_dir,
        costs=arguments.costs,
        command=arguments.command_line,
    )
    print(f"open {page} in a browser")


def report(
    runs: Sequence[str | Path],
    output: str | Path = "report.html",
    *,
    split: str | None = None,
    num_samples: int = 16,
    max_examples: int | None = 500,
    batch_size: int = 32,
    seed: int = 0,
    diagnostics: bool = True,
    untuned: bool = False,
    model: str | None = None,
    data_dir: str | Path | None = None,
    costs: str | Path | None = None,
    command: str = "",
    progress: bool = True,
) -> Path:
    """Predict with each run, and write everything about them into one self-contained HTML file.

    Args:
        runs: Folders that ``bayeslora fit`` or ``bayeslora compare`` wrote; a comparison stands for its runs.
        output: The file; replaced as a whole once the page is complete.
        split: What the runs are judged on; ``test`` where it is labelled, else ``validation``. Shifted and
            out-of-scope splits of the task are added.
        num_samples: Draws of the posterior predictive; runs without noise (``sample_scaler=0``) use their one point.
        max_examples: A random subset of this size of every split; everything if ``None``.
        batch_size: Rows of a forward pass.
        seed: Decides subset and draws.
        diagnostics: Run :func:`bayeslora.diagnose` too, which costs some minutes on a small encoder. What it finds is
            kept in the run's folder, in ``diagnostics.json``, for the next report of the same run.
        untuned: Draws as they were fitted, where a width was tuned; the diagnostics always are.
        model, data_dir: Where base model and data are now, if they moved.
        costs: Of classes, a CSV file of what each answer costs under each truth: a header ``truth`` and the classes,
            perhaps with ``person``, and a row for each class. The page then says what to hand to a person.
        command: The command line to print on the page.
        progress: Show progress bars.

    Returns:
        The path of the file.

    Raises:
        InputError: for a folder that holds no finished run, runs of different tasks, and an ``output`` that cannot be
            written: before anything is predicted.
        StorageError: where it cannot be written at the end.

    Example:
        >>> task = load_task("reviews", "reviews", text_columns="text")
        >>> _ = compare("base", task, output_dir="compared", num_samples=2, progress=False, max_steps=1)
        >>> report(["compared"], "page.html", num_samples=2, diagnostics=False, progress=False).name
        'page.html'
    """
    output = Path(output)
    folders = [run for folder in runs for run in _expand(Path(folder))]
    if not folders:
        raise InputError("nothing to report on: give at least one run folder")
    results = []
    priced = None
    names = _names(folders)
    for folder in folders:
        check_is_run(folder)
    _check_writable(output)
    for folder, name in tqdm(
        list(zip(folders, names, strict=True)), desc="runs", disable=not progress or len(folders) < 2
    ):
        run = open_run(folder, model=model, data_dir=data_dir)
        if untuned:
            run.posterior.tuning = None
        if costs:
            single = run.task.scores_probabilities  # one label an example
            priced = read_costs(costs, run.task.label_names if single else ())
        results.append(
            _collect(
                name,
                folder,
                run,
                split=split,
                num_samples=num_samples,
                max_examples=max_examples,
                batch_size=batch_size,
                seed=seed,
                diagnostics=diagnostics,
                progress=progress,
            )
        )
    title = f"bayeslora report: {names[0]}" if len(names) == 1 else f"bayeslora report: {len(names)} runs"
    compared = [rows for folder in runs for rows in _compared(Path(folder))]
    return _write(output, report_html(results, title=title, command=command, compared=compared, costs=priced))


def _expand(folder: Path) -> list[Path]:
    """The folder, or the runs of the comparison that it holds."""
    if not (folder / SETTINGS_FILE).is_file():
        return [folder]
    runs = sorted(file.parent for file in folder.glob(f"*/*/{RUN_FILE}"))
    if not runs:
        raise InputError(
            f"{folder} holds a comparison without runs: let it finish first, with keep_adapters; what its "
            "tables say is in summary.md"
        )
    return runs


def _compared(folder: Path) -> list[ComparedMethods]:
    """All that a comparison scored, with and without a run of its own."""
    file, settings = folder / RESULTS_FILE, folder / SETTINGS_FILE
    if not settings.is_file() or not file.is_file():
        return []
    header, rows = table_cells(headline(pd.read_csv(file)))
    command = str(read_json(settings).get("command", ""))
    return [ComparedMethods(str(folder), header, rows, command)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many of their parents' as it takes to tell them apart."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise InputError("a run is given twice")
    depth = 1
    while True:
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
        depth += 1


def _collect(
    name: str,
    folder: Path,
    run: FittedRun,
    *,
    split: str | None,
    num_samples: int,
    max_examples: int | None,
    batch_size: int,
    seed: int,
    diagnostics: bool,
    progress: bool,
) -> RunResults:
    task, posterior = run.task, run.posterior
    _check_reportable(task)
    chosen = split or run.labelled_split()
    bayesian = posterior.monteclora_config.sample_scaler > 0
    count = num_samples if bayesian else 0
    splits = {}
    for part in _parts(task, chosen):
        labelled = part not in task.out_of_scope_splits
        data = run.data(part, limit=max_examples, seed=seed, labelled=labelled)
        if progress:
            tqdm.write(f"{name}: {len(data)} examples of {part}")
        prediction = posterior.predict(
            data, num_samples=count, batch_size=batch_size, seed=seed, keep_draws=False, progress=progress
        )
        texts = prediction.shown(task.texts(part, limit=max_examples, seed=seed)) if part == chosen else ()
        splits[part] = _split_results(prediction, texts)
    diagnosed: list = []
    if diagnostics and bayesian:
        data = run.training_data()
        diagnosed = diagnosed_once(
            folder,
            fingerprint(folder, data, run.history, batch_size, seed),
            lambda: diagnose(posterior, data, history=run.history, batch_size=batch_size, seed=seed, progress=progress),
            lambda text: tqdm.write(f"{name}: {text}") if progress else None,
        )
    noisy = posterior.model.has_noise
    draws = posterior.posterior_draws(num_samples=SPREAD_DRAWS, seed=seed) if noisy else None
    return RunResults(
        name,
        _facts(run, count),
        splits,
        prediction.label_names or (),
        run.history,
        posterior.adapter_names,
        None if draws is None else draws.noise_scale / draws.mean_scale,
        diagnosed,
        str(run.record.get("command", "")),
        splits.pop(CALIBRATION) if chosen != CALIBRATION and CALIBRATION in splits else None,
    )


def _parts(task: Task, chosen: str) -> list[str]:
    """The split to judge by, other inputs, and what conformal sets are calibrated on, where it is labelled."""
    parts = [chosen, *(name for name in (*task.shift_splits, *task.out_of_scope_splits) if name != chosen)]
    calibrates = CALIBRATION in task.splits and CALIBRATION not in parts and task.is_labelled(CALIBRATION)
    return [*parts, CALIBRATION] if calibrates else parts


def _check_reportable(task: Task) -> None:
    if task.writes:
        raise InputError(f"task {task.name!r} is text to learn: a report is on classes, choices or numbers")


def _split_results(prediction: Prediction, texts: Sequence[str]) -> SplitResults:
    return SplitResults(
        prediction.labels,
        texts,
        prediction.probs,
        prediction.entropy,
        prediction.mutual_information,
        prediction.mean,
        prediction.std,
        groups=prediction.groups,
        unit=prediction.unit,
        entity_counts=prediction.entity_counts,
        label_probs=prediction.label_probs,
        label_truth=prediction.label_truth,
    )


def _facts(run: FittedRun, num_samples: int) -> dict[str, str]:
    bayes, task, record = run.posterior, run.task, run.record
    config, training = bayes.monteclora_config.to_dict(), record.get("training", {})
    trained = sum(p.numel() for p in bayes.network.parameters() if p.requires_grad)
    variational = sum(p.numel() for p in bayes.guide.parameters() if p.requires_grad)
    facts = {
        "method": f"MonteCLoRA, {num_samples} draws"
        if num_samples
        else ("MonteCLoRA at the mean" if config["sample_scaler"] else "LoRA (sample_scaler 0)"),
        "model": record["model"],
        "task": task.name + (f", {len(task.label_names)} classes" if task.label_names else ", regression"),
        "steps": f"{record.get('steps', '?')}",
        "trained parameters": f"{trained:,} in the network, {variational:,} in the guide",
        "adapters": f"{len(bayes.adapter_names)}",
    }
    noise = relative_noise_by_adapter(bayes)
    if noise:
        low, middle, high = np.quantile([*noise.values()], (0, 0.5, 1))
        facts["relative noise ρ of the adapters"] = f"{low:.2g} to {high:.2g}, median {middle:.2g}"
    if bayes.tuning is not None:
        facts["tuned"] = str(bayes.tuning)
    facts |= {name: _show(training[name]) for name in TRAINING_FACTS if training.get(name) not in (None, -1)}
    facts |= {name: _show(config[name]) for name in METHOD_FACTS if config.get(name) is not None}
    versions = record.get("versions", {})
    return facts | {"versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown"}


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _check_writable(output: Path) -> None:
    """Raise ``InputError`` where a file cannot be put at ``output``; leaves nothing behind."""
    try:
        if output.is_dir():
            raise InputError(f"{output} is a folder: the report is one file, such as {output / 'report.html'}")
        nearest = next(folder for folder in output.absolute().parents if folder.exists())
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=f".{output.name}-"):
            pass
    except OSError as error:
        raise InputError(f"cannot write a report to {output}: {error.strerror}; choose another --output") from error


def _write(output: Path, page: str) -> Path:
    """Whole or not at all: what stood there before stays until the new page is complete."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}-")
        try:
            # a name that is no Unicode, in the command or a path, must not cost the page
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
                file.write(page)
            os.chmod(temporary, 0o644)
            os.replace(temporary, output)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(f"cannot write the report to {output}: {error.strerror}") from error
    return output
