"""How labels follow from a network's outputs, as Pyro observation sites.

A likelihood is a :class:`PyroModule` called with the network's outputs, the labels (or ``None`` to simulate them) and
the number of training examples; it samples the site ``labels`` in a plate over the examples of the batch. A
:class:`Likelihood` also says what those outputs are; for any other module they are the network's logits. Those of
language models are in :mod:`bayeslora.models.language`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from bayeslora.errors import InputError


@contextmanager
def example_plate(batch_size: int, num_examples: int | None) -> Iterator[None]:
    """The plate over a batch, scaled to the whole training set when its size is known.

    The batch can be the larger of the two: several processes fill up the last batch with examples they have seen.
    """
    scale = (num_examples or batch_size) / batch_size
    with pyro.plate("examples", batch_size, dim=-1), pyro.poutine.scale(scale=scale):
        yield


class Likelihood(PyroModule):
    """What a likelihood says beside its density; each method has a default for a classifier or a regressor.

    ``counted_by_trainer`` promises that ``transformers.Trainer``, which counts the labels other than -100 (from the
    second on in a causal language model), finds the same number as :meth:`count`.

    Example:
        >>> Likelihood().count(torch.tensor([0, 1, 1]))  # examples
        tensor(3)
        >>> Likelihood().label_names(network)
        ('LABEL_0', 'LABEL_1')
    """

    counted_by_trainer = False

    def outputs(self, network: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None = None) -> Tensor:
        """What the labels depend on, as the network computes it under the weights that are set.

        Args:
            network: The network, adapted or not.
            inputs: Its arguments, one example a row.
            labels: The labels, for a likelihood that evaluates the density of these only.

        Returns:
            One row an example, ``(batch, ...)``.
        """
        return network(**inputs).logits

    def weights(self, outputs: Tensor) -> Tensor:
        """How much each example counts in an average over several batches, ``(batch,)``."""
        return outputs.new_ones(len(outputs), dtype=torch.float32)

    def count(self, labels: Tensor) -> Tensor:
        """What the mean over a batch is over: the number of its examples."""
        return torch.tensor(len(labels), device=labels.device)

    def label_names(self, network: nn.Module) -> tuple[str, ...] | None:
        """Names of the classes in order, or None where there are none."""
        names = getattr(network.config, "id2label", None) or {}
        return tuple(str(names[i]) for i in sorted(names)) or None

    def describe(self) -> dict[str, Any] | None:
        """What makes this likelihood again, ready for JSON; None where the network's class says it all."""
        return None


def network_outputs(
    likelihood: nn.Module | None, network: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None = None
) -> Tensor:
    """:meth:`Likelihood.outputs`; the network's logits for any other module, and for None."""
    if isinstance(likelihood, Likelihood):
        return likelihood.outputs(network, inputs, labels)
    return network(**inputs).logits


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

    def forward(self, logits: Tensor, labels: Tensor | None, num_examples: int | None = None) -> Tensor:
        with example_plate(logits.shape[0], num_examples):
            return pyro.sample("labels", dist.Categorical(logits=logits.float()), obs=_classes(labels, logits))


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

    def __init__(self) -> None:
        super().__init__("likelihood")
        self.scale = PyroParam(torch.tensor(math.sqrt(0.5)), constraints.positive)

    def forward(self, logits: Tensor, labels: Tensor | None, num_examples: int | None = None) -> Tensor:
        if logits.numel() != len(logits):
            raise InputError(f"one number is learnt for each example, and the network gives {tuple(logits.shape)}: "
                             "load it with num_labels=1")  # fmt: skip
        mean = logits.float().reshape(logits.shape[0])
        labels = None if labels is None else _one_each(labels, logits).float()
        with example_plate(mean.shape[0], num_examples):
            return pyro.sample("labels", dist.Normal(mean, self.scale), obs=labels)


def _one_each(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels of shape ``(batch,)`` or ``(batch, 1)`` as the former; any other would be scored against each other."""
    if labels.numel() != len(logits):
        raise InputError(f"{len(logits)} examples need one label each, got labels of shape {tuple(labels.shape)}")
    return labels.reshape(-1)


def _classes(labels: Tensor | None, logits: Tensor) -> Tensor | None:
    if labels is not None and labels.is_floating_point():
        raise InputError(f"the labels of a classifier are whole numbers (torch.long), got {labels.dtype}")
    return None if labels is None else _one_each(labels, logits)


def is_causal(network: nn.Module) -> bool:
    """Whether the network is a causal language model, by its class."""
    return type(network).__name__.endswith(("ForCausalLM", "LMHeadModel"))
