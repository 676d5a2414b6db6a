"""Choices between texts, for causal language models: the official data sets, and what is asked of them.

====================  =========================================  =======================================================
task                  read                                       scored
====================  =========================================  =======================================================
piqa                  ``Question: GOAL``, ``Answer:``            each solution
siqa                  ``Q: CONTEXT QUESTION``, ``A:``            each answer
winogrande            the sentence up to the blank, filled       the rest of the sentence
arc_easy,             ``Question: QUESTION``, ``Answer:``        each choice
arc_challenge
openbookqa            the stem                                   each choice
boolq_question_only   ``Question: QUESTION?``, ``Answer:``       ``no`` and ``yes``; the passage is not shown
====================  =========================================  =======================================================

These are the prompts of EleutherAI's evaluation harness, without examples before them. ``style="letters"`` lists the
options after the question instead, and scores their letters.

``"arc_easy+openbookqa"`` is a mixture: the training splits of both together, the test splits of both together as
``test``, and each on its own in a split of its name, which comparisons and reports score too.

References:
    Bisk et al. (2020), *PIQA*; Sap et al. (2019), *Social IQA*; Sakaguchi et al. (2020), *WinoGrande*; Clark et al.
    (2018), *Think you have Solved Question Answering? Try ARC*; Mihaylov et al. (2018), *OpenBookQA*; Clark et al.
    (2019), *BoolQ*.
"""

import dataclasses
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.errors import InputError
from bayeslora.tasks.base import Task, arrange, given_path
from bayeslora.tasks.encoding import chat, encode_letters, encode_options
from bayeslora.tasks.labels import UNLABELLED, is_labelled
from bayeslora.tasks.network import load_network
from bayeslora.tasks.prompting import ChoicePrompting, read_prompting
from bayeslora.tasks.reading import read_hub, read_local

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]
_ROWS_AT_ONCE = 200
MIXED = "+"  # between the names of tasks that are learned together


@dataclass(frozen=True)
class Question:
    """One question: what is asked, what is read before each option, the options, and the right one (-1: unknown).

    ``listed`` is what the letters stand for, where that is not the options themselves.
    """

    question: str
    prompts: list[str]
    options: list[str]
    label: int
    listed: list[str] | None = None


@dataclass(frozen=True)
class NamedChoice:
    """What is known of a task before its data is read; ``columns`` are those that ``read`` needs, labels aside."""

    repository: str
    hub_config: str | None
    columns: tuple[str, ...]
    read: Callable[[Row], Question]


def _one_prompt(question: str, prompt: str, options: list[str], label: int) -> Question:
    return Question(question, [prompt] * len(options), options, label)


def _numbered(value: Any, names: list[str]) -> int:
    """Position of a label among its names; -1 for none."""
    text = "" if value is None else str(value).strip()
    if text in ("", "-1"):
        return UNLABELLED
    if text not in names:
        raise InputError(f"the label {value!r} is none of {', '.join(names)}")
    return names.index(text)


def _piqa(row: Row) -> Question:
    goal = row["goal"]
    label = _numbered(row.get("label"), ["0", "1"])
    return _one_prompt(goal, f"Question: {goal}\nAnswer:", [row["sol1"], row["sol2"]], label)


def _siqa(row: Row) -> Question:
    question = f"{row['context']} {row['question']}"
    options = [row["answerA"], row["answerB"], row["answerC"]]
    return _one_prompt(question, f"Q: {question}\nA:", options, _numbered(row.get("label"), ["1", "2", "3"]))


def _winogrande(row: Row) -> Question:
    sentence, fillings = row["sentence"], [row["option1"], row["option2"]]
    before, blank, after = sentence.partition("_")
    if not blank:
        raise InputError(f"the sentence {sentence!r:.80} has no blank (_)")
    label = _numbered(row.get("answer"), ["1", "2"])
    return Question(sentence, [before + filling for filling in fillings], [after.strip()] * 2, label, fillings)


def _choices(row: Row, question: str, prompt: str) -> Question:
    choices = row["choices"]
    names = [str(name).strip() for name in choices["label"]]
    return _one_prompt(question, prompt, list(choices["text"]), _numbered(row.get("answerKey"), names))


