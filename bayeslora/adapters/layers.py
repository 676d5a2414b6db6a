"""PEFT puts the LoRA layers in; here their ``lora_A`` learns to use a drawn weight, and equal shapes form a group.

No parameter is renamed or added, so the network's state dict stays PEFT's own.
"""

import difflib
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayeslora.adapters.provenance import new_modules
from bayeslora.config import MonteCLoRAConfig
from bayeslora.errors import InputError
from bayeslora.untrusted import check_lora_words

logger = logging.getLogger(__name__)
one_at_a_time = threading.RLock()  # the draw in a network and Pyro's stack of handlers are shared by all threads


class Draw:
    """What is drawn for one layer; empty in every copy, so a network can be deep-copied at any time.

    ``weight`` is the drawn A: ``(r, n_in)``, or ``(groups, r, n_in)`` for as many equal, consecutive groups of rows of
    the input. With ``mirrors`` it is μ and below it the deviation from μ, ``(2r, n_in)``, and every example has its
    own ``(2r, r)``: an identity, which passes μ on, and below it a diagonal of ±1, which turns rows of the deviation.
    ``is_reached`` says whether the layer has run since it was set.
    """

    __slots__ = ("is_reached", "mirrors", "weight")

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        self.mirrors: Tensor | None = None
        self.is_reached = False

    def set(self, weight: Tensor, mirrors: Tensor | None = None) -> None:
        self.weight, self.mirrors, self.is_reached = weight, mirrors, False

    def __deepcopy__(self, memo: dict) -> "Draw":
        return Draw()

    def __reduce__(self):
        return Draw, ()


class SampledLinear(nn.Linear):
    """``lora_A``: uses the drawn weight while one is set, and its own weight, the mean μ (r × n_in), otherwise."""

    draw: Draw

    @classmethod
    def wrap(cls, linear: nn.Linear) -> "SampledLinear":
        """A sampled layer that shares ``linear``'s parameter."""
        new = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        new.weight = linear.weight
        new.draw = Draw()
        return new.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        weight, mirrors = self.draw.weight, self.draw.mirrors
        if weight is None:
            return nn.functional.linear(input, self.weight)
        self.draw.is_reached = True
        if mirrors is not None:
            both = _in_groups(nn.functional.linear(input, weight), len(mirrors))
            output = torch.bmm(both, mirrors.to(both.dtype))
        elif weight.dim() == 3:
            output = torch.bmm(_in_groups(_as_computed(input), len(weight)), weight.mT)
        else:
            return nn.functional.linear(input, weight)
        return output.reshape(*input.shape[:-1], -1)


def _in_groups(rows: Tensor, groups: int) -> Tensor:
    """Equal, consecutive groups of rows: ``(groups, rows, columns)``."""
    if rows.shape[0] % groups:
        raise RowsError(f"the input of an adapted layer has {rows.shape[0]} rows, not a multiple of {groups}")
    return rows.reshape(groups, -1, rows.shape[-1])


def _as_computed(input: Tensor) -> Tensor:
    """In the type that autocast computes in."""
    device = input.device.type
    return input.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else input


class RowsError(RuntimeError):
    """Examples do not lie along the first dimension of a layer's input, so they cannot each have a weight."""


@dataclass(frozen=True)
class Adapter:
    """One adapted layer: its name in the base network, its LoRA layer and its samplable A; ``key`` is PEFT's name
    of the adapter, the same for all layers."""

    name: str
    layer: LoraLayer
    lora_A: SampledLinear
    key: str

    @property
    def rank(self) -> int:
        return self.lora_A.out_features

    @property
    def columns(self) -> int:
        return self.lora_A.in_features

    @property
    def kind(self) -> str:
        """The name without block numbers, e.g. ``encoder.layer.attention.self.query``."""
        return ".".join(part for part in self.name.split(".") if not part.isdigit())

    @property
    def block(self) -> int:
        """Index of the transformer block the layer sits in; 0 outside blocks."""
        return next((int(part) for part in self.name.split(".") if part.isdigit()), 0)


