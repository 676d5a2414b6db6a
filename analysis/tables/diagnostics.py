"""Is this posterior to be trusted? Numbers in, verdicts out.

Each question has a number, two thresholds, where they come from, and one sentence of advice.
:func:`bayeslora.diagnose` collects the numbers from a network.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bayeslora.errors import InputError

FEWEST_LOGS = 8  # entries of a trace: two to a quarter
RULE_OF_THUMB = "rule of thumb of this library"


@dataclass(frozen=True)
class Diagnostic:
    """One question asked of a posterior, and its answer.

    Attributes:
        name: What was asked.
        value: The number found.
        threshold: ``(good, bad)``: as good as the first, or better, is good; worse than the second is bad; what lies
            between is doubtful. The first is the smaller one where small values are good.
        verdict: ``"good"``, ``"doubtful"`` or ``"bad"``.
        source: Where the number and its thresholds come from.
        advice: What to do about it, in one sentence.

    Example:
        >>> Diagnostic("pareto_k", 0.6, (0.5, 0.7), "doubtful", "Yao et al. (2018)", "compare with another guide").rule
        'good if ≤ 0.5, bad if > 0.7'
    """

    name: str
    value: float
    threshold: tuple[float, float]
    verdict: str
    source: str
    advice: str

    @property
    def rule(self) -> str:
        """The thresholds in words."""
        good, bad = self.threshold
        first, second = ("≤", ">") if good < bad else ("≥", "<")
        return f"good if {first} {good:g}, bad if {second} {bad:g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; a value that is not finite becomes None."""
        value = self.value if math.isfinite(self.value) else None
        return dataclasses.asdict(self) | {"value": value, "threshold": list(self.threshold)}


def importance_sampling(log_weights: ArrayLike) -> Diagnostic:
    r"""Would importance sampling turn the guide's draws into the posterior's? Pareto-smoothed k̂.

    .. math:: \log w_s = \log p(y, \theta_s) - \log q(\theta_s), \qquad \theta_s \sim q

    Args:
        log_weights: log w up to a constant, in nats, shape ``(draws,)``; at least 25.

    References:
        Yao, Vehtari, Simpson, Gelman (2018), *Yes, but Did It Work?: Evaluating Variational Inference*.
    """
    advice = {
        "good": "the guide covers the posterior of (π, Σ, A): weighting its draws by importance would change little",
        "doubtful": "averages over the draws are usable, but compare them with another guide's",
        "bad": "the draws do not stand for the exact posterior over all weights, as is usual with very many of them: "
        "trust what held-out data confirm, such as calibration, and no interval of a single weight",
    }
    return _judge("pareto_k", pareto_k(log_weights), (0.5, 0.7), "Yao et al. (2018), section 3.1", advice)


def pareto_k(log_weights: ArrayLike) -> float:
    """k̂, the shape of the generalised Pareto distribution that fits the largest weights; 0 where all are equal to 1e-3.

    As in Pareto-smoothed importance sampling: of S weights the largest min(S/5, 3·sqrt(S)) are fitted, and the estimate
    is drawn to ½ with the weight of ten observations.

    Args:
        log_weights: Up to a constant, in nats, shape ``(draws,)``; at least 25.

    Raises:
        InputError: Too few weights, or one that is NaN or +∞.

    References:
        Zhang and Stephens (2009), *A New and Efficient Estimation Method for the Generalized Pareto Distribution*.
        Vehtari, Simpson, Gelman, Yao, Gabry (2024), *Pareto Smoothed Importance Sampling*, JMLR 25.
    """
    values = np.sort(np.asarray(log_weights, dtype=np.float64).ravel())
    if len(values) < 25:
        raise InputError(f"log_weights has {len(values)} entries, and a tail needs at least 25 draws to be judged")
    if np.isnan(values).any() or values[-1] == np.inf:
        raise InputError("log_weights holds NaN or +∞: a density could not be evaluated at a draw")
    values -= values[-1]
    size = math.ceil(min(len(values) / 5, 3 * math.sqrt(len(values))))
    cutoff = max(values[-size - 1], math.log(np.finfo(np.float64).tiny))
    tail = np.exp(values[-size:]) - math.exp(cutoff)
    tail = tail[tail > 0]
    if np.ptp(values) < 1e-3:  # densities in float32 know no better
        return 0.0
    if len(tail) < 5:
        return math.inf
    return _pareto_shape(tail)


