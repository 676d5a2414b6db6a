"""A class for each word: named entities, parts of speech.

Words come as lists: a column of lists of words and one of as many tags, or a file in columns
(:mod:`bayeslora.tasks.conll`). A word is learnt and predicted at its first piece.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.analysis.tagging.words import split_words
from bayeslora.errors import InputError
from bayeslora.tasks.base import Task, require_room
from bayeslora.tasks.labels import UNLABELLED, class_indices, names_from_values
from bayeslora.tasks.network import load_network
from bayeslora.tasks.reading import list_of, require_column

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

LABEL_COLUMNS = ("tags", "ner_tags", "pos_tags", "labels")  # looked for in this order, where none is named
_NOT_SCORED = -100


def are_words(splits: "dict[str, Dataset]", columns: Sequence[str]) -> bool:
    """Whether the one column of text holds lists of words."""
    return len(columns) == 1 and all(
        columns[0] in data.column_names and list_of(data, columns[0]) in ("string", "large_string")
        for data in splits.values()
    )


def prepare_words(
    name: str, splits: "dict[str, Dataset]", column: str, label_column: str | None, label_names: Sequence[str] | None
) -> "tuple[dict[str, Dataset], str, tuple[str, ...]]":
    """Splits with tags as class indices, the column of the tags, and the names of the classes.

    Raises:
        InputError: naming the row where words and tags do not fit together, or a tag that the training split lacks.
    """
    reference = "train" if "train" in splits else next(iter(splits))
    where = f"task {name!r}, split {reference!r}"
    label_column = label_column or _label_column(where, splits[reference])
    require_column(where, splits[reference], label_column, "label_column")
    names = _class_names(where, splits[reference], label_column, label_names)
    prepared = {
        split: _prepare(f"task {name!r}, split {split!r}", data, column, label_column, names)
        for split, data in splits.items()
    }
    if label_column not in prepared[reference].column_names:
        raise InputError(f"{where}: every tag is missing or -1: there is nothing to learn the classes from")
    return prepared, label_column, names


def _label_column(where: str, data: "Dataset") -> str:
    found = [name for name in LABEL_COLUMNS if name in data.column_names]
    if len(found) != 1:
        raise InputError(
            f"{where}: the columns are {', '.join(data.column_names)}: say with label_column which "
            "holds the words' tags"
        )
    return found[0]


def _class_names(where: str, data: "Dataset", column: str, given: Sequence[str] | None) -> tuple[str, ...]:
    feature = getattr(data.features[column], "feature", None)
    if feature is None or str(getattr(feature, "dtype", "")).startswith("float"):
        raise InputError(f"{where}: label column {column!r} holds {data.features[column]}, expected a list of tags")
    values = [tag for tags in data[column][:] for tag in tags or ()]
    names = tuple(given or getattr(feature, "names", None) or names_from_values(where, values))
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"{where}: the classes are {', '.join(names)}; expected two or more different ones")
    return names


def _prepare(where: str, data: "Dataset", column: str, label_column: str, names: tuple[str, ...]) -> "Dataset":
    from datasets import List, Value

    if not data.num_rows:
        raise InputError(f"{where}: the data set is empty; expected at least one example")
    words = data[column][:]
    for row, sentence in enumerate(words):
        if not sentence or not all(isinstance(word, str) and word.strip() for word in sentence):
            raise InputError(f"{where}: row {row} has no words, or an empty one: leave it out")
    if label_column not in data.column_names:
        return data
    tags = data[label_column][:]
    if all(tag is None or tag == UNLABELLED for of in tags for tag in (of or ())):
        return data.remove_columns(label_column)
    for row, (sentence, of) in enumerate(zip(words, tags, strict=True)):
        if of is None or len(of) != len(sentence):
            raise InputError(
                f"{where}: row {row} has {len(sentence)} words and {len(of or ())} tags: one is needed for each"
            )
    numbers = [class_indices(f"{where}, row {row}", of, names, "word") for row, of in enumerate(tags)]
    return data.remove_columns(label_column).add_column(label_column, numbers, feature=List(Value("int64")))


@dataclass(frozen=True, eq=False)
class TokenTask(Task):
    """A :class:`bayeslora.tasks.base.Task` with a class for each word.

    ``data`` has a column of lists of words, and in labelled splits one of as many class indices.
    """

    scores_probabilities = False  # what is compared are probabilities of one label

    @property
    def kind(self) -> str:
        return "tokens"

    @property
    def recipe(self) -> dict[str, Any]:
        return {**super().recipe, "kind": self.kind}

    def is_labelled(self, split: str) -> bool:
        return self.label_column in self.split(split).column_names

    def split(self, name: str, *, labelled: bool = False, limit: int | None = None, seed: int = 0) -> "Dataset":
        data = super().split(name, limit=limit, seed=seed)
        if labelled and self.label_column not in data.column_names:
            raise InputError(f"task {self.name!r}: split {name!r} has no tags")
        return data

    def texts(self, split: str, *, limit: int | None = None, seed: int = 0) -> list[Any]:
        return self.split(split, limit=limit, seed=seed)[self.text_columns[0]][:]

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
        """Word pieces of one split and ``labels``: a word's class at its first piece, -100 elsewhere, and -1 where the
        class is not known. Arguments as :meth:`bayeslora.tasks.base.Task.encode`.

        A warning says how many words lie beyond ``max_length``: these are neither learnt nor predicted nor scored.
        """
        from datasets import Dataset

        wanted = self.is_labelled(split) if labelled is None else labelled
        data = self.split(split, labelled=wanted, limit=limit, seed=seed)
        tags = data[self.label_column][:] if wanted else None
        where = f"task {self.name!r}, split {split!r}"
        examples, beyond = encode_words(tokenizer, data[self.text_columns[0]][:], tags, max_length, where)
        if sum(beyond):
            logger.warning(
                "%s: %d words of %d sentences lie beyond max_length=%d, neither learnt nor predicted nor scored",
                where,
                sum(beyond),
                sum(count > 0 for count in beyond),
                max_length,
            )
        return Dataset.from_list(examples)

    def left_out(
        self, tokenizer: Any, split: str, *, max_length: int, limit: int | None = None, seed: int = 0
    ) -> dict[str, int]:
        words = self.texts(split, limit=limit, seed=seed)
        return {"words_left_out": sum(encode_words(tokenizer, words, None, max_length, split)[1])}

    @classmethod
    def tokens(
        cls, tokenizer: Any, first: Sequence[Any], second: Sequence[str] | None, max_length: int
    ) -> list[dict[str, Any]]:
        """Word pieces of sentences, and -1 as the label of each word.

        Raises:
            InputError: for a sentence that is longer than the network was fitted to.
        """
        words = [split_words(sentence) for sentence in first]
        examples, beyond = encode_words(tokenizer, words, None, max_length, "the texts")
        for row, count in enumerate(beyond):
            if count:
                raise InputError(
                    f"the texts, row {row}: {count} of its {len(words[row])} words lie beyond the {max_length} pieces "
                    "that this run reads (max_length): split it, sentence by sentence"
                )
        return examples

    @classmethod
    def unpaired(cls, texts: Sequence[Any], pairs: Sequence[str] | None) -> tuple[list[Any], None]:
        """Sentences, each a string or a list of its words."""
        if pairs is not None:
            raise InputError("words are tagged in single sentences: leave --text-pair out (pairs=None)")
        for row, text in enumerate(texts):
            words = [text] if isinstance(text, str) else text
            if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
                raise InputError(f"a text is a string, or a list of its words, got {text!r:.100}")
            if not all(word.strip() for word in words) or not split_words(text):
                raise InputError(f"the texts, row {row}: it has no words, or an empty one")
        return list(texts), None

    def load_network(self, path: str | Path, **kwargs: Any) -> tuple[Any, Any]:
        """A pretrained network with a head for the words' classes, and its tokenizer."""
        return load_network(path, self.label_names, kind=self.kind, **kwargs)

    def with_out_of_scope(self, other: Task, split: str = "test") -> Task:
        raise InputError(f"task {self.name!r} tags words: texts of another task are no lists of words")


