"""Expected log predictive density of what `to_arviz` wrote, for ``arviz.compare``."""

from typing import Any

import numpy as np

from bayeslora.analysis.draws.inference_data import has_data_tree
from bayeslora.errors import InputError

FEWEST_DRAWS = 25  # PSIS fits a Pareto distribution to the largest fifth, which needs five


def leave_one_out(data: Any) -> Any:
    """``arviz.loo(data, pointwise=True)``, on data that it can say something about.

    It estimates log p(y_i | all the others) for draws that were conditioned on all of y: give data made from the
    examples that the model was **trained** on. For others, see `held_out_elpd`.

    Args:
        data: What `to_arviz` returned for labelled examples.

    Returns:
        ArviZ's ``ELPDData``, in nats, which ``arviz.compare`` takes.

    Raises:
        InputError: There is no log-likelihood, it has fewer than 25 draws, or all draws are equal for some example, as
            those of plain LoRA are: then importance sampling has nothing to reweigh.

    Example:
        >>> draws = np.random.default_rng(0).normal(-0.7, 0.1, size=(1, 100, 3))  # chain, draw, example
        >>> variables = {"posterior": {"site": draws}, "log_likelihood": {"labels": draws}}
        >>> data = build_inference_data(variables, {}, {"site": ["example"], "labels": ["example"]}, {})
        >>> round(float(leave_one_out(data).iloc[0]), 1)  # three times -0.7
        -2.1
    """
    draws = _draws(_pointwise(data))
    if len(draws) < FEWEST_DRAWS:
        raise InputError(
            f"PSIS-LOO needs at least {FEWEST_DRAWS} draws, and there are {len(draws)}: raise num_samples in to_arviz"
        )
    equal = (draws == draws[0]).all(axis=0)
    if equal.all():
        raise InputError(
            "all draws have the same log-likelihood, as those of a point estimate such as plain LoRA have: leaving one "
            "example out changes nothing that reweighing draws could show; use held_out_elpd on data that the model "
            "was not trained on"
        )
    if equal.any():
        raise InputError(
            f"all draws give example {int(equal.argmax())} the same log-likelihood, so that PSIS-LOO has "
            "no weights for it: leave it out, or use held_out_elpd on other data"
        )
    import arviz

    return arviz.loo(data, pointwise=True)


def held_out_elpd(data: Any) -> Any:
    r"""The log predictive density of examples that the model was **not** trained on.

    .. math:: \sum_i \log \frac1S \sum_s p(y_i \mid \theta_s)

    Draws that have not seen y need no leaving out, so this holds for plain LoRA as well (whose draws are all one).

    Args:
        data: What `to_arviz` returned for labelled examples.

    Returns:
        ArviZ's ``ELPDData``, in nats, which ``arviz.compare`` takes; its standard error is that over examples, and its
        number of effective parameters NaN.

    Raises:
        InputError: There is no log-likelihood.

    Example:
        >>> log_likelihood = np.log([[[0.25], [0.75]]])  # chain, draw, example
        >>> data = build_inference_data({"log_likelihood": {"labels": log_likelihood}}, {}, {"labels": ["example"]}, {})
        >>> round(float(held_out_elpd(data).iloc[0]), 4)  # log(0.25/2 + 0.75/2)
        -0.6931
    """
    values = _pointwise(data)
    draws = _draws(values)  # (S, n)
    pointwise = values.isel(chain=0, draw=0, drop=True)
    pointwise = pointwise.copy(data=np.logaddexp.reduce(draws, axis=0) - np.log(len(draws)))
    count = pointwise.size
    total, error = float(pointwise.sum()), float(np.sqrt(count * pointwise.values.var()))
    import arviz

    if has_data_tree(arviz):
        from arviz_stats.utils import ELPDData

        return ELPDData(
            elpd=total,
            se=error,
            p=np.nan,
            n_samples=len(draws),
            n_data_points=count,
            scale="log",
            warning=False,
            good_k=np.nan,
            elpd_i=pointwise,
        )
    from arviz.stats.stats_utils import ELPDData

    return ELPDData(
        {
            "elpd_loo": total,
            "se": error,
            "p_loo": np.nan,
            "n_samples": len(draws),
            "n_data_points": count,
            "warning": False,
            "loo_i": pointwise,
            "scale": "log",
            "good_k": np.nan,
        }
    )


def _pointwise(data: Any) -> Any:
    """``log_likelihood["labels"]``, ``(chain, draw, example)``."""
    try:
        return data["log_likelihood"]["labels"].transpose("chain", "draw", ...)
    except (KeyError, AttributeError) as error:
        raise InputError("the data hold no log-likelihood: give to_arviz a data set with labels") from error


def _draws(values: Any) -> np.ndarray:
    """The chains one after the other, ``(draws, examples)``."""
    return values.values.reshape(-1, values.shape[-1])