def _pareto_shape(excess: np.ndarray) -> float:
    """Zhang and Stephens' estimate from ascending, positive excesses."""
    n = len(excess)
    m = 30 + int(math.sqrt(n))
    theta = 1 - np.sqrt(m / (np.arange(1, m + 1) - 0.5))
    theta = theta / (3 * excess[int(n / 4 + 0.5) - 1]) + 1 / excess[-1]
    shape = np.log1p(-theta[:, None] * excess).mean(axis=1)
    likelihood = n * (np.log(-theta / shape) - shape - 1)
    weights = np.exp(likelihood - likelihood.max())
    best = (theta * weights).sum() / weights.sum()
    return float((n * np.log1p(-best * excess).mean() + 10 * 0.5) / (n + 10))


def restart_agreement(draws: ArrayLike) -> Diagnostic:
    r"""Do runs from other seeds predict the same? R̂ of the predictive probabilities, all of them pooled.

    .. math:: \hat R^2 = \frac{S-1}{S} + \frac{\sum_i \mathrm{Var}_{\text{runs}}(\bar p_i)}
              {\sum_i \mathrm{E}_{\text{runs}}[\mathrm{Var}_{\text{draws}}(p_i)]}

    Args:
        draws: Predictions of each run under each of its S draws, shape ``(runs, draws, ...)``.

    Raises:
        InputError: Fewer than two runs or draws.

    References:
        Gelman and Rubin (1992), *Inference from Iterative Simulation Using Multiple Sequences*.
    """
    values = np.asarray(draws, dtype=np.float64)
    if values.ndim < 3 or min(values.shape[:2]) < 2:
        raise InputError(f"draws must have shape (runs, draws, ...), two of each at least; got {values.shape}")
    between = values.mean(axis=1).var(axis=0, ddof=1).sum()
    within = values.var(axis=1, ddof=1).mean(axis=0).sum()
    ratio = between / within if within > 0 else math.inf
    square = 1 - 1 / values.shape[1] + ratio if between > 0 else 1.0
    advice = {
        "good": "runs from other seeds give the same predictions, up to what each posterior leaves open",
        "doubtful": "seeds matter more than the posterior says: average the predictions of a few runs",
        "bad": "runs differ more than the draws within each of them: the posterior knows one mode only, so train an "
        "ensemble, or train longer",
    }
    source = f"Gelman and Rubin (1992); thresholds: {RULE_OF_THUMB} (1.4 = runs as far apart as draws)"
    return _judge("restart_r_hat", math.sqrt(square), (1.1, 1.4), source, advice)


def convergence(history: Sequence[Mapping[str, float]]) -> list[Diagnostic]:
    """Has training ended? One verdict for the loss and for each part of the ELBO that the log holds.

    The value is the relative change from the third quarter of a trace to the last, as far as it exceeds two standard
    errors.

    Args:
        history: The entries of a run's log, such as ``fit(...).history``.

    Returns:
        Nothing for a trace of fewer than eight entries.

    References:
        Kucukelbir et al. (2017), *Automatic Differentiation Variational Inference* (relative tolerance 0.01).
    """
    advice = {
        "good": "the trace is flat over the last half of training",
        "doubtful": "it still moved a little in the last half: train longer if the time is there",
        "bad": "it was still moving when training ended: train longer, or with a larger learning rate",
    }
    source = "Kucukelbir et al. (2017), section 3"
    judged = []
    for part in ("loss", "elbo/task", "elbo/kl"):
        trace = np.array([entry[part] for entry in history if part in entry], dtype=np.float64)
        if len(trace) >= FEWEST_LOGS:
            name = f"convergence_{part.removeprefix('elbo/')}"
            judged.append(_judge(name, _late_change(trace), (0.01, 0.05), source, advice))
    return judged


