"""Training a network that is too large for one device: its frozen weights in shards over all processes (FSDP2).

DeepSpeed's engine runs a posterior as it is, in a loop of your own.

``fit``, :class:`bayeslora.BayesTrainer` and the trainers over TRL's take Trainer's and Accelerate's own FSDP
configuration; in a loop of your own, :func:`shard` does the same.
"""

import json
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from bayeslora.adapters.sharding import check_shardable, is_sharded, shard_frozen
from bayeslora.distributed import world_size
from bayeslora.errors import InputError
from bayeslora.posterior import Posterior
from bayeslora.storage.checkpoint import describe_base
from bayeslora.storage.peft_files import kept_tensors
from bayeslora.wrapper import repeated_blocks

logger = logging.getLogger(__name__)

USE_FSDP = "ACCELERATE_USE_FSDP"  # set by accelerate launch


def shard(bayes: Posterior, blocks: Collection[str] = (), *, mesh: Any = None) -> list[str]:
    """Put the frozen weights of a network into shards over the processes, in place, block by block.

    Every process then holds its share of them, and all of a block while it runs (``torch.distributed.fsdp``'s
    ``fully_shard``). What is trained stays whole in each, and so do the posterior and its draws: wrap ``bayes`` in
    ``torch.nn.parallel.DistributedDataParallel`` afterwards, which averages its gradients and leaves the shards alone.
    Saving is done in one process as before; training, prediction and loading take part in all of them.

    Args:
        bayes: What will be trained; each process has loaded the same network, on the CPU where it does not fit the
            accelerator.
        blocks: Names of the classes whose modules are gathered and freed together; if empty, the members of the
            network's outermost lists of equal modules, which are a transformer's blocks, or else what transformers
            does not split over devices.
        mesh: A ``DeviceMesh``: of one dimension, the default, over all processes on the current kind of accelerator, or
            the CPU where there is none; or of two with names, copies of the network and the shards of each.

    Returns:
        Names of the blocks; none in a single process, which has nobody to share with and keeps everything.

    Raises:
        InputError: for a network that cannot be put into shards or has no such blocks, and for processes that loaded
            different ones.

    Example:
        >>> shard(bayes)  # under torchrun: ['bert.encoder.layer.0', 'bert.encoder.layer.1']
        []
    """
    check_shardable(bayes.network)
    found = _blocks(bayes.network.get_base_model(), blocks)
    if world_size() == 1:
        logger.warning("one process holds all of the network: launch several with torchrun to put it into shards")
        return []
    _check_equal(remember_base(bayes))
    if mesh is None:
        accelerator = torch.accelerator.current_accelerator()
        mesh = init_device_mesh(accelerator.type if accelerator else "cpu", (world_size(),))
    shard_frozen(bayes.network, bayes.kept_keys, found.values(), mesh)
    shards = {name: p for name, p in bayes.named_parameters(remove_duplicate=False) if hasattr(p, "full_tensor")}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(bayes, [*shards])
    bayes.to(next(iter(shards.values())).device)
    return [*found]


def remember_base(bayes: Posterior) -> dict[str, Any]:
    """Note what saved files say of the base network, before an engine takes its weights apart.

    :func:`shard` does so; call it before ``deepspeed.initialize`` with ZeRO 3. Saving then needs what is trained alone:
    ``with deepspeed.zero.GatheredParameters([p for p in bayes.parameters() if p.requires_grad])``.

    Example:
        >>> remember_base(bayes)["class"]
        'BertForSequenceClassification'
    """
    bayes.base_record = describe_base(bayes, sorted(kept_tensors(bayes.network, bayes.kept_keys)))
    return bayes.base_record


def _blocks(base: nn.Module, classes: Collection[str]) -> dict[str, nn.Module]:
    """Names and modules, outer ones first."""
    repeated = set() if classes else set(repeated_blocks(base))
    classes = classes or (() if repeated else getattr(base, "_no_split_modules", None) or ())
    found = {n: m for n, m in base.named_modules() if m in repeated or type(m).__name__ in classes}
    missing = sorted(set(classes) - {type(module).__name__ for module in found.values()})
    if missing:
        raise InputError(f"{type(base).__name__} has no modules of the class {missing[0]!r}")
    if not found:
        raise InputError(
            f"{type(base).__name__} has no list of equal blocks: name the classes of what is to be gathered together "
            "(blocks=['...'], or fsdp_config={'transformer_layer_cls_to_wrap': ['...']})"
        )
    return found


