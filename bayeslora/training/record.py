"""``run.json``: what a run was begun with, so that only the same run goes on in its folder."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError
from bayeslora.files.records import MAX_RUN_BYTES, read_json
from bayeslora.files.writing import write_json
from bayeslora.posterior import Posterior
from bayeslora.storage.manifest import read_manifest, version_info
from bayeslora.storage.run_folder import (
    ADAPTER_FOLDER,
    RUN_FILE,
    foreign_entry,
    last_checkpoint,
)
from bayeslora.training.budget import RECORDED, TRAINER_NAMES, FitOptions

logger = logging.getLogger(__name__)


def refuse_other_content(output_dir: Path, resume: bool) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"output_dir {output_dir} is a file; give a folder")
    ours = (output_dir / RUN_FILE).is_file()
    if output_dir.is_dir() and not ours and foreign_entry(output_dir, RUN_FILE):
        raise InputError(f"output_dir {output_dir} holds something else already; give a new or empty folder")
    if resume and not ours:
        raise InputError(f"nothing to resume in {output_dir}: it holds no {RUN_FILE}")


def begin_run(output_dir: Path, resume: bool, record: dict[str, Any]) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to resume from, if any, and the record of a run that is finished already."""
    run_file = output_dir / RUN_FILE
    if not resume:
        if run_file.is_file():
            raise InputError(
                f"output_dir {output_dir} holds a run already; continue it with resume=True, or give another folder"
            )
        write_json(run_file, record)
        return None, None
    before = read_record(run_file)
    _check_same_run(output_dir, before, json.loads(json.dumps(record, default=float)))
    for remains in output_dir.glob(f".{ADAPTER_FOLDER}-*"):  # of a run killed while it wrote the adapter
        shutil.rmtree(remains, ignore_errors=True)
    if before["finished"]:
        try:
            read_manifest(output_dir / ADAPTER_FOLDER)
            return None, before
        except InputError as error:
            logger.warning("%s; finishing the run again from its last checkpoint", error)
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is None:
        logger.warning("%s holds no whole checkpoint: starting from the beginning", output_dir)
    return checkpoint, None


def read_record(run_file: Path) -> dict[str, Any]:
    record = read_json(run_file, most_bytes=MAX_RUN_BYTES)
    for name, kind in (("config", dict), ("training", dict), ("finished", bool)):
        if not isinstance(record.get(name), kind):
            raise InputError(f"{run_file} is damaged (its {name!r}): start the run again in another folder")
    return record


def as_begun(output_dir: Path, resume: bool, options: FitOptions) -> FitOptions:
    """With what a run to resume has of defaults: as many epochs as it began with; and none of the draws at evaluations
    that runs of an earlier version did not score."""
    run_file = output_dir / RUN_FILE
    if not resume or not run_file.is_file():
        return options
    began = read_record(run_file)["training"]
    if options.epochs is None:
        options = dataclasses.replace(options, epochs=began.get("num_train_epochs"))
    if options.best_metric is None and "eval_samples" not in began:
        options = dataclasses.replace(options, eval_samples=0, best_metric="loss")
    return options


def begun_sampling(output_dir: Path, resume: bool) -> str | None:
    """How a run to resume draws its batches, at random in earlier versions; None where nothing is resumed."""
    run_file = output_dir / RUN_FILE
    if not resume or not run_file.is_file():
        return None
    return read_record(run_file)["training"].get("train_sampling_strategy", "random")


def _check_same_run(output_dir: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """A resumed run goes on with the settings it began with; a field that came later had its default."""
    names = {field: name for name, field in TRAINER_NAMES.items()}  # as fit calls it
    defaults = {"config": MonteCLoRAConfig().to_dict(), "training": {"tuning_examples": 0, "eval_samples": 0}}
    for part, missing in defaults.items():
        began = {**missing, **before[part]}
        began.setdefault("train_sampling_strategy", now[part].get("train_sampling_strategy"))
        for name, value in now[part].items():
            if began.get(name) != value:
                raise InputError(
                    f"the run in {output_dir} began with {names.get(name, name)}={_given(began.get(name))!r}, not "
                    f"{_given(value)!r}: resume it with the same settings, or use another folder"
                )


def _given(value: Any) -> Any:
    """TrainingArguments has -1 where no number of steps was given."""
    return None if value == -1 else value


def run_record(
    bayes: Posterior,
    arguments: TrainingArguments,
    variational_learning_rate: float,
    data: Mapping[str, Any],
    metadata: Mapping[str, Any] | None,
    *,
    eval_samples: int = 0,
) -> dict[str, Any]:
    """What ``run.json`` says of a run that begins; ``data`` is what it trains, evaluates and tunes on."""
    num_examples, tuning_set = len(data["train_dataset"]), data.get("tune")
    return {
        **(metadata or {}),
        "finished": False,
        "config": bayes.monteclora_config.to_dict(),
        "training": {
            **{name: _plain(getattr(arguments, name)) for name in RECORDED if hasattr(arguments, name)},
            "eval_samples": eval_samples if data.get("eval_dataset") is not None else 0,
            "variational_learning_rate": variational_learning_rate,
            "train_examples": num_examples,
            "tuning_examples": 0 if tuning_set is None else len(tuning_set),
            "processes": arguments.world_size,
        },
        "train_examples": num_examples,
        "versions": version_info(),
    }


def record_without_training(bayes: Posterior, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What ``run.json`` says of a posterior that was put on a finished adapter."""
    return {
        **metadata,
        "finished": False,
        "config": bayes.monteclora_config.to_dict(),
        "training": {},
        "versions": version_info(),
    }


def _plain(value: Any) -> Any:
    return value.value if hasattr(value, "value") else value
