"""What is tuned once a posterior is fitted, and kept with it."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Tuning:
    """A width of the noise, a temperature, and how they were found.

    Attributes:
        width: Multiplies A − μ in every draw; 0 is the mean network.
        temperature: Divides every draw's logits, of classes; 1 leaves them.
        nll: Negative log-likelihood of the tuning examples with both: nats per example, of texts per token.
        nll_at_mean: That of the mean network.
        nll_untuned: That of draws as they were fitted.
        examples: How many there were.
        num_samples: Draws of each prediction.
    """

    width: float = 1.0
    temperature: float = 1.0
    nll: float = math.nan
    nll_at_mean: float = math.nan
    nll_untuned: float = math.nan
    examples: int = 0
    num_samples: int = 0

    def to_dict(self) -> dict[str, float]:
        """Plain JSON types; ``Tuning(**values)`` reads them back."""
        return asdict(self)

    @classmethod
    def is_dict(cls, values: Any) -> bool:
        """Whether a value of unknown origin is what :meth:`to_dict` makes."""
        if not isinstance(values, dict) or values.keys() != {f.name for f in fields(cls)}:
            return False
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e6 for v in values.values())
        return numbers and values["width"] >= 0 and values["temperature"] > 0
