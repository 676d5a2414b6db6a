"""Texts to learn, for causal language models: mathematics and code, with what a written answer is judged by.

==========  =======================================  =========================  ====================================
task        read                                     learnt                     judged by
==========  =======================================  =========================  ====================================
gsm8k       ``Question: QUESTION``, ``Answer:``      solution and number        :func:`gsm8k_matches`
magicoder   the problem as an instruction            the solution               nothing; learnt for humaneval
humaneval   a signature and its documentation        the function's body        :mod:`bayeslora.judging.code_execution`
==========  =======================================  =========================  ====================================

References:
    Cobbe et al. (2021), *Training Verifiers to Solve Math Word Problems*; Chen et al. (2021), *Evaluating Large
    Language Models Trained on Code*; Wei et al. (2023), *Magicoder: Source Code Is All You Need*.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.errors import InputError
from bayeslora.tasks.base import Task, arrange, given_path
from bayeslora.tasks.encoding import chat, encode_text
from bayeslora.tasks.network import load_network
from bayeslora.tasks.prompting import TextPrompting, read_prompting
from bayeslora.tasks.reading import check_texts, read_hub, read_local

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]


@dataclass(frozen=True)
class NamedText:
    """What is known of a task before its data is read.

    ``columns`` are those it needs, ``write`` makes prompt and target of a row; ``stops`` end a written answer.
    """

    repository: str
    hub_config: str | None
    columns: tuple[str, ...]
    write: Callable[[Row], tuple[str, str]]
    stops: tuple[str, ...] = ()


TEXT_TASKS = {
    "gsm8k": NamedText(
        "openai/gsm8k",
        "main",
        ("question", "answer"),
        lambda row: (f"Question: {row['question']}\nAnswer:", f" {row['answer']}"),
        ("Question:",),
    ),
    "magicoder": NamedText(
        "ise-uiuc/Magicoder-OSS-Instruct-75K",
        None,
        ("problem", "solution"),
        lambda row: (f"@@ Instruction\n{row['problem']}\n\n@@ Response\n", row["solution"]),
        ("@@ Instruction",),
    ),
    "humaneval": NamedText(
        "openai/openai_humaneval",
        None,
        ("prompt", "canonical_solution", "test", "entry_point"),
        lambda row: (row["prompt"], row["canonical_solution"]),
        ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n```", "\n@"),
    ),
}
_FOLDERS = {"magicoder": "magicoder_oss_instruct"}


def load_text_task(name: str, data_dir: str | Path | None, prompting: Mapping[str, Any] | None) -> "TextTask":
    """Read one of :data:`TEXT_TASKS`; see :func:`bayeslora.load_task`. Files are found as for other tasks; those of
    ``magicoder`` may lie in a folder ``magicoder_oss_instruct``, and a split that begins with ``train_`` is ``train``.

    Raises:
        InputError: anything amiss with the files, the columns or the prompting.
    """
    known = TEXT_TASKS[name]
    how = read_prompting(TextPrompting, prompting)
    if data_dir is None:
        splits = read_hub(name, known.repository, known.hub_config)
    else:
        folder = Path(data_dir).expanduser()
        other = folder / _FOLDERS.get(name, name)
        splits = read_local(name, other if other.is_dir() else folder, known.columns)
    if "train" not in splits:
        splits = {"train" if split.startswith("train_") else split: data for split, data in splits.items()}
    check_texts(name, splits, known.columns)
    from datasets import DatasetDict

    task = TextTask(
        name=name,
        data=DatasetDict(arrange({split: _write(data, known) for split, data in splits.items()})),
        text_columns=("prompt",),
        label_column="target",
        label_names=(),
        metrics=(),
        data_dir=given_path(data_dir),
        prompting=how,
    )
    task.likelihood()  # a mistake in the reduction is found here
    return task


def _write(data: "Dataset", known: NamedText) -> "Dataset":
    """Columns ``prompt`` and ``target``, and those of the original that judge an answer."""
    from datasets import Dataset

    written = [known.write(row) for row in data]
    kept = {
        column: data[column][:]
        for column in ("answer", "test", "entry_point", "task_id")
        if column in data.column_names
    }
    return Dataset.from_dict({"prompt": [p for p, _ in written], "target": [t for _, t in written], **kept})


@dataclass(frozen=True, eq=False)
class TextTask(Task):
    """A :class:`bayeslora.tasks.base.Task` whose labels are texts.

    ``data`` has the columns ``prompt`` and ``target``, and what judges an answer: ``answer`` (gsm8k), ``test`` and
    ``entry_point`` (humaneval).
    """

    prompting: TextPrompting = field(default_factory=TextPrompting)
    writes = True
    takes_texts = False

    @property
    def kind(self) -> str:
        return "text"

    @property
    def recipe(self) -> dict[str, Any]:
        asked = {"prompting": asdict(self.prompting)}
        return {"name": self.name, "data_dir": self.data_dir, **asked, **self.named_shifts}

    @property
    def likelihood_record(self) -> dict[str, Any]:
        return {"kind": self.kind, "reduction": self.prompting.reduction}

    def prompts(self, tokenizer: Any, split: str, *, limit: int | None = None, seed: int = 0) -> list[str]:
        """What the model reads before it writes, one text an example, for :meth:`bayeslora.BayesLoRA.generate`."""
        prompts = self.split(split, limit=limit, seed=seed)["prompt"][:]
        return [chat(tokenizer, prompt)[0] for prompt in prompts] if self.prompting.chat else list(prompts)

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends a written answer, beside the end of the text."""
        return () if self.prompting.chat else TEXT_TASKS[self.name].stops

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
        """Tokens of prompt and target and ``labels`` for the target; arguments as
        :meth:`bayeslora.tasks.base.Task.encode`. ``labelled=False`` leaves target and labels out."""
        data = self.split(split, limit=limit, seed=seed)
        from datasets import Dataset

        examples = []
        for row in data:
            prompt, target = row["prompt"], row["target"] if labelled is not False else ""
            if self.prompting.chat:
                prompt, target = chat(tokenizer, prompt, target)
            if labelled is False:
                target = ""
            end = labelled is not False and not self.prompting.chat
            example = encode_text(tokenizer, prompt, target, max_length=max_length, end=end)
            if labelled is False:
                del example["labels"]
            examples.append(example)
        return Dataset.from_list(examples)

    def load_network(self, path: str | Path, **kwargs: Any) -> tuple[Any, Any]:
        """A causal language model and its tokenizer; see :func:`bayeslora.tasks.network.load_network`."""
        return load_network(path, None, **kwargs)

    def score(self, predictions: Any, labels: Any) -> dict[str, float]:
        raise InputError(f"task {self.name!r} is text: predict() gives its likelihood, generate() answers to be judged")

    def with_out_of_scope(self, other: Task, split: str = "test") -> Task:
        raise InputError(f"task {self.name!r} is text: nothing is out of its scope")


