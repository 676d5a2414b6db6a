"""What a study compares: methods x tasks x learning rates x batch sizes x ranks x seeds, from YAML or Python."""

import dataclasses
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError
from bayeslora.options import LENGTH, MOST, ranges
from bayeslora.study.entries import (
    MethodSpec,
    check_fields,
    check_text,
    listed,
    method_specs,
    number,
)
from bayeslora.study.study_file import read_study_file
from bayeslora.tasks.load import TaskSpec
from bayeslora.training.budget import TrainingBudget

SETTINGS_FILE = "comparison.json"  # in the folder of a study: the study, and what its cells have in common
MOST_LETTERS = 200  # of a name, in a path; file systems take 255 bytes, with what is put around it
AXES = ("tasks", "methods", "learning_rates", "batch_sizes", "ranks", "seeds")
LATER = ("prompting", "shift_splits")  # of a task: digests of studies without them stay as they were
LORA_FIELDS = (
    "lora_alpha",
    "target_modules",
    "lora_dropout",
    "modules_to_save",
    "layers_to_transform",
    "use_rslora",
    "rank_pattern",
    "lora_options",
)


@dataclass(frozen=True)
class Cell:
    """One point of the grid: one training, by the label of its method and the name of its task."""

    task: str
    method: str
    learning_rate: float
    batch_size: int
    rank: int
    seed: int

    @property
    def folder(self) -> Path:
        """Where it lies in the study's folder."""
        setting = f"{slug(self.task)}-lr{self.learning_rate:g}-batch{self.batch_size}-rank{self.rank}"
        return Path(setting) / f"{slug(self.method)}-seed{self.seed}"

    def __str__(self) -> str:
        return (
            f"{self.method}, {self.task}, learning rate {self.learning_rate:g}, batch {self.batch_size}, "
            f"rank {self.rank}, seed {self.seed}"
        )


RANGES = ranges(TrainingBudget) | {"rank": ranges(MonteCLoRAConfig)["r"]}
# what all cells have in common of a training's options
TRAINING_OPTIONS = tuple(f.name for f in dataclasses.fields(TrainingBudget) if f.name not in Cell.__annotations__)


