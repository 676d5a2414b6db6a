"""A tuned width: one number for all noise of a fitted posterior, found on examples that it was not fitted to."""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple, cast

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from tqdm.auto import tqdm

from bayeslora.adapters.blocks import fewer_blocks, in_last_blocks
from bayeslora.analysis.decisions.conformal import conformal_threshold
from bayeslora.data.rows import check_kind
from bayeslora.errors import InputError
from bayeslora.inference.draws import as_tuned
from bayeslora.inference.predict import predict
from bayeslora.models.tuning import COVERAGES, Tuning
from bayeslora.noise_schedules import check_follows_noise
from bayeslora.posterior import Posterior
from bayeslora.prediction import Prediction

LEAST_EXAMPLES = 20  # fewer say next to nothing about a width
GRID = (0.0, 0.5, 1.0, 2.0, 4.0)  # tried first; doubled on while the widest is the best
WIDEST = 64.0
BISECTIONS = 5  # between the widest that keeps the answers and the narrowest that does not
REFINEMENTS = 4  # further widths between the neighbours of the best
NEAR = 0.005  # nats that noise in fewer blocks may cost
TEMPERATURES = (0.05, 10.0)  # at 13 the options that a choice lacks would no longer have probability 0


def tune(
    bayes: Posterior,
    dataset: Any,
    *,
    num_samples: int = 16,
    with_temperature: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
    antithetic: bool = False,
    agreement: float | None = None,
    blocks: int | str | None = None,
) -> Tuning:
    """Choose the width that predicts held-out labels best, and keep it with the posterior.

    The width multiplies A − μ in every draw, of the posterior and of the prior; 0 is the mean network, which is tried
    too. All widths are tried with the same draws, those of ``predict`` with this seed: the negative log-likelihood is a
    smooth function of the width, and ``predict`` has the one that is returned. On these examples it is at most that of
    the mean and that of the draws as they were fitted; of others nothing is promised.

    Without labels, ``agreement`` takes the widest noise that leaves the answers alone: the mean over draws prefers the
    same class as the mean network for that share of the examples. They must be new to the network too: of what it knows
    by heart, no noise changes its mind. Nothing is promised of the likelihood then.

    Prediction with noise in the last blocks only costs less, as all before them runs once for all draws.
    ``blocks="auto"`` looks for the fewest, 1, 2, 4, ..., that predict the labels as well as noise in all of them does,
    within 0.005 nats, each with its own best width.

    The width is in whatever draws from now on, the temperature in ``predict`` and what predicts with it: a network
    that is merged, exported or run as a draw gives its own logits.

    Args:
        bayes: The fitted module; whatever predicts with it uses the width from now on, saved or not.
        dataset: Examples that it was not fitted to, as for :func:`bayeslora.inference.predict.predict`; 20 or more,
            labelled unless ``agreement`` is given.
        num_samples: Draws of each prediction. Nine are made, up to four more where the width is above 4; with
            ``agreement`` seven to thirteen.
        with_temperature: For classes: choose a temperature jointly, by which every draw's logits are divided.
        batch_size, seed, progress, antithetic: As in ``predict``.
        agreement: For classes: in place of labels, the share of the mean network's answers to keep, such as 0.95.
        blocks: How many of the last blocks have noise (:class:`bayeslora.models.Tuning`): a number, all if ``None``, or
            ``"auto"``, which asks for labels and takes nine predictions more, cheaper ones, for each number it tries.

    Returns:
        What was chosen, and the negative log-likelihood with it, at the mean and with the width 1.

    Raises:
        InputError: for too few or unlabelled examples, plain LoRA, a temperature or an agreement without classes, more
            blocks than the network has, or a guide whose noise does not follow ε.
    """
    widths = Widths(
        bayes,
        dataset,
        num_samples=num_samples,
        temperatures=with_temperature,
        batch_size=batch_size,
        seed=seed,
        antithetic=antithetic,
    )
    tuning = widths.choose(with_temperature=with_temperature, agreement=agreement, blocks=blocks, progress=progress)
    bayes.model.tuning = tuning
    return tuning