@dataclass(frozen=True)
class AdapterGroup:
    """All adapters with one (r, n_in): one plate in the model, three sites for all of them together."""

    rank: int
    columns: int
    adapters: tuple[Adapter, ...]

    @property
    def name(self) -> str:
        return f"r{self.rank}_in{self.columns}"

    def __len__(self) -> int:
        return len(self.adapters)

    def mean(self) -> Tensor:
        """μ of every adapter in float32 (or wider), one column a row: shape ``(adapters, columns, r)``."""
        stacked = torch.stack([adapter.lora_A.weight for adapter in self.adapters])
        return stacked.to(torch.promote_types(stacked.dtype, torch.float32)).mT

    def mean_scale(self) -> Tensor:
        """Root mean square of the entries of μ, without gradient: shape ``(adapters,)``."""
        norms = torch._foreach_norm([adapter.lora_A.weight.detach() for adapter in self.adapters])
        return torch.stack(norms).float() / math.sqrt(self.columns * self.rank)


def adapt(network: nn.Module, config: MonteCLoRAConfig) -> PeftModel:
    """Inject LoRA through PEFT (unless ``network`` is a PeftModel already) and make every ``lora_A`` samplable.

    Raises:
        InputError: for targets that match nothing, and for adapters that cannot be honoured.
    """
    if hasattr(network, "_orig_mod"):
        raise InputError("torch.compile(network) hides the network's class and the names of its layers: "
                         "pass the network itself, then call bayes.compile()")  # fmt: skip
    keep_trainable(network)
    if not isinstance(network, PeftModel):
        if carries_adapter(network):
            raise InputError(
                f"this {type(network).__name__} carries an adapter already, put into it in place: load the network "
                "anew, or, to go on with that adapter, pass its PeftModel (bayes.network of a BayesLoRA)"
            )
        check_targets(network, config)
        lora = lora_config(network, config)
        # patterns are written out when the adapter is saved, and PEFT knows the usual targets of a network
        given = {"alpha_pattern"} if lora.target_modules else {"alpha_pattern", "target_modules"}
        check_lora_words(_as_json(lora), except_for=given)
        check_heads(network, lora)
        try:
            network = get_peft_model(network, lora)
        except ValueError as error:
            raise InputError(f"PEFT cannot adapt {type(network).__name__}: {error}") from error
    else:
        lora = network.peft_config[active_adapter(network)]
        # EVA decides how A begins and how large it is, both of which are in the adapter by now
        given = {"init_lora_weights"} if lora.init_lora_weights == "eva" else set()
        check_lora_words(_as_json(lora), except_for={"alpha_pattern", *given})
    make_samplable(network)
    return network


def carries_adapter(network: nn.Module) -> bool:
    """Whether PEFT, transformers or a BayesLoRA has put an adapter into it."""
    return isinstance(network, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in network.modules())


def _as_json(lora: LoraConfig) -> dict[str, Any]:
    """A configuration as ``adapter_config.json`` holds it."""
    return {word: sorted(value) if isinstance(value, set) else value for word, value in lora.to_dict().items()}


def lora_config(network: nn.Module, config: MonteCLoRAConfig) -> LoraConfig:
    """The PEFT configuration, with the task type read off the network's class."""
    name = type(network).__name__
    task_types = {"ForSequenceClassification": TaskType.SEQ_CLS, "ForCausalLM": TaskType.CAUSAL_LM,
                  "LMHeadModel": TaskType.CAUSAL_LM}  # fmt: skip
    task_type = next((known for ending, known in task_types.items() if name.endswith(ending)), None)
    targets = config.target_modules
    options = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": list(targets) if isinstance(targets, tuple) else targets,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "modules_to_save": _saved_modules(network, config, task_type) or None,
        "layers_to_transform": list(config.layers_to_transform) if config.layers_to_transform else None,
        "rank_pattern": dict(config.rank_pattern),
        "task_type": task_type,
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in network.modules()),
        **config.lora_options,
    }
    try:
        return LoraConfig(**options)
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"peft.LoraConfig does not take an option: {error}") from error


