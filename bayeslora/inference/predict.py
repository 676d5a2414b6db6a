"""Posterior predictive: average over whole networks, each one coherent draw of all adapters."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayeslora.adapters.modes import is_compiled
from bayeslora.data.batches import Batch, Collator, pad_token
from bayeslora.data.checks import read_examples
from bayeslora.errors import InputError
from bayeslora.inference.draws import Draws, Networks, as_tuned, evaluating, run_as
from bayeslora.inference.prefix import MAX_KEPT_BYTES, Prefix
from bayeslora.models.language import NOT_SCORED
from bayeslora.models.tuning import Tuning
from bayeslora.posterior import Posterior
from bayeslora.prediction import Prediction

logger = logging.getLogger(__name__)

FIRST_DRAWS = 16  # of num_samples="auto", from which it learns how many more it takes
MOST_DRAWS = 256


def predict(
    bayes: Posterior,
    dataset: Any,
    *,
    num_samples: int | str = 16,
    batch_size: int = 32,
    seed: int | None = 0,
    keep_draws: bool = True,
    progress: bool = True,
    first_draw: int = 0,
    prior: bool = False,
    noise_factor: float = 1.0,
    antithetic: bool = False,
    tolerance: float = 0.02,
    blocks: int | None = None,
) -> Prediction:
    """Average the predictive over draws of the posterior; with the width and the temperature that were tuned, if any
    (:func:`bayeslora.inference.tuning.tune`).

    Args:
        bayes: The fitted module; its training mode is restored afterwards.
        dataset: Encoded examples, numbered rows that are dicts, such as a ``datasets.Dataset``, a list or torch's
            ``Subset``; ``labels`` (or ``label``) are optional. See :mod:`bayeslora.data.checks`.
        num_samples: S; each draw is one network for all examples. 0 runs the posterior mean instead. ``"auto"``: as
            many as ``tolerance`` takes, 16 to 256.
        batch_size: Rows of one forward pass, examples times draws: a batch of fewer examples is run for several draws
            at once, where the network keeps its examples in rows. Changes memory and speed, not the result beyond
            rounding (1e-6 in the probabilities of a float32 network).
        seed: Draw s is the same for any S, batch size and data set with the same seed. ``None`` for fresh draws.
        keep_draws: Keep every draw's output, ``S × n × C`` numbers.
        progress: Show a progress bar.
        first_draw: Use the draws ``first_draw .. first_draw + num_samples - 1`` of ``seed``, to go on in blocks.
        prior: Draw from the prior around the means that the network has now, instead of the posterior.
        noise_factor: Multiplies every draw's A − μ, on top of a tuned width: below 1 the draws lie closer to the mean
            than the posterior's.
        antithetic: Draw in mirrored pairs: draw 2k is the same as without, and draw 2k + 1 is its image 2μ − A, as
            likely under the posterior. Averages have less Monte Carlo error, as what is odd in A − μ cancels
            (Hammersley and Morton 1956, *A new Monte Carlo technique: antithetic variates*); a pair is dependent.
        tolerance: With ``num_samples="auto"``, for :attr:`~bayeslora.Prediction.monte_carlo_error`, averaged over the
            examples: of probabilities, or of numbers in their own unit. Where 256 draws leave more, a warning says so.
        blocks: Draw the adapters of the network's last k blocks, and those behind them, only; others are at their
            mean. Draws are those of the whole network there. The tuned k, if any, unless given.

    Whatever the network computes before the first adapter that is drawn is computed once for all draws of a batch
    (:mod:`bayeslora.inference.prefix`).

    Raises:
        InputError: for an empty data set, a row that the network cannot read, texts without labels, a negative number
            of draws, ``"auto"`` for what has no ``monte_carlo_error`` (texts), ``antithetic`` with a guide that does
            not promise symmetry (``symmetric_rows``), a layer that a draw does not reach, or more blocks than there
            are.
    """
    count = None if num_samples == "auto" else _count(num_samples)
    if count is None and not (isinstance(tolerance, Real) and tolerance > 0):
        raise InputError(f"tolerance must be positive, got {tolerance!r}")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if antithetic and not prior and not getattr(bayes.guide, "symmetric_rows", False):
        raise InputError(
            f"antithetic draws need a posterior that is symmetric about its mean, and "
            f"{type(bayes.guide).__name__} does not promise it: leave antithetic out, or set "
            "symmetric_rows = True on the guide if no row's sign matters to it"
        )
    examples = read_examples(bayes.model, dataset)
    batches, order = examples.batches(batch_size)

    def outputs(first: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Of draws from the ``first`` on, ``(count, n, ...)``, and labels; the mean's ``count`` times without noise."""
        noisy = bayes.model.has_noise
        draws = Draws(
            bayes,
            count if noisy else 0,
            seed,
            first=first_draw + first,
            prior=prior,
            noise_factor=noise_factor,
            antithetic=antithetic,
        )
        parts = [*run_batches(bayes, batches, examples.collate, draws, batch_size, progress)]
        drawn = _joined([output for output, _ in parts], dim=1, filling=np.nan).numpy()[:, order]
        labels = [labels.cpu() for _, labels in parts if labels is not None]
        known = _joined(labels, dim=0, filling=NOT_SCORED).numpy()[order] if len(labels) == len(parts) else None
        if bayes.model.tuning is not None and bayes.model.labelling.of_classes:
            drawn = drawn / bayes.model.tuning.temperature
        return drawn if noisy else np.repeat(drawn, max(count, 1), axis=0), known

    def summary(drawn: np.ndarray, labels: np.ndarray | None, keep: bool = True) -> Prediction:
        return bayes.model.labelling.summarize(drawn, labels, bayes.network, keep=keep)

    def error(summarized: Prediction) -> np.ndarray | None:
        said = summarized.sample_outputs
        if said is None:
            return None
        apart = first_draw % 2 if antithetic else 0  # the image of a draw that is not among these
        return monte_carlo_error(said[apart:], mirrored=antithetic)

    tuning = bayes.model.tuning
    tuning = tuning if blocks is None else replace(tuning or Tuning(), blocks=blocks)
    with evaluating(bayes), as_tuned(bayes, tuning):
        if count is None:
            drawn, labels = _enough(outputs, lambda *drawn: error(summary(*drawn)), tolerance)
        else:
            drawn, labels = outputs(0, count)
    found = summary(drawn, labels)
    kept = found if keep_draws else summary(drawn, labels, keep=False)
    return replace(kept, monte_carlo_error=error(found))


