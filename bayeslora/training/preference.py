r"""TRL's trainers on pairs of texts, one preferred to the other, on a posterior: a reward model, and DPO.

The loss is TRL's own, of a network that is one draw of all adapters, the same for both texts of a pair; to it is added
what the objective has beside the likelihood, :math:`\eta\,\mathrm{KL} + \lambda_C L_C`. With the default losses that
is the objective of a Bradley-Terry likelihood, :math:`-\log\sigma` of the difference of two rewards, where DPO's reward
is :math:`\beta` times the log-ratio of policy and reference.
"""

from typing import Any

import torch
from pyro import poutine, sample
from pyro.distributions import Delta
from torch import Tensor
from transformers.utils import ModelOutput
from trl import DPOTrainer, RewardTrainer

from bayeslora.adapters.drawing import check_in_use, clear_draw, one_at_a_time
from bayeslora.adapters.modes import without_cache
from bayeslora.distributed import own_noise, refuse_sharded
from bayeslora.errors import InputError
from bayeslora.models.likelihoods import example_plate
from bayeslora.models.network import is_causal
from bayeslora.posterior import Posterior, has_plain_forward
from bayeslora.training.arguments import REFUSED, REFUSED_BY_TRAINER
from bayeslora.training.trl import OnPosterior

_COMPILED = {"torch_compile": REFUSED_BY_TRAINER["torch_compile"]}


class _OnPairs(OnPosterior):
    """The network's outputs are those of one draw, and the loss has the posterior's part beside TRL's."""

    refused = {name: reason for name, reason in REFUSED.items() if name != "label_names"} | _COMPILED

    def __init__(self, model: Posterior, *more: Any, variational_learning_rate: float | None = None, **options: Any):
        super().__init__(model, *more, variational_learning_rate=variational_learning_rate, **options)
        model.model.likelihood.requires_grad_(False)  # the loss is TRL's

    def check_model(self, model: Posterior) -> None:
        if model.monteclora_config.noise_schedule == "entropy":
            raise InputError(
                f"noise_schedule='entropy' follows predictions of classes, and {type(self).__name__} compares texts: "
                "choose 'learned', 'constant', 'cosine' or 'per_layer'"
            )
        if not has_plain_forward(model.guide) or model.elbo.num_particles > 1:
            raise InputError(
                f"{type(self).__name__} runs the network once in a step, as one draw: use num_particles=1, and one of "
                "bayeslora's guides or a subclass of Guide"
            )

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **options: Any) -> Any:
        bayes, mode = self.bayes, "train" if self.model.training else "eval"
        penalties: list[Tensor] = []

        def run(**given: Any) -> ModelOutput:
            output, penalty = drawn_outputs(bayes, given)
            penalties.extend([] if penalty is None else [penalty])
            return output

        bayes.run_instead = run
        try:
            with self.trl_forward():
                found = super().compute_loss(model, inputs, return_outputs=return_outputs, **options)  # type: ignore[misc]
        finally:
            bayes.run_instead = None
        task, *outputs = found if return_outputs else (found,)
        loss = task + sum(penalties)
        if penalties:
            assert bayes.elbo.parts is not None
            bayes.elbo.parts.task = task.detach()
            for name, value in bayes.elbo.parts.to_floats().items():
                self._metrics[mode][f"elbo/{name}"].append(value)  # type: ignore[attr-defined]
            if bayes.noise_schedule.follows_loss:
                bayes.noise_schedule.see_loss(-torch.expm1(-task.detach()))
        return (loss, *outputs) if return_outputs else loss


class BayesRewardTrainer(_OnPairs, RewardTrainer):
    """``trl.RewardTrainer`` whose model is a :class:`bayeslora.BayesLoRA` over a network with one output, the reward.

    Each draw of the posterior is a reward model: ``predict`` gives a text's reward in each (``sample_means``), whose
    standard deviation over draws says how sure the reward is; see ``examples/how_sure_is_the_reward.py``. TRL prepares
    the data, and takes its own arguments.

    Args:
        model: What to fit; ``num_labels=1``. The scale of its Gaussian likelihood is not trained, and means nothing.
        more: TRL's arguments, in TRL's order.
        variational_learning_rate: For the guide; 10 × the learning rate if ``None``.
        options: TRL's arguments by name.

    Raises:
        InputError: for another model, and for what TRL does to a network or a loss of its own.
    """

    def check_model(self, model: Posterior) -> None:
        super().check_model(model)
        if getattr(model.config, "num_labels", None) != 1 or is_causal(model.network.get_base_model()):
            raise InputError(
                "BayesRewardTrainer learns one number for a text: load the network with "
                "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)"
            )


