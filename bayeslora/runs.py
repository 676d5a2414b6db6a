"""A finished run's folder as something that predicts."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bayeslora.errors import InputError
from bayeslora.files.records import read_run
from bayeslora.module import BayesLoRA
from bayeslora.prediction import Prediction
from bayeslora.storage.run_folder import ADAPTER_FOLDER, RUN_FILE
from bayeslora.tasks.base import Task
from bayeslora.tasks.choice import CHOICE_TASKS
from bayeslora.tasks.load import LOADERS, load_task, task_class
from bayeslora.tasks.network import load_network, loading


@dataclass(frozen=True, eq=False)
class FittedRun:
    """What ``bayeslora fit`` made, opened by :func:`open_run`.

    Attributes:
        posterior: The fitted :class:`bayeslora.BayesLoRA`.
        tokenizer: The network's.
        record: ``run.json``.
        data_dir: Where the data is now, if it moved.
    """

    posterior: BayesLoRA
    tokenizer: Any
    record: dict[str, Any]
    data_dir: str | None = None
    _tokenizing: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @cached_property
    def task(self) -> Task:
        """What it was fitted to, with its data, which is read when this is first asked for."""
        return _task(self.record, self.data_dir)

    @property
    def network(self) -> Any:
        """The network with its adapter, a ``peft.PeftModel``."""
        return self.posterior.network

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Names of the classes, where there are any."""
        return self.posterior.model.labelling.label_names(self.network)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The log of the training."""
        return self.record.get("history", [])

    def predict(
        self,
        texts: Sequence[str] | Sequence[tuple[str, str]],
        pairs: Sequence[str] | None = None,
        *,
        num_samples: int | str = 16,
        **options: Any,
    ) -> Prediction:
        """The posterior predictive of texts, as ``bayeslora predict --text`` has it. The data is not needed.

        Args:
            texts: One text for each example, or one pair of texts. Of a task that tags words also lists of words; a
                text is split by :func:`~bayeslora.analysis.tagging.words.split_words`.
            pairs: The second text of each, for a task on pairs.
            num_samples: Draws of the posterior; 0 is its mean, ``"auto"`` as many as it takes.
            options: Further options of :meth:`bayeslora.BayesLoRA.predict`.

        Raises:
            InputError: as :meth:`encode` and :meth:`bayeslora.BayesLoRA.predict`.
        """
        found = self.posterior.predict(self.encode(texts, pairs), num_samples=num_samples, **options)
        return found.of_texts(texts)

    def encode(
        self, texts: Sequence[str] | Sequence[tuple[str, str]], pairs: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """Tokens of texts, one example each.

        Raises:
            InputError: where the task is not on such texts, or on other numbers of them.
        """
        if isinstance(texts, str) or isinstance(pairs, str):
            raise InputError("texts come as a list, one text for each example: give [text] for a single one")
        if not len(texts):
            raise InputError("there are no texts to predict: give at least one")
        first, second = task_class(self.record["task"]).unpaired(texts, pairs)
        self._check_takes(second is not None)
        if second is not None and len(second) != len(first):
            raise InputError(f"{len(first)} texts but {len(second)} in --text-pair (pairs): give as many of each")
        return self.tokens(first, second)

    def tokens(self, first: list[str], second: list[str] | None = None) -> list[dict[str, Any]]:
        """Tokens of texts, or of pairs, as the network has read them in the fit; several threads may ask at once."""
        kind = task_class(self.record["task"])
        with self._tokenizing:  # a fast tokenizer keeps its truncation, and fails where another thread sets it
            return kind.tokens(self.tokenizer, first, second, self.record["max_length"])

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns of text that it was fitted to; with no need of the data, where the run says them."""
        columns = self.record["task"].get("text_columns") or self.task.text_columns
        return (columns,) if isinstance(columns, str) else tuple(columns)

    def _check_takes(self, paired: bool) -> None:
        """Refuse texts where the task is on something else, with no need of its data."""
        name = self.record["task"]["name"]
        if name in LOADERS:
            kind = "choice" if name in CHOICE_TASKS else "text"
            raise InputError(f"task {name!r} is one of kind {kind}: --text is for classifiers, use --split")
        columns = self.text_columns
        if len(columns) > 2:
            raise InputError(
                f"task {name!r} has {len(columns)} text columns ({', '.join(columns)}): --text cannot give them all, "
                "use --split"
            )
        if (len(columns) == 2) != paired:
            single = "single texts: leave --text-pair out (pairs=None)"
            raise InputError(f"task {name!r} is on {single if paired else 'pairs: give --text-pair too (pairs=[...])'}")

    def data(self, split: str, *, limit: int | None = None, seed: int = 0, labelled: bool | None = None) -> Any:
        """A split of the task's data, encoded as for the fit; see :meth:`bayeslora.tasks.base.Task.encode`."""
        length = self.record["max_length"]
        return self.task.encode(self.tokenizer, split, max_length=length, limit=limit, seed=seed, labelled=labelled)

    def training_data(self) -> Any:
        """The examples that it was fitted to."""
        return self.data("train", limit=self.posterior.num_examples, labelled=True)

    def labelled_split(self) -> str:
        """What to judge it by: ``test`` where it is labelled, else ``validation``.

        Raises:
            InputError: where neither is.
        """
        for split in ("test", "validation"):
            if split in self.task.splits and self.task.is_labelled(split):
                return split
        raise InputError(f"task {self.task.name!r} has no labelled test or validation split: name one with --split")


def open_run(folder: str | Path, *, model: str | Path | None = None, data_dir: str | Path | None = None) -> FittedRun:
    """Open what ``bayeslora fit`` wrote: base network, adapter, posterior, tokenizer and task.

    Args:
        folder: The run's folder.
        model, data_dir: Where base model and data are now, if they moved.

    Raises:
        InputError: when it is no run folder, or the run is not finished.

    Example:
        >>> run = open_run("runs/reviews")
        >>> prediction = run.predict(["the film is good", "a dull plot"])
        >>> prediction.label_names, prediction.probs.shape
        (('bad', 'good'), (2, 2))
    """
    folder = Path(folder)
    check_is_run(folder)
    record = read_run(folder / RUN_FILE)
    if not (folder / ADAPTER_FOLDER).is_dir():
        raise InputError(f"{folder} is not finished: continue it with fit --resume")
    moved = str(data_dir) if data_dir else None
    network, tokenizer = _load_network(record, model or record["model"], moved)
    posterior = BayesLoRA.from_pretrained(folder / ADAPTER_FOLDER, network)
    posterior.tokenizer = posterior.tokenizer or tokenizer
    return FittedRun(posterior, posterior.tokenizer, record, moved)


def _task(record: dict[str, Any], data_dir: str | None) -> Task:
    return load_task(**record["task"] | ({"data_dir": data_dir} if data_dir else {}))


def _load_network(record: dict[str, Any], model: str | Path, data_dir: str | None) -> tuple[Any, Any]:
    """Base network and its tokenizer; the data is read only where the record does not say the classes."""
    recipe, options = record["task"], loading(record.get("bits"))
    if recipe["name"] in LOADERS:
        return load_network(model, None, **options)
    if "label_names" in recipe:
        return load_network(model, recipe["label_names"] or (), kind=recipe.get("kind"), **options)
    return _task(record, data_dir).load_network(model, **options)


def check_is_run(folder: Path) -> None:
    """Raise ``InputError`` for a folder that no fit wrote."""
    if not (folder / RUN_FILE).is_file():
        raise InputError(f"{folder} is not a run folder: it holds no run.json; give what fit wrote")