def _count(num_samples: Any) -> int:
    if isinstance(num_samples, bool) or not isinstance(num_samples, Integral):
        raise InputError(f"num_samples must be a whole number, or 'auto', got {num_samples!r}")
    if num_samples < 0:
        raise InputError(f"num_samples must be 0 (the mean network) or more, got {num_samples}")
    return int(num_samples)


def monte_carlo_error(said: np.ndarray, *, mirrored: bool = False) -> np.ndarray | None:
    """Standard error of the mean over draws, ``(n,)``: of an example's numbers, the one that is known worst.

    Args:
        said: What every draw says, ``(S, n, ...)``.
        mirrored: Draws 2k and 2k + 1 are images of each other: only pairs are independent.

    Returns:
        None where there are fewer than two independent draws.

    Example:
        >>> import numpy as np
        >>> said = np.random.default_rng(0).normal(size=(400, 3, 2))  # a standard error of 1/20
        >>> monte_carlo_error(said).round(3)
        array([0.051, 0.049, 0.051])
    """
    if mirrored:
        said = said[: len(said) // 2 * 2].reshape(-1, 2, *said.shape[1:]).mean(1)
    if len(said) < 2:
        return None
    errors = said.std(0, ddof=1) / np.sqrt(len(said))
    return np.fmax.reduce(errors.reshape(len(errors), -1), axis=1)  # NaN lies beyond an example's end


def _enough(
    outputs: Callable[[int, int], tuple[np.ndarray, np.ndarray | None]],
    error: Callable[[np.ndarray, np.ndarray | None], np.ndarray | None],
    tolerance: float,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Outputs of as many draws as it takes for their mean error to be at most ``tolerance``, and labels."""
    drawn, labels = outputs(0, FIRST_DRAWS)
    while True:
        found = error(drawn, labels)
        if found is None:
            raise InputError(
                "num_samples='auto' draws until the error of what is predicted is small, and this kind of task says "
                "none of it: give a number of draws"
            )
        if not found.mean() > tolerance:
            return drawn, labels
        if len(drawn) == MOST_DRAWS:
            logger.warning(
                "%d draws leave a Monte Carlo error of %.3g, above the tolerance of %.3g",
                len(drawn),
                found.mean(),
                tolerance,
            )
            return drawn, labels
        times = min(float(found.mean()) / tolerance, MOST_DRAWS) ** 2
        needed = 2 * math.ceil(len(drawn) * times / 2)
        more, _ = outputs(len(drawn), min(max(needed, len(drawn) + 8), MOST_DRAWS) - len(drawn))
        drawn = np.concatenate([drawn, more])


def _joined(parts: Sequence[Tensor], *, dim: int, filling: float) -> Tensor:
    """Batches one after the other along ``dim``; what is shorter along those behind it is filled up."""
    widest = [max(sizes) for sizes in zip(*(part.shape[dim + 1 :] for part in parts), strict=True)]
    padded = []
    for part in parts:
        missing = [wide - size for wide, size in zip(widest, part.shape[dim + 1 :], strict=True)]
        padding = [size for amount in reversed(missing) for size in (0, amount)]
        padded.append(nn.functional.pad(part, padding, value=filling) if any(missing) else part)
    return torch.cat(padded, dim)


def run_batches(
    bayes: Posterior,
    batches: Sequence[Sequence[dict[str, Any]]],
    collate: Collator,
    draws: Networks,
    batch_size: int,
    progress: bool,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Logits of each batch under every draw, ``(draws, n, C)`` (the mean's, if there is no draw), and its labels."""
    bayes.model.labelling.prepare(bayes.network)
    drawn = tuple(group for group, _ in bayes.model.drawn_groups())
    prefix = Prefix(bayes.network, drawn, lambda batch: bayes.model.outputs(*_apart(batch)))
    with _progress(len(batches) * max(draws.count, 1), progress) as bar:
        for batch in batches:
            inputs = collate(batch).to(bayes.network.device)
            labels = inputs.pop("labels", None)
            parts = []
            for part in _outputs(bayes, inputs, labels, draws, prefix, batch_size):
                parts.append(part.float().cpu())
                bar.update(len(part))
            yield torch.cat(parts), labels


def _apart(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """The network's arguments, and the labels, which a decoder reads."""
    return {name: value for name, value in batch.items() if name != "labels"}, batch.get("labels")


def _outputs(
    bayes: Posterior, inputs: Batch, labels: Tensor | None, draws: Networks, prefix: Prefix, batch_size: int
) -> Iterator[Tensor]:
    """One batch under every draw, or at the mean: shapes ``(draws, n, C)``, as many draws as fit at a time."""
    if draws.count == 0:
        yield bayes.model.outputs(inputs, labels).unsqueeze(0)
        return
    together = _draws_together(bayes, inputs, draws, batch_size)
    prefix.run(inputs if labels is None else {**inputs, "labels": labels}, repeat=together > 1)
    for start in range(0, draws.count, together):
        count = min(together, draws.count - start)
        repeated = {name: torch.cat([value] * count) for name, value in inputs.items()}
        copies = None if labels is None else torch.cat([labels] * count)
        with prefix.reused(count):
            outputs = run_as(bayes, draws.matrices(start, count), lambda: bayes.model.outputs(repeated, copies))  # noqa: B023
        yield outputs.unflatten(0, (count, -1))


def _draws_together(bayes: Posterior, inputs: Batch, draws: Networks, batch_size: int) -> int:
    """How many draws one forward pass takes."""
    examples = len(next(iter(inputs.values())))
    fitting = min(batch_size // examples, draws.count, MAX_KEPT_BYTES // draws.bytes_each)
    without_padding = "input_ids" in inputs and pad_token(bayes.network) is None
    if fitting < 2 or without_padding:  # transformers' decoders then take one row only
        return 1
    if is_compiled(bayes.network):  # other shapes would be other graphs
        return 1
    return fitting if bayes.rows_are_examples(inputs) else 1


def _progress(total: int, show: bool) -> Any:
    return tqdm(total=total, desc="predict", unit="batch", disable=None if show else True, leave=False)