def check_targets(network: nn.Module, config: MonteCLoRAConfig) -> None:
    """Refuse target names that match no layer, and layers that have no linear ``lora_A``."""
    targets = config.target_modules
    if targets is None or targets == "all-linear":
        return
    modules = dict(network.named_modules())
    patterns = [targets] if isinstance(targets, str) else list(targets)
    for target in patterns:
        matched = [name for name in modules if _matches(name, target, is_pattern=isinstance(targets, str))]
        if not matched:
            raise InputError(f"target module {target!r} matches no layer of {type(network).__name__}; "
                             f"{_suggest(target, modules)}")  # fmt: skip
        for name in matched:
            if isinstance(modules[name], nn.Embedding):
                raise InputError(
                    f"target module {target!r} matches the embedding {name!r}: embeddings keep lora_A as a bare "
                    "parameter looked up by index, so a draw has no input to multiply; target linear layers"
                )


def _saved_modules(network: nn.Module, config: MonteCLoRAConfig, task_type: TaskType | None) -> list[str]:
    """Names of the modules to train whole: those asked for, a classifier's head, and whatever is new."""
    from_peft = ("classifier", "score") if task_type == TaskType.SEQ_CLS else ()  # it adds these itself
    asked, new = [*(config.modules_to_save or ()), *from_peft], new_modules(network)
    backbone = [name for name in new if "." in name and "pooler" not in name]
    if backbone:
        logger.warning("the checkpoint of this %s lacks %s: trained whole, and saved with the adapter",
                       type(network).__name__, ", ".join(backbone))  # fmt: skip
    # PEFT takes every module whose name ends like this, but would put LoRA into those it was not told of
    ending = [name for name, _ in network.named_modules() if any(name.endswith(saved) for saved in asked)]
    outermost = [name for name in ending if not any(name.startswith(f"{other}.") for other in [*ending, *new])]
    return [name for name in dict.fromkeys([*asked, *outermost, *new]) if name not in from_peft]


def check_heads(network: nn.Module, lora: LoraConfig) -> None:
    """Refuse quantised layers that would have to be trained whole: the head, and ``modules_to_save``."""
    saved = (*(lora.modules_to_save or ()), *(("classifier", "score") if lora.task_type == TaskType.SEQ_CLS else ()))
    for name, module in network.named_modules():
        if name.endswith(saved) and is_quantized(module):
            raise InputError(
                f"{name!r} is quantised and cannot be trained: load the network without quantising it, for instance "
                f"with BitsAndBytesConfig(..., llm_int8_skip_modules=[{name!r}])"
            )


def _matches(name: str, target: str, *, is_pattern: bool) -> bool:
    if is_pattern:
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith("." + target)


