"""How labels follow from a network's outputs, as Pyro observation sites.

A likelihood is a :class:`PyroModule` called with the network's outputs, the labels (or ``None`` to simulate them) and
the number of training examples; it samples the site ``labels`` in a plate over the examples of the batch. A
:class:`Likelihood` also says all else that depends on the kind of task: what those outputs are, which labels there can
be, how a prediction is summarised and an evaluation scored. Nothing else asks which likelihood it is. For a module that
is none, its defaults hold. Likelihoods of language models are in :mod:`bayeslora.models.language`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from scipy.special import log_softmax, softmax
from torch import Tensor, nn
from torch.distributions import constraints

from bayeslora.analysis.metrics.registry import METRICS, calibration_summary
from bayeslora.analysis.metrics.uncertainty import mutual_information, predictive_entropy
from bayeslora.errors import InputError, Where
from bayeslora.prediction import ClassPrediction, NumberPrediction, Prediction

UNLABELLED = -1  # how official test splits say that they have no labels
NOT_SCORED = -100  # the label of a token that is read but not scored, as in transformers


@contextmanager
def example_plate(batch_size: int, num_examples: int | None) -> Iterator[None]:
    """The plate over a batch, scaled to the whole training set when its size is known.

    The batch can be the larger of the two: several processes fill up the last batch with examples they have seen.
    """
    scale = (num_examples or batch_size) / batch_size
    with pyro.plate("examples", batch_size, dim=-1), pyro.poutine.scale(scale=scale):
        yield


class Likelihood(PyroModule):
    """What a likelihood says beside its density; each method has a default for a classifier.

    A new kind of task is a subclass, the :class:`~bayeslora.prediction.Prediction` that it makes, and a line in
    :data:`bayeslora.models.selection.KINDS`.

    Example:
        >>> Likelihood().count(torch.tensor([0, 1, 1]))  # examples
        tensor(3)
        >>> Likelihood().label_names(network)
        ('LABEL_0', 'LABEL_1')
    """

    counted_by_trainer = False
    """Whether ``transformers.Trainer``, which counts the labels other than -100 (from the second on in a causal
    language model), is sure to find the same number as :meth:`count`."""

    loss_type: str | None = None
    """What transformers calls the loss of this likelihood, where the network has to be told."""

    of_classes = False
    """Whether the outputs are logits of classes, of which one is the label."""

    evaluates_labels = False
    """Whether the outputs are of given labels, and do not exist without."""

    without_labels: str | None = None
    """Why examples without a column of labels cannot be predicted, and what to do; None where they can be."""

    several_labels = False
    """Whether an example has several labels, each with probabilities of its own."""

    takes_options = True
    """Whether an example can be several texts to choose from, its columns lists of lists."""

    label_type: Literal["class", "number"] | None = None
    """What an example's label is: one whole number, one number, or whatever stands in the data."""

    learnt_in_few_passes = False
    """Whether many passes over little data make worse predictions, as of texts, which are soon known by heart: a
    training of default length then has no least number of steps."""

    metric_names: ClassVar[Mapping[str, bool]] = {}
    """What :meth:`metrics` gives: the name of each, and whether more is better."""

    def outputs(self, network: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None = None) -> Tensor:
        """What the labels depend on, as the network computes it under the draw that is set.

        Args:
            network: The network, adapted or not.
            inputs: Its arguments, one example a row.
            labels: The labels, for a likelihood that evaluates the density of these only.

        Returns:
            One row an example, ``(batch, ...)``.
        """
        return network(**inputs).logits

    def prepare(self, network: nn.Module) -> None:
        """Find out what :meth:`outputs` has to know of a network, before anything watches it run: nothing."""

    def weights(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """How much each example counts in an average over several batches, ``(batch,)``."""
        return outputs.new_ones(len(outputs), dtype=torch.float32)

    def count(self, labels: Tensor) -> Tensor:
        """What the mean over a batch is over: the number of its examples."""
        return torch.tensor(len(labels), device=labels.device)

    def unlearned(self, outputs: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
        """How far a batch is from known by heart, where it would be 0: 1 − exp(−``loss``), with ``loss`` the negative
        log-likelihood of an example: the probability that its label lacks, by the geometric mean. A likelihood whose
        density can be above 1 has to say otherwise."""
        return -torch.expm1(-loss)

    def simulate(self, outputs: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor | None:
        """Labels as the outputs have them, where they can be drawn one by one; else those that are given."""
        return labels

    def permute(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The labels of all examples, each with that of another one."""
        return labels[torch.randperm(len(labels), generator=generator)]

    def label_names(self, network: nn.Module) -> tuple[str, ...] | None:
        """Names of the classes in order, or None where there are none."""
        names = getattr(network.config, "id2label", None) or {}
        return tuple(str(names[i]) for i in sorted(names)) or None

    def columns_read(self, arguments: frozenset[str]) -> frozenset[str] | None:
        """Which columns :meth:`outputs` reads, of a network with these arguments; None where it cannot be known."""
        return arguments if type(self).outputs is Likelihood.outputs else None

    def check_label(self, label: np.ndarray, example: Mapping[str, Any], where: Where, network: nn.Module) -> None:
        """Refuse an example's label, finite numbers, with an ``InputError`` where it is none for this likelihood."""

    def check_labels(self, labels: np.ndarray, name: str, network: nn.Module, *, learns: bool) -> None:
        """Refuse the labels of a whole data set with an ``InputError``, after :meth:`check_label` of each.

        Args:
            labels: ``(n,)``; NaN where a label is not one number.
            name: What the data set is called.
            network: The network.
            learns: Whether it is to be learnt from, or evaluated on while learning.
        """

    def summarize(
        self, outputs: np.ndarray, labels: np.ndarray | None, network: nn.Module, *, keep: bool
    ) -> Prediction:
        """The result of a prediction.

        Args:
            outputs: :meth:`outputs` of n examples under S draws, ``(S, n, ...)``. Where examples differ in length, what
                lies beyond the shorter ones means nothing: it is of padding, or NaN.
            labels: ``(n, ...)``, -100 there; None if there are none.
            network: The network.
            keep: Whether the result holds what each draw says.
        """
        if labels is not None and (labels == UNLABELLED).all():
            labels = None
        log_probs = log_softmax(outputs.astype(np.float64), axis=-1)
        probs = np.exp(log_probs).mean(0)
        return ClassPrediction(
            labels,
            self.label_names(network),
            probs,
            predictive_entropy(probs),
            mutual_information(np.exp(log_probs)),
            log_probs if keep else None,
        )

    def metrics(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """What an evaluation while training computes at the mean, beside the loss: :attr:`metric_names`."""
        return {}

    def describe(self) -> dict[str, Any] | None:
        """What makes this likelihood again, ready for JSON: ``kind``, its name in
        :data:`bayeslora.models.selection.KINDS`, and its arguments. None where the network's class says it all."""
        return None


_ANY = Likelihood()


def as_likelihood(likelihood: nn.Module | None) -> Likelihood:
    """The likelihood itself; for any other module, and for None, one with the defaults of :class:`Likelihood`."""
    return likelihood if isinstance(likelihood, Likelihood) else _ANY


def network_outputs(
    likelihood: nn.Module | None, network: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None = None
) -> Tensor:
    """:meth:`Likelihood.outputs`; the network's logits for any other module, and for None."""
    return as_likelihood(likelihood).outputs(network, inputs, labels)


class CategoricalLikelihood(Likelihood):
    """Class labels: ``y ~ Categorical(softmax(logits))``.

    Called with logits of shape ``(batch, classes)`` and whole numbers, or None to draw them, of shape ``(batch,)``.

    Raises:
        InputError: for labels that are no whole numbers, or not one for each example.

    Example:
        >>> trace = pyro.poutine.trace(CategoricalLikelihood()).get_trace(torch.zeros(2, 2), torch.tensor([0, 1]))
        >>> round(float(trace.log_prob_sum()), 4)  # two labels of probability 1/2: -2 log 2
        -1.3863
    """

    counted_by_trainer = True
    of_classes = True
    takes_options = False
    label_type: Literal["class", "number"] | None = "class"
    metric_names = {  # noqa: RUF012
        name: metric.higher_is_better for name, metric in METRICS.items() if metric.higher_is_better is not None
    }

    def forward(self, logits: Tensor, labels: Tensor | None, num_examples: int | None = None) -> Tensor:
        with example_plate(logits.shape[0], num_examples):
            return pyro.sample("labels", dist.Categorical(logits=logits.float()), obs=_classes(labels, logits))

    def simulate(self, outputs: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        probs = outputs.softmax(-1, torch.float64).cpu()
        return torch.multinomial(probs, 1, generator=generator)[:, 0].to(outputs.device)

    def num_classes(self, network: nn.Module) -> int | None:
        """How many classes there are, where the network's configuration says it."""
        return getattr(network.config, "num_labels", None)

    def check_label(self, label: np.ndarray, example: Mapping[str, Any], where: Where, network: nn.Module) -> None:
        _check_single(label, where)

    def check_labels(self, labels: np.ndarray, name: str, network: nn.Module, *, learns: bool) -> None:
        if (labels == UNLABELLED).all():
            if learns:
                raise InputError(f"{name} is an unlabelled split (every label is -1): use a labelled one")
            return
        classes = self.num_classes(network) or labels.max() + 1
        for row in np.flatnonzero(labels % 1 != 0)[:1]:
            raise Where(name, row).refused(f"a classifier's labels are whole numbers, found {labels[row]:g}")
        for row in np.flatnonzero((labels < 0) | (labels >= classes))[:1]:
            raise Where(name, row).refused(
                f"label {labels[row]:.0f} is outside the network's {classes} classes 0..{classes - 1}"
            )

    def metrics(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return calibration_summary(softmax(np.asarray(outputs, dtype=np.float64), axis=-1), labels)


class GaussianLikelihood(Likelihood):
    """Real labels: ``y ~ N(f, σ²)`` with a learned σ, in the labels' unit.

    Called with f of shape ``(batch, 1)`` or ``(batch,)`` and labels, or None to draw them, of shape ``(batch,)``.
    σ starts at sqrt(½), where the gradient of the negative log-likelihood is that of the squared error.

    Raises:
        InputError: for a network with several outputs, or labels that are not one for each example.

    Example:
        >>> trace = pyro.poutine.trace(GaussianLikelihood()).get_trace(torch.zeros(1, 1), torch.zeros(1))
        >>> round(trace.log_prob_sum().item(), 4)  # log N(0; 0, 1/2) = -log(π)/2
        -0.5724
    """

    takes_options = False
    label_type = "number"

    def __init__(self) -> None:
        super().__init__("likelihood")
        self.scale = PyroParam(torch.tensor(math.sqrt(0.5)), constraints.positive)

    def forward(self, logits: Tensor, labels: Tensor | None, num_examples: int | None = None) -> Tensor:
        if logits.numel() != len(logits):
            raise InputError(
                f"one number is learnt for each example, and the network gives {tuple(logits.shape)}: "
                "load it with num_labels=1"
            )
        mean = logits.float().reshape(logits.shape[0])
        labels = None if labels is None else _one_each(labels, logits).float()
        with example_plate(mean.shape[0], num_examples):
            return pyro.sample("labels", dist.Normal(mean, self.scale), obs=labels)

    def unlearned(self, outputs: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
        """The mean squared error: σ shrinks with it, and the density has no upper bound."""
        return (outputs.float().reshape(-1) - labels.float().reshape(-1)).square().mean()

    def check_label(self, label: np.ndarray, example: Mapping[str, Any], where: Where, network: nn.Module) -> None:
        _check_single(label, where)

    def summarize(
        self, outputs: np.ndarray, labels: np.ndarray | None, network: nn.Module, *, keep: bool
    ) -> Prediction:
        means = outputs.reshape(len(outputs), -1).astype(np.float64)
        noise = float(self.scale.detach())
        return NumberPrediction(labels, means.mean(0), np.sqrt(means.var(0) + noise**2), noise, means if keep else None)


def _check_single(label: np.ndarray, where: Where) -> None:
    if label.size != 1:
        raise where.refused(f"an example has one label, got labels of shape {label.shape}")


def _one_each(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels of shape ``(batch,)`` or ``(batch, 1)`` as the former; any other would be scored against each other."""
    if labels.numel() != len(logits):
        raise InputError(f"{len(logits)} examples need one label each, got labels of shape {tuple(labels.shape)}")
    return labels.reshape(-1)


def _classes(labels: Tensor | None, logits: Tensor) -> Tensor | None:
    if labels is not None and labels.is_floating_point():
        raise InputError(f"the labels of a classifier are whole numbers (torch.long), got {labels.dtype}")
    return None if labels is None else _one_each(labels, logits)
