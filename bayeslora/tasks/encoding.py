"""Text for causal language models: prompts and answers as tokens, with what is scored marked.

An answer's tokens are those that follow the prompt's when both are tokenised as one text, as the evaluation harness
does it. Where something has to be cut, it is the beginning of the prompt.

References:
    Gao et al., *A framework for few-shot language model evaluation* (EleutherAI's lm-evaluation-harness).
"""

import string
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bayeslora.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

NOT_SCORED = -100
Encoded = dict[str, list[Any]]


def encode_text(tokenizer: Any, prompt: str, target: str, *, max_length: int = 512, end: bool = True) -> Encoded:
    """A prompt that is read and a target that is learnt: ``input_ids``, ``attention_mask`` and ``labels``.

    Args:
        tokenizer: A ``transformers`` tokenizer.
        prompt: Its labels are -100; may be empty, and then the target's first token is not scored.
        target: Its labels are its tokens.
        max_length: Tokens at most: the prompt loses its beginning, and the target its end where it is longer itself.
        end: Put the end-of-sequence token after the target.
    """
    before, after = join(tokenizer, prompt, target)
    if end and tokenizer.eos_token_id is not None:
        after = [*after, tokenizer.eos_token_id]
    before, after = _cut(before, after, max_length)
    tokens = [*before, *after]
    return {
        "input_ids": tokens,
        "attention_mask": [1] * len(tokens),
        "labels": [NOT_SCORED] * len(before) + after,
    }


def encode_options(tokenizer: Any, prompts: Sequence[str], options: Sequence[str], *, max_length: int = 512) -> Encoded:
    """Prompt and option, one row an option, for :class:`bayeslora.models.ChoiceLikelihood`.

    Args:
        tokenizer: A ``transformers`` tokenizer.
        prompts: One for each option.
        options: The texts that are scored, with the space before them, if there is to be one.
        max_length: Tokens of a row at most.

    Returns:
        ``input_ids``, ``attention_mask`` and ``answer_mask``, lists of one list an option, and ``answer_characters``.

    Raises:
        InputError: for an option without tokens, or so long that nothing would be left before it.
    """
    encoded: Encoded = {name: [] for name in ("input_ids", "attention_mask", "answer_mask", "answer_characters")}
    for prompt, option in zip(prompts, options, strict=True):
        before, after = join(tokenizer, prompt, option)
        if not after:
            raise InputError(f"the option {option!r} has no tokens to score")
        if len(after) >= max_length:
            raise InputError(
                f"max_length is {max_length}, but the option {option!r:.80} is {len(after)} tokens "
                f"long: nothing would be left before it; give more than {len(after)}"
            )
        before, after = _cut(before or [_start(tokenizer)], after, max_length)
        encoded["input_ids"].append([*before, *after])
        encoded["attention_mask"].append([1] * (len(before) + len(after)))
        encoded["answer_mask"].append([0] * len(before) + [1] * len(after))
        encoded["answer_characters"].append(len(option.strip()))
    return encoded


def encode_letters(tokenizer: Any, prompt: str, count: int, *, max_length: int = 512) -> Encoded:
    """A prompt that lists its options, and the tokens of their letters, for the same likelihood.

    Args:
        tokenizer: A ``transformers`` tokenizer.
        prompt: A text after which " A", " B", ... may follow (or "A", "B", ..., if it ends in white space).
        count: How many options there are.
        max_length: Tokens at most.

    Returns:
        ``input_ids``, ``attention_mask`` and ``letter_ids``.

    Raises:
        InputError: where the tokenizer needs several tokens for a letter.
    """
    space = "" if prompt[-1:].isspace() else " "
    letters = []
    for letter in string.ascii_uppercase[:count]:
        before, after = join(tokenizer, prompt, space + letter)
        if len(after) != 1:
            raise InputError(f"{letter!r} is {len(after)} tokens here, not one: use style='options'")
        letters.append(after[0])
    tokens = before[-max_length:]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "letter_ids": letters}