class BayesDPOTrainer(_OnPairs, DPOTrainer):
    """``trl.DPOTrainer`` whose model is a :class:`bayeslora.BayesLoRA` over a causal language model.

    The log-probabilities of both texts of a pair come from one draw, those of the reference from the network with the
    adapter switched off, or from ``ref_model``. TRL prepares the data, and takes its own arguments.

    Args:
        model: What to fit.
        ref_model: Another network as the reference.
        more: TRL's further arguments, in TRL's order.
        variational_learning_rate: For the guide; 10 × the learning rate if ``None``.
        options: TRL's arguments by name.

    Raises:
        InputError: for another model, and for what TRL does to a network or a loss of its own.
    """

    refused = _OnPairs.refused | {
        "precompute_ref_log_probs": "the reference is the network with the adapter off, which TRL does not run ahead",
        "sync_ref_model": "the reference stays what it is",
        "router_aux_loss_coef": "mixtures of experts are not supported",
    }

    def __init__(
        self,
        model: Posterior,
        ref_model: Any = None,
        *more: Any,
        variational_learning_rate: float | None = None,
        **options: Any,
    ):
        base = _Reference(model) if ref_model is None and isinstance(model, Posterior) else ref_model
        super().__init__(model, base, *more, variational_learning_rate=variational_learning_rate, **options)
        if ref_model is None:
            self.ref_model = None  # TRL then switches the adapter off

    def check_model(self, model: Posterior) -> None:
        super().check_model(model)
        base = model.network.get_base_model()
        if not is_causal(base):
            raise InputError(
                f"BayesDPOTrainer learns which text a language model prefers, and the network is a "
                f"{type(base).__name__}: load it with AutoModelForCausalLM"
            )


class _Reference(torch.nn.Module):
    """Stands for a reference while TRL is built, which would else put a second adapter into the network."""

    def __init__(self, bayes: Posterior):
        super().__init__()
        self.config = bayes.config


def drawn_outputs(bayes: Posterior, inputs: dict[str, Any]) -> tuple[ModelOutput, Tensor | None]:
    """What the network says of pairs, as one draw where it is trained, and the posterior's part of the objective.

    Args:
        bayes: The posterior.
        inputs: The network's arguments; the second half of the rows belongs to the first, row by row.

    Returns:
        The network's own output, and η·KL + λ_C·L_C in nats per pair: None at the mean, and with the adapter off.
    """
    groups = bayes.model.groups
    switched_off = all(adapter.layer.disable_adapters for group in groups for adapter in group.adapters)
    with one_at_a_time:
        if switched_off:  # the reference: a draw stays set for checkpointed layers
            return bayes.network(**inputs), None
        clear_draw(groups)
        check_in_use(groups)
        if not (bayes.training and bayes.sampling and torch.is_grad_enabled()):
            return bayes.network(**inputs), None
        refuse_sharded(groups)
        read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with own_noise(bayes.device, bayes.together), without_cache(bayes.network):
            drawn = bayes.draw_for_pairs(read)
            with drawn.in_network:
                output = bayes.network(**inputs)
            bayes.model.arrived(**read)
            penalty = _penalty(bayes, drawn, len(read["input_ids"]) // 2)
        # DistributedDataParallel looks for parameters in what forward returns, and takes no further entry there
        name = next(name for name, value in output.items() if isinstance(value, Tensor) and value.requires_grad)
        output[name] = output[name] + 0 * penalty
        return output, penalty


def _penalty(bayes: Posterior, drawn: Any, pairs: int) -> Tensor:
    """The objective without a likelihood."""
    nothing = torch.zeros(pairs, device=bayes.model.groups[0].device)

    def observe() -> None:
        with example_plate(pairs, bayes.num_examples):
            sample("labels", Delta(nothing), obs=nothing)

    observed = poutine.trace(observe).get_trace()
    return bayes.elbo.average([bayes.elbo.score({**drawn.model.nodes, **observed.nodes}, drawn.guide.nodes)])
