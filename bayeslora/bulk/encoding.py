"""What a run reads of a row: texts, pairs of them, or a question with its options."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from bayeslora.errors import InputError
from bayeslora.runs import FittedRun
from bayeslora.tasks.base import as_texts
from bayeslora.tasks.choice import CHOICE_TASKS, encode_question, read_question
from bayeslora.tasks.load import LOADERS
from bayeslora.tasks.prompting import ChoicePrompting, read_prompting

Values = Mapping[str, Any]


class Encoder(Protocol):
    """Rows to examples of a network."""

    columns: tuple[str, ...]

    def problem(self, values: Values) -> str:
        """Why a row cannot be read; empty where it can."""
        ...

    def __call__(self, rows: Sequence[Values]) -> list[dict[str, Any]]:
        """Examples of rows without problems."""
        ...


def encoder_of(run: FittedRun, text_columns: Sequence[str] | None) -> Encoder:
    """How the rows of a file become examples of a run.

    Args:
        run: The fitted run.
        text_columns: What the file calls the columns of text; None where it calls them as the data of the fit.

    Raises:
        InputError: for a run that learns to write, or another number of columns.
    """
    name = run.record["task"]["name"]
    if name in CHOICE_TASKS:
        if text_columns:
            raise InputError(f"task {name!r} has columns of its own: leave --text-columns out")
        return _Questions(run)
    if name in LOADERS:
        raise InputError(
            f"task {name!r} is one of kind text: it writes, and nothing is predicted of a row; evaluate --generate "
            "has answers judged, and bayes.generate writes them"
        )
    if run.posterior.model.labelling.several_labels:
        raise InputError(
            f"a file's rows get one label each, and an example of task {name!r} has several: predict with --text, with "
            "--split, or in Python with open_run(folder).predict(texts)"
        )
    known = run.text_columns
    if text_columns and len(text_columns) != len(known):
        raise InputError(f"--text-columns: the run reads {len(known)} ({', '.join(known)}), got {len(text_columns)}")
    return _Texts(run, tuple(text_columns or known))


class _Texts:
    def __init__(self, run: FittedRun, columns: tuple[str, ...]):
        self.run, self.columns = run, columns

    def problem(self, values: Values) -> str:
        for column in self.columns:
            if column not in values:
                return f"it has no column {column!r}, but {', '.join(values) or 'none'}; --text-columns names others"
            text = values[column]
            if not isinstance(text, str):
                return f"{column!r} is {'null' if text is None else f'a {type(text).__name__}, not a text'}"
            if not text.strip():
                return f"{column!r} is empty"
            if any("\ud800" <= character <= "\udfff" for character in text):
                return f"{column!r} is no valid Unicode"
        return ""

    def __call__(self, rows: Sequence[Values]) -> list[dict[str, Any]]:
        return self.run.tokens(*as_texts([[row[column] for row in rows] for column in self.columns]))


class _Questions:
    def __init__(self, run: FittedRun):
        recipe = run.record["task"]
        self.run, self.known = run, CHOICE_TASKS[recipe["name"]]
        self.columns = self.known.columns
        self.prompting = read_prompting(ChoicePrompting, recipe.get("prompting"))

    def problem(self, values: Values) -> str:
        missing = [column for column in self.columns if column not in values]
        if missing:
            return f"it has no column {missing[0]!r}, but {', '.join(values) or 'none'}"
        try:
            example = self._encode(values)
        except (InputError, TypeError, KeyError, AttributeError) as error:
            return f"it is not as expected: {error}"
        options, most = len(example.get("letter_ids", example["input_ids"])), len(self.run.label_names or ())
        return f"it has {options} options, and the run was fitted to {most} at most" if options > most else ""

    def __call__(self, rows: Sequence[Values]) -> list[dict[str, Any]]:
        return [self._encode(row) for row in rows]

    def _encode(self, values: Values) -> dict[str, Any]:
        question = read_question(self.known, {name: v for name, v in values.items() if name not in _ANSWERS})
        return encode_question(self.run.tokenizer, question, self.prompting, self.run.record["max_length"])


_ANSWERS = ("label", "answer", "answerKey")  # of the official data: what is predicted is not read