def _suggest(target: str, modules: Mapping[str, nn.Module]) -> str:
    linear = {name.rsplit(".", 1)[-1] for name, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
    close = difflib.get_close_matches(target, sorted(linear), n=3, cutoff=0.4)
    if close:
        return "closest names: " + ", ".join(close)
    return "its linear layers: " + ", ".join(sorted(linear))


def make_samplable(network: PeftModel) -> None:
    """Wrap ``lora_A`` of every layer of the active adapter; wrapping twice changes nothing.

    Raises:
        InputError: with the reason, where a layer does not multiply its input by a plain ``lora_A``.
    """
    key = active_adapter(network)
    found = False
    for name, layer in _lora_layers(network):
        variant = getattr(layer, "lora_variant", {}).get(key)
        if variant is not None:
            raise InputError(f"layer {name!r} uses {type(variant).__name__}, which bypasses lora_A: not supported")
        if key in layer.lora_embedding_A:
            raise InputError(f"layer {name!r} is an embedding: its lora_A has no input to multiply; "
                             "target linear layers")  # fmt: skip
        if key not in layer.lora_A:
            continue
        if isinstance(layer, ParamWrapper):
            raise InputError(f"layer {name!r} ({type(layer.get_base_layer()).__name__}) is adapted at its bare "
                             "parameters, as PEFT does with mixtures of experts, where no draw reaches it: name linear "
                             "layers in target_modules, those of the attention for instance")  # fmt: skip
        lora_a = layer.lora_A[key]
        found = True
        if isinstance(lora_a, SampledLinear):
            continue
        if type(lora_a) is not nn.Linear or lora_a.bias is not None:
            raise InputError(
                f"layer {name!r}: lora_A is a {type(lora_a).__name__}, and only linear layers (nn.Linear, "
                "Conv1D) can be sampled; leave convolutions and parallel layers out of target_modules"
            )
        layer.lora_A[key] = SampledLinear.wrap(lora_a)
    if not found:
        raise InputError(f"the network has no LoRA layer for its active adapter {key!r}: nothing to sample")


def active_adapter(network: PeftModel) -> str:
    """The one active adapter's name; several at once cannot be sampled."""
    active = network.active_adapters
    if len(active) != 1:
        raise InputError(f"exactly one active adapter can be sampled, found {active}; call set_adapter(name)")
    return active[0]


def check_in_use(groups: tuple[AdapterGroup, ...]) -> None:
    """Make sure that the network uses these adapters, where a draw reaches it.

    Raises:
        InputError: when another adapter is active, or one is merged into the frozen weights.
    """
    for group in groups:
        for adapter in group.adapters:
            if adapter.layer.active_adapters != [adapter.key]:
                raise InputError(
                    f"the network now uses the adapter {', '.join(adapter.layer.active_adapters)}, and this posterior "
                    f"is over {adapter.key!r}: call bayes.network.set_adapter({adapter.key!r})"
                )
            if adapter.layer.merged:
                raise InputError(
                    "the adapter is merged into the frozen weights, where no draw can reach it: call "
                    "bayes.network.unmerge_adapter()"
                )


def frozen_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer, or of the one under a LoRA layer; dequantised where it is packed.

    Raises:
        InputError: for a quantisation that cannot be read back.
    """
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    weight = getattr(base, "weight", None)
    if weight is None:
        raise InputError(f"cannot read the weight of a {type(base).__name__}: of quantised networks, those of "
                         "bitsandbytes and torchao are supported")  # fmt: skip
    if get_bnb_param_type(weight):
        return dequantize_bnb_weight(weight, state=getattr(base, "state", None))
    if is_quantized(base):
        return weight.detach().dequantize()
    return weight.detach()


def keep_trainable(network: nn.Module) -> None:
    """Switch off what makes a bitsandbytes layer untrainable once it has run in eval mode on a CPU with AVX512-BF16.

    There it repacks its four-bit weight for a kernel that has no gradient, and stays so.
    """
    for name, module in network.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise InputError(f"bitsandbytes has repacked {name!r} for prediction only, when the network ran in "
                                 "eval mode: pass a freshly loaded network")  # fmt: skip
            module.support_avx512bf16_for_cpu = False


def is_quantized(module: nn.Module) -> bool:
    """Whether any weight is packed, rather than a plain tensor of floats."""
    return any(
        not parameter.is_floating_point() or type(parameter).__module__.startswith(("bitsandbytes.", "torchao."))
        for parameter in module.parameters()
    )


def _lora_layers(network: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in network.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def find_groups(network: PeftModel) -> tuple[AdapterGroup, ...]:
    """The samplable adapters by shape, in network order."""
    key = active_adapter(network)
    shapes: dict[tuple[int, int], list[Adapter]] = {}
    for name, layer in _lora_layers(network):
        if key in layer.lora_A:
            adapter = Adapter(name, layer, layer.lora_A[key], key)
            shapes.setdefault((adapter.rank, adapter.columns), []).append(adapter)
    return tuple(AdapterGroup(*shape, tuple(adapters)) for shape, adapters in shapes.items())


def set_draw(groups: tuple[AdapterGroup, ...], weights: Mapping[str, Tensor]) -> None:
    """Give every adapter its drawn weight.

    Args:
        weights: Group name to drawn A, one column a row: ``(adapters, columns, r)``, or
            ``(draws, adapters, columns, r)`` for a batch of as many equal groups of consecutive rows, one a draw.
    """
    check_in_use(groups)
    for group in groups:
        drawn = weights[group.name].mT.to(group.adapters[0].lora_A.weight.dtype)
        for adapter, weight in zip(group.adapters, drawn.unbind(-3), strict=True):
            adapter.lora_A.draw.set(weight)


def set_noise(
    groups: tuple[AdapterGroup, ...], noise: Mapping[str, Tensor], signs: Mapping[str, Tensor] | None = None
) -> None:
    """Give every adapter a drawn deviation from its mean.

    Args:
        noise: Group name to A − μ, one column a row: ``(adapters, columns, r)``.
        signs: Group name to ±1, ``(adapters, examples, r)``: every example's own mirror image of the rows of A − μ.
    """
    for group in groups:
        mean = torch.stack([adapter.lora_A.weight for adapter in group.adapters])
        deviation = noise[group.name].mT
        mirrors: Sequence[Tensor | None] = [None] * len(group)
        if signs is None:
            weights = (mean + deviation).to(mean.dtype)
        else:
            weights = torch.cat([mean, deviation.to(mean.dtype)], dim=-2)
            turned = torch.diag_embed(signs[group.name])  # (adapters, examples, r, r)
            identity = torch.eye(group.rank, device=turned.device).expand_as(turned)
            mirrors = torch.cat([identity, turned], dim=-2).unbind()
        for adapter, weight, mirror in zip(group.adapters, weights.unbind(), mirrors, strict=True):
            adapter.lora_A.draw.set(weight, mirror)


def clear_draw(groups: tuple[AdapterGroup, ...]) -> None:
    """Back to the means."""
    for group in groups:
        for adapter in group.adapters:
            draw = adapter.lora_A.draw
            draw.weight = draw.mirrors = None


def check_reached(groups: tuple[AdapterGroup, ...]) -> None:
    """Make sure that every layer used the draw that was last set for it, unless its adapter is switched off.

    Raises:
        InputError: naming layers that did not run: a kernel reads their ``lora_A.weight`` itself, or the network never
            gets to them.
    """
    adapters = [adapter for group in groups for adapter in group.adapters if not adapter.layer.disable_adapters]
    unreached = [adapter.name for adapter in adapters if not adapter.lora_A.draw.is_reached]
    if unreached:
        shown = ", ".join(unreached[:3]) + (f" and {len(unreached) - 3} more" if len(unreached) > 3 else "")
        raise InputError(
            f"the draw did not arrive in {shown} (of {len(adapters)} adapted layers): either the network does not run "
            "them, then leave them out of target_modules; or a fused kernel reads lora_A.weight itself, as Unsloth's "
            "and axolotl's do, then switch it off (Unsloth: load the network with transformers; axolotl: "
            "lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel: false)"
        )


@contextmanager
def keeping_draw(groups: tuple[AdapterGroup, ...]) -> Iterator[None]:
    """Whatever is set inside, the draw is afterwards what it was before."""
    draws = [adapter.lora_A.draw for group in groups for adapter in group.adapters]
    before = [(draw.weight, draw.mirrors, draw.is_reached) for draw in draws]
    try:
        yield
    finally:
        for draw, values in zip(draws, before, strict=True):
            draw.weight, draw.mirrors, draw.is_reached = values


@contextmanager
def using_draw(
    groups: tuple[AdapterGroup, ...], weights: Mapping[str, Tensor], *, keep: bool = False
) -> Iterator[None]:
    """Run the network as one draw, or several (see :func:`set_draw`).

    ``keep`` leaves it set, for checkpointed layers that run again in the backward pass.
    """
    set_draw(groups, weights)
    with _cleared_after(groups, keep):
        yield


@contextmanager
def using_noise(
    groups: tuple[AdapterGroup, ...],
    noise: Mapping[str, Tensor],
    signs: Mapping[str, Tensor] | None = None,
    *,
    keep: bool = False,
) -> Iterator[None]:
    """Run the network with deviations from its means (see :func:`set_noise`); ``keep`` as in :func:`using_draw`."""
    set_noise(groups, noise, signs)
    with _cleared_after(groups, keep):
        yield


@contextmanager
def _cleared_after(groups: tuple[AdapterGroup, ...], keep: bool) -> Iterator[None]:
    try:
        yield
    finally:
        if not keep:
            clear_draw(groups)


@contextmanager
def leaves_for_recomputation(groups: tuple[AdapterGroup, ...], network: nn.Module) -> Iterator[None]:
    """Let checkpointed layers recompute, in the backward pass, with the draw that is set; it stays set.

    Reentrant checkpointing runs a backward pass for each block, and the first would free the graph of the draw that
    all blocks share. So each adapter gets a leaf instead, and the leaves' gradients go on into the draw's graph where
    the network's input ends its own backward pass, after the last block.
    """
    draws = [adapter.lora_A.draw for group in groups for adapter in group.adapters]
    drawn = [(draw, draw.weight) for draw in draws if draw.weight is not None and draw.weight.requires_grad]
    if not drawn:
        yield
        return
    leaves, tensors = [], [weight for _, weight in drawn]
    for draw, weight in drawn:
        draw.weight = weight.detach().requires_grad_()
        leaves.append(draw.weight)
    entry, passed = _Handover.apply(leaves, *tensors), []

    def enter(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        passed.append(module)
        return output + entry.to(output.dtype)

    embeddings: nn.Module = network.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(enter)
    try:
        yield
    finally:
        handle.remove()
    if not passed:
        raise InputError(
            "gradient checkpointing needs the network to look its input embeddings up itself: pass input_ids, or "
            "switch checkpointing off"
        )


class _Handover(torch.autograd.Function):
    """A zero whose backward pass hands the leaves' gradients on to the tensors they stand for."""

    @staticmethod
    def forward(ctx: Any, leaves: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.leaves = leaves
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:
        gradients = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return None, *gradients


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Dropout off inside; every module's own mode afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def is_compiled(network: nn.Module) -> bool:
    """Whether the network or a part of it was compiled in place."""
    return any(module._compiled_call_impl is not None for module in network.modules())


def rows_are_examples(
    network: nn.Module,
    groups: tuple[AdapterGroup, ...],
    inputs: Mapping[str, Tensor],
    *,
    run: Callable[[Mapping[str, Tensor]], Any] | None = None,
) -> bool:
    """Whether the examples of a batch can each have their own weights: false where some adapted layer sees them along
    another dimension than the first (Longformer's attention), or sees something else (DeBERTa's relative positions).

    Runs two examples together, each with its own random weights, and alone, and compares what the ``lora_A`` return.
    ``run`` runs the network on inputs, ``network(**inputs)`` unless given; there an example may take several rows.
    """
    run_network = run or (lambda batch: network(**batch))
    pair = {name: value[[0, -1]] for name, value in inputs.items()}
    generator = torch.Generator().manual_seed(0)
    device = groups[0].adapters[0].lora_A.weight.device
    weights = {g.name: torch.randn(2, len(g), g.columns, g.rank, generator=generator).to(device) for g in groups}
    alone = [{name: value[i : i + 1] for name, value in pair.items()} for i in range(2)]
    outputs: list[Tensor] = []
    layers = [adapter.lora_A for group in groups for adapter in group.adapters]
    hooks = [layer.register_forward_hook(lambda module, args, output: outputs.append(output)) for layer in layers]

    def run_as(drawn: dict[str, Tensor], batch: dict[str, Tensor]) -> list[Tensor]:
        outputs.clear()
        with using_draw(groups, drawn):
            run_network(batch)
        return [output.float() for output in outputs]

    eager = torch.compiler.set_stance("force_eager") if is_compiled(network) else nullcontext()
    try:
        with eager, evaluation_mode(network), torch.no_grad():
            together = run_as(weights, pair)
            for i in range(2):
                single = run_as({name: drawn[i] for name, drawn in weights.items()}, alone[i])
                for one, both in zip(single, together, strict=True):
                    if both.shape[0] != 2 * one.shape[0] or one.shape[1:] != both.shape[1:]:
                        return False
                    mine = both.unflatten(0, (2, -1))[i]
                    if (mine - one).norm() > 0.05 * one.norm():
                        return False
    except RowsError:
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return True


@contextmanager
def without_cache(network: nn.Module) -> Iterator[None]:
    """No keys and values are kept inside, for no later token asks for them; one block's graph then fits all blocks."""
    config: Any = getattr(network, "config", None)
    caching = getattr(config, "use_cache", None)
    if caching:
        config.use_cache = False
    try:
        yield
    finally:
        if caching:
            config.use_cache = caching
