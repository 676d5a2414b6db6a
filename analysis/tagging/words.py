"""The words of a text."""

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+(?:[-.,'’]\w+)*|[^\w\s]")


def split_words(text: str | Sequence[str]) -> list[str]:
    """The words of a text, marks of punctuation apart; a list of words as it is.

    Example:
        >>> split_words("Mr. O'Neill paid 1,000 francs.")
        ['Mr', '.', "O'Neill", 'paid', '1,000', 'francs', '.']
    """
    return _WORD.findall(text) if isinstance(text, str) else list(text)
