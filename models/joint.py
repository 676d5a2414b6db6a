"""The joint density as a Pyro model: the prior's three sites, then the network, then the labels."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyro
import torch
from peft import PeftModel
from torch import Tensor, nn

from bayeslora.adapters.arrival import Arrival, refuse_switched_off
from bayeslora.adapters.blocks import in_last_blocks
from bayeslora.adapters.drawing import using_draw
from bayeslora.adapters.groups import AdapterGroup, find_groups
from bayeslora.adapters.modes import checkpointable, recomputes
from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError
from bayeslora.models.parameter_store import claim_names
from bayeslora.models.prior import Prior

if TYPE_CHECKING:
    from bayeslora.models.likelihoods import Likelihood


class JointModel(Prior):
    """Prior over (π, Σ, A) of every adapter, and the likelihood of the labels given the network with that A.

    :class:`bayeslora.models.MonteCLoRA` is this for a network as it was loaded, with the likelihood that fits it.

    Args:
        network: A PeftModel whose LoRA layers can be sampled (:func:`bayeslora.adapters.inject.adapt`).
        config: Hyperparameters.
        likelihood: A PyroModule as in :mod:`bayeslora.models.likelihoods`.
        num_examples: Size of the training set; scales the likelihood of a mini-batch up to it.
    """

    likelihood: Any

    def __init__(
        self,
        network: PeftModel,
        config: MonteCLoRAConfig,
        likelihood: nn.Module,
        num_examples: int | None = None,
    ):
        super().__init__(find_groups(network), config)
        self._network = (network,)  # in a tuple: its parameters are its own, not this module's
        self._checkpointable = checkpointable(network)
        self._arrival = Arrival()
        self.likelihood = likelihood
        self.num_examples = num_examples

    @property
    def network(self) -> PeftModel:
        return self._network[0]

    @property
    def labelling(self) -> "Likelihood":
        """What says all else that depends on the kind of task beside the density of the labels."""
        raise NotImplementedError(f"{type(self).__name__} must say what labels its outputs")

    def drawn(self, group: AdapterGroup) -> list[bool]:
        """Which adapters' draws differ from their means: those of the last blocks, where ``tuning`` says so."""
        blocks = None if self.tuning is None else self.tuning.blocks
        return super().drawn(group) if blocks is None else in_last_blocks(self.network, self.groups, blocks)[group.name]

    def drawn_groups(self) -> tuple[tuple[AdapterGroup, list[int]], ...]:
        """The groups with those of their adapters that are drawn, and their places in the group."""
        parts = []
        for group in self.groups:
            places = [place for place, drawn in enumerate(self.drawn(group)) if drawn]
            if places:
                parts.append((replace(group, adapters=tuple(group.adapters[place] for place in places)), places))
        return tuple(parts)

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> Tensor:
        self._register_parameters()
        return self.joint(labels=labels, **inputs)[1]

    def joint(self, labels: Tensor | None = None, **inputs: Any) -> tuple[Tensor, Tensor]:
        """The joint density of latent sites and labels, without the bookkeeping of Pyro's parameter store.

        Returns:
            The network's outputs (logits, see :meth:`outputs`) under this draw, and the labels.
        """
        with self.full_precision():
            draw = self.run(pyro)
        with using_draw(self.groups, draw, keep=self.recomputes()):
            observed = self.observe(labels=labels, **inputs)
        if not self.arrived(labels=labels, **inputs) and labels is not None:
            refuse_switched_off()
        return observed

    def arrived(self, labels: Tensor | None = None, **inputs: Any) -> bool:
        """Whether the last draw reached every adapted layer; false where adapters are switched off.

        Raises:
            InputError: naming layers that it went past (:mod:`bayeslora.adapters.arrival`).
        """
        return self._arrival.check(self.network, self.groups, lambda: self.outputs(inputs, labels))

    def observe(self, labels: Tensor | None = None, **inputs: Any) -> tuple[Tensor, Tensor]:
        """The likelihood's site, given the draw that is set; returns outputs and labels."""
        outputs = self.outputs(inputs, labels)
        # forward, not call: σ enters Pyro's global store only where the whole model is called as a Pyro model
        return outputs, self.likelihood.forward(outputs, labels, self.num_examples)

    def outputs(self, inputs: Mapping[str, Any], labels: Tensor | None = None) -> Tensor:
        """What the likelihood makes of the network under the draw that is set: its logits, unless it is a
        :class:`~bayeslora.models.Likelihood` that says otherwise."""
        return self.labelling.outputs(self.network, inputs, labels)

    def example_weights(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """How much each example counts in an average over several batches, ``(batch,)``."""
        return self.labelling.weights(outputs, labels)

    def count(self, labels: Tensor) -> Tensor:
        """What the mean over a batch is over: its examples, or the scored tokens of its texts."""
        return self.labelling.count(labels)

    def at_mean(self, labels: Tensor | None = None, **inputs: Any) -> tuple[Tensor, Tensor]:
        """The same with every A at its mean μ: no latent site, plain LoRA."""
        return self.observe(labels=labels, **inputs)

    def recomputes(self) -> bool:
        """Whether layers run again in the backward pass, and must then see the same draw.

        Raises:
            InputError: where they would do so reentrantly.
        """
        return torch.is_grad_enabled() and recomputes(self._checkpointable)

    def _register_parameters(self) -> None:
        trained = {f"network.{name}": p for name, p in self.network.named_parameters() if p.requires_grad}
        own = [f"model.{name.removesuffix('_unconstrained')}" for name, _ in self.named_parameters()]
        claim_names([*trained, *own], self)
        for name, parameter in trained.items():
            if pyro.param(name, parameter) is not parameter:
                raise InputError(
                    f"Pyro's parameter store holds another {name!r}: call pyro.clear_param_store() before "
                    "fitting a second model"
                )