_NUMBER = r"-?[$0-9.,]{2,}|-?[0-9]+"


def gsm8k_matches(answers: Sequence[str], solutions: Sequence[str]) -> dict[str, list[bool]]:
    """Whether written answers give the number of the solution.

    ``strict``: the number after the first ``####`` is it, as the training texts write it. ``flexible``: the last number
    in the text is it. Commas, dollar signs and a final full stop do not count, as in the evaluation harness.

    Args:
        answers: What the model wrote.
        solutions: The data's, ending in ``#### NUMBER``.

    Raises:
        InputError: for a solution without a number, or unequal lengths.
    """
    if len(answers) != len(solutions):
        raise InputError(f"{len(answers)} answers for {len(solutions)} solutions")
    found: dict[str, list[bool]] = {"strict": [], "flexible": []}
    for answer, solution in zip(answers, solutions, strict=True):
        right = gsm8k_number(solution)
        if right is None:
            raise InputError(f"the solution ends without '#### NUMBER': {solution[-40:]!r}")
        found["strict"].append(gsm8k_number(answer) == right)
        found["flexible"].append(gsm8k_number(answer, flexible=True) == right)
    return found


def gsm8k_number(text: str, *, flexible: bool = False) -> str | None:
    """The number that a text answers with, as it writes it but for commas, dollar signs and a final full stop; None if
    there is none."""
    numbers = re.findall(_NUMBER, text) if flexible else re.findall(r"#### (-?[0-9.,]+)", text)[:1]
    return re.sub(r"[,$]|\.$", "", numbers[-1]) if numbers else None
