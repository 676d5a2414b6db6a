"""Network, Pyro model and Pyro guide behind one forward that any training loop can drive."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from bayeslora.adapters.arrival import refuse_switched_off
from bayeslora.adapters.drawing import (
    check_in_use,
    clear_draw,
    one_at_a_time,
    rows_are_examples,
    using_draw,
    using_noise,
)
from bayeslora.adapters.groups import active_adapter
from bayeslora.adapters.modes import without_cache
from bayeslora.adapters.parameters import optimizer_groups
from bayeslora.adapters.placement import is_split
from bayeslora.adapters.provenance import Sketch, kept_keys, not_in_checkpoint
from bayeslora.distributed import Together, own_noise, refuse_sharded
from bayeslora.distributions import random_signs
from bayeslora.elbo import CooperativeELBO, replayed
from bayeslora.errors import InputError
from bayeslora.guides.base import Guide
from bayeslora.models.joint import JointModel
from bayeslora.noise_schedules import start_noise
from bayeslora.recorder import Recorder
from bayeslora.wrapper import WrappedNetwork

logger = logging.getLogger(__name__)


class Posterior(WrappedNetwork):
    """Network, prior and guide behind one forward: the objective in training mode, the mean in evaluation mode.

    :class:`bayeslora.BayesLoRA` is this with what is done with a posterior: predict, save, merge and so on. Whatever
    does one of those takes a Posterior.

    Args:
        model: Prior, network and likelihood.
        guide: A guide that was built from this model.

    Raises:
        InputError: for units of the noise or a schedule of it that the guide or the likelihood cannot follow.
    """

    guide: Any

    def __init__(self, model: JointModel, guide: nn.Module):
        nn.Module.__init__(self)
        self.monteclora_config = config = model.config
        self.network = model.network
        #: Keys of the base network's tensors that its checkpoint does not hold, and that are saved with the adapter.
        self.kept_keys = kept_keys(self.network, not_in_checkpoint(self.network))
        self.sketches: dict[str, Sketch] = {}  # of what is taken from the base network, made at the first saving
        self.base_record: dict[str, Any] | None = None  # what files say of it, where its weights lie in shards
        self.model = model
        self.guide = guide
        if model.groups[0].device.type != "meta":  # where every draw is made
            self.model.to(model.groups[0].device)
            self.guide.to(model.groups[0].device)
        self.elbo = CooperativeELBO.from_config(config)
        self.noise_schedule = start_noise(model, guide)
        #: A transformers tokenizer to keep with the adapter, where one is set; a folder that is opened sets its own.
        self.tokenizer: Any = None
        #: ``run.json`` of the run that made it, for its model card; a run's folder that is opened sets it.
        self.about: Mapping[str, Any] | None = None
        self.sampling = config.sample_scaler > 0
        #: What forward is instead, for a trainer whose loss is its own (:mod:`bayeslora.training.preference`).
        self.run_instead: Callable[..., Any] | None = None
        self.together = Together()
        self._rows: bool | None = None  # whether examples can have their own noise; looked up at the first batch
        self._freeze()
        self._say_what_counts()

    def _freeze(self) -> None:
        """Only what the objective depends on is trained, so that every trained parameter gets a gradient."""
        if not any(parameter.requires_grad for parameter in self.network.parameters()):  # as PEFT loads an adapter
            self.network.set_adapter(active_adapter(self.network))
        if self.monteclora_config.mode == "post_hoc":
            self.network.requires_grad_(False)
            self.model.requires_grad_(False)
        if self.monteclora_config.sample_scaler == 0:
            self.guide.requires_grad_(False)

    def _say_what_counts(self) -> None:
        """Tell Trainer, which asks the network, whether it can count what the objective averages over."""
        base: Any = self.network.get_base_model()
        base.accepts_loss_kwargs = getattr(self.model.likelihood, "counted_by_trainer", False)
        loss_type = self.model.labelling.loss_type
        if loss_type is not None:
            base.loss_type = loss_type  # GPT-2 does not say so: the first label has nothing before it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Posterior":
        """Moves everything and casts the network; the posterior stays in float32 where ``fn`` would narrow it, and
        what is split over several devices stays where it is."""
        split = is_split(self.network)

        def in_place(tensor: Tensor) -> Tensor:
            moves = split and fn(tensor.new_empty(0)).device != tensor.device
            return tensor.to(fn(tensor.new_empty(0)).dtype) if moves else fn(tensor)

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = in_place(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        self.network._apply(in_place, recurse)
        self.model._apply(keep_precision, recurse)
        self.guide._apply(keep_precision, recurse)
        return self

    @property
    def active_adapter(self) -> str:
        """PEFT's name of the adapter that the posterior is over."""
        return self.model.groups[0].adapters[0].key

    @property
    def num_examples(self) -> int | None:
        """Size of the training set, which ``normalization="elbo"`` needs; :func:`fit` sets it."""
        return self.model.num_examples

    @num_examples.setter
    def num_examples(self, value: int | None) -> None:
        self.model.num_examples = value

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapted layers, group by group: the order of every array over adapters."""
        return [adapter.name for group in self.model.groups for adapter in group.adapters]

    def parameter_groups(
        self, learning_rate: float, variational_learning_rate: float | None = None, *, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """What is trained, with the rates that ``fit`` gives it: for the optimizer of a loop of your own, or of a stock
        ``transformers.Trainer``, ``optimizers=(AdamW(bayes.parameter_groups(1e-3)), None)``.

        Args:
            learning_rate: For μ, B and the head.
            variational_learning_rate: For the posterior, which hardly moves at the network's; 10 × that if ``None``.
            weight_decay: On the network's matrices; vectors and the posterior, which its KL regularises, have none.

        Example:
            >>> [(group["lr"], len(group["params"]) > 0) for group in bayes.parameter_groups(0.001)]
            [(0.001, True), (0.001, True), (0.01, True)]
        """
        posterior = [*self.guide.parameters(), *self.model.parameters()]
        return optimizer_groups(self.network, posterior, learning_rate, variational_learning_rate, weight_decay)

    # The first arguments are spelled out for tools that match data set columns with forward's signature.
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        """Objective and logits in training mode; logits, and the loss at the mean, in eval mode.

        ``loss`` is in nats per example; ``logits`` has shape ``(batch, classes)``. Threads take turns.

        Args:
            num_items_in_batch: What all batches that one step accumulates count together (scored tokens of texts,
                else examples); Trainer passes it. ``loss`` is then this batch's share of that step's objective.

        Raises:
            InputError: where the network no longer uses the adapter that the posterior is over, under
                ``torch.compile(bayes)``. In training mode without labels, the backward pass from ``logits`` raises it.
        """
        if self.run_instead is not None:
            inputs |= {"labels": labels, "num_items_in_batch": num_items_in_batch, "token_type_ids": token_type_ids}
            given = {name: value for name, value in inputs.items() if value is not None}
            return self.run_instead(input_ids=input_ids, attention_mask=attention_mask, **given)
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs |= {name: value for name, value in named.items() if value is not None}
        if getattr(self, "_is_replica", False):
            raise InputError(
                "the copies that torch.nn.DataParallel makes share one draw: launch one process for each device with "
                "torchrun, or show this one a single device (CUDA_VISIBLE_DEVICES=0)"
            )
        if "fused_lm_head" in inputs:
            raise InputError(
                "trl.SFTTrainer steps on a loss of its own, without noise and KL: use "
                "bayeslora.training.sft.BayesSFTTrainer, which takes the same arguments"
            )
        output = self._run(labels, inputs, traced=torch.compiler.is_compiling())
        if num_items_in_batch is not None and labels is not None:
            output.loss = output.loss * self.share(labels, num_items_in_batch)
        return output

    def share(self, labels: Tensor, num_items: Tensor | int) -> Tensor:
        """Of a step's objective, what a batch with these labels is: its tokens, or examples, over those of them all."""
        count = self.model.count(labels)
        return count / torch.as_tensor(num_items, device=count.device).clamp(min=1)

    @torch.compiler.disable  # the network may be compiled; Pyro's bookkeeping around it would be traced at every step
    def _run(self, labels: Tensor | None, inputs: dict[str, Any], *, traced: bool) -> SequenceClassifierOutput:
        if traced:
            raise InputError(
                "torch.compile(bayes) would trace Pyro's bookkeeping anew at every step: call bayes.compile(), which "
                "compiles the network in place, and train bayes itself (without torch_compile=True in Trainer)"
            )
        with one_at_a_time:
            check_in_use(self.model.groups)
            return self._run_alone(labels, inputs)

    def _run_alone(self, labels: Tensor | None, inputs: dict[str, Any]) -> SequenceClassifierOutput:
        clear_draw(self.model.groups)
        if labels is None:
            logits = self.model.outputs(inputs)
            if self.training and self.sampling and logits.requires_grad:
                logits.register_hook(_refuse_other_loss)
            return SequenceClassifierOutput(logits=logits)
        batch = {"labels": labels, **inputs}
        if not self.training:
            return self._loss_at_mean(batch)
        refuse_sharded(self.model.groups)
        with own_noise(self.device, self.together), without_cache(self.network):
            return self._objective(batch) if self.sampling else self._loss_at_mean(batch)

    def _loss_at_mean(self, batch: dict[str, Any]) -> SequenceClassifierOutput:
        with pyro.validation_enabled(False):
            logits, labels = self.model.at_mean(**batch)
        return SequenceClassifierOutput(loss=self.negative_log_likelihood(logits, labels).mean(), logits=logits)

    def _objective(self, batch: dict[str, Any]) -> SequenceClassifierOutput:
        """Draw, run the network as that draw, score both programs, for each particle."""
        self._check_objective()
        draw = self._draw if has_plain_forward(self.guide) else self._draw_through_pyro
        scores, outputs = [], []
        with pyro.validation_enabled(False):
            for _ in range(self.elbo.num_particles):
                drawn = draw(batch)
                with drawn.in_network:
                    observe = pyro.poutine.replay(self.model.observe, trace=drawn.guide)
                    observed = pyro.poutine.trace(observe).get_trace(**batch)
                outputs.append(observed.nodes["_RETURN"]["value"][0])
                scores.append(self.elbo.score({**drawn.model.nodes, **observed.nodes}, drawn.guide.nodes))
            loss = self.elbo.average(scores)
        if not self.model.arrived(**batch) and loss.requires_grad:
            loss.register_hook(refuse_switched_off)
        logits = torch.stack(outputs).mean(0).detach()
        self.noise_schedule.see_logits(logits)
        if self.noise_schedule.follows_loss:
            assert self.elbo.parts is not None  # of the loss above
            self.noise_schedule.see_loss(self.model.labelling.unlearned(logits, batch["labels"], self.elbo.parts.task))
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _check_objective(self) -> None:
        self.model.check_untuned("to train it further")
        if self.monteclora_config.normalization == "elbo" and self.num_examples is None:
            raise InputError(
                "normalization='elbo' divides the KL by the number of training examples, which is not known: "
                "set bayes.num_examples = len(train_dataset) (fit does), or use normalization='paper'"
            )
        if self.model.recomputes() and self.elbo.num_particles > 1:
            raise InputError(
                "gradient checkpointing recomputes layers with the last draw only, so num_particles must be 1 with it: "
                "accumulate gradients over several steps instead"
            )

    def _draw(self, batch: dict[str, Any], rows_each: int = 1) -> "Drawn":
        """Without Pyro's handlers, which cost more than the arithmetic, and of A − μ, which examples can mirror.

        The inputs have all examples' first rows, then all their second ones, up to ``rows_each``.
        """
        groups, guide = self.model.groups, Recorder()
        means = self.model.zero_means() if self.guide.takes_mean else None
        with self.model.full_precision():
            self.guide.run(guide, means)
            model = Recorder(guide.values())
            noise = self.model.run(model, means)
            if means is None:
                noise = {group.name: noise[group.name] - self.model.mean(group) for group in groups}
            signs = self._signs(len(batch["labels"]), rows_each) if self._has_own_noise(batch) else None
        return Drawn(using_noise(groups, noise, signs, keep=self.model.recomputes()), model, guide)

    def _draw_through_pyro(self, batch: dict[str, Any]) -> "Drawn":
        """From a guide that is a Pyro program of its own: the same sequence under Pyro's handlers, of A itself."""
        guide = pyro.poutine.trace(self.guide.forward).get_trace(**batch)  # not call: Pyro's store stays empty
        with self.model.full_precision():
            model = replayed(self.model.run, guide, pyro)
        matrices = model.nodes["_RETURN"]["value"]
        return Drawn(using_draw(self.model.groups, matrices, keep=self.model.recomputes()), model, guide)

    def _has_own_noise(self, batch: dict[str, Tensor]) -> bool:
        """Whether each example of a training batch gets its own noise."""
        alone = len(batch["labels"]) == 1
        if alone or self.monteclora_config.noise == "shared" or not self.guide.symmetric_rows:
            return False
        unknown = self._rows is None
        rows = self.rows_are_examples(_without_labels(batch))
        if unknown and not rows:
            logger.warning(
                "%s has adapted layers whose rows are not the examples: a batch shares one draw of the noise",
                type(self.network.get_base_model()).__name__,
            )
        return rows

    def rows_are_examples(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether examples of one batch can have different draws; found out with the first ``inputs``.

        See :func:`bayeslora.adapters.drawing.rows_are_examples`.
        """
        if self._rows is None:
            self.model.labelling.prepare(self.network)
            self._rows = rows_are_examples(self.network, self.model.groups, inputs, run=self.model.outputs)
        return self._rows

    def _signs(self, examples: int, rows_each: int) -> dict[str, Tensor]:
        """±1 for every adapter, row of inputs and row of A: each example's own mirror image of the noise. Where rows of
        A are correlated, they turn together."""
        together = self.monteclora_config.wishart_scale == "full"
        sizes = {g: (len(g), examples, 1 if together else g.rank) for g in self.model.groups}
        signs = {g: random_signs(*size, device=g.device).expand(-1, -1, g.rank) for g, size in sizes.items()}
        return {g.name: own.repeat(1, rows_each, 1) for g, own in signs.items()}

    def negative_log_likelihood(self, logits: Tensor, labels: Tensor) -> Tensor:
        """−log p(label | logits) of every example, in nats, shape ``(batch,)``."""
        with pyro.validation_enabled(False):
            site = pyro.poutine.trace(self.model.likelihood.forward).get_trace(logits, labels).nodes["labels"]
        return -site["fn"].log_prob(site["value"])

    def train(self, mode: bool = True) -> "Posterior":
        clear_draw(self.model.groups)  # a checkpointed step leaves its draw for the backward pass
        return super().train(mode)

    def draw_for_pairs(self, inputs: Mapping[str, Tensor]) -> "Drawn":
        """A draw for inputs whose second half belongs to the first, row by row: both rows of a pair see the same."""
        self._check_objective()
        return self._draw({**inputs, "labels": inputs["input_ids"][::2, 0]}, rows_each=2)  # labels: one for each pair

    def draw_together(self, group: Any) -> None:
        """In training, give all processes of ``group`` the same draw and dropout, that of its first.

        For processes that run one network on the same examples between them, as in tensor parallelism: each process
        else has a draw of its own. Predictions agree by their seed.

        Args:
            group: A ``torch.distributed`` process group that this process belongs to, or None for none.

        Example:
            >>> bayes.draw_together(None)  # under torchrun: mesh["tp"].get_group()
        """
        self.together = Together(group)

    @contextmanager
    def without_sampling(self) -> Iterator[None]:
        """Inside, training mode is plain LoRA at the mean."""
        before, self.sampling = self.sampling, False
        try:
            yield
        finally:
            self.sampling = before


class Drawn(NamedTuple):
    """One draw of every adapter: the context in which it is the network's, and the sites of both programs."""

    in_network: AbstractContextManager[None]
    model: Recorder | Trace
    guide: Recorder | Trace


def has_plain_forward(guide: nn.Module) -> bool:
    """Whether a guide is its :meth:`~bayeslora.guides.Guide.run`, and no more."""
    return isinstance(guide, Guide) and type(guide).forward is Guide.forward


def _without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def _refuse_other_loss(gradient: Tensor) -> None:
    """A backward pass from the mean's logits has come this far."""
    raise InputError(
        "a training step from logits alone would train the mean, without noise and KL: pass labels= and step on the "
        "loss that comes back; label_smoothing_factor and compute_loss_func take the labels away. For gradients of the "
        "mean's outputs call bayes.eval() first"
    )
