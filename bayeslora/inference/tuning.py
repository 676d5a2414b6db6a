"""A tuned width: one number for all noise of a fitted posterior, found on examples that it was not fitted to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from tqdm.auto import tqdm

from bayeslora.errors import InputError
from bayeslora.inference.predict import predict
from bayeslora.models.tuning import Tuning
from bayeslora.posterior import Posterior
from bayeslora.prediction import Prediction

LEAST_EXAMPLES = 20  # fewer say next to nothing about a width
GRID = (0.0, 0.5, 1.0, 2.0, 4.0)  # tried first; doubled on while the widest is the best
WIDEST = 64.0
REFINEMENTS = 4  # further widths between the neighbours of the best
TEMPERATURES = (0.05, 20.0)


def tune(
    bayes: Posterior,
    dataset: Any,
    *,
    num_samples: int = 16,
    with_temperature: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Tuning:
    """Choose the width that predicts held-out labels best, and keep it with the posterior.

    The width multiplies A − μ in every draw; 0 is the mean network, which is tried too. All widths are tried with the
    same draws, so that the negative log-likelihood is a smooth function of the width.

    Args:
        bayes: The fitted module; whatever predicts with it uses the width from now on, saved or not.
        dataset: Labelled examples that it was not fitted to, as for :func:`bayeslora.inference.predict.predict`; 20 or
            more.
        num_samples: Draws of each prediction; about ten are made.
        with_temperature: For classes: choose a temperature jointly, by which every draw's logits are divided.
        batch_size, seed, progress: As in ``predict``.

    Returns:
        What was chosen, and the negative log-likelihood with it, at the mean and with the width 1.

    Raises:
        InputError: for too few or unlabelled examples, plain LoRA, a temperature without classes, or a guide whose
            noise does not follow ε.
    """
    _check(bayes, dataset, num_samples, with_temperature)
    tried: dict[float, tuple[float, float]] = {}
    with tqdm(total=len(GRID) + REFINEMENTS, desc="tune", unit="width", disable=None if progress else True) as bar:

        def nll(width: float) -> float:
            if width not in tried:
                with at_width(bayes, width):
                    prediction = predict(
                        bayes,
                        dataset,
                        num_samples=num_samples if width else 0,
                        batch_size=batch_size,
                        seed=seed,
                        antithetic=getattr(bayes.guide, "symmetric_rows", False),
                        progress=False,
                    )
                tried[width] = best_temperature(prediction) if with_temperature else (prediction.nll, 1.0)
                bar.update()
            return tried[width][0]

        best = search(nll)
    score, temperature = tried[best]
    tuning = Tuning(best, temperature, score, tried[0.0][0], tried[1.0][0], len(dataset), num_samples)
    bayes.model.tuning = tuning
    return tuning


def search(nll: Callable[[float], float]) -> float:
    """The width of the lowest value that was seen: over a grid with 0, then between its best point's neighbours."""
    widths = list(GRID)
    while min(widths, key=nll) == widths[-1] < WIDEST:
        widths.append(2 * widths[-1])
    place = widths.index(min(widths, key=nll))
    low, high = widths[max(place - 1, 0)], widths[min(place + 1, len(widths) - 1)]
    seen: dict[float, float] = {width: nll(width) for width in widths}

    def between(width: float) -> float:
        seen[width] = nll(width)
        return seen[width]

    minimize_scalar(between, bounds=(low, high), method="bounded", options={"maxiter": REFINEMENTS})
    return float(min(seen, key=lambda width: seen[width]))


def best_temperature(prediction: Prediction) -> tuple[float, float]:
    """The lowest negative log-likelihood over temperatures of every draw's logits, and that temperature."""
    log_probs, labels = prediction.sample_log_probs, prediction.labels.astype(int)

    def nll(log_temperature: float) -> float:
        tempered = log_softmax(log_probs / np.exp(log_temperature), axis=-1)[:, np.arange(len(labels)), labels]
        return float(-(np.logaddexp.reduce(tempered, axis=0) - np.log(len(tempered))).mean())

    bounds = np.log(TEMPERATURES)
    found = minimize_scalar(nll, bounds=bounds, method="bounded")
    return (float(found.fun), float(np.exp(found.x))) if found.fun < nll(0.0) else (nll(0.0), 1.0)


@contextmanager
def at_width(bayes: Posterior, width: float) -> Iterator[None]:
    """Inside, draws have this width, and no temperature."""
    before, bayes.model.tuning = bayes.model.tuning, Tuning(width)
    try:
        yield
    finally:
        bayes.model.tuning = before


def _check(bayes: Posterior, dataset: Any, num_samples: int, with_temperature: bool) -> None:
    if bayes.monteclora_config.sample_scaler == 0:
        raise InputError("sample_scaler=0 is plain LoRA: it has no noise whose width could be tuned")
    if not getattr(bayes.guide, "follows_noise_schedule", False):
        raise InputError(f"a width multiplies ε, and a {type(bayes.guide).__name__} does not follow: use one of the "
                         "guides that are shipped, or set follows_noise_schedule = True on one that does")  # fmt: skip
    if num_samples < 1:
        raise InputError(f"num_samples must be at least 1, got {num_samples}")
    if with_temperature and not bayes.model.labelling.of_classes:
        raise InputError("with_temperature=True is for probabilities of classes: leave it out")
    if len(dataset) < LEAST_EXAMPLES:
        raise InputError(f"a width needs at least {LEAST_EXAMPLES} examples to be tuned on, got {len(dataset)}")