def _late_change(trace: np.ndarray) -> float:
    """|mean of the last quarter − mean of the third| beyond two standard errors, relative to the last quarter."""
    size = len(trace) // 4
    third, last = trace[-2 * size : -size], trace[-size:]
    error = math.sqrt((third.var(ddof=1) + last.var(ddof=1)) / size)
    change = max(abs(third.mean() - last.mean()) - 2 * error, 0.0)
    return change / abs(last.mean()) if change else 0.0


def data_drivenness(gradient: ArrayLike, curvature: ArrayLike) -> Diagnostic:
    r"""Would the noise be another if the labels were permuted? Its linear response, median over adapters.

    With :math:`A - \mu` of adapter k scaled by :math:`e^{t_k}`, one Newton step against the KL alone:

    .. math:: \Delta t_k = \frac{\partial_{t_k} (L_{\text{permuted}} - L)}{\eta\, \partial^2_{t_k} \mathrm{KL}}

    0.05 says that permuted labels would change the noise by some 5 %.

    Args:
        gradient: The numerator: of the mean negative log-likelihood under permuted labels, less that under the labels
            as they are, shape ``(adapters,)``.
        curvature: The denominator, not negative, shape ``(adapters,)``; 0 where nothing holds the noise.

    References:
        Zhang et al. (2017), *Understanding Deep Learning Requires Rethinking Generalization* (permuted labels).
    """
    gradient, curvature = np.abs(np.asarray(gradient, dtype=np.float64)), np.asarray(curvature, dtype=np.float64)
    response = np.divide(gradient, curvature, out=np.full(gradient.shape, np.inf), where=curvature > 0)
    response[gradient == 0] = 0
    advice = {
        "good": "labels decide how wide the posterior is",
        "doubtful": "labels hardly move the noise: raise sample_scaler, or lower kl_weight",
        "bad": "the noise is that of the prior, whatever the labels are: raise sample_scaler, or lower kl_weight",
    }
    source = f"permuted labels: Zhang et al. (2017); thresholds: {RULE_OF_THUMB}"
    return _judge("data_drivenness", float(np.median(response)), (0.05, 0.01), source, advice)


def amortization_gap(losses: ArrayLike, refined: ArrayLike) -> Diagnostic:
    """What do shared parameters cost? Objective of the guide, minus that of adapter-by-adapter v and α refined from it.

    Args:
        losses: The objective in nats per example at the guide, one value a batch, shape ``(batches,)``.
        refined: The same batches after refinement.

    References:
        Cremer, Li, Duvenaud (2018), *Inference Suboptimality in Variational Autoencoders*.
    """
    gap = float(np.mean(np.asarray(losses, dtype=np.float64) - np.asarray(refined, dtype=np.float64)))
    advice = {
        "good": "v and α of each adapter on its own would fit no better",
        "doubtful": "v and α of each adapter on its own would fit a little better: try guide='mean_field'",
        "bad": "v and α of each adapter on its own would fit better: train longer, or with guide='mean_field'",
    }
    source = f"Cremer et al. (2018); thresholds in nats per example: {RULE_OF_THUMB}"
    return _judge("amortization_gap", gap, (0.01, 0.05), source, advice)


def _judge(
    name: str, value: float, threshold: tuple[float, float], source: str, advice: Mapping[str, str]
) -> Diagnostic:
    good, bad = threshold
    sign = 1 if good < bad else -1  # 1 where small values are good
    verdict = "bad"  # also for NaN
    if sign * value <= sign * bad:
        verdict = "good" if sign * value <= sign * good else "doubtful"
    return Diagnostic(name, float(value), threshold, verdict, source, advice[verdict])
