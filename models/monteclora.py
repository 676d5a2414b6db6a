"""MonteCLoRA as a Pyro model, of a network as it was loaded."""

from pyro.nn import PyroModule
from torch import nn

from bayeslora.adapters.inject import adapt
from bayeslora.config import MonteCLoRAConfig
from bayeslora.models.joint import JointModel
from bayeslora.models.likelihoods import Likelihood, as_likelihood
from bayeslora.models.selection import likelihood_for


class MonteCLoRA(JointModel):
    """Prior over (π, Σ, A) of every adapter, and the likelihood of the labels given the network with that A.

    Args:
        network: A transformers model, or a PeftModel with one active LoRA adapter.
        config: Hyperparameters.
        likelihood: A :class:`PyroModule` as in :mod:`bayeslora.models.likelihoods`; read off the network if ``None``.
        num_examples: Size of the training set; scales the likelihood of a mini-batch up to it.

    Called as a Pyro model, ``model(**batch)``, it registers the network's trainable parameters with Pyro, so
    ``pyro.infer.SVI(model, guide, optim, CooperativeELBO())`` trains them all.

    Raises:
        InputError: for a network that cannot be adapted, or whose likelihood is not known.

    References:
        Seth et al. (2025), *Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank
        Adaptation*, section 4.

    Example:
        >>> model = MonteCLoRA(network, MonteCLoRAConfig(r=2, target_modules=["query"]))
        >>> trace = pyro.poutine.trace(model).get_trace(**batch)
        >>> {name: tuple(trace.nodes[name]["value"].shape) for name in ("pi_r2_in16", "A_r2_in16")}
        {'pi_r2_in16': (2, 1, 4), 'A_r2_in16': (2, 16, 2)}
    """

    def __init__(
        self,
        network: nn.Module,
        config: MonteCLoRAConfig,
        *,
        likelihood: PyroModule | None = None,
        num_examples: int | None = None,
    ):
        adapted = adapt(network, config)
        if likelihood is None:
            likelihood = likelihood_for(adapted.get_base_model())
        super().__init__(adapted, config, likelihood, num_examples)
        self.labelling.prepare(adapted)

    @property
    def labelling(self) -> Likelihood:
        """The likelihood, or one with the defaults in place of a density alone."""
        return as_likelihood(self.likelihood)
