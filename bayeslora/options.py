"""Which numbers the options of commands and studies take, by the word that Python has for each."""

from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

from bayeslora.config import MAX_COMPONENTS, MAX_RANK
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

RANGES: dict[str, Range] = {
    "epochs": Range(float, 0, 1e6, above=True),
    "max_steps": COUNT,
    "batch_size": COUNT,
    "learning_rate": POSITIVE,
    "variational_learning_rate": NOT_NEGATIVE,
    "gradient_accumulation": COUNT,
    "warmup": Range(float, 0, 1, below=True),
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "early_stopping": COUNT,
    "seed": Range(least=0, most=2**32 - 1),  # NumPy's
    "rank": Range(most=MAX_RANK),
    "lora_alpha": POSITIVE,
    "num_components": Range(most=MAX_COMPONENTS),
    "sample_scaler": NOT_NEGATIVE,
    "kl_weight": NOT_NEGATIVE,
    "cooperation": NOT_NEGATIVE,
    "max_length": Range(least=2, most=2**20),
    "num_samples": FROM_ZERO,
    **dict.fromkeys(
        ("train_examples", "test_examples", "max_examples", "max_train_examples", "max_test_examples"), COUNT
    ),
    "steps": COUNT,
    "max_new_tokens": COUNT,
    "temperature": NOT_NEGATIVE,
    "top_p": Range(float, 0, 1, above=True),
}
