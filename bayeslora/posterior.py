"""Network, Pyro model and Pyro guide behind one forward that any training loop can drive."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from peft import PeftModel
from pyro.nn import PyroModule
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from bayeslora.adapters.drawing import (
    check_in_use,
    check_reached,
    clear_draw,
    keeping_draw,
    one_at_a_time,
    rows_are_examples,
    set_draw,
    using_noise,
)
from bayeslora.adapters.groups import active_adapter
from bayeslora.adapters.inject import adapt
from bayeslora.adapters.modes import evaluation_mode, without_cache
from bayeslora.adapters.provenance import Sketch, kept_keys, not_in_checkpoint
from bayeslora.config import MonteCLoRAConfig
from bayeslora.distributed import own_noise, refuse_sharded
from bayeslora.distributions import random_signs
from bayeslora.elbo import CooperativeELBO, Nodes
from bayeslora.errors import InputError
from bayeslora.guides import GUIDES, Guide
from bayeslora.models import MonteCLoRA
from bayeslora.models.likelihoods import as_likelihood
from bayeslora.noise_schedules import SCHEDULES, NoiseSchedule
from bayeslora.recorder import Recorder

logger = logging.getLogger(__name__)


class Posterior(PeftModel):
    """Network, prior and guide behind one forward: the objective in training mode, the mean in evaluation mode.

    :class:`bayeslora.BayesLoRA` is this with what is done with a posterior: predict, save, merge and so on. Whatever
    does one of those takes a Posterior.
    """

    _is_prompt_learning = False  # what PeftModel's own __init__, which would adapt the network again, sets
    guide: Any

    def __init__(
        self,
        network: nn.Module,
        config: MonteCLoRAConfig | None = None,
        *,
        guide: Callable[[MonteCLoRA], nn.Module] | None = None,
        likelihood: PyroModule | None = None,
    ):
        nn.Module.__init__(self)
        if isinstance(network, Posterior):
            raise InputError("this is a BayesLoRA already: pass the network itself, or go on with this one")
        config = config or MonteCLoRAConfig()
        if isinstance(network, PeftModel):
            config = _with_lora_words(config, network)
        self.monteclora_config = config
        self.network = adapt(network, config)
        #: Keys of the base network's tensors that its checkpoint does not hold, and that are saved with the adapter.
        self.kept_keys = kept_keys(self.network, not_in_checkpoint(self.network))
        self.sketches: dict[str, Sketch] = {}  # of what is taken from the base network, made at the first saving
        self.model = MonteCLoRA(self.network, config, likelihood=likelihood)
        self.guide = self._build_guide(guide)
        self.elbo = CooperativeELBO.from_config(config)
        self.noise_schedule = self._build_noise_schedule()
        self.sampling = config.sample_scaler > 0
        self._rows: bool | None = None  # whether examples can have their own noise; looked up at the first batch
        self._arrives = False  # whether draws are known to reach the network; looked at after the first training batch
        self._freeze()
        self._say_what_counts()

    def _build_guide(self, guide: Callable[[MonteCLoRA], nn.Module] | None) -> nn.Module:
        if guide is None:
            if self.monteclora_config.guide not in GUIDES:
                raise InputError(f"no guide {self.monteclora_config.guide!r}; there are {', '.join(GUIDES)}, "
                                 "or pass a class as guide=")  # fmt: skip
            guide = GUIDES[self.monteclora_config.guide]
        if isinstance(guide, nn.Module):
            raise InputError(
                f"guide= takes a class or function of the model, not a finished {type(guide).__name__}: "
                "a guide belongs to the model it was built from"
            )
        device = next(self.network.parameters()).device
        return guide(self.model).to(device)

    def _build_noise_schedule(self) -> NoiseSchedule:
        name = self.monteclora_config.noise_schedule
        if name != "constant" and not getattr(self.guide, "follows_noise_schedule", False):
            raise InputError(f"noise_schedule={name!r} changes ε, and a {type(self.guide).__name__} does not follow: "
                             "use one of the guides that are shipped, or noise_schedule='constant'")  # fmt: skip
        return SCHEDULES[name](self.model)

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
        loss_type = as_likelihood(self.model.likelihood).loss_type
        if loss_type is not None:
            base.loss_type = loss_type  # GPT-2 does not say so: the first label has nothing before it

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get("_modules", {}).get(name, value)
        if name == "network" and before is not value and not self.__dict__.get("_is_replica"):
            raise InputError("the model and the guide belong to this network: build a BayesLoRA on the other one, or "
                             "change this one in place (bayes.compile(), bayes.network.set_adapter(...))")  # fmt: skip
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Posterior":
        """Moves everything and casts the network; the posterior stays in float32 where ``fn`` would narrow it."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        self.network._apply(fn, recurse)
        self.model._apply(keep_precision, recurse)
        self.guide._apply(keep_precision, recurse)
        return self

    @property
    def config(self) -> Any:
        """The network's own transformers configuration, where transformers looks for it."""
        return self.network.config

    def __getattr__(self, name: str) -> Any:
        """No more than a module has: what is true of the network (being quantised) is not true of the guide."""
        return nn.Module.__getattr__(self, name)

    @property
    def base_model(self) -> nn.Module:
        """PEFT's tuner, where a PeftModel has it."""
        return self.network.base_model

    @property
    def active_adapter(self) -> str:
        """PEFT's name of the adapter that the posterior is over."""
        return self.model.groups[0].adapters[0].key

    @property
    def generation_config(self) -> Any:
        """The network's own, where TRL looks for it."""
        return self.network.get_base_model().generation_config

    def add_model_tags(self, tags: Any) -> None:
        """Tags for the network's model card, which TRL adds."""
        self.network.get_base_model().add_model_tags(tags)

    def get_input_embeddings(self) -> nn.Module:
        """The network's own."""
        return self.network.get_base_model().get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The network's own."""
        return self.network.get_base_model().get_output_embeddings()

    def enable_input_require_grads(self) -> None:
        """What checkpointed blocks of a network with frozen embeddings need."""
        self.network.get_base_model().enable_input_require_grads()

    @property
    def device(self) -> torch.device:
        return self.network.device

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
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs |= {name: value for name, value in named.items() if value is not None}
        if getattr(self, "_is_replica", False):
            raise InputError(
                "the copies that torch.nn.DataParallel makes share one draw: launch one process for each device with "
                "torchrun, or show this one a single device (CUDA_VISIBLE_DEVICES=0)"
            )
        if "fused_lm_head" in inputs:
            raise InputError("trl.SFTTrainer steps on a loss of its own, without noise and KL: use "
                             "bayeslora.training.sft.BayesSFTTrainer, which takes the same arguments")  # fmt: skip
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
        if not self.training:
            return self._loss_at_mean(labels=labels, **inputs)
        refuse_sharded(self.model.groups)
        with own_noise(self.device), without_cache(self.network):
            objective = self._objective if self.sampling else self._loss_at_mean
            return objective(labels=labels, **inputs)

    def _objective(self, **batch: Any) -> SequenceClassifierOutput:
        if self.monteclora_config.normalization == "elbo" and self.num_examples is None:
            raise InputError(
                "normalization='elbo' divides the KL by the number of training examples, which is not known: "
                "set bayes.num_examples = len(train_dataset) (fit does), or use normalization='paper'"
            )
        if self.elbo.num_particles > 1 and self.model.recomputes():
            raise InputError(
                "gradient checkpointing recomputes layers with the last draw only, so num_particles must be 1 with it: "
                "accumulate gradients over several steps instead"
            )
        logits: list[Tensor] = []
        with pyro.validation_enabled(False):
            if isinstance(self.guide, Guide) and type(self.guide).forward is Guide.forward:
                loss = self.elbo.average(lambda: self._run_directly(logits, **batch))
            else:  # forward, not call: parameters stay out of Pyro's global store

                def model(**kwargs: Any) -> None:
                    logits.append(self.model.joint(**kwargs)[0])

                loss = self.elbo.differentiable_loss(model, self.guide.forward, **batch)
        if not self._arrives:
            self._check_arrival(batch)
        mean = torch.stack(logits).mean(0).detach()
        self.noise_schedule.see_logits(mean)
        return SequenceClassifierOutput(loss=loss, logits=mean)

    def _run_directly(self, outputs: list[Tensor], **batch: Any) -> tuple[Nodes, Nodes]:
        """One particle without Pyro's handlers around the latent sites: same sites, values and gradients."""
        guide = Recorder()
        with self.model.centred(), self.model.full_precision():
            self.guide.run(guide)
            model = Recorder(guide.values())
            noise = self.model.run(model)
            signs = self._signs(batch) if self._has_own_noise(batch) else None
        with using_noise(self.model.groups, noise, signs, keep=self.model.recomputes()):
            observed = pyro.poutine.trace(self.model.observe).get_trace(**batch)
        outputs.append(observed.nodes["_RETURN"]["value"][0])
        return {**model.nodes, **observed.nodes}, guide.nodes

    def _check_arrival(self, batch: dict[str, Any]) -> None:
        """Once, after the first training batch: the draw must have reached every layer."""
        try:
            check_reached(self.model.groups)
        except InputError:  # some networks leave out layers at random while they are trained
            with evaluation_mode(self.network), torch.no_grad(), keeping_draw(self.model.groups):
                set_draw(self.model.groups, {group.name: group.mean() for group in self.model.groups})
                self.model.outputs({name: value for name, value in batch.items() if name != "labels"}, batch["labels"])
                check_reached(self.model.groups)
        self._arrives = True

    def _has_own_noise(self, batch: dict[str, Tensor]) -> bool:
        """Whether each example of a training batch gets its own noise."""
        alone = len(batch["labels"]) == 1
        if alone or self.monteclora_config.noise == "shared" or not self.guide.symmetric_rows:
            return False
        unknown = self._rows is None
        rows = self.rows_are_examples({name: value for name, value in batch.items() if name != "labels"})
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
            self._rows = rows_are_examples(self.network, self.model.groups, inputs, run=self.model.outputs)
        return self._rows

    def _signs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """±1 for every adapter, example and row of A: each example's own mirror image of the noise."""
        examples = len(batch["labels"])
        device = batch["labels"].device
        return {g.name: random_signs(len(g), examples, g.rank, device=device) for g in self.model.groups}

    def _loss_at_mean(self, **batch: Any) -> SequenceClassifierOutput:
        with pyro.validation_enabled(False):
            logits, labels = self.model.mean_field(**batch)
        return SequenceClassifierOutput(loss=self.negative_log_likelihood(logits, labels).mean(), logits=logits)

    def negative_log_likelihood(self, logits: Tensor, labels: Tensor) -> Tensor:
        """−log p(label | logits) of every example, in nats, shape ``(batch,)``."""
        with pyro.validation_enabled(False):
            site = pyro.poutine.trace(self.model.likelihood.forward).get_trace(logits, labels).nodes["labels"]
        return -site["fn"].log_prob(site["value"])

    def train(self, mode: bool = True) -> "Posterior":
        clear_draw(self.model.groups)  # a checkpointed step leaves its draw for the backward pass
        return super().train(mode)

    @contextmanager
    def without_sampling(self) -> Iterator[None]:
        """Inside, training mode is plain LoRA at the mean."""
        before, self.sampling = self.sampling, False
        try:
            yield
        finally:
            self.sampling = before

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the network is the frozen base model (PEFT's own switch)."""
        trained = [(parameter, parameter.requires_grad) for parameter in self.network.parameters()]
        try:
            with self.network.disable_adapter():
                yield
        finally:
            for parameter, requires_grad in trained:  # PEFT makes the adapter trainable, in post_hoc mode too
                parameter.requires_grad_(requires_grad)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the network in place, with ``torch.compile``'s arguments; draws are inputs of the compiled graph.

        Blocks that repeat are compiled one by one and share their graph, so that a deep network takes no longer than
        one block. A second length of the inputs makes a second graph, for all lengths.
        """
        blocks = repeated_blocks(self.network)
        if blocks:
            self.enable_input_require_grads()  # as the others' inputs do: else the first block's graph is another
        for module in blocks or [self.network]:
            module.compile(*args, **options)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute activations in the backward pass, reentrantly or not; recomputed layers see the same draw."""
        base = self.network.get_base_model()
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable(activation_checkpointing_kwargs, **options)
        base.enable_input_require_grads()


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network's stacks: members of its outermost lists of two or more modules of one class."""
    found: list[nn.Module] = []
    for child in network.children():
        blocks = list(child) if isinstance(child, nn.ModuleList) else []
        alike = len(blocks) > 1 and len({type(block) for block in blocks}) == 1
        found += blocks if alike else repeated_blocks(child)
    return found


def _refuse_other_loss(gradient: Tensor) -> None:
    """A backward pass from the mean's logits has come this far."""
    raise InputError(
        "a training step from logits alone would train the mean, without noise and KL: pass labels= and step on the "
        "loss that comes back; label_smoothing_factor and compute_loss_func take the labels away. For gradients of the "
        "mean's outputs call bayes.eval() first"
    )


def _with_lora_words(config: MonteCLoRAConfig, network: PeftModel) -> MonteCLoRAConfig:
    """The configuration with PEFT's words as the network's adapter has them."""
    lora = network.peft_config[network.active_adapters[0]]
    words = {f.name for f in dataclasses.fields(config)} & {f.name for f in dataclasses.fields(lora)}
    plain = {}
    for word in words - {"mode"}:
        value = getattr(lora, word)
        plain[word] = tuple(sorted(value)) if isinstance(value, set) else value
    return config.replace(**plain)
