"""What every trainer of TRL's has on a posterior: TRL's data preparation and arguments, our parameters and noise."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from bayeslora.distributed import check_parallelism
from bayeslora.errors import InputError
from bayeslora.noise_schedules import NoiseScheduleCallback
from bayeslora.posterior import Posterior
from bayeslora.training.arguments import check_arguments
from bayeslora.training.engines import OnShards, fsdp_launched, take_sharding
from bayeslora.training.trainer import BayesTrainer, DropTuning, variational_rate


class OnPosterior(OnShards):
    """A mixin before a class of ``trl`` that makes it one for a :class:`bayeslora.BayesLoRA`, with TRL's own arguments.

    A subclass says what it cannot do in :attr:`refused` and :meth:`check_model`.

    Args:
        model: What to fit.
        more: TRL's arguments, in TRL's order.
        variational_learning_rate: For the guide; 10 × the learning rate if ``None``.
        options: TRL's arguments by name.

    Raises:
        InputError: for another model, and for what TRL does to a network or a loss of its own.
    """

    #: Fields of the arguments that are refused, with the reason.
    refused: Mapping[str, str] = {}

    args: Any
    model: Any
    accelerator: Any
    train_dataset: Any
    add_callback: Callable[[Any], None]

    def __init__(self, model: Posterior, *more: Any, variational_learning_rate: float | None = None, **options: Any):
        if not isinstance(model, Posterior):
            raise InputError(
                f"{type(self).__name__} fits a BayesLoRA, and model is a {type(model).__name__}: pass "
                "model=BayesLoRA(network, MonteCLoRAConfig(...)), whose configuration takes the options of a LoraConfig"
            )
        self.check_model(model)
        start: Callable[..., None] = super().__init__
        given = inspect.signature(start).bind_partial(model, *more, **options)
        _check_options(given.arguments, type(self).__name__)
        if given.arguments.get("args") is not None:
            given.arguments["args"] = self._taken(model, given.arguments["args"])
        elif fsdp_launched():
            raise InputError(f"{type(self).__name__} reads what FSDP is to do from its arguments: pass args=")
        self._base = model.network.get_base_model()
        own = vars(self._base).get("forward")  # accelerate's, of a network with a device_map
        start(*given.args, **given.kwargs)
        self._trl_forward = vars(self._base).get("forward")
        set_forward(self._base, own)
        self.add_callback(NoiseScheduleCallback(model.noise_schedule))
        self.add_callback(DropTuning(model))
        self.variational_learning_rate = variational_rate(self.args, variational_learning_rate)
        model.num_examples = len(self.train_dataset)

    def _taken(self, model: Posterior, args: TrainingArguments) -> TrainingArguments:
        """Refuse what cannot be done, and put the network into shards where that is asked for."""
        check_arguments(args, self.refused)
        _check_can_be_done(args)
        args = copy.copy(args)
        sharding = take_sharding(args)
        check_parallelism(args)
        if sharding is not None:
            sharding.apply(model, args.device)
        return args

    def check_model(self, model: Posterior) -> None:
        """Refuse a posterior over another kind of task."""

    @property
    def bayes(self) -> Posterior:
        return self.accelerator.unwrap_model(self.model)

    @contextmanager
    def trl_forward(self) -> Iterator[None]:
        """Inside, the network's forward is the one that TRL put there, with a loss of its own.

        Outside it is the network's, for a copy of TRL's goes on to run the network that it was made for.
        """
        own = vars(self._base).get("forward")
        set_forward(self._base, self._trl_forward)
        try:
            yield
        finally:
            set_forward(self._base, own)

    create_optimizer = BayesTrainer.create_optimizer

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """None is written: the folder holds what :func:`bayeslora.storage.checkpoint.write_adapter` writes."""


def set_forward(module: torch.nn.Module, forward: Any) -> None:
    """The forward of this one module; that of its class if None."""
    if forward is not None:
        module.forward = forward
    else:
        vars(module).pop("forward", None)


def _check_can_be_done(args: TrainingArguments) -> None:
    """Refuse what would patch or resize the network under the posterior, or cannot be on this machine."""
    template = getattr(args, "chat_template_path", None)
    if template is not None and not Path(template).is_file():
        raise InputError(
            f"chat_template_path={template!r} is a model, whose tokens TRL would add to the network: pass "
            "a .jinja file, or call trl.clone_chat_template before BayesLoRA"
        )
    if getattr(args, "activation_offloading", False) and not torch.accelerator.is_available():
        raise InputError("activation_offloading=True moves activations to the CPU, and there is no accelerator")
    if (args.gradient_checkpointing_kwargs or {}).get("selective"):
        raise InputError(
            "gradient_checkpointing_kwargs={'selective': True} patches the network, and is not supported: "
            "leave 'selective' out"
        )


def _check_options(options: Mapping[str, Any], trainer: str) -> None:
    """Refuse arguments that would change the network or the loss."""
    refused = {
        "peft_config": "the model has its adapter already: pass its settings to MonteCLoRAConfig",
        "compute_loss_func": "the loss is the objective of the posterior",
        "quantization_config": "the network is loaded already: load it quantised before BayesLoRA",
    }
    for name, reason in refused.items():
        if options.get(name) is not None:
            raise InputError(f"{name} cannot be combined with {trainer}: {reason}")
