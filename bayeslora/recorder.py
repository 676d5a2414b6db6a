"""Runs our own model and guide without Pyro's stack of handlers, which costs more than the arithmetic on small batches.

A program that takes its primitives from an argument, ``program.sample`` and ``program.plate``, runs under ``pyro``
itself or under a :class:`Recorder`: same sites, same values from the same generator, same nodes for the ELBO.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor


class Recorder:
    """The primitives of a program that needs no other handler, and the record of one run.

    Args:
        values: Values of the sites, from a guide's run; a site that is not among them is sampled.

    ``nodes`` holds what a :class:`pyro.poutine.Trace` would, and ``pyro.poutine.replay`` takes it for one.
    """

    def __init__(self, values: Mapping[str, Tensor] | None = None):
        self.nodes: dict[str, dict[str, Any]] = {}
        self._values = values or {}
        self._plates: list[CondIndepStackFrame] = []

    @contextmanager
    def plate(self, name: str, size: int, *, dim: int) -> Iterator[None]:
        """Sites inside are independent along batch dimension ``dim``."""
        self._plates.append(CondIndepStackFrame(name, dim, size, 0))
        try:
            yield
        finally:
            self._plates.pop()

    def sample(self, name: str, fn: Any, *, infer: dict[str, Any] | None = None) -> Tensor:
        """The site's value, given or drawn, of shape ``plates + fn.event_shape``."""
        shape = [1] * max((-frame.dim for frame in self._plates), default=0)
        for frame in self._plates:
            shape[frame.dim] = frame.size
        if fn.batch_shape != tuple(shape):
            fn = fn.expand(shape)
        value = self._values[name] if name in self._values else fn.rsample()
        self.nodes[name] = {
            "type": "sample",
            "name": name,
            "fn": fn,
            "value": value,
            "infer": infer or {},
            "is_observed": False,
            "cond_indep_stack": tuple(self._plates),
        }
        return value

    def __contains__(self, name: str) -> bool:
        return name in self.nodes

    def values(self) -> dict[str, Tensor]:
        """Site name to value."""
        return {name: node["value"] for name, node in self.nodes.items()}
