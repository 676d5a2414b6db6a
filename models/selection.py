"""Which likelihood fits a network, read off its class and configuration."""

from typing import Any

from pyro.nn import PyroModule
from torch import nn

from bayeslora.adapters.provenance import CLASSIFIERS
from bayeslora.errors import InputError
from bayeslora.models.language import NextTokenLikelihood
from bayeslora.models.likelihoods import CategoricalLikelihood, GaussianLikelihood, is_causal


def likelihood_for(network: nn.Module) -> PyroModule:
    """The likelihood that fits a network's task, read off its class and configuration.

    A causal language model gets :class:`~bayeslora.models.NextTokenLikelihood`, the mean over tokens.

    Raises:
        InputError: for a network that is neither a classifier of sequences, images or audio, nor a regressor, nor a
            causal language model.

    Example:
        >>> type(likelihood_for(network)).__name__  # a classifier
        'CategoricalLikelihood'
    """
    config: Any = network.config
    problem = getattr(config, "problem_type", None)
    if type(network).__name__.endswith(CLASSIFIERS) and problem != "multi_label_classification":
        regression = problem == "regression" or (problem is None and config.num_labels == 1)
        if regression and config.num_labels != 1:
            raise InputError(f"problem_type='regression' with num_labels={config.num_labels}: one number is learnt, so "
                             "load the network with num_labels=1, or pass likelihood= to BayesLoRA")  # fmt: skip
        return GaussianLikelihood() if regression else CategoricalLikelihood()
    if is_causal(network):
        return NextTokenLikelihood()
    raise InputError(
        f"no likelihood for {type(network).__name__} with problem_type={problem!r}: load the network with "
        "AutoModelForSequenceClassification (single-label or regression), AutoModelForImageClassification, "
        "AutoModelForAudioClassification or AutoModelForCausalLM, or pass likelihood= to BayesLoRA"
    )
