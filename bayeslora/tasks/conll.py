"""Files in columns, as the shared tasks of CoNLL have them: one word a line with its tags, an empty line between
sentences."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow

ENDINGS = ("conll", "bio", "iob", "iob2", "txt")
WORDS, TAGS = "tokens", "tags"
_DOCUMENT = "-DOCSTART-"  # begins a document in CoNLL-2003, and is no sentence


def read_columns(path: Path) -> "pyarrow.Table":
    """A table with a sentence a row: ``tokens``, the first column, ``tags``, the last, and those between them as
    ``column2``, ``column3``, ...; each a list of one string a word.

    Columns are parted by tabs where a line has one, else by spaces.

    Raises:
        ValueError: for a line with another number of columns than the first.
    """
    import pyarrow

    sentences: list[list[list[str]]] = [[]]
    width = None
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        cells = [cell.strip() for cell in line.strip("\r").split("\t")] if "\t" in line.strip() else line.split()
        if not any(cells):
            sentences.append([])
            continue
        width = width or len(cells)
        if len(cells) != width or not all(cells):
            raise ValueError(f"line {number}: {len([c for c in cells if c])} columns where the first line has {width}")
        if cells[0] != _DOCUMENT:
            sentences[-1].append(cells)
    rows = [list(zip(*sentence, strict=True)) for sentence in sentences if sentence]
    names = _names(width or 1)
    return pyarrow.table({name: [list(row[place]) for row in rows] for place, name in enumerate(names)})


def _names(width: int) -> list[str]:
    return [WORDS, *(f"column{place}" for place in range(2, width)), *([TAGS] if width > 1 else [])]
