"""A network's repeated blocks, and which adapters lie in the last of them or behind."""

from torch import nn

from bayeslora.adapters.groups import AdapterGroup
from bayeslora.errors import InputError


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network's stacks: members of its outermost lists of two or more modules of one class."""
    repeated: list[nn.Module] = []
    for child in network.children():
        blocks = list(child) if isinstance(child, nn.ModuleList) else []
        alike = len(blocks) > 1 and len({type(block) for block in blocks}) == 1
        repeated += blocks if alike else repeated_blocks(child)
    return repeated


def in_last_blocks(network: nn.Module, groups: tuple[AdapterGroup, ...], count: int) -> dict[str, list[bool]]:
    """Which adapters lie in the last ``count`` blocks or behind them, in the order in which the network lists modules.

    Returns:
        Group name to one truth value an adapter.

    Raises:
        InputError: where the network has fewer blocks, or none of these adapters.
    """
    blocks = repeated_blocks(network)
    if count > len(blocks):
        raise InputError(f"blocks is {count}, and the network has {len(blocks) or 'no'} repeated blocks")
    first = blocks[-count]
    behind, reached = set(), False
    for module in network.modules():
        reached = reached or module is first
        if reached:
            behind.add(id(module))
    found = {group.name: [id(adapter.layer) in behind for adapter in group.adapters] for group in groups}
    if not any(map(any, found.values())):
        raise InputError(
            f"no adapter lies in the last {count} of the network's {len(blocks)} blocks: there is no noise"
        )
    return found


def fewer_blocks(network: nn.Module, groups: tuple[AdapterGroup, ...]) -> list[int]:
    """Numbers of last blocks, doubling, that leave out some adapters and not all."""
    counts = []
    for power in range(len(repeated_blocks(network)).bit_length()):
        try:
            found = in_last_blocks(network, groups, 2**power)
        except InputError:
            continue
        if not all(map(all, found.values())):
            counts.append(2**power)
    return counts
