"""TRL's supervised fine-tuning on a posterior: its data preparation, our objective."""

from pathlib import Path
from typing import Any

from trl import SFTTrainer

from bayeslora.checkpoint import write_adapter
from bayeslora.module import BayesLoRA
from bayeslora.training import BayesTrainer


class BayesSFTTrainer(SFTTrainer):
    """``trl.SFTTrainer`` whose model is a :class:`bayeslora.BayesLoRA` over a causal language model.

    TRL prepares the data as always: chat templates, prompt and completion, masking, truncation, packing. The loss is
    the objective per example, as under a stock ``transformers.Trainer``; TRL's own entropy and token accuracy, which
    need a point estimate's logits, are not logged. Checkpoints hold the adapter and its posterior. With TRL's packing a
    whole batch is one row: it shares a draw and counts as one example, so keep ``normalization="paper"`` there.

    Args:
        model: What to fit; its likelihood must be the next-token one.
        variational_learning_rate: For the guide; 10 × the learning rate if ``None``, as in :func:`bayeslora.fit`.
        options: Arguments of ``trl.SFTTrainer``; ``processing_class``, the tokenizer, is one that it needs.
    """

    def __init__(self, model: BayesLoRA, *args: Any, variational_learning_rate: float | None = None, **options: Any):
        super().__init__(model, *args, **options)
        self.model_accepts_loss_kwargs = False  # the objective is a mean over the micro-batch
        given = variational_learning_rate
        self.variational_learning_rate = 10 * self.args.learning_rate if given is None else given
        model.num_examples = len(self.train_dataset)

    @property
    def bayes(self) -> BayesLoRA:
        return self.accelerator.unwrap_model(self.model)

    create_optimizer = BayesTrainer.create_optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        output = model(**inputs)
        return (output.loss, output) if return_outputs else output.loss

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """None is written: the adapter's folder holds what :func:`bayeslora.checkpoint.write_adapter` writes."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_adapter(self.bayes, folder)
