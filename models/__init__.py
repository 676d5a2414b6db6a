"""What is assumed: priors over the adapters, and likelihoods of the labels."""

from bayeslora.models.language import ChoiceLikelihood, NextTokenLikelihood
from bayeslora.models.likelihoods import CategoricalLikelihood, GaussianLikelihood, Likelihood
from bayeslora.models.low_rank_regression import LowRankRegression, low_rank_regression
from bayeslora.models.monteclora import MonteCLoRA
from bayeslora.models.selection import likelihood_for
from bayeslora.models.seq2seq import TargetLikelihood
from bayeslora.models.several import MultiLabelLikelihood, TokenLikelihood
from bayeslora.models.tuning import Tuning

__all__ = [
    "CategoricalLikelihood",
    "ChoiceLikelihood",
    "GaussianLikelihood",
    "Likelihood",
    "LowRankRegression",
    "MonteCLoRA",
    "MultiLabelLikelihood",
    "NextTokenLikelihood",
    "TargetLikelihood",
    "TokenLikelihood",
    "Tuning",
    "likelihood_for",
    "low_rank_regression",
]
