"""TRL's supervised fine-tuning on a posterior: its data preparation, our objective."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from bayeslora.errors import InputError
from bayeslora.models import NextTokenLikelihood
from bayeslora.noise_schedules import NoiseScheduleCallback
from bayeslora.posterior import Posterior
from bayeslora.training.arguments import REFUSED_BY_SFT, check_arguments
from bayeslora.training.trainer import BayesTrainer, DropTuning, variational_rate


class BayesSFTTrainer(SFTTrainer):
    """``trl.SFTTrainer`` whose model is a :class:`bayeslora.BayesLoRA` over a causal language model.

    TRL prepares the data as always: chat templates, prompt and completion, masking, truncation, packing. The loss is
    the objective per example, as under a stock ``transformers.Trainer``; TRL's own entropy and token accuracy, which
    need a point estimate's logits, are not logged. Checkpoints hold the adapter and its posterior. With TRL's packing a
    whole batch is one row: it shares a draw and counts as one example, so keep ``normalization="paper"`` there.

    Args:
        model: What to fit; its likelihood must be the next-token one.
        args: TRL's ``SFTConfig``.
        variational_learning_rate: For the guide; 10 × the learning rate if ``None``, as in :func:`bayeslora.fit`.
        options: Arguments of ``trl.SFTTrainer``; ``processing_class``, the tokenizer, is one that it needs.

    Raises:
        InputError: for another model, and for what TRL does to a network or a loss of its own.
    """

    def __init__(
        self,
        model: Posterior,
        args: SFTConfig | TrainingArguments | None = None,
        *more: Any,
        variational_learning_rate: float | None = None,
        **options: Any,
    ):
        _check_model(model)
        _check_options(options)
        if args is not None:
            check_arguments(args, REFUSED_BY_SFT)
            _check_can_be_done(args)
        super().__init__(model, args, *more, **options)
        self.add_callback(NoiseScheduleCallback(model.noise_schedule))
        self.add_callback(DropTuning(model))
        self.model_accepts_loss_kwargs = True
        self.variational_learning_rate = variational_rate(self.args, variational_learning_rate)
        model.num_examples = len(self.train_dataset)

    @property
    def bayes(self) -> Posterior:
        return self.accelerator.unwrap_model(self.model)

    create_optimizer = BayesTrainer.create_optimizer
    _get_num_items_in_batch = BayesTrainer._get_num_items_in_batch
    compute_loss = Trainer.compute_loss

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """None is written: the folder holds what :func:`bayeslora.storage.checkpoint.write_adapter` writes."""


def _check_model(model: Any) -> None:
    """A posterior over texts."""
    if not isinstance(model, Posterior):
        raise InputError(
            f"BayesSFTTrainer fits a BayesLoRA, and model is a {type(model).__name__}: pass "
            "model=BayesLoRA(network, MonteCLoRAConfig(...)), whose configuration takes the options of a LoraConfig"
        )
    if model.model.labelling.loss_type != NextTokenLikelihood.loss_type:
        raise InputError(
            f"BayesSFTTrainer learns texts, and the likelihood is a {type(model.model.likelihood).__name__}: pass a "
            "BayesLoRA over a causal language model, without likelihood= or with NextTokenLikelihood()"
        )


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


def _check_options(options: dict[str, Any]) -> None:
    """Refuse arguments of ``SFTTrainer`` that would change the network or the loss."""
    refused = {
        "peft_config": "the model has its adapter already: pass its settings to MonteCLoRAConfig",
        "compute_loss_func": "the loss is the objective of the posterior",
        "quantization_config": "the network is loaded already: load it quantised before BayesLoRA",
    }
    for name, reason in refused.items():
        if options.get(name) is not None:
            raise InputError(f"{name} cannot be combined with BayesSFTTrainer: {reason}")