def encode_words(
    tokenizer: Any,
    sentences: Sequence[Sequence[str]],
    tags: Sequence[Sequence[int]] | None,
    max_length: int,
    where: str,
) -> tuple[list[dict[str, Any]], list[int]]:
    """Examples of sentences, and how many words of each lie beyond ``max_length``.

    Args:
        tokenizer: A fast one, which knows each piece's word.
        sentences: Lists of words.
        tags: A class index for each word; None where they are not known.
        max_length: Pieces at most, the tokenizer's own tokens among them.
        where: What to call the sentences.

    Raises:
        InputError: for a word of which the tokenizer leaves nothing, and a slow tokenizer.
    """
    require_room(tokenizer, max_length, pair=False)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{type(tokenizer).__name__} does not say which word a piece is of: use a fast tokenizer")
    pieces = tokenizer(list(map(list, sentences)), is_split_into_words=True, truncation=True, max_length=max_length)
    names = [name for name in tokenizer.model_input_names if name in pieces]
    examples, beyond = [], []
    for row, words in enumerate(sentences):
        of = pieces.word_ids(row)
        begins = [word is not None and word != before for before, word in zip([None, *of], of, strict=False)]
        seen = [word for word, first in zip(of, begins, strict=True) if first]
        whole = len(of) < max_length
        missing = next((number for number in range(len(words) if whole else seen[-1]) if number not in set(seen)), None)
        if missing is not None or len(seen) != len(set(seen)):
            raise InputError(
                f"{where}, row {row}: the tokenizer leaves nothing of word {missing} ({words[missing or 0]!r}): remove "
                "it, or write something in its place"
            )
        known = [UNLABELLED] * len(words) if tags is None else tags[row]
        labels = [known[word] if first else _NOT_SCORED for word, first in zip(of, begins, strict=True)]
        examples.append({**{name: pieces[name][row] for name in names}, "labels": labels})
        beyond.append(len(words) - len(seen))
    return examples, beyond
