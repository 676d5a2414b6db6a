"""What a network computes before its first adapter that is drawn: run once a batch, used for every draw.

The embeddings always lie there, with ``layers_to_transform`` the blocks below the first adapted one, and all but the
last where only these are drawn.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from bayeslora.adapters.groups import AdapterGroup
from bayeslora.adapters.modes import is_compiled

MAX_KEPT_BYTES = 2**30
_PLAIN = (Tensor, bool, int, float, str, torch.dtype, torch.device, type(None))

Output = tuple[list[Any], TreeSpec]  # what a module returned, flattened


class Prefix:
    """The outputs of the modules before the first adapter, for one batch at a time.

    A module's output is used again only where nothing else can tell that the module did not run: no adapter lies in
    it, it is called once before the first adapter, tensors and plain values go in and come out, and it changes
    neither its input nor itself. All other modules run as always. Up to a GiB is kept.
    """

    def __init__(
        self,
        network: nn.Module,
        drawn: tuple[AdapterGroup, ...],
        run: Callable[[Mapping[str, Tensor]], Any] | None = None,
    ):
        self._run = run or (lambda inputs: network(**inputs))
        self.adapters = [adapter.lora_A for group in drawn for adapter in group.adapters]
        varying = {id(adapter) for adapter in self.adapters}
        reusable = () if is_compiled(network) else _without(varying, network)  # parts left out would be other graphs
        self.modules = list(dict.fromkeys(reusable))
        self.outputs: dict[nn.Module, Output] = {}
        self._rows: dict[nn.Module, list[bool]] | None = None  # which tensors of an output have a row per example

    def run(self, inputs: Mapping[str, Tensor], *, repeat: bool = False) -> None:
        """Run a batch up to the first adapter.

        Args:
            inputs: The network's, examples along the first dimension.
            repeat: Prepare for :meth:`reused` with ``copies``; once, this runs the batch twice more.
        """
        if not self.modules:
            return
        self.outputs = self._outputs(inputs)
        if repeat and self._rows is None:
            examples = len(next(iter(inputs.values())))
            twice = self._outputs({name: torch.cat([value] * 2) for name, value in inputs.items()})
            self._rows = {}
            for module in self.outputs.keys() & twice.keys():
                with suppress(ValueError):
                    self._rows[module] = _rows(self.outputs[module], twice[module], examples, 2 * examples)

    @contextmanager
    def reused(self, copies: int = 1) -> Iterator[None]:
        """Inside, the network takes the kept outputs of its last :meth:`run`, for ``copies`` of that batch in a row."""
        with ExitStack() as stack:
            for module, (leaves, spec) in self.outputs.items():
                rows = [False] * len(leaves) if copies == 1 else (self._rows or {}).get(module)
                if rows is not None:
                    stack.enter_context(_replaced(module, _first_returning(module, leaves, spec, rows, copies)))
            yield

    def _outputs(self, inputs: Mapping[str, Tensor]) -> dict[nn.Module, Output]:
        recorder = _Recorder()
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(_replaced(module, recorder.recording(module)))
            for adapter in self.adapters:
                stack.callback(adapter.register_forward_pre_hook(_stop).remove)
            with suppress(_FirstAdapter):
                self._run(inputs)
        return {module: output for module, output in recorder.outputs.items() if recorder.calls[module] == 1}


class _FirstAdapter(BaseException):
    """Not an error: ends a run at the first adapter, through any ``except Exception`` of the network's."""


def _stop(module: nn.Module, args: Any) -> None:
    raise _FirstAdapter


class _Recorder:
    """Keeps copies of what modules return, and counts their calls."""

    def __init__(self) -> None:
        self.outputs: dict[nn.Module, Output] = {}
        self.calls: Counter[nn.Module] = Counter()
        self.depth = 0
        self.bytes = 0

    def recording(self, module: nn.Module) -> Callable:
        forward = module.forward

        def record(*args: Any, **kwargs: Any) -> Any:
            self.calls[module] += 1
            before, given = _state(module), tree_leaves((args, kwargs))
            self.depth += 1
            try:
                output = forward(*args, **kwargs)
            finally:
                self.depth -= 1
            after = _state(module)
            unchanged = len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True))
            if self.depth == 0 and unchanged:
                self._keep(module, given, output)
            return output

        return record

    def _keep(self, module: nn.Module, given: list[Any], output: Any) -> None:
        leaves, spec = tree_flatten(output)
        if not all(isinstance(leaf, _PLAIN) for leaf in [*given, *leaves]):
            return
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        size = sum(tensor.nbytes for tensor in tensors)
        inputs = {_memory(leaf) for leaf in given if isinstance(leaf, Tensor)}
        if self.bytes + size > MAX_KEPT_BYTES or any(_memory(tensor) in inputs for tensor in tensors):
            return
        self.bytes += size
        self.outputs[module] = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec


def _without(adapters: set[int], module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules in which none of these lies and nothing works in place."""
    for child in module.children():
        inner = list(child.modules())
        lists = isinstance(child, nn.ModuleList | nn.ModuleDict)  # these are never called themselves
        if lists or any(id(part) in adapters for part in inner):
            yield from _without(adapters, child)
        elif not any(getattr(part, "inplace", False) for part in inner):
            yield child


def _state(module: nn.Module) -> list[Any]:
    """Every attribute and buffer of a module and those in it."""
    return [value for part in module.modules() for value in (*vars(part).values(), *part._buffers.values())]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _rows(output: Output, other: Output, examples: int, others: int) -> list[bool]:
    """Which tensors of an output have rows per example, as many for each, seen from batches of two sizes.

    Raises:
        ValueError: if the outputs differ in anything else.
    """
    rows = []
    for one, two in zip(output[0], other[0], strict=True):
        if not isinstance(one, Tensor) or not isinstance(two, Tensor):
            same, has_rows = type(one) is type(two) and one == two, False
        else:
            same = one.shape == two.shape
            alike = one.dim() > 0 and one.shape[1:] == two.shape[1:]
            has_rows = alike and _share_rows(len(one), examples, len(two), others)
        if not same and not has_rows:
            raise ValueError("an output changes with the number of examples, but has no row for each")
        rows.append(not same)
    return rows


def _share_rows(rows: int, examples: int, other_rows: int, other_examples: int) -> bool:
    """Whether every example has as many rows in both."""
    return rows % examples == 0 and rows * other_examples == other_rows * examples


def _first_returning(module: nn.Module, leaves: list, spec: TreeSpec, rows: list[bool], copies: int) -> Callable:
    """A ``forward`` whose first call returns a copy of what was kept, and which is the module's own from then on."""
    forward, calls = module.forward, 0

    def first_kept(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 1:
            return forward(*args, **kwargs)
        copied = [
            torch.cat([leaf] * copies) if of_rows else leaf.clone() if isinstance(leaf, Tensor) else leaf
            for leaf, of_rows in zip(leaves, rows, strict=True)
        ]
        return tree_unflatten(copied, spec)

    return first_kept


@contextmanager
def _replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """``module.forward`` is another function inside."""
    own = vars(module).get("forward")  # where accelerate puts its own
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
