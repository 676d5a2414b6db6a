"""Named tasks and your own: text in, labels out, with the metrics people report for them.

Tasks for causal language models are in :mod:`bayeslora.tasks.choice` and :mod:`bayeslora.tasks.text`.

References:
    Wang et al. (2019), *GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language
    Understanding*; Wang et al. (2019), *SuperGLUE: A Stickier Benchmark for General-Purpose Language
    Understanding Systems*.
    Hutto & Gilbert (2014), *VADER* (the task ``sentiment``, see :mod:`bayeslora.tasks.sentiment`).
    For ``clinc_oos`` and ``ag_news`` see :mod:`bayeslora.tasks.out_of_scope`.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.errors import InputError
from bayeslora.tasks.base import Task, arrange, given_path
from bayeslora.tasks.choice import CHOICE_TASKS, MIXED, load_choice_task
from bayeslora.tasks.conll import WORDS
from bayeslora.tasks.labels import prepare_labels
from bayeslora.tasks.metrics import REGRESSION_METRICS
from bayeslora.tasks.multi_label import COLUMN as APPLYING
from bayeslora.tasks.multi_label import MultiLabelTask, are_label_lists, prepare_label_lists
from bayeslora.tasks.out_of_scope import separate
from bayeslora.tasks.reading import check_texts, holds_columns, read_hub, read_local
from bayeslora.tasks.sentiment import SHIFTED_DOMAINS, read_sentiment
from bayeslora.tasks.text import TEXT_TASKS, load_text_task
from bayeslora.tasks.tokens import TokenTask, are_words, prepare_words

if TYPE_CHECKING:
    from datasets import Dataset

#: Tasks with columns and labels of their own, which language models learn, and what loads each.
LOADERS = {**dict.fromkeys(CHOICE_TASKS, load_choice_task), **dict.fromkeys(TEXT_TASKS, load_text_task)}
_GLUE, _SUPERGLUE = "nyu-mll/glue", "aps/super_glue"


@dataclass(frozen=True)
class NamedTask:
    """What is known of a task before its data is read.

    ``label_names`` are in the order of the integers, or empty where the data name them. ``hub_config`` is the task's
    name unless given. Examples whose label is ``out_of_scope_label`` belong to no class.
    """

    repository: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    shift_splits: tuple[str, ...] = ()
    label_column: str = "label"
    hub_config: str | None = None
    out_of_scope_label: str | None = None


_ENTAILMENT = ("entailment", "not_entailment")

NAMED_TASKS = {
    "mrpc": NamedTask(_GLUE, ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), metrics=("accuracy", "f1")),
    "cola": NamedTask(_GLUE, ("sentence",), ("unacceptable", "acceptable"), metrics=("matthews_correlation",)),
    "rte": NamedTask(_GLUE, ("sentence1", "sentence2"), _ENTAILMENT),
    "sst2": NamedTask(_GLUE, ("sentence",), ("negative", "positive")),
    "qnli": NamedTask(_GLUE, ("question", "sentence"), _ENTAILMENT),
    "qqp": NamedTask(_GLUE, ("question1", "question2"), ("not_duplicate", "duplicate"), metrics=("accuracy", "f1")),
    "mnli": NamedTask(
        _GLUE,
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        shift_splits=("validation_mismatched",),
    ),
    "wic": NamedTask(_SUPERGLUE, ("word", "sentence1", "sentence2"), ("False", "True")),
    "boolq": NamedTask(_SUPERGLUE, ("question", "passage"), ("False", "True")),
    "sentiment": NamedTask("", ("text",), ("negative", "positive"), shift_splits=tuple(SHIFTED_DOMAINS)),
    "clinc_oos": NamedTask(
        "clinc/clinc_oos", ("text",), (), label_column="intent", hub_config="plus", out_of_scope_label="oos"
    ),
    "ag_news": NamedTask(
        "fancyzhx/ag_news", ("text",), ("World", "Sports", "Business", "Sci/Tech"), hub_config="default"
    ),
}


def load_task(
    name: str,
    data_dir: str | Path | None = None,
    *,
    text_columns: str | Sequence[str] | None = None,
    label_column: str | Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
    prompting: Mapping[str, Any] | None = None,
    shift_splits: Sequence[str] | None = None,
    kind: str | None = None,
) -> "Task":
    """Read a task's data and check it: a named GLUE or SuperGLUE task, another of :data:`NAMED_TASKS`, or your own.

    Tasks of a causal language model: choices between texts, :data:`bayeslora.tasks.choice.CHOICE_TASKS`, and texts to
    learn, :data:`bayeslora.tasks.text.TEXT_TASKS`. Choices of several kinds are learned together as a mixture,
    ``"arc_easy+openbookqa"``, and scored together and each on its own.

    ``clinc_oos`` has 150 intents, and the questions that ask for none of them in a split ``out_of_scope``.

    Args:
        name: One of :data:`NAMED_TASKS`, or any name for data of your own.
        data_dir: A folder (or one file) with parquet, JSON, JSONL or CSV: ``DIR/NAME/train.parquet`` or
            ``DIR/train.parquet``, and so on; ``dev`` means ``validation``, and further files become further
            splits. Without it a named task comes from the Hugging Face hub and ``sentiment`` through pip.
        text_columns: One column; or two, encoded as a pair; or three, of which the first is put before each
            of the others, as WiC needs: the pair "word: sentence1", "word: sentence2". A column of lists of words is a
            task with a class for each word (:mod:`bayeslora.tasks.tokens`); of a file in columns
            (:mod:`bayeslora.tasks.conll`) it is ``tokens``, which need not be given.
        label_column: Class indices, class names or floats (regression); "label" unless given. Of words, lists of
            them; the one of ``tags``, ``ner_tags``, ``pos_tags`` and ``labels`` that is there unless given. A column of
            lists of labels, or several columns of 0 and 1, are labels of which each applies or does not
            (:mod:`bayeslora.tasks.multi_label`).
        label_names: Names of the classes in the order of the integers. Without it a data set of your own
            takes the sorted labels of its training split.
        prompting: How a language model is asked: options of :class:`bayeslora.tasks.prompting.ChoicePrompting` or
            :class:`bayeslora.tasks.prompting.TextPrompting`. Choices and texts take no other option but
            ``shift_splits``.
        shift_splits: Further labelled splits that come from elsewhere than the training data, which comparisons and
            reports score beside the test split. Those that the task is known for if ``None``.
        kind: What a recipe says the task was; refused where the data is another.

    Raises:
        InputError: anything amiss with the name, the files, the columns, the labels or the options.

    Example:
        >>> task = load_task("reviews", "reviews", text_columns="text")
        >>> task.splits, task.label_names
        (('train', 'validation', 'test'), ('bad', 'good'))
    """
    mixture = name.split(MIXED)[0] in CHOICE_TASKS
    loader = load_choice_task if mixture else LOADERS.get(name)
    if loader:
        if text_columns or label_column or label_names:
            raise InputError(
                f"task {name!r} has columns and labels of its own: leave text_columns, label_column and label_names out"
            )
        return _with_shifts(loader(name, data_dir, prompting), shift_splits)
    if prompting:
        raise InputError(
            f"prompting is for tasks of language models, and {name!r} is none; those are {', '.join(LOADERS)}"
        )
    known = NAMED_TASKS.get(name)
    columns = _text_columns(name, known, data_dir, text_columns)
    splits, origin = arrange(_read(name, known, data_dir, columns)), dict[str, list[int]]()
    about = {"name": name, "text_columns": columns, "metrics": ("accuracy",), "data_dir": given_path(data_dir)}
    if known is None and are_words(splits, columns):
        return _with_shifts(_token_task(splits, label_column, label_names, about), shift_splits)
    if known is None and are_label_lists(splits, label_column or "label"):
        return _with_shifts(_multi_label_task(splits, label_column or "label", label_names, about), shift_splits)
    if kind is not None:
        raise InputError(f"task {name!r} was one of kind {kind}, and the columns of its data hold none")
    if label_column is not None and not isinstance(label_column, str):
        raise InputError(f"task {name!r} has one label column: several are for labels of your own data")
    official = known is not None and label_column in (None, known.label_column)
    label_column = label_column or (known.label_column if known else "label")
    if known and official:
        label_names = label_names or known.label_names
        if known.out_of_scope_label:
            splits, origin = separate(name, splits, label_column, known.out_of_scope_label)
    check_texts(name, splits, columns)
    splits, names = prepare_labels(name, splits, label_column, label_names)
    from datasets import DatasetDict

    task = Task(
        name=name,
        data=DatasetDict(splits),
        text_columns=columns,
        label_column=label_column,
        label_names=names,
        metrics=_metrics(known, names),
        shift_splits=tuple(split for split in known.shift_splits if split in splits) if known else (),
        out_of_scope_splits=tuple(split for split in splits if split.endswith("out_of_scope")) if official else (),
        data_dir=given_path(data_dir),
        origin=origin,
    )
    return _with_shifts(task, shift_splits)


def _token_task(
    splits: "dict[str, Dataset]",
    label_column: str | Sequence[str] | None,
    label_names: Sequence[str] | None,
    about: Mapping[str, Any],
) -> TokenTask:
    from datasets import DatasetDict

    name, (column,) = about["name"], about["text_columns"]
    if label_column is not None and not isinstance(label_column, str):
        raise InputError(f"task {name!r}: words have one column of tags, got {', '.join(label_column)}")
    splits, label_column, names = prepare_words(name, splits, column, label_column, label_names)
    return TokenTask(data=DatasetDict(splits), label_column=label_column, label_names=names, **about)


def _multi_label_task(
    splits: "dict[str, Dataset]", read: str | Sequence[str], label_names: Sequence[str] | None, about: Mapping[str, Any]
) -> MultiLabelTask:
    from datasets import DatasetDict

    check_texts(about["name"], splits, about["text_columns"])
    splits, names = prepare_label_lists(about["name"], splits, read, label_names)
    columns = read if isinstance(read, str) else tuple(read)
    return MultiLabelTask(data=DatasetDict(splits), label_column=APPLYING, label_names=names, columns=columns, **about)


def task_class(recipe: Mapping[str, Any]) -> type[Task]:
    """The class of the task that a recipe makes, as far as its data is not needed for it."""
    return _CLASSES.get(recipe.get("kind") or "", Task)


#: Kinds that a recipe names, and whose texts are read in ways of their own.
_CLASSES: dict[str, type[Task]] = {"tokens": TokenTask, "multi_label": MultiLabelTask}


@dataclass(frozen=True)
class TaskSpec:
    """What :func:`bayeslora.load_task` needs to read a task.

    Args:
        name, data_dir, text_columns, label_column, label_names, prompting, shift_splits, kind: As there.

    Example:
        >>> TaskSpec("reviews", "reviews", text_columns=("text",)).load().label_names
        ('bad', 'good')
    """

    name: str
    data_dir: str | None = None
    text_columns: tuple[str, ...] | None = None
    label_column: str | tuple[str, ...] | None = None
    label_names: tuple[str, ...] | None = None
    prompting: Mapping[str, Any] | None = None
    shift_splits: tuple[str, ...] | None = None
    kind: str | None = None

    def load(self) -> Any:
        return load_task(**dataclasses.asdict(self))


def _with_shifts(task: Task, names: Sequence[str] | None) -> Task:
    """The task with these shifted splits, each checked; as it is with None."""
    if names is None:
        return task
    for name in (names,) if isinstance(names, str) else names:
        if name in ("train", "validation"):
            raise InputError(f"task {task.name!r}: {name!r} is what is trained or tuned on, and no shifted split")
        task.split(name, labelled=True)
    return replace(task, shift_splits=(names,) if isinstance(names, str) else tuple(names), names_shifts=True)


def _text_columns(
    name: str, known: NamedTask | None, data_dir: str | Path | None, given: str | Sequence[str] | None
) -> tuple[str, ...]:
    if known is None and not given and holds_columns(name, data_dir):
        return (WORDS,)
    if known is None and (data_dir is None or not given):
        named = [*NAMED_TASKS, *LOADERS]
        close = difflib.get_close_matches(name, named)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise InputError(
            f"unknown task {name!r}: {hint}named tasks are {', '.join(named)}; "
            "for your own data give data_dir and text_columns"
        )
    columns = (given,) if isinstance(given, str) else tuple(given or ())
    if known and not columns:
        return known.text_columns
    if len(columns) > 3:
        raise InputError(f"task {name!r}: {len(columns)} text columns {columns}, expected one to three")
    return columns


def _read(
    name: str, known: NamedTask | None, data_dir: str | Path | None, columns: tuple[str, ...]
) -> "dict[str, Dataset]":
    if name == "sentiment":
        return read_sentiment(data_dir)
    if data_dir is None and known:
        return read_hub(name, known.repository, known.hub_config or name)
    assert data_dir is not None  # a task without a name has a folder
    return read_local(name, data_dir, columns)


def _metrics(known: NamedTask | None, names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        return REGRESSION_METRICS
    return known.metrics if known and len(known.label_names) == len(names) else ("accuracy",)
