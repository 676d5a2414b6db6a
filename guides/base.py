"""What every guide shares: a program over the groups of adapters, under Pyro or without its handlers."""

import inspect
from collections.abc import Mapping
from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import Tensor

from bayeslora.adapters.groups import AdapterGroup
from bayeslora.models.parameter_store import claim_names
from bayeslora.models.prior import Prior


class Guide(PyroModule):
    """A variational family over the sites of :class:`~bayeslora.models.MonteCLoRA`.

    A subclass makes its parameters in ``__init__`` and samples the sites in :meth:`sample_group`. The guide is called
    like the model and ignores its arguments.

    Args:
        model: The model whose sites it approximates.

    Example:
        >>> class PointGuide(Guide):
        ...     def sample_group(self, group, program):
        ...         adapters, columns = self.plates(group, program)
        ...         with adapters:
        ...             sites, name = self.sample_priors(group, program), f"A_{group.name}"
        ...             with columns:
        ...                 return sites | {name: program.sample(name, dist.Delta(self.model.mean(group), event_dim=1))}
        >>> BayesLoRA(network, guide=PointGuide).predict(dataset, num_samples=2).mutual_information[:3].round(6)
        array([0., 0., 0.])
    """

    #: Whether the sign of any row of A − μ can be turned without a change of its law; each example of a training batch
    #: can then have its own noise.
    symmetric_rows = False

    #: Whether ε is read from ``model.sample_scaler(group)`` at every draw, so that a noise schedule and
    #: ``noise_units="relative"`` can change it.
    follows_noise_schedule = False

    #: Whether :meth:`sample_group` has an argument ``mean``, found out by itself; training then draws A − μ at once.
    takes_mean = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        group, run = (inspect.signature(program).parameters for program in (cls.sample_group, cls.run))
        cls.takes_mean = "mean" in group and "means" in run

    def __init__(self, model: Prior):
        super().__init__("guide")
        self._model = (model,)  # in a tuple: the model's parameters are its own
        self.config = model.config

    @property
    def model(self) -> Prior:
        return self._model[0]

    def sample_group(self, group: AdapterGroup, program: Any) -> dict[str, Tensor]:
        """Sample the model's three sites for one group of adapters, and return them: site name to value.

        ``program.sample(name, distribution)`` is Pyro's. Names and shapes are the model's
        (:mod:`bayeslora.models.prior`). A site whose entries are independent over adapters and columns goes into
        the :meth:`plates`; a joint one stays outside and has them in its event: ``(adapters, columns, r)``. The mean
        of A is ``self.model.mean(group)``. ``infer={"expected_kl": ...}`` gives a site's KL where it is known, in
        nats, of a shape that expands to ``(adapters, columns)``; it is else estimated at the draw.

        A guide whose law of A − μ does not depend on μ may take a third argument, ``mean: Tensor | None = None``, which
        is then the mean of A, where it is not None.
        """
        raise NotImplementedError(f"{type(self).__name__} must define sample_group(group, program)")

    def plates(self, group: AdapterGroup, program: Any) -> tuple[Any, Any]:
        """The model's plates over a group's adapters and over their columns, to be entered once each."""
        adapters = program.plate(f"adapters_{group.name}", len(group), dim=-2)
        return adapters, program.plate(f"columns_{group.name}", group.columns, dim=-1)

    def sample_priors(self, group: AdapterGroup, program: Any) -> dict[str, Tensor]:
        """π and Σ from their priors, for a guide that describes A alone; inside the plate over adapters."""
        pi, factor = f"pi_{group.name}", f"sigma_tril_{group.name}"
        return {
            pi: program.sample(pi, self.model.weights_prior(group)),
            factor: program.sample(factor, self.model.covariance_prior(group)),
        }

    def noise_variance(self, group: AdapterGroup) -> Tensor | None:
        """Variance of an entry of A around μ, averaged over entries, ``(adapters,)``; None where there is no formula.

        Logs depend on it, and under ``noise_units="relative"`` the ε that training starts with.
        """
        return None

    def forward(self, *args, **kwargs) -> dict[str, Tensor]:
        """Sample every site once; returns site name to value."""
        if self._pyro_context.active:  # called as a Pyro guide, and not run from within
            claim_names([f"guide.{name.removesuffix('_unconstrained')}" for name, _ in self.named_parameters()], self)
        return self.run(pyro)

    def run(self, program: Any, means: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The guide's program, under Pyro's primitives or a :class:`~bayeslora.recorder.Recorder`'s.

        ``means``, for a guide that :attr:`takes_mean`, are those of :meth:`bayeslora.models.prior.Prior.run`.
        """
        draw: dict[str, Tensor] = {}
        with self.model.full_precision():
            for group in self.model.groups:
                own = {} if means is None else {"mean": means[group.name]}
                draw |= self.sample_group(group, program, **own)
        return draw
