"""Short names for adapters: ``encoder.layer.0.attention.self.query`` reads ``0 query`` in a picture."""

from collections.abc import Sequence
from typing import NamedTuple


class ShortName(NamedTuple):
    """How a picture names one adapter.

    Attributes:
        layer: Index of the layer, or None outside the stack of layers.
        kind: Kind of projection: the name without the layer, as short as tells it from the other kinds.
    """

    layer: int | None
    kind: str

    @property
    def label(self) -> str:
        """``"0 query"``, or only the kind where there is no layer."""
        return self.kind if self.layer is None else f"{self.layer} {self.kind}"


class _Parts(NamedTuple):
    prefix: tuple[str, ...]  # before the layer index; empty where there is none
    layer: int | None
    tail: tuple[str, ...]  # after it


def short_names(names: Sequence[str]) -> list[ShortName]:
    """One `ShortName` per adapter, in the same order.

    The layer is the first component that is a number. ``attention.output.dense`` and ``output.dense`` keep as
    many components as tell them apart; ``self.query`` becomes ``query``.
    """
    parts = [_split(name) for name in names]
    kinds = list(dict.fromkeys((part.prefix, part.tail) for part in parts))
    shortest = {kind: _shortest(kind, [other for other in kinds if other != kind]) for kind in kinds}
    return [ShortName(part.layer, shortest[part.prefix, part.tail]) for part in parts]


def network_order(names: Sequence[str]) -> list[int]:
    """Indices that put the adapters in the order of the network: stack by stack, layer by layer.

    Within a layer, and between stacks, the given order stays.
    """
    parts = [_split(name) for name in names]
    stacks = list(dict.fromkeys(part.prefix for part in parts))

    def place(i: int) -> tuple[int, int]:
        layer = parts[i].layer
        return stacks.index(parts[i].prefix), -1 if layer is None else layer

    return sorted(range(len(names)), key=place)


def _split(name: str) -> _Parts:
    components = name.split(".")
    for i, component in enumerate(components[:-1]):
        if component.isdecimal():
            return _Parts(tuple(components[:i]), int(component), tuple(components[i + 1 :]))
    return _Parts((), None, tuple(components))


def _shortest(kind: tuple[tuple[str, ...], tuple[str, ...]], others: list) -> str:
    """The shortest ending of ``kind`` that no other kind shares; all of it where the tails are equal."""
    prefix, tail = kind
    for length in range(1, len(tail) + 1):
        ending = tail[-length:]
        if all(other_tail[-length:] != ending for _, other_tail in others):
            return ".".join(ending)
    twins = any(other_tail == tail for _, other_tail in others)
    return ".".join(prefix + tail if twins else tail)