class Tried(NamedTuple):
    """What a search looks at, of one width's prediction: an answer for each example, where there are classes; the
    negative log-likelihood; its lowest over temperatures with that temperature; and the labels' probabilities at each
    temperature that can be chosen. The draws, ``(S, n, C)``, go."""

    answers: np.ndarray | None
    nll: float | None
    tempered: tuple[float, float] | None
    label_probs: dict[float, np.ndarray]


@dataclass
class Widths:
    """The widths of one posterior on one set of examples, each predicted once, however many searches ask for it.

    The posterior stays as it was fitted; what :func:`tune` returns is the same as :meth:`choose` returns, bit for bit.

    Args:
        bayes, dataset, num_samples, batch_size, seed, antithetic: As for :func:`tune`.
        temperatures: Whether a search will ask for a temperature.

    Raises:
        InputError: as :func:`tune`.
    """

    bayes: Posterior
    dataset: Any
    _: KW_ONLY
    num_samples: int = 16
    temperatures: bool = False
    batch_size: int = 32
    seed: int = 0
    antithetic: bool = False

    def __post_init__(self) -> None:
        check_tunable(self.bayes, self.dataset)
        if isinstance(self.num_samples, bool) or not isinstance(self.num_samples, Integral) or self.num_samples < 1:
            raise InputError(f"num_samples must be a whole number of at least 1, got {self.num_samples!r}")
        if self.temperatures and not self.bayes.model.labelling.of_classes:
            raise InputError("with_temperature=True is for probabilities of classes: leave it out")
        self._tried: dict[tuple[float, int | None], Tried] = {}

    def choose(
        self,
        *,
        with_temperature: bool = False,
        agreement: float | None = None,
        rise: float | None = None,
        blocks: int | str | None = None,
        progress: bool = True,
    ) -> Tuning:
        """The width that :func:`tune` finds with these options; a temperature needs ``temperatures``.

        ``rise``, in place of them: the largest width with which the negative log-likelihood of the labels is at most
        ``1 + rise`` times that of the mean network.
        """
        _check_agreement(self.bayes, agreement, with_temperature)
        if with_temperature and not self.temperatures:
            raise InputError("these widths have no temperatures: make them with temperatures=True")
        by_labels = agreement is None and rise is None
        if blocks == "auto" and not by_labels:
            raise InputError("blocks='auto' compares likelihoods of labels: give a number of blocks, or tune by labels")
        last_blocks = None if blocks == "auto" else cast("int | None", blocks)
        check_blocks(self.bayes, Tuning(blocks=last_blocks))
        asked: set[tuple[float, int | None]] = set()
        total = len(GRID) + REFINEMENTS if by_labels else 2 + BISECTIONS
        with tqdm(total=total, desc="tune", unit="width", disable=None if progress else True) as bar:

            def at(last: int | None, width: float) -> Tried:
                key = width, last if width else None
                asked.add(key)
                if key not in self._tried:
                    self._tried[key] = self._predicted(*key)
                    bar.update()
                return self._tried[key]

            def found(last: int | None) -> Tuning:
                here = partial(at, last)
                if rise is not None:
                    tuning = _by_rise(here, rise)
                elif agreement is not None:
                    tuning = _by_agreement(here, agreement)
                else:
                    tuning = _by_labels(here, with_temperature)
                return replace(tuning, blocks=last)

            tuning = self._fewest_blocks(found) if blocks == "auto" else found(last_blocks)
        passes = sum(self.num_samples if width else 1 for width, _ in asked)
        conformal = self._conformal(tuning) if by_labels else None
        return replace(
            tuning, examples=len(self.dataset), num_samples=self.num_samples, passes=passes, conformal=conformal
        )

    def _conformal(self, tuning: Tuning) -> dict[str, float] | None:
        """See :class:`Tuning`; None where there are no classes."""
        tried = self._tried[tuning.width, tuning.blocks if tuning.width else None]
        label_probs = tried.label_probs.get(tuning.temperature)
        if label_probs is None:
            return None
        return {f"{coverage:g}": conformal_threshold(label_probs, coverage) for coverage in COVERAGES}

    def _fewest_blocks(self, found: Callable[[int | None], Tuning]) -> Tuning:
        """The best width in the fewest blocks that predict as well as all of them."""
        whole = found(None)
        best = cast("float", whole.nll)
        network, groups = self.bayes.network, self.bayes.model.groups
        for count in fewer_blocks(network, groups) if whole.width else ():
            fewer = found(count)
            if cast("float", fewer.nll) <= best + NEAR:
                return replace(fewer, nll_all_blocks=best)
        return replace(whole, nll_all_blocks=best)

    def _predicted(self, width: float, blocks: int | None) -> Tried:
        with as_tuned(self.bayes, Tuning(width, blocks=blocks)):
            prediction = predict(
                self.bayes,
                self.dataset,
                num_samples=self.num_samples if width else 0,
                batch_size=self.batch_size,
                seed=self.seed,
                progress=False,
                antithetic=self.antithetic,
            )
        with np.errstate(invalid="ignore"):
            nll = prediction.nll
        probs = prediction.probs
        tempered = None if nll is None or not self.temperatures else best_temperature(prediction)
        label_probs: dict[float, np.ndarray] = {}
        labelling = self.bayes.model.labelling
        one_label = labelling.of_classes and not labelling.several_labels  # what a conformal set promises, it is for
        if nll is not None and math.isfinite(nll) and one_label:
            temperatures = {1.0} if tempered is None else {1.0, tempered[1]}
            label_probs = {t: np.exp(_log_predictive(prediction, t)) for t in temperatures}
        return Tried(None if probs is None else probs.argmax(-1), nll, tempered, label_probs)