def _arc(row: Row) -> Question:
    return _choices(row, row["question"], f"Question: {row['question']}\nAnswer:")


def _openbookqa(row: Row) -> Question:
    return _choices(row, row["question_stem"], row["question_stem"])


def _boolq(row: Row) -> Question:
    question = row["question"]
    value = row.get("label") if row.get("answer") is None else row["answer"]
    label = _numbered(int(value) if isinstance(value, bool) else value, ["0", "1"])
    return _one_prompt(question, f"Question: {question}?\nAnswer:", ["no", "yes"], label)


_ARC = ("question", "choices")
# of PIQA and Social IQA the copies that the evaluation harness reads: the authors' own need code of theirs to be loaded
CHOICE_TASKS = {
    "piqa": NamedChoice("baber/piqa", None, ("goal", "sol1", "sol2"), _piqa),
    "siqa": NamedChoice("lighteval/siqa", None, ("context", "question", "answerA", "answerB", "answerC"), _siqa),
    "winogrande": NamedChoice("allenai/winogrande", "winogrande_xl", ("sentence", "option1", "option2"), _winogrande),
    "arc_easy": NamedChoice("allenai/ai2_arc", "ARC-Easy", _ARC, _arc),
    "arc_challenge": NamedChoice("allenai/ai2_arc", "ARC-Challenge", _ARC, _arc),
    "openbookqa": NamedChoice("allenai/openbookqa", "main", ("question_stem", "choices"), _openbookqa),
    "boolq_question_only": NamedChoice("google/boolq", None, ("question",), _boolq),
}


def load_choice_task(name: str, data_dir: str | Path | None, prompting: Mapping[str, Any] | None) -> "ChoiceTask":
    """Read one of :data:`CHOICE_TASKS`, or a mixture of several; see :func:`bayeslora.load_task`.

    Raises:
        InputError: anything amiss with the names, the files, the columns, the labels or the prompting.
    """
    how, parts = read_prompting(ChoicePrompting, prompting), name.split(MIXED)
    for part in parts:
        if part not in CHOICE_TASKS or parts.count(part) > 1:
            raise InputError(
                f"task {name!r}: a mixture is of different tasks out of {', '.join(CHOICE_TASKS)}, and {part!r} is "
                f"{'there twice' if part in CHOICE_TASKS else 'none of them'}"
            )
    read = {part: _read(part, data_dir) for part in parts}
    splits = read[name] if name in read else _mixed(name, read)
    most = max(len(options) for data in splits.values() for options in data["options"][:])
    from datasets import DatasetDict

    task = ChoiceTask(
        name=name,
        data=DatasetDict(splits),
        text_columns=("question",),
        label_column="label",
        label_names=tuple(string.ascii_uppercase[:most]),
        metrics=("accuracy",),
        shift_splits=() if name in read else tuple(parts),
        data_dir=given_path(data_dir),
        prompting=how,
    )
    task.likelihood()  # a mistake in the normalization is found here
    return task


def _read(name: str, data_dir: str | Path | None) -> "dict[str, Dataset]":
    known = CHOICE_TASKS[name]
    splits = read_hub(name, known.repository, known.hub_config) if data_dir is None else read_local(name, data_dir, ())
    return arrange(
        {split: _read_split(f"task {name!r}, split {split!r}", known, data) for split, data in splits.items()}
    )


def _mixed(name: str, read: "Mapping[str, dict[str, Dataset]]") -> "dict[str, Dataset]":
    """Training and validation splits one after the other, and a split to score for each task, called by its name: its
    test split where that has labels, or else its validation split, which is then left out of the common one."""
    from datasets import concatenate_datasets

    train, validation, scored = [], [], {}
    for part, splits in read.items():
        labelled = [s for s in ("test", "validation") if s in splits and is_labelled(splits[s], "label")]
        if "train" not in splits or not labelled:
            raise InputError(
                f"task {name!r}: {part} has no {'labelled test or validation' if 'train' in splits else 'train'} split"
            )
        train.append(splits["train"])
        scored[part] = splits[labelled[0]]
        validation += [splits["validation"]] if labelled == ["test", "validation"] else []
    common = {"train": concatenate_datasets(train)} | (
        {"validation": concatenate_datasets(validation)} if validation else {}
    )
    return {**common, "test": concatenate_datasets(list(scored.values())), **scored}


