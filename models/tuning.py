"""What is tuned once a posterior is fitted, and kept with it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from bayeslora.errors import InputError

COVERAGES = (0.8, 0.9, 0.95, 0.99)  # for which a tuned posterior knows the sets
WIDEST = 1e6  # of a width or a temperature, which are some hundred at most


@dataclass(frozen=True)
class Tuning:
    """A width of the noise, where there is any, a temperature, and how they were found: what ``bayes.tune`` returns.

    Attributes:
        width: τ, which multiplies A − μ in every draw; 0 is the mean network.
        temperature: Divides the logits of classes, of every draw and of the mean; 1 leaves them.
        nll: Negative log-likelihood of the tuning examples with both: nats per example, of texts per token. None, as
            the two that follow, where it is not known.
        nll_at_mean: That of the mean network, at its own best temperature if one was asked for.
        nll_untuned: That of draws as they were fitted, in the same blocks, likewise.
        examples: How many there were.
        num_samples: Draws of each prediction.
        passes: Passes over them that the search takes, one for each draw.
        agreement: Share of the examples of which draws on average say what the mean network says, where that was the
            rule; None where the width was found by labels.
        blocks: k, where only the adapters of the network's last k blocks, and those behind them, are drawn: all others
            are at their mean, and what lies before is computed once for all draws. None draws all.
        nll_all_blocks: The negative log-likelihood with the best width for all blocks, where k was looked for.
        conformal: For classes, by labels: how probable a label must be to belong to a set that holds the truth with
            the coverage that is the name, such as ``{"0.9": 0.21}``; see :mod:`bayeslora.analysis.decisions.conformal`.
            It is that of the tuning examples with this width and temperature, as ``num_samples`` draws predict them.

    Raises:
        InputError: for a width below 0, a temperature that is not above 0, or one that is no finite number; for blocks
            that are no number of at least 1.

    Example:
        >>> bayes.tuning = Tuning(width=0.0)
        >>> bool(np.ptp(bayes.predict(dataset, num_samples=4).sample_probs, axis=0).max() > 0)  # draws are the mean
        False
        >>> bayes.tuning = None
    """

    width: float = 1.0
    temperature: float = 1.0
    nll: float | None = None
    nll_at_mean: float | None = None
    nll_untuned: float | None = None
    examples: int = 0
    num_samples: int = 0
    passes: int = 0
    agreement: float | None = None
    blocks: int | None = None
    nll_all_blocks: float | None = None
    conformal: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("temperature", self.temperature)):
            if not _is_number(value) or not 0 <= value <= WIDEST or (name == "temperature" and value == 0):
                least = "0 or more" if name == "width" else "above 0"
                raise InputError(f"{name} must be a number, {least} and up to {WIDEST:g}, got {value!r}")
        if self.blocks is not None and (type(self.blocks) is not int or self.blocks < 1):
            raise InputError(
                f"blocks is how many of the last blocks are drawn, 1 or more, or None, got {self.blocks!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``Tuning(**values)`` reads them back."""
        values = asdict(replace(self, conformal=None))
        plain = {name: value if _is_number(value) else None for name, value in values.items()}
        return plain | {"conformal": None if self.conformal is None else dict(self.conformal)}

    def __str__(self) -> str:
        tempered = "" if self.temperature == 1 else f", temperature to {self.temperature:.3g}"
        where = f", on {self.examples} examples" if self.examples else ""
        kept = "" if self.agreement is None else f", keeping {self.agreement:.1%} of the mean network's answers"
        some = "" if self.blocks is None else f", noise in the last {self.blocks} blocks only"
        return f"width tuned to {self.width:.3g}{some}{tempered}{where}{kept}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e100