def _by_labels(at: Callable[[float], Tried], with_temperature: bool) -> Tuning:
    def scored(width: float) -> tuple[float, float]:
        """Negative log-likelihood and temperature; infinite where it is no number."""
        tried = at(width)
        if tried.nll is None:
            raise InputError(
                "a width is tuned by the likelihood of labels, and there is none: pass labelled examples, of a kind "
                "whose Prediction has sample_log_likelihood"
            )
        nll, temperature = tried.tempered if with_temperature and tried.tempered else (tried.nll, 1.0)
        return (nll if math.isfinite(nll) else math.inf), temperature

    best = search(lambda width: scored(width)[0])
    nll, temperature = scored(best)
    if not math.isfinite(nll):
        raise InputError("no width gives the labels a probability: the mean network's outputs are not finite")
    return Tuning(best, temperature, nll, scored(0.0)[0], scored(1.0)[0])


def _by_agreement(at: Callable[[float], Tried], least: float) -> Tuning:
    def kept(width: float) -> float:
        return float(np.mean(at(width).answers == at(0.0).answers))

    best = widest(lambda width: kept(width) >= least)
    if best >= WIDEST:
        raise InputError(
            f"noise of {WIDEST:g} times its size leaves {kept(best):.1%} of the answers alone: they say nothing about "
            "a width (the network answers all of these examples alike, or its adapter does not matter to them); tune "
            "by labels, or set a width"
        )
    return Tuning(best, agreement=kept(best))


def _by_rise(at: Callable[[float], Tried], rise: float) -> Tuning:
    def nll(width: float) -> float:
        found = at(width).nll
        return math.inf if found is None or not math.isfinite(found) else found

    best = widest(lambda width: nll(width) <= (1 + rise) * nll(0.0))
    return Tuning(best, nll=nll(best), nll_at_mean=nll(0.0))


def widest(holds: Callable[[float], bool]) -> float:
    """The largest width that was tried and for which a rule holds, by doubling and bisection; 0 is taken to hold."""
    low, high = 0.0, 1.0
    while holds(high):
        low, high = high, 2 * high
        if low >= WIDEST:
            return low
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def search(nll: Callable[[float], float]) -> float:
    """The width of the lowest value that was seen: over a grid with 0, then between its best point's neighbours."""
    widths = list(GRID)
    while min(widths, key=nll) == widths[-1] < WIDEST:
        widths.append(2 * widths[-1])
    for _ in range(REFINEMENTS):
        widths.sort()
        place = widths.index(min(widths, key=nll))
        widths.append(_between(widths[max(place - 1, 0)], widths[place], widths[min(place + 1, len(widths) - 1)], nll))
    return min(widths, key=nll)


