"""Which adapters cause the uncertainty? The variance of the logits, with one part of the network drawn at a time."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayeslora.adapters.drawing import check_in_use, one_at_a_time
from bayeslora.analysis.draws.adapter_names import network_order, short_names
from bayeslora.data.checks import read_examples
from bayeslora.errors import InputError
from bayeslora.inference.draws import Draws, evaluating
from bayeslora.inference.predict import run_batches
from bayeslora.posterior import Posterior

PARTS = ("adapter", "layer", "kind")


@dataclass(frozen=True)
class Attribution:
    """Variance of the logits over draws, by the part of the network that is drawn.

    Attributes:
        parts: Names of the P parts, in network order.
        variance: ``(P, n)``, with only that part drawn and the others at their means; the classes' variances summed,
            in squared logits.
        total: ``(n,)``, the same with all parts drawn.
        deviations: ``(S, P + 1)``, squared distance of each draw's logits from their mean over draws, averaged over
            the examples; the last column is that of all parts together.
    """

    parts: list[str]
    variance: np.ndarray = field(repr=False)
    total: np.ndarray = field(repr=False)
    deviations: np.ndarray = field(repr=False)

    @property
    def remainder(self) -> np.ndarray:
        """``(n,)``: what is left of ``total`` after the parts; interaction between them, positive or negative."""
        return self.total - self.variance.sum(axis=0)


def attribute_variance(
    bayes: Posterior,
    dataset: Any,
    *,
    by: str = "layer",
    num_samples: int = 32,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Attribution:
    """Draw one part of the network at a time, and all of it, and compare the variances of the logits.

    Logits are taken relative to their mean over the classes, since a shift of all of them changes no probability.
    Were the network linear in its adapters, the parts would add up to the total. They are drawn by the same numbers
    as in :func:`bayeslora.inference.predict.predict` with this seed, alone and together. The cost is that of P + 1
    predictions.

    Args:
        bayes: The fitted module.
        dataset: Encoded examples, as for :meth:`bayeslora.BayesLoRA.predict`; labels are not looked at.
        by: What a part is: an ``"adapter"``, a ``"layer"`` of the network, or a ``"kind"`` of projection.
        num_samples: S draws; a share is known to about ``sqrt(2 / S)`` of itself.
        batch_size: Rows of one forward pass, examples times draws.
        seed: Decides the draws.
        progress: Show a progress bar.

    Raises:
        InputError: for an empty data set, fewer than two draws, or a posterior without any spread.
    """
    if by not in PARTS:
        raise InputError(f"by must be one of {', '.join(PARTS)}, got {by!r}")
    if num_samples < 2:
        raise InputError(f"num_samples must be at least 2 to have a variance, got {num_samples}")
    if not bayes.model.has_noise:
        raise InputError(
            "sample_scaler is 0, or the tuned width: every draw is the mean network, and has no variance to attribute"
        )
    parts = _parts(bayes.adapter_names, by)
    variances: list[np.ndarray] = []
    deviations = np.zeros((num_samples, len(parts) + 1))
    examples = read_examples(bayes.model, dataset)
    batches, order = examples.batches(batch_size)
    with one_at_a_time, evaluating(bayes):
        check_in_use(bayes.model.groups)
        draws = _OnePartAtATime(bayes, num_samples, seed, list(parts.values()))
        for logits, _ in run_batches(bayes, batches, examples.collate, draws, batch_size, progress):
            squares = _squared_deviations(logits.unflatten(0, (num_samples, -1)).double().numpy())
            variances.append(squares.sum(axis=0) / (num_samples - 1))
            deviations += squares.sum(axis=-1)
    variance = np.concatenate(variances, axis=-1)[:, order]
    return Attribution(list(parts), variance[:-1], variance[-1], deviations / len(examples.rows))


def _parts(adapters: list[str], by: str) -> dict[str, list[int]]:
    """Name of each part and the adapters in it, in network order."""
    order, short = network_order(adapters), short_names(adapters)
    parts: dict[str, list[int]] = {}
    for index in order:
        name = short[index]
        if by == "adapter":
            part = adapters[index]
        elif by == "layer":
            part = name.kind if name.layer is None else f"layer {name.layer}"
        else:
            part = name.kind
        parts.setdefault(part, []).append(index)
    return parts


def _squared_deviations(logits: np.ndarray) -> np.ndarray:
    """``(S, P + 1, n, C)`` to the squared distance from the mean over draws, ``(S, P + 1, n)``."""
    if logits.shape[-1] > 1:
        logits = logits - logits.mean(axis=-1, keepdims=True)
    return np.square(logits - logits.mean(axis=0)).sum(axis=-1)


class _OnePartAtATime:
    """For each of S draws, P networks with one part drawn and the others at their means, and one with all drawn.

    They are :class:`bayeslora.inference.draws.Networks`, for :func:`bayeslora.inference.predict.run_batches`.
    """

    def __init__(self, bayes: Posterior, count: int, seed: int, parts: list[list[int]]):
        self._whole = Draws(bayes, count, seed)
        self.bytes_each = self._whole.bytes_each
        self.variants = len(parts) + 1
        self.count = count * self.variants
        self._means = {group.name: group.mean() for group in bayes.model.groups}
        self._chosen = self._masks(bayes, parts)

    def matrices(self, start: int, count: int) -> dict[str, Tensor]:
        first, last = start // self.variants, (start + count - 1) // self.variants
        drawn = self._whole.matrices(first, last - first + 1)
        if last == first:
            drawn = {name: values.unsqueeze(0) for name, values in drawn.items()}
        rows = torch.arange(start, start + count)
        draw, variant = rows // self.variants - first, rows % self.variants
        chosen = {
            name: torch.where(self._chosen[name][variant], values[draw], self._means[name])
            for name, values in drawn.items()
        }
        return chosen if count > 1 else {name: values[0] for name, values in chosen.items()}

    def _masks(self, bayes: Posterior, parts: list[list[int]]) -> dict[str, Tensor]:
        """Group name to which of its adapters each variant draws: ``(variants, adapters, 1, 1)``."""
        everything = torch.zeros(self.variants, len(bayes.adapter_names), dtype=torch.bool)
        for variant, adapters in enumerate(parts):
            everything[variant, adapters] = True
        everything[-1] = True
        groups = bayes.model.groups
        split = everything.split([len(group) for group in groups], dim=1)
        return {
            group.name: mask[..., None, None].to(self._means[group.name].device)
            for group, mask in zip(groups, split, strict=True)
        }
