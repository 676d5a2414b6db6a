"""TRL's supervised fine-tuning on a posterior: its data preparation, our objective."""

from typing import Any

from transformers import Trainer
from trl import SFTTrainer

from bayeslora.errors import InputError
from bayeslora.models import NextTokenLikelihood
from bayeslora.posterior import Posterior
from bayeslora.training.arguments import REFUSED_BY_SFT
from bayeslora.training.trainer import BayesTrainer
from bayeslora.training.trl import OnPosterior


class BayesSFTTrainer(OnPosterior, SFTTrainer):
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

    refused = REFUSED_BY_SFT

    def __init__(self, model: Posterior, *more: Any, variational_learning_rate: float | None = None, **options: Any):
        super().__init__(model, *more, variational_learning_rate=variational_learning_rate, **options)
        self.model_accepts_loss_kwargs = True

    def check_model(self, model: Posterior) -> None:
        """A posterior over texts."""
        if model.model.labelling.loss_type != NextTokenLikelihood.loss_type:
            raise InputError(
                f"BayesSFTTrainer learns texts, and the likelihood is a {type(model.model.likelihood).__name__}: pass "
                "a BayesLoRA over a causal language model, without likelihood= or with NextTokenLikelihood()"
            )

    _get_num_items_in_batch = BayesTrainer._get_num_items_in_batch
    compute_loss = Trainer.compute_loss