def _between(low: float, best: float, high: float, nll: Callable[[float], float]) -> float:
    """The lowest point of the parabola through three; the middle of the wider side where that is nothing new."""
    middle = (best + (high if high - best > best - low else low)) / 2
    rise, fall = (best - low) * (nll(best) - nll(high)), (best - high) * (nll(best) - nll(low))
    if not low < best < high or not math.isfinite(rise - fall) or rise == fall:
        return middle
    lowest = best - ((best - low) * rise - (best - high) * fall) / (rise - fall) / 2
    return lowest if abs(lowest - best) > (high - low) / 50 else middle


def best_temperature(prediction: Prediction) -> tuple[float, float]:
    """The lowest negative log-likelihood over temperatures of every draw's logits, and that temperature."""

    def nll(log_temperature: float) -> float:
        return float(-_log_predictive(prediction, np.exp(log_temperature)).mean())

    found = minimize_scalar(nll, bounds=np.log(TEMPERATURES), method="bounded")
    return (float(found.fun), float(np.exp(found.x))) if found.fun < nll(0.0) else (nll(0.0), 1.0)


def _log_predictive(prediction: Prediction, temperature: float) -> np.ndarray:
    """log p of each label with every draw's logits divided by the temperature, in nats, ``(n,)``."""
    labels = prediction.labels.astype(int)
    tempered = log_softmax(prediction.sample_log_probs / temperature, axis=-1)[:, np.arange(len(labels)), labels]
    return np.logaddexp.reduce(tempered, axis=0) - np.log(len(tempered))


def set_tuning(bayes: Posterior, tuning: Tuning | None) -> None:
    """Use a width that was found elsewhere; None goes back to draws as they were fitted.

    Raises:
        InputError: for anything else than a :class:`Tuning`, for more blocks than there are, or a guide whose noise
            does not follow ε.
    """
    if tuning is not None:
        if not isinstance(tuning, Tuning):
            raise InputError(f"tuning is a bayeslora.models.Tuning, such as Tuning(width=0.5), or None, got {tuning!r}")
        _check_follows(bayes)
        check_blocks(bayes, tuning)
    bayes.model.tuning = tuning


def check_blocks(bayes: Posterior, tuning: Tuning) -> None:
    """Refuse more blocks than the network has, and blocks without an adapter.

    Raises:
        InputError: saying which.
    """
    if tuning.blocks is not None:
        in_last_blocks(bayes.network, bayes.model.groups, tuning.blocks)


def _check_agreement(bayes: Posterior, agreement: float | None, with_temperature: bool) -> None:
    if agreement is None:
        return
    if not isinstance(agreement, int | float) or isinstance(agreement, bool) or not 0 < agreement <= 1:
        raise InputError(f"agreement is a share of the examples, above 0 and at most 1, got {agreement!r}")
    if not bayes.model.labelling.of_classes:
        raise InputError("agreement is between answers, for classes: tune by labels instead")
    if with_temperature:
        raise InputError("a temperature needs labels: leave with_temperature or agreement out")


def _check_follows(bayes: Posterior) -> None:
    check_follows_noise(bayes.guide, "a width multiplies ε", ", or set follows_noise_schedule = True on one that does")


def check_tunable(bayes: Posterior, dataset: Any) -> None:
    """Refuse a posterior without a width, and too few examples.

    Raises:
        InputError: saying which.
    """
    if bayes.monteclora_config.sample_scaler == 0:
        raise InputError("sample_scaler=0 is plain LoRA: it has no noise whose width could be tuned")
    _check_follows(bayes)
    check_kind(dataset)
    if len(dataset) < LEAST_EXAMPLES:
        raise InputError(f"a width needs at least {LEAST_EXAMPLES} examples to be tuned on, got {len(dataset)}")
