"""Run a network as a draw: matrices A are set from outside, used, and taken away again."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora.adapters.groups import AdapterGroup
from bayeslora.adapters.modes import evaluation_mode, is_compiled
from bayeslora.adapters.sampled import RowsError
from bayeslora.errors import InputError

# One for the process, not one a network: beside the draw that a network holds, all threads share Pyro's stack of
# handlers, its validation switch and torch's generators, which a seeded draw borrows. Another thread's network would be
# seen by these handlers, or draw from this seed.
one_at_a_time = threading.RLock()


def check_in_use(groups: tuple[AdapterGroup, ...]) -> None:
    """Make sure that the network uses these adapters, where a draw reaches it.

    Raises:
        InputError: when another adapter is active, or one is merged into the frozen weights.
    """
    for group in groups:
        for adapter in group.adapters:
            if adapter.layer.active_adapters != [adapter.key]:
                raise InputError(
                    f"the network now uses the adapter {', '.join(adapter.layer.active_adapters)}, and this posterior "
                    f"is over {adapter.key!r}: call bayes.network.set_adapter({adapter.key!r})"
                )
            if adapter.layer.merged:
                raise InputError(
                    "the adapter is merged into the frozen weights, where no draw can reach it: call "
                    "bayes.network.unmerge_adapter()"
                )


def set_draw(groups: tuple[AdapterGroup, ...], matrices: Mapping[str, Tensor]) -> None:
    """Give every adapter its drawn matrix.

    Args:
        matrices: Group name to drawn A, one column a row: ``(adapters, columns, r)``, or
            ``(draws, adapters, columns, r)`` for a batch of as many equal groups of consecutive rows, one a draw.
    """
    check_in_use(groups)
    for group in groups:
        drawn = matrices[group.name].mT.to(group.adapters[0].lora_A.weight.dtype)
        for adapter, weight in zip(group.adapters, drawn.unbind(-3), strict=True):
            adapter.lora_A.draw.set(weight.to(adapter.lora_A.weight.device))


def set_noise(
    groups: tuple[AdapterGroup, ...], noise: Mapping[str, Tensor], signs: Mapping[str, Tensor] | None = None
) -> None:
    """Give every adapter a drawn deviation from its mean.

    Args:
        noise: Group name to A − μ, one column a row: ``(adapters, columns, r)``.
        signs: Group name to ±1, ``(adapters, examples, r)``: every example's own mirror image of the rows of A − μ.
    """
    for group in groups:
        mean = group.weights()
        deviation = noise[group.name].mT
        turned: Sequence[Tensor | None] = [None] * len(group)
        if signs is None:
            matrices = (mean + deviation).to(mean.dtype)
        else:
            matrices = torch.cat([mean, deviation.to(mean.dtype)], dim=-2)
            turned = signs[group.name].unsqueeze(-2).unbind()
        for adapter, matrix, own in zip(group.adapters, matrices.unbind(), turned, strict=True):
            device = adapter.lora_A.weight.device
            adapter.lora_A.draw.set(matrix.to(device), None if own is None else own.to(device))


def clear_draw(groups: tuple[AdapterGroup, ...]) -> None:
    """Back to the means."""
    for group in groups:
        for adapter in group.adapters:
            draw = adapter.lora_A.draw
            draw.weight = draw.signs = None


@contextmanager
def in_turn(groups: tuple[AdapterGroup, ...]) -> Iterator[None]:
    """Inside, no other thread draws; the network uses these adapters (:func:`check_in_use`)."""
    with one_at_a_time:
        check_in_use(groups)
        yield


@contextmanager
def keeping_draw(groups: tuple[AdapterGroup, ...]) -> Iterator[None]:
    """Whatever is set inside, the draw is afterwards what it was before."""
    draws = [adapter.lora_A.draw for group in groups for adapter in group.adapters]
    before = [(draw.weight, draw.signs, draw.is_reached) for draw in draws]
    try:
        yield
    finally:
        for draw, values in zip(draws, before, strict=True):
            draw.weight, draw.signs, draw.is_reached = values


@contextmanager
def using_draw(
    groups: tuple[AdapterGroup, ...], matrices: Mapping[str, Tensor], *, keep: bool = False
) -> Iterator[None]:
    """Run the network as one draw, or several (see :func:`set_draw`).

    ``keep`` leaves it set, for checkpointed layers that run again in the backward pass.
    """
    set_draw(groups, matrices)
    with _cleared_after(groups, keep):
        yield


@contextmanager
def using_noise(
    groups: tuple[AdapterGroup, ...],
    noise: Mapping[str, Tensor],
    signs: Mapping[str, Tensor] | None = None,
    *,
    keep: bool = False,
) -> Iterator[None]:
    """Run the network with deviations from its means (see :func:`set_noise`); ``keep`` as in :func:`using_draw`."""
    set_noise(groups, noise, signs)
    with _cleared_after(groups, keep):
        yield


@contextmanager
def _cleared_after(groups: tuple[AdapterGroup, ...], keep: bool) -> Iterator[None]:
    try:
        yield
    finally:
        if not keep:
            clear_draw(groups)


def rows_are_examples(
    network: nn.Module,
    groups: tuple[AdapterGroup, ...],
    inputs: Mapping[str, Tensor],
    *,
    run: Callable[[Mapping[str, Tensor]], Any] | None = None,
) -> bool:
    """Whether the examples of a batch can each have their own weights: false where some adapted layer sees them along
    another dimension than the first (Longformer's attention), or sees something else (DeBERTa's relative positions).

    Runs an example twice together, each time with its own random weights, and alone, and compares what the ``lora_A``
    return.
    ``run`` runs the network on inputs, ``network(**inputs)`` unless given; there an example may take several rows.
    """
    run_network = run or (lambda batch: network(**batch))
    pair = {name: value[[0, 0]] for name, value in inputs.items()}
    generator = torch.Generator().manual_seed(0)
    device = groups[0].device
    matrices = {g.name: torch.randn(2, len(g), g.columns, g.rank, generator=generator).to(device) for g in groups}
    alone = {name: value[:1] for name, value in pair.items()}
    outputs: list[Tensor] = []
    layers = [adapter.lora_A for group in groups for adapter in group.adapters]
    hooks = [layer.register_forward_hook(lambda module, args, output: outputs.append(output)) for layer in layers]

    def run_as(drawn: dict[str, Tensor], batch: dict[str, Tensor]) -> list[Tensor]:
        outputs.clear()
        with using_draw(groups, drawn):
            run_network(batch)
        return [output.float() for output in outputs]

    eager = torch.compiler.set_stance("force_eager") if is_compiled(network) else nullcontext()
    try:
        with eager, evaluation_mode(network), torch.no_grad():
            together = run_as(matrices, pair)
            for i in range(2):
                single = run_as({name: drawn[i] for name, drawn in matrices.items()}, alone)
                for one, both in zip(single, together, strict=True):
                    if both.shape[0] != 2 * one.shape[0] or one.shape[1:] != both.shape[1:]:
                        return False
                    mine = both.unflatten(0, (2, -1))[i]
                    if (mine - one).norm() > 0.05 * one.norm():
                        return False
    except RowsError:
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return True
