"""A file of costs: what each answer costs under each truth, and a person."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bayeslora.errors import InputError

PERSON = "person"


def read_costs(file: str | Path, label_names: Sequence[str]) -> tuple[np.ndarray, float | None]:
    """Costs of truths (rows) and answers (columns), in the order of ``label_names``, and of a person where said.

    The file is a table in CSV: a header ``truth`` and the classes, perhaps with ``person``; a row for each class.

    Raises:
        InputError: for a file that is not such a table of these classes.

    Example:
        >>> _ = Path("costs.csv").write_text("truth,good,bad,person\\ngood,0,1,0.2\\nbad,5,0,0.2\\n")
        >>> read_costs("costs.csv", ("bad", "good"))
        (array([[0., 5.],
               [1., 0.]]), 0.2)
    """
    if not label_names:
        raise InputError("--costs is for one class an example, and this task has none: leave it out")
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            header, *rows = [[cell.strip() for cell in row] for row in csv.reader(lines) if row]
        answers, table = header[1:], {row[0]: [float(cell) for cell in row[1:]] for row in rows}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --costs {file}: {error}") from error
    except (ValueError, IndexError) as error:
        raise InputError(f"--costs {file} is no table of numbers with a header and a row for each class") from error
    expected = sorted(label_names)
    distinct = len(set(answers)) == len(answers) and len(table) == len(rows)
    whole = distinct and all(len(row) == len(answers) for row in table.values())
    if sorted(table) != expected or sorted(set(answers) - {PERSON}) != expected or not whole:
        raise InputError(
            f"--costs {file} must have a header 'truth,{','.join(label_names)}', perhaps with '{PERSON}', and one row "
            f"with all cells for each of {', '.join(label_names)}; it has columns {', '.join(answers)} and rows "
            f"{', '.join(table)}"
        )
    costs = np.array([[table[truth][answers.index(answer)] for answer in label_names] for truth in label_names])
    people = {table[truth][answers.index(PERSON)] for truth in label_names} if PERSON in answers else {None}
    if len(people) > 1:
        raise InputError(f"--costs {file} gives a person several prices: one in every row, as the truth is not known")
    (person,) = people
    finite = np.isfinite(costs).all() and (person is None or np.isfinite(person))
    if not finite:
        raise InputError(f"--costs {file} must hold finite numbers")
    return costs, person
