"""How labels follow from a network's outputs, as Pyro observation sites.

A likelihood is a :class:`PyroModule` called with the network's logits, the labels (or ``None`` to simulate them) and
the number of training examples; it samples the site ``labels`` in a plate over the examples of the batch.
"""

import math
from collections.abc import Iterator
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


class CategoricalLikelihood(PyroModule):
    """Class labels: ``y ~ Categorical(softmax(logits))``, logits of shape ``(batch, classes)``."""

    def forward(self, logits: Tensor, labels: Tensor | None, num_examples: int | None = None) -> Tensor:
        with example_plate(logits.shape[0], num_examples):
            return pyro.sample("labels", dist.Categorical(logits=logits.float()), obs=labels)


class GaussianLikelihood(PyroModule):
    """Real labels: ``y ~ N(f, σ²)`` with f of shape ``(batch, 1)`` or ``(batch,)`` and a learned σ.

    σ starts at sqrt(½), where the gradient of the negative log-likelihood is that of the squared error.
    """

    def __init__(self) -> None:
        super().__init__("likelihood")
        self.scale = PyroParam(torch.tensor(math.sqrt(0.5)), constraints.positive)

    def forward(self, logits: Tensor, labels: Tensor | None, num_examples: int | None = None) -> Tensor:
        mean = logits.float().reshape(logits.shape[0])
        labels = None if labels is None else labels.float().reshape(-1)
        with example_plate(mean.shape[0], num_examples):
            return pyro.sample("labels", dist.Normal(mean, self.scale), obs=labels)


def likelihood_for(network: nn.Module) -> PyroModule:
    """The likelihood that fits a network's task, read off its class and configuration.

    Raises:
        InputError: for a network that is neither a sequence classifier nor a regressor.
    """
    config: Any = network.config
    problem = getattr(config, "problem_type", None)
    if type(network).__name__.endswith("ForSequenceClassification") and problem != "multi_label_classification":
        regression = problem == "regression" or (problem is None and config.num_labels == 1)
        return GaussianLikelihood() if regression else CategoricalLikelihood()
    raise InputError(
        f"no likelihood for {type(network).__name__} with problem_type={problem!r}: load the network with "
        "AutoModelForSequenceClassification (single-label or regression), or pass likelihood= to BayesLoRA"
    )
