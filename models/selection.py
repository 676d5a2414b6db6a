"""The kinds of task there are, and which of them a network or a file is for."""

from typing import Any

from pyro.nn import PyroModule
from torch import nn

from bayeslora.adapters.provenance import CLASSIFIERS
from bayeslora.errors import InputError
from bayeslora.models.language import ChoiceLikelihood, NextTokenLikelihood
from bayeslora.models.likelihoods import CategoricalLikelihood, GaussianLikelihood, Likelihood
from bayeslora.models.network import is_causal, is_seq2seq
from bayeslora.models.seq2seq import TargetLikelihood
from bayeslora.models.several import MultiLabelLikelihood, TokenLikelihood

#: Kind of task (:attr:`bayeslora.tasks.base.Task.kind`) to the likelihood, which says all that depends on the kind:
#: what is predicted (a :class:`bayeslora.prediction.Prediction`), which labels there can be, and how they are scored.
KINDS: dict[str, type[Likelihood]] = {
    "classification": CategoricalLikelihood,
    "regression": GaussianLikelihood,
    "choice": ChoiceLikelihood,
    "text": NextTokenLikelihood,
    "tokens": TokenLikelihood,
    "multi_label": MultiLabelLikelihood,
    "target": TargetLikelihood,
}
_CALLED_IN_FILES = {"next_token": "text"}


def likelihood_for(network: nn.Module) -> PyroModule:
    """The likelihood that fits a network's task, read off its class and configuration.

    ``problem_type="multi_label_classification"`` gets :class:`~bayeslora.models.MultiLabelLikelihood`, the mean over
    labels. A causal language model gets :class:`~bayeslora.models.NextTokenLikelihood`, the mean over tokens; a
    classifier of tokens :class:`~bayeslora.models.TokenLikelihood`, the mean over words; and a
    network with an encoder and a decoder that writes :class:`~bayeslora.models.TargetLikelihood`.

    Raises:
        InputError: for a network that is neither a classifier of sequences, tokens, images or audio, nor a regressor,
            nor a language model, causal or with an encoder and a decoder.

    Example:
        >>> type(likelihood_for(network)).__name__  # a classifier
        'CategoricalLikelihood'
    """
    config: Any = network.config
    problem = getattr(config, "problem_type", None)
    if type(network).__name__.endswith("ForTokenClassification"):
        return TokenLikelihood()
    if type(network).__name__.endswith(CLASSIFIERS) and problem == "multi_label_classification":
        return MultiLabelLikelihood()
    if type(network).__name__.endswith(CLASSIFIERS):
        regression = problem == "regression" or (problem is None and config.num_labels == 1)
        if regression and config.num_labels != 1:
            raise InputError(
                f"problem_type='regression' with num_labels={config.num_labels}: one number is learnt, so "
                "load the network with num_labels=1, or pass likelihood= to BayesLoRA"
            )
        return GaussianLikelihood() if regression else CategoricalLikelihood()
    if is_causal(network):
        return NextTokenLikelihood()
    if is_seq2seq(network):
        return TargetLikelihood()
    raise InputError(
        f"no likelihood for {type(network).__name__} with problem_type={problem!r}: load the network with "
        "AutoModelForSequenceClassification (one label, several or a number), AutoModelForTokenClassification, "
        "AutoModelForImageClassification, AutoModelForAudioClassification, AutoModelForCausalLM or "
        "AutoModelForSeq2SeqLM, or pass likelihood= to BayesLoRA"
    )


def described_likelihood(record: Any) -> Likelihood:
    """The likelihood that :meth:`Likelihood.describe` described, from JSON of unknown origin.

    Raises:
        InputError: for anything else.
    """
    options = dict(record) if isinstance(record, dict) else {}
    kind = options.pop("kind", None)
    names = options.get("label_names", ["A", "B"])
    if isinstance(kind, str) and isinstance(names, list) and all(isinstance(name, str) for name in names):
        kind = _CALLED_IN_FILES.get(kind, kind)
        try:
            likelihood = KINDS[kind](**options)
        except (KeyError, TypeError):
            likelihood = Likelihood()
        if likelihood.describe() is not None:
            return likelihood
    raise InputError(f"unknown likelihood {record!r:.200}: pass the one used when fitting as likelihood=")
