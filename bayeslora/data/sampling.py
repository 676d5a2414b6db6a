"""Batches of examples of like length, in an order that follows from the seed and the epoch alone."""

from collections.abc import Iterator, Sized
from itertools import chain
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from bayeslora.data.batches import length_of


def sampling_strategy(dataset: Any, processes: int = 1) -> str:
    """``"group_by_length"`` for examples of unequal length, where it spares padding; else ``"random"``, as for several
    ``processes``: these are dealt an order that a resumed run has again at random only.

    Example:
        >>> [sampling_strategy([{"input_ids": [1, 2]}, {"input_ids": second}]) for second in ([1], [3, 4])]
        ['group_by_length', 'random']
    """
    if processes > 1:
        return "random"
    first = length_of(dataset[0])
    unequal = any(length_of(dataset[index]) != first for index in range(1, len(dataset)))
    return "group_by_length" if unequal else "random"


class LikeLengthSampler(LengthGroupedSampler):
    """transformers' sampler, without its use of torch's own random state: that one orders examples anew when a run is
    resumed, and otherwise for a method that draws than for one that does not.

    It sorts within quarters of little data. Where these hold fewer than four batches, that is hardly sorting: each half
    is then sorted (up to eight batches), so that an epoch's batches still are not those of the last, and the batches
    come in random order, the one with the longest example first.

    Args:
        batch_size: Examples of a step.
        lengths: Of all examples.
        seed: Decides the order, with the epoch.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Trainer says so before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator, size = torch.Generator().manual_seed(self.seed + self.epoch), self.batch_size
        if len(self.lengths) >= 16 * size:
            return iter(get_length_grouped_indices(self.lengths, size, generator=generator))
        together = min(max(len(self.lengths) // (2 * size), 1), 8)
        order = get_length_grouped_indices(self.lengths, size, mega_batch_mult=together, generator=generator)
        first, *others = [order[start : start + size] for start in range(0, len(order), size)]
        last = [others.pop()] if others and len(others[-1]) < size else []  # a batch is size examples in a row
        mixed = [others[index] for index in torch.randperm(len(others), generator=generator).tolist()]
        return chain.from_iterable([first, *mixed, *last])


class OrderedTrainer(Trainer):
    """A Trainer that groups examples by length, where its arguments say so: choices and sounds too, and in the same
    order whenever it is asked."""

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        """In the order of the examples: transformers groups these too, by tokens alone."""
        sized = eval_dataset is not None and isinstance(eval_dataset, Sized)
        return SequentialSampler(eval_dataset) if sized and self.args.world_size <= 1 else None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        data = self.train_dataset if train_dataset is None else train_dataset
        grouped = self.args.train_sampling_strategy == "group_by_length"
        if not (grouped and isinstance(data, Sized) and length_of(data[0])):  # type: ignore[index]
            return super()._get_train_sampler(train_dataset)
        lengths = [length_of(data[index]) for index in range(len(data))]  # type: ignore[index]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LikeLengthSampler(self.args.train_batch_size * self.args.gradient_accumulation_steps, lengths, seed)
