"""Several processes that fit one posterior: noise of its own for each, and what one does for all.

``accelerate.PartialState`` knows rank and number too, but making one lets the processes meet, on a backend of its own
choice; here they are asked before ``TrainingArguments`` has chosen it. Nor does it hand on results and errors.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import distributed

from bayeslora.adapters.groups import AdapterGroup
from bayeslora.errors import InputError

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


def launched_processes() -> int:
    """How many processes a launcher says there will be, before they have met."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def world_size() -> int:
    """Number of processes that have met; 1 where nothing was launched."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Index of this process; 0 where nothing was launched."""
    return distributed.get_rank() if world_size() > 1 else 0


class Together:
    """The processes that run one network together, and so need one draw; a pickled copy has none."""

    def __init__(self, group: Any = None):
        self.group = group

    def __deepcopy__(self, memo: dict) -> "Together":
        return Together(self.group)

    def __reduce__(self):
        return Together, ()

    def agree(self, seed: int, device: torch.device) -> int:
        """The first one's seed."""
        if self.group is None:
            return seed
        shared = torch.tensor(seed, device=device)
        distributed.broadcast(shared, distributed.get_global_rank(self.group, 0), group=self.group)
        return int(shared)


@contextmanager
def own_noise(device: torch.device, together: Together | None = None) -> Iterator[None]:
    """Inside, random numbers are this rank's own; outside, the generators of all ranks stay in step.

    Training loops seed every rank alike, so that all shuffle the data alike; noise and dropout would then be the same
    on every rank too. Here one number from the common CPU generator and the rank seed the block. Nothing else is
    remembered: who restores the common generator restores every rank's noise. A single process is left as it is, and
    those that are ``together`` take the first one's numbers.
    """
    if world_size() == 1:
        yield
        return
    common = int(torch.randint(2**62, ()))
    seed = int(np.random.SeedSequence([common, rank()]).generate_state(1, np.uint64)[0] >> 1)
    seed = seed if together is None else together.agree(seed, device)
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type if accelerators else None):
        torch.default_generator.manual_seed(seed)
        if accelerators:
            torch.get_device_module(device).manual_seed_all(seed)
        yield


def on_main_process(action: Callable[[], Result]) -> Result:
    """Run ``action`` on rank 0 alone; every rank waits for it, and gets its result or raises its error."""
    if world_size() == 1:
        return action()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            known = isinstance(error, InputError)
            outcome[1] = error if known else RuntimeError(f"the main process failed: {error!r}")
            distributed.broadcast_object_list(outcome)
            raise
    distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def average(tensors: Iterable[torch.Tensor]) -> None:
    """Make each tensor its mean over the processes, in place; every rank calls it."""
    if world_size() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)
            tensor /= world_size()


def leave() -> None:
    """End this process's part in the group, at the end of a command: gloo's threads can outlive the interpreter, and a
    thread that is still there when it ends aborts the process."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def refuse_sharded(groups: tuple[AdapterGroup, ...]) -> None:
    """Every lora_A must be whole when a step begins: a draw is made for all of them before the network runs.

    Raises:
        InputError: for layers that were sharded one by one, as FSDP's automatic wrapping does.
    """
    if world_size() == 1:
        return
    from torch.distributed.tensor import DTensor

    for adapter in (adapter for group in groups for adapter in group.adapters):
        weight = adapter.lora_A.weight
        if isinstance(weight, DTensor) or weight.shape != (adapter.rank, adapter.columns):
            raise InputError(
                f"the lora_A of {adapter.name!r} is sharded, and a draw is made of whole matrices before any layer "
                "runs: call bayeslora.training.engines.shard(bayes), which leaves them whole, in place of fully_shard; "
                "under ZeRO 3 train only, and predict with the adapter that was saved"
            )


def check_parallelism(arguments: "TrainingArguments") -> None:
    """One process per device, and whole copies of what is trained, as DistributedDataParallel has them.

    Raises:
        InputError: for DeepSpeed and tensor parallelism, asked for in ``arguments`` or by ``accelerate launch``.
    """
    asked = {
        "DeepSpeed": arguments.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true",
        "parallelism_config": arguments.parallelism_config,
    }
    for name, used in asked.items():
        if used:
            raise InputError(
                f"{name} is not supported: launch with torchrun or accelerate launch --multi_gpu, and without that "
                "option. For a network that is too large for one device pass fsdp=True; DeepSpeed's engine runs a "
                "posterior in a loop of your own"
            )
    if arguments.world_size != world_size():
        raise InputError(
            f"{world_size()} processes were launched, but each would train on its own: pass use_cpu=True if they are "
            "to run on CPUs"
        )
    if arguments.n_gpu > 1:  # Trainer would use threads, whose copies of the module share one draw
        logger.warning("using one of %d GPUs: torchrun --nproc-per-node %d uses all", *(2 * [arguments.n_gpu]))
        arguments._n_gpu = 1
