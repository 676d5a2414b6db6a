"""How a task is put to a language model."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bayeslora.errors import InputError


@dataclass(frozen=True)
class ChoicePrompting:
    """How a choice is put to a language model.

    Args:
        style: ``"options"``: every option is read after the prompt, and its text scored; ``"letters"``: the prompt
            lists the options, and their letters are scored, one forward pass an example.
        normalization: Of an option's log-likelihood, see :class:`bayeslora.models.ChoiceLikelihood`; letters need
            none.
        chat: Put the prompt into the tokenizer's chat template.

    Raises:
        InputError: for an unknown style.
    """

    style: str = "options"
    normalization: str = "tokens"
    chat: bool = False

    def __post_init__(self) -> None:
        if self.style not in ("options", "letters"):
            raise InputError(f"style must be 'options' or 'letters', got {self.style!r}")


@dataclass(frozen=True)
class TextPrompting:
    """How texts are put to a language model.

    Args:
        chat: Prompt and answer as turns of the tokenizer's chat template.
        reduction: Of the likelihood, see :class:`bayeslora.models.NextTokenLikelihood`.
    """

    chat: bool = False
    reduction: str = "mean"


def read_prompting(kind: type, given: Mapping[str, Any] | None) -> Any:
    """The options of a task's prompting, checked."""
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    for name, value in (given or {}).items():
        if name not in defaults:
            raise InputError(f"prompting has no {name!r}; there are {', '.join(defaults)}")
        if type(value) is not type(defaults[name]):
            raise InputError(f"prompting: {name} must be of the kind of {defaults[name]!r}, got {value!r}")
    return kind(**(given or {}))