def _read_split(where: str, known: NamedChoice, data: "Dataset") -> "Dataset":
    from datasets import Dataset

    missing = [column for column in known.columns if column not in data.column_names]
    if missing:
        raise InputError(
            f"{where}: no column {missing[0]!r}; expected {', '.join(known.columns)}, and the columns are "
            f"{', '.join(data.column_names)}"
        )
    if not data.num_rows:
        raise InputError(f"{where}: the data set is empty; expected at least one example")
    questions = []
    for number, row in enumerate(data):
        try:
            questions.append(read_question(known, row))
        except (InputError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{where}: row {number} is not as expected: {error}") from error
    return Dataset.from_list(questions)


def read_question(known: NamedChoice, row: Row) -> dict[str, Any]:
    """A row of the official data as one of a :class:`ChoiceTask`.

    Raises:
        InputError, TypeError, KeyError, AttributeError: where it is not as expected.
    """
    question = dataclasses.asdict(known.read(row))
    return question | {"listed": question["listed"] or question["options"]}


def encode_question(tokenizer: Any, row: Row, prompting: ChoicePrompting, max_length: int) -> dict[str, Any]:
    """Prompt and options of one row of a :class:`ChoiceTask`, as tokens."""
    if prompting.style == "letters":
        lines = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, row["listed"], strict=False)]
        prompt = "\n".join([f"Question: {row['question']}", *lines])
        prompt = chat(tokenizer, prompt)[0] if prompting.chat else f"{prompt}\nAnswer:"
        return encode_letters(tokenizer, prompt, len(lines), max_length=max_length)
    prompts, options = list(row["prompts"]), [f" {option}" for option in row["options"]]
    if prompting.chat:
        prompts, options = [chat(tokenizer, prompt)[0] for prompt in prompts], list(row["options"])
    return encode_options(tokenizer, prompts, options, max_length=max_length)


@dataclass(frozen=True, eq=False)
class ChoiceTask(Task):
    """A :class:`bayeslora.tasks.base.Task` whose classes are texts, to be scored by a causal language model.

    ``data`` has the columns ``question``, ``prompts``, ``options``, ``listed`` (a list of each) and ``label``. The
    classes are called A, B, ...; an example may have fewer options than there are classes.
    """

    prompting: ChoicePrompting = field(default_factory=ChoicePrompting)
    takes_texts = False

    @property
    def kind(self) -> str:
        return "choice"

    @property
    def recipe(self) -> dict[str, Any]:
        asked = {"prompting": dataclasses.asdict(self.prompting)}
        return {"name": self.name, "data_dir": self.data_dir, **asked, **self.named_shifts}

    @property
    def likelihood_record(self) -> dict[str, Any]:
        names = list(self.label_names)
        return {"kind": self.kind, "label_names": names, "normalization": self.prompting.normalization}

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
        """Prompts and options of one split as tokens, and ``labels``.

        Arguments as :meth:`bayeslora.tasks.base.Task.encode`. A prompt that is too long loses its beginning. See
        :mod:`bayeslora.tasks.encoding` for what comes out.
        """
        wanted = self.is_labelled(split) if labelled is None else labelled
        data = self.split(split, labelled=wanted, limit=limit, seed=seed)
        from datasets import Dataset, concatenate_datasets

        parts = []
        for start in range(0, data.num_rows, _ROWS_AT_ONCE):
            rows = data.select(range(start, min(start + _ROWS_AT_ONCE, data.num_rows)))
            encoded = [encode_question(tokenizer, row, self.prompting, max_length) for row in rows]
            parts.append(
                Dataset.from_list(
                    [
                        {**example, "labels": row["label"]} if wanted else example
                        for example, row in zip(encoded, rows, strict=True)
                    ]
                )
            )
        return concatenate_datasets(parts)

    def load_network(self, path: str | Path, **kwargs: Any) -> tuple[Any, Any]:
        """A causal language model and its tokenizer; see :func:`bayeslora.tasks.network.load_network`."""
        return load_network(path, None, **kwargs)

    def with_out_of_scope(self, other: Task, split: str = "test") -> Task:
        raise InputError(f"task {self.name!r} chooses between texts: texts of another task have none to choose from")