@dataclass(frozen=True)
class Study:
    """A grid of trainings and how each is scored.

    Args:
        model: A folder, a hub name, or ``"demo"``.
        tasks: Names of tasks, or mappings with the names of :func:`bayeslora.load_task`.
        methods: Names, or mappings with ``name`` and the method's options; ``sweep: {option: [values]}`` stands for
            one method for every combination. ``label`` is what tables call it.
        learning_rates, batch_sizes, ranks, seeds: The grid; every method is trained at each of its points.
        train_examples, test_examples: Random subsets of these sizes, the same for all; everything when ``None``.
        validation_examples: The same for what is tuned and chosen on; as ``test_examples`` when ``None``.
        test_split: What is scored; ``validation`` where it is unlabelled.
        shift_splits: Score the tasks' shifted splits too: those that a task is known for, or that its ``shift_splits``
            names.
        hold_out: Training examples set aside as validation where the task's own validation split is what is scored, or
            is missing.
        max_length: Tokens per example.
        num_samples: Draws of every method that draws.
        training: The budget, equal for all, by the names of :func:`bayeslora.fit`: ``epochs`` (5), ``warmup``, ...
        trainer: Further fields of ``transformers.TrainingArguments`` for all, such as ``bf16: true``.
        lora: Options of every adapter: ``lora_alpha``, ``target_modules``, ``lora_dropout``, ...
        curve_points: Evaluations on the validation split while training; 0 records no learning curve.
        curve_examples: Of the validation split, for the curve.
        keep_adapters: Keep what was trained; else only predictions, scores and curves stay.
        reference: What differences are taken from, by the names in the tables; several give a table each. The first
            method if there is none. It changes tables only.
        retries: How often to repeat a cell that failed otherwise than by diverging or by bad input.

    Raises:
        InputError: naming the first entry that cannot be.

    Example:
        >>> study = Study("base", tasks=("sst2", "cola"), methods=("lora", "monteclora"), learning_rates=(1e-3, 3e-3))
        >>> Study.from_dict(study.to_dict()) == study
        True
    """

    model: str
    tasks: tuple[TaskSpec, ...]
    methods: tuple[MethodSpec, ...]
    learning_rates: tuple[float, ...] = (TrainingBudget.learning_rate,)
    batch_sizes: tuple[int, ...] = (TrainingBudget.batch_size,)
    ranks: tuple[int, ...] = (MonteCLoRAConfig.r,)
    seeds: tuple[int, ...] = (0,)
    train_examples: int | None = None
    test_examples: int | None = None
    validation_examples: int | None = None
    test_split: str = "test"
    shift_splits: bool = True
    hold_out: int = 0
    max_length: int = 64
    num_samples: int = 16
    training: Mapping[str, Any] = field(default_factory=lambda: {"epochs": 5})
    trainer: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    curve_points: int = 0
    curve_examples: int = 200
    keep_adapters: bool = False
    reference: tuple[str, ...] = ()
    retries: int = 1

    def __post_init__(self) -> None:
        tasks = tuple(_task_spec(task) for task in listed("tasks", self.tasks))
        methods = tuple(spec for method in listed("methods", self.methods) for spec in method_specs(method))
        object.__setattr__(self, "tasks", tasks)
        object.__setattr__(self, "methods", methods)
        for name, kind in (("learning_rates", float), ("batch_sizes", int), ("ranks", int), ("seeds", int)):
            most = RANGES[name.removesuffix("s")].most
            values = tuple(number(name, value, kind, most=most) for value in listed(name, getattr(self, name)))
            object.__setattr__(self, name, values)
        for name in AXES:
            entries = [json.dumps(_plain(value), sort_keys=True) for value in getattr(self, name)]
            repeated = [entry for entry in entries if entries.count(entry) > 1]
            if repeated:
                raise InputError(f"study: {name} names {repeated[0]} twice")
        for name, least in (
            ("num_samples", 1),
            ("max_length", 2),
            ("hold_out", 0),
            ("curve_points", 0),
            ("curve_examples", 1),
            ("retries", 0),
        ):
            number(name, getattr(self, name), int, least=least, most=LENGTH.most if name == "max_length" else MOST)
        for name in ("train_examples", "test_examples", "validation_examples"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), int, least=1)
        check_fields("training", self.training, TRAINING_OPTIONS)
        check_fields("lora", self.lora, LORA_FIELDS)
        if not isinstance(self.trainer, Mapping):
            raise InputError(f"study: trainer must be a mapping, got {shown(self.trainer)}")
        for name in ("model", "test_split"):
            check_text(name, getattr(self, name))
        object.__setattr__(self, "reference", _listed_texts("reference", self.reference))
        for name in ("shift_splits", "keep_adapters"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"study: {name} takes true or false, got {shown(getattr(self, name))}")
        for name, value in self.training.items():
            if name == "schedule":
                check_text("schedule", value)
            elif value is not None:
                RANGES[name].check(f"study: {name}", value)
        self._refuse_idle()
        names = [task.name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"study: two tasks are called {name!r}: give one of them another name")
        check_folders(self, ["method"])

    def _refuse_idle(self) -> None:
        """Refuse entries that would do nothing beside the others."""
        named = next((task.name for task in self.tasks if task.shift_splits), None)
        if named and not self.shift_splits:
            raise InputError(f"study: shift_splits of task {named!r} does nothing beside shift_splits: false")
        if self.curve_examples != type(self).curve_examples and not self.curve_points:
            raise InputError("study: curve_examples does nothing without curve_points")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Study":
        """Read a study file.

        Raises:
            InputError: as :func:`bayeslora.study.study_file.read_study_file` and :class:`Study`.
        """
        return cls.from_dict(read_study_file(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Study":
        """From plain values, as :meth:`to_dict` and YAML files have them."""
        check_fields("study", values, [f.name for f in dataclasses.fields(cls)])
        missing = [name for name in ("model", "tasks", "methods") if not values.get(name)]
        if missing:
            raise InputError(f"study: {missing[0]!r} is missing; a study names at least a model, tasks and methods")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return _plain(self)

    @property
    def digest(self) -> str:
        """The same for studies that train and score the same."""
        return _digest({name: value for name, value in self.to_dict().items() if name != "reference"})

    @property
    def settings(self) -> dict[str, Any]:
        """All but the grid: what cells of one folder have in common."""
        return {name: value for name, value in self.to_dict().items() if name not in (*AXES, "reference", "retries")}

    def cell_digest(self, cell: Cell, methods: Sequence[MethodSpec]) -> str:
        """Changes with anything that the cell's scores depend on; ``methods`` are those that it serves."""
        task = next(task for task in self.tasks if task.name == cell.task)
        return _digest(_plain([self.settings, cell, task, methods]))


def axes(study: Study, trained: Sequence[str]) -> dict[str, list[Any]]:
    """The grid as Optuna's search space; ``trained`` are the labels of the methods that train."""
    return {
        "task": [task.name for task in study.tasks],
        "method": list(trained),
        "learning_rate": list(study.learning_rates),
        "batch_size": list(study.batch_sizes),
        "rank": list(study.ranks),
        "seed": list(study.seeds),
    }


def cells(study: Study, trained: Sequence[str]) -> Iterator[Cell]:
    """Every point of the grid."""
    space = axes(study, trained)
    for values in itertools.product(*space.values()):
        yield Cell(**dict(zip(space, values, strict=True)))


def differing(one: Cell, other: Cell) -> str:
    """The first field in which two cells differ."""
    return next(f.name for f in dataclasses.fields(Cell) if getattr(one, f.name) != getattr(other, f.name))


def check_folders(study: Study, trained: Sequence[str]) -> None:
    """Raise ``InputError`` where two cells would write over each other, also on a file system that ignores case."""
    taken: dict[Path, Cell] = {}
    for cell in cells(study, trained):
        other = taken.setdefault(cell.folder, cell)
        if other != cell:
            name = differing(cell, other)
            two = f"{getattr(other, name)!r} and {getattr(cell, name)!r}"
            raise InputError(
                f"study: the {name.replace('_', ' ')}s {two} would both be written to "
                f"{cell.folder.as_posix()}: change one of them"
            )


def _task_spec(task: Any) -> TaskSpec:
    if isinstance(task, TaskSpec):
        return task
    values = {"name": task} if isinstance(task, str) else task
    check_fields("tasks", values, [f.name for f in dataclasses.fields(TaskSpec)])
    if "name" not in values:
        raise InputError(f"study: a task needs a name, got {shown(values)}")
    columns = values.get("text_columns")
    columns = (columns,) if isinstance(columns, str) else columns
    folder = values.get("data_dir")
    names = values.get("label_names")
    shifts = values.get("shift_splits")
    shifts = (shifts,) if isinstance(shifts, str) else shifts
    for name in ("name", "label_column"):
        if values.get(name) is not None or name == "name":
            check_text(f"{name} of a task", values[name])
    for name, entries in (("text_columns", columns), ("label_names", names), ("shift_splits", shifts)):
        if isinstance(entries, str) or not isinstance(entries or (), Sequence):
            raise InputError(f"study: {name} of a task takes a list of texts, got {shown(entries)}")
        for entry in entries or ():
            check_text(f"{name} of a task", entry)
    if not isinstance(values.get("prompting") or {}, Mapping):
        raise InputError(f"study: prompting of a task must be a mapping, got {shown(values['prompting'])}")
    given = {
        "text_columns": columns and tuple(columns),
        "label_names": names and tuple(names),
        "data_dir": folder and str(folder),
        "shift_splits": None if shifts is None else tuple(shifts),
    }
    return TaskSpec(**{**values, **given})


def _listed_texts(name: str, values: Any) -> tuple[str, ...]:
    """Texts, or one that stands for a list of one."""
    found = (values,) if isinstance(values, str) else tuple(values) if isinstance(values, list | tuple) else None
    if found is None:
        raise InputError(f"study: {name} takes a text or a list of texts, got {shown(values)}")
    for value in found:
        check_text(name, value)
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {name: entry for name, entry in fields.items() if name not in LATER or entry is not None}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def slug(name: str) -> str:
    """What a file or folder is called after ``name``, on every file system.

    Little is left of names with letters outside ASCII, and of long ones: they get a hash.
    """
    name = unicodedata.normalize("NFC", name)  # some file systems and keyboards take é apart
    plain = re.sub(r"[^a-z0-9.]+", "-", name.lower().replace("+", "-plus")).strip("-.") or "x"
    if name.isascii() and len(plain) <= MOST_LETTERS:
        return plain
    return f"{plain[:MOST_LETTERS]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
