"""A finished run's folder as something that predicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayeslora.errors import InputError
from bayeslora.files.records import read_run
from bayeslora.module import BayesLoRA
from bayeslora.prediction import Prediction
from bayeslora.storage.run_folder import ADAPTER_FOLDER, RUN_FILE
from bayeslora.tasks.base import Task, require_room
from bayeslora.tasks.load import load_task


@dataclass(frozen=True, eq=False)
class FittedRun:
    """What ``bayeslora fit`` made, opened by :func:`open_run`.

    Attributes:
        posterior: The fitted :class:`bayeslora.BayesLoRA`.
        tokenizer: The network's.
        task: What it was fitted to.
        record: ``run.json``.
    """

    posterior: BayesLoRA
    tokenizer: Any
    task: Task
    record: dict[str, Any]

    @property
    def network(self) -> Any:
        """The network with its adapter, a ``peft.PeftModel``."""
        return self.posterior.network

    @property
    def history(self) -> list[dict[str, Any]]:
        """The log of the training."""
        return self.record.get("history", [])

    def predict(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, num_samples: int | str = 16, **options: Any
    ) -> Prediction:
        """The posterior predictive of texts, as ``bayeslora predict --text`` has it.

        Args:
            texts: One text for each example.
            pairs: The second text of each, for a task on pairs.
            num_samples: Draws of the posterior; 0 is its mean, ``"auto"`` as many as it takes.
            options: Further options of :meth:`bayeslora.BayesLoRA.predict`.

        Raises:
            InputError: as :meth:`encode` and :meth:`bayeslora.BayesLoRA.predict`.
        """
        return self.posterior.predict(self.encode(texts, pairs), num_samples=num_samples, **options)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Tokens of texts, one example each.

        Raises:
            InputError: where the task is not on such texts, or on other numbers of them.
        """
        if isinstance(texts, str) or isinstance(pairs, str):
            raise InputError("texts come as a list, one text for each example: give [text] for a single one")
        if not len(texts):
            raise InputError("there are no texts to predict: give at least one")
        _check_takes_texts(self.task)
        if (len(self.task.text_columns) == 2) != bool(pairs):
            wanted = (
                "single texts: leave --text-pair out (pairs=None)"
                if pairs
                else "pairs: give --text-pair too (pairs=[...])"
            )
            raise InputError(f"task {self.task.name!r} is on {wanted}")
        if pairs and len(pairs) != len(texts):
            raise InputError(f"{len(texts)} texts but {len(pairs)} in --text-pair (pairs): give as many of each")
        length = self.record["max_length"]
        require_room(self.tokenizer, length, pair=bool(pairs))
        tokens = self.tokenizer(list(texts), list(pairs) if pairs else None, truncation=True, max_length=length)
        return [{name: values[i] for name, values in tokens.items()} for i in range(len(texts))]

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
    moved = {"data_dir": str(data_dir)} if data_dir else {}
    task = load_task(**record["task"] | moved)
    network, tokenizer = task.load_network(model or record["model"])
    return FittedRun(BayesLoRA.from_pretrained(folder / ADAPTER_FOLDER, network), tokenizer, task, record)


def check_is_run(folder: Path) -> None:
    """Raise ``InputError`` for a folder that no fit wrote."""
    if not (folder / RUN_FILE).is_file():
        raise InputError(f"{folder} is not a run folder: it holds no run.json; give what fit wrote")


def _check_takes_texts(task: Task) -> None:
    if not task.takes_texts:
        raise InputError(f"task {task.name!r} is one of kind {task.kind}: --text is for classifiers, use --split")
    if len(task.text_columns) > 2:
        raise InputError(
            f"task {task.name!r} has {len(task.text_columns)} text columns "
            f"({', '.join(task.text_columns)}): --text cannot give them all, use --split"
        )
