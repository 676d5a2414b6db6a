"""An option in one place: its default, the numbers it takes and what it is for, as a field of a dataclass.

Signatures, flags, study files and records read them from there: :class:`bayeslora.training.budget.FitOptions` has those
of a training, :class:`bayeslora.MonteCLoRAConfig` those of the method.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache
from reprlib import repr as shown
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bayeslora.errors import InputError

MOST = 2**31 - 1  # what every library below us takes as a count


@dataclass(frozen=True)
class Range:
    """Numbers of a ``kind`` from ``least`` to ``most``; ``above`` and ``below`` leave these two out."""

    kind: type = int
    least: float = 1
    most: float = MOST
    above: bool = False
    below: bool = False

    def check(self, name: str, value: Any) -> Any:
        """The value as ``kind``.

        Raises:
            InputError: naming ``name`` and what it takes.
        """
        wanted = (int, float) if self.kind is float else (int,)
        if not isinstance(value, wanted) or isinstance(value, bool) or not self._holds(value):
            raise InputError(f"{name} takes {self}, got {shown(value)}")
        return self.kind(value)

    def parse(self, name: str, text: str) -> Any:
        """The number that a text is.

        Raises:
            InputError: as :meth:`check`.
        """
        try:
            value = self.kind(text)
        except ValueError:
            value = text
        return self.check(name, value)

    def _holds(self, value: float) -> bool:
        low = value > self.least if self.above else value >= self.least
        return low and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        what = "a whole number" if self.kind is int else "a number"
        least, most = (f"{end:g}" if self.kind is float else str(end) for end in (self.least, self.most))
        return f"{what} {'above' if self.above else 'from'} {least} {'and below' if self.below else 'to'} {most}"


COUNT = Range()
FROM_ZERO = Range(least=0)
POSITIVE = Range(float, 0, 1e12, above=True)
NOT_NEGATIVE = Range(float, 0, 1e12)
SEED = Range(least=0, most=2**32 - 1)  # NumPy's
LENGTH = Range(least=2, most=2**20)  # of a text, in tokens


def option(
    default: Any, help: str, takes: Range | None = None, *, flag: bool = True, trainer: str | None = None
) -> Any:
    """A dataclass field that knows what it is for.

    Args:
        default: Its value unless given.
        help: What it is, in a few words.
        takes: The numbers it takes; ``None`` for other values.
        flag: Whether the command line has it too.
        trainer: The field of ``TrainingArguments`` that it sets, if it is one.
    """
    return dataclasses.field(default=default, metadata={"help": help, "takes": takes, "flag": flag, "trainer": trainer})


def ranges(owner: type) -> dict[str, Range]:
    """The numbers that each numeric option of a dataclass takes."""
    return {f.name: f.metadata["takes"] for f in dataclasses.fields(owner) if f.metadata.get("takes")}


def flags(owner: type) -> list[dataclasses.Field[Any]]:
    """The options of a dataclass that the command line has."""
    return [f for f in dataclasses.fields(owner) if f.metadata.get("flag")]


@cache
def choices(owner: type) -> dict[str, tuple[str, ...]]:
    """The values between which options of a dataclass choose, from their ``Literal`` types."""
    hints = get_type_hints(owner)
    return {f.name: get_args(hints[f.name]) for f in dataclasses.fields(owner) if get_origin(hints[f.name]) is Literal}