def chat(tokenizer: Any, prompt: str, target: str = "", *, system: str | None = None) -> tuple[str, str]:
    """A turn of the user and one of the assistant in the tokenizer's chat template: what is read, and what is learnt.

    The second part ends as the template ends a turn, so no end-of-sequence token needs to follow.

    Raises:
        InputError: for a tokenizer without a chat template, or one that puts something else before a finished turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{type(tokenizer).__name__} has no chat template: use chat=False, or an instruction-tuned model"
        )
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": prompt})
    opened = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": target}], tokenize=False)
    if not whole.startswith(opened):
        raise InputError("the chat template writes a finished turn differently from one that begins: leave it out")
    return opened, whole[len(opened) :]


def encode_instructions(
    dataset: "Dataset",
    tokenizer: Any,
    *,
    prompt: str = "{prompt}",
    target: str = "{completion}",
    use_chat: bool = False,
    system: str | None = None,
    max_length: int = 512,
) -> "Dataset":
    """Instructions and answers from the columns of a data set, through ``datasets.map``.

    Args:
        dataset: Columns that the templates name.
        tokenizer: A ``transformers`` tokenizer.
        prompt: Template of what is read, such as ``"Question: {question}\\nAnswer:"``.
        target: Template of what is learnt, such as ``" {answer}"``.
        use_chat: Put both into the tokenizer's chat template.
        system: The chat's system message.
        max_length: Tokens at most, see :func:`encode_text`.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, ready for :func:`bayeslora.fit`.

    Raises:
        InputError: for a template that names no column.
    """
    for template in (prompt, target):
        for _, name, _, _ in string.Formatter().parse(template):
            if name is not None and name not in dataset.column_names:
                raise InputError(
                    f"the template {template!r} names {name!r}; the columns are {', '.join(dataset.column_names)}"
                )

    def encode(row: Mapping[str, Any]) -> Encoded:
        read, learnt = prompt.format(**row), target.format(**row)
        if use_chat:
            read, learnt = chat(tokenizer, read, learnt, system=system)
        return encode_text(tokenizer, read, learnt, max_length=max_length, end=not use_chat)

    return dataset.map(encode, remove_columns=dataset.column_names, load_from_cache_file=False)


def pack(examples: Iterable[Mapping[str, Sequence[int]]], length: int) -> list[Encoded]:
    """Several texts in a row, one after another, so that little is padded.

    A text begins at position 0 and sees only itself: transformers reads the borders off ``position_ids`` where there is
    no ``attention_mask``. Texts that share a row share a draw, and count as one example. Text longer than ``length``
    has a row of its own.

    Args:
        examples: ``input_ids`` and ``labels``, as :func:`encode_text` gives them.
        length: Tokens of a row.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels`` of each row.

    Raises:
        InputError: for a length below 1.
    """
    if length < 1:
        raise InputError(f"length must be at least 1 token, got {length}")
    rows: list[Encoded] = []
    for example in examples:
        tokens, labels = list(example["input_ids"]), list(example["labels"])
        if not rows or len(rows[-1]["input_ids"]) + len(tokens) > length:
            rows.append({"input_ids": [], "position_ids": [], "labels": []})
        rows[-1]["input_ids"] += tokens
        rows[-1]["position_ids"] += range(len(tokens))
        rows[-1]["labels"] += [NOT_SCORED, *labels[1:]]  # nothing stands before a text's first token
    return rows


def join(tokenizer: Any, before: str, after: str) -> tuple[list[int], list[int]]:
    """Tokens of a text, and of what follows it; spaces at the end of the first go to the second.

    A token that begins every text (``<s>``) begins the first.
    """
    stripped = before.rstrip(" ")
    before, after = stripped, before[len(stripped) :] + after
    first = _tokens(tokenizer, before)
    whole = _tokens(tokenizer, before + after)
    begin = _begin(tokenizer)
    if begin and first[:1] == begin:  # a chat template has put it there
        begin = []
    return [*begin, *first], whole[len(first) :]


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _begin(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []


def _start(tokenizer: Any) -> int:
    """A token to stand before a text without a prompt."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise InputError(
        "without a prompt the first token needs one before it, and this tokenizer has neither a beginning "
        "nor an end of sequence"
    )


def _cut(before: list[int], after: list[int], max_length: int) -> tuple[list[int], list[int]]:
    after = after[:max_length]
    room = max_length - len(after)
    return before[len(before) - min(room, len(before)) :], after
