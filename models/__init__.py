"""What is assumed: priors over the adapters, and likelihoods of the labels."""

from bayeslora.models.likelihoods import CategoricalLikelihood, GaussianLikelihood, likelihood_for
from bayeslora.models.low_rank_regression import LowRankRegression, low_rank_regression
from bayeslora.models.monteclora import MonteCLoRA

__all__ = [
    "CategoricalLikelihood",
    "GaussianLikelihood",
    "LowRankRegression",
    "MonteCLoRA",
    "likelihood_for",
    "low_rank_regression",
]