def _check_equal(record: dict[str, Any]) -> None:
    """Each process keeps shards of what it has loaded itself."""
    own = json.dumps(record, sort_keys=True, default=str)
    everyone: list[Any] = [None] * world_size()
    distributed.all_gather_object(everyone, own)
    if len(set(everyone)) > 1:
        raise InputError(
            "the processes hold different networks, and shards of them would not fit together: load the same "
            "checkpoint in each, and seed what is made at random alike"
        )


@dataclass(frozen=True)
class Sharding:
    """What an FSDP configuration asks for."""

    blocks: tuple[str, ...]

    @classmethod
    def asked(cls, args: TrainingArguments) -> "Sharding | None":
        """By ``fsdp`` and ``fsdp_config``, or by ``accelerate launch``.

        Raises:
            InputError: for what cannot be done for a posterior, with what to set.
        """
        if not args.fsdp and not fsdp_launched():
            return None
        if (args.fsdp_config or {}).get("xla"):
            raise InputError("FSDP on XLA devices is not supported")
        options = args.fsdp_plugin_args or {}
        if int(options.get("fsdp_version", os.environ.get("FSDP_VERSION", "1"))) != 2:
            raise InputError("FSDP's version 1 is not supported: set fsdp_config={'version': 2} (--fsdp_version 2)")
        plugin = FullyShardedDataParallelPlugin(**options)
        _refuse_unsupported(plugin)
        if not args.accelerator_config.even_batches:
            raise InputError("shards need as many batches in every process: leave even_batches=False out")
        return cls(tuple(plugin.transformer_cls_names_to_wrap or ()))

    def apply(self, bayes: Posterior, device: torch.device) -> None:
        """Put ``bayes`` into shards on this kind of device, unless it is already."""
        if not is_sharded(bayes.network):
            mesh = init_device_mesh(device.type, (world_size(),)) if world_size() > 1 else None
            shard(bayes, self.blocks, mesh=mesh)


def _refuse_unsupported(plugin: FullyShardedDataParallelPlugin) -> None:
    policy = getattr(plugin.auto_wrap_policy, "__name__", "")
    refused = {
        "reshard_after_forward=False": (
            not plugin.reshard_after_forward,
            "blocks are freed after each pass: leave it out",
        ),
        "cpu_offload": (type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy", "leave it out"),
        "cpu_ram_efficient_loading": (
            plugin.cpu_ram_efficient_loading,
            "every process describes the whole network before it keeps its share: set it to false",
        ),
        "activation_checkpointing": (plugin.activation_checkpointing, "pass gradient_checkpointing=True instead"),
        "ignored_modules": (plugin.ignored_modules, "what is trained stays whole by itself"),
        "mixed_precision_policy": (plugin.mixed_precision_policy, "pass bf16=True, or load the network in bfloat16"),
        "auto_wrap_policy": (
            policy == "size_based_auto_wrap_policy",
            "use TRANSFORMER_BASED_WRAP",
        ),
    }
    for name, (used, instead) in refused.items():
        if used:
            raise InputError(f"FSDP's {name} is not supported: {instead}")


def fsdp_launched() -> bool:
    """Whether ``accelerate launch`` asked for FSDP."""
    return os.environ.get(USE_FSDP, "false").lower() == "true"


def take_sharding(args: TrainingArguments) -> Sharding | None:
    """What ``args`` ask for; they are then those of whole copies, as Trainer has its own way to wrap a module."""
    sharding = Sharding.asked(args)
    args.fsdp, args.fsdp_plugin_args = None, None
    return sharding


class OnShards:
    """A mixin before a class of Trainer's: trains what :func:`shard` has put into shards."""

    accelerator: Any

    def create_accelerator_and_postprocess(self) -> None:
        with _without_fsdp():
            super().create_accelerator_and_postprocess()  # type: ignore[misc]

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        bare = self.accelerator.unwrap_model(model, keep_torch_compile=False) is model
        model = super()._wrap_model(model, training, dataloader)  # type: ignore[misc]
        if not (bare and training and is_sharded(model)):
            return model
        self.accelerator.prepare_model(model, evaluation_mode=True)  # it refuses to average around shards
        handler = self.accelerator.ddp_handler
        return DistributedDataParallel(model, **({} if handler is None else handler.to_kwargs()))


@contextmanager
def _without_fsdp() -> Iterator[None]:
    """Inside, Accelerate does not see that its launcher asked for FSDP."""
    asked = os.environ.pop(USE_FSDP, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[USE_FSDP] = asked
