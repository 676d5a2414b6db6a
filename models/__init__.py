"""What is assumed: priors over the adapters, and likelihoods of the labels."""

from bayeslora.models.likelihoods import CategoricalLikelihood, GaussianLikelihood, likelihood_for
from bayeslora.models.monteclora import MonteCLoRA

__all__ = ["CategoricalLikelihood", "GaussianLikelihood", "MonteCLoRA", "likelihood_for"]
