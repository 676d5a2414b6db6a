"""Options of a choice in one row: what they share, the prompt, is read once.

A question with four options is four texts that differ in their last tokens. In one row, the prompt comes first and the
options one after the other, each at the positions that it has behind the prompt, and each sees the prompt and itself:
a mask over pairs of tokens and the tokens' positions say so. The probabilities are those of the four texts, up to
rounding, for two to three times fewer tokens. It is done where a trial on the network shows that it listens to both.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bayeslora.adapters.modes import evaluation_mode, is_compiled, without_cache
from bayeslora.adapters.sampled import SampledLinear

LEAST_GAIN = 1.25  # times fewer tokens, below which texts are left as they are
MARGIN = 5.0  # how many times closer than with a wrong mask or wrong positions the trial must be

_tried: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


class SharedPrompt(NamedTuple):
    """A batch of choices in one row each.

    ``inputs``: the network's arguments, with L tokens a row; ``needed``: where logits are, ``(batch, L)``, the token
    before each scored one; ``source``: for each scored token, in the order of ``answer.nonzero()``, which of these.
    """

    inputs: dict[str, Tensor]
    needed: Tensor
    source: Tensor


def pack(network: nn.Module, tokens: Tensor, mask: Tensor, answer: Tensor) -> SharedPrompt | None:
    """Texts ``(batch, C, T)`` in one row a question.

    Args:
        network: Its attention decides how it is told what sees what, and how far.
        tokens, mask: The texts, and 1 where they are not padding.
        answer: True at the scored tokens; an option without any is not there.

    Returns:
        None where that saves little, a question's options share no token, padding lies before or in texts, or they are
        longer than attention reaches.
    """
    if tokens.shape[-1] > _reach(network):
        return None
    places = torch.arange(tokens.shape[-1], device=tokens.device)
    real = mask.bool() & answer.any(-1, keepdim=True)
    if bool((real[..., 1:] & ~real[..., :-1]).any()) or not bool(real.any((1, 2)).all()):
        return None
    first = torch.where(answer, places, tokens.shape[-1]).amin(-1)  # of an option's scored tokens
    example = tokens.gather(1, real.any(-1).int().argmax(1)[:, None, None].expand(-1, 1, tokens.shape[-1]))
    same = ((tokens == example) & real) | ~real.any(-1, keepdim=True)
    shared = torch.minimum(same.all(1).int().cumprod(-1).sum(-1), first.amin(1))  # (batch,) tokens
    own = (real.sum(-1) - shared[:, None]).clamp(min=0)  # (batch, C) tokens behind them
    length = int((shared + own.sum(1)).amax())
    if int(shared.amin()) == 0 or LEAST_GAIN * length * len(tokens) > tokens.numel():
        return None
    starts = shared[:, None] + own.cumsum(1) - own
    at = torch.where(places < shared[:, None, None], places, starts[..., None] + places - shared[:, None, None])
    rows = torch.arange(len(tokens), device=tokens.device)[:, None, None].expand_as(tokens)[real]
    options = torch.arange(tokens.shape[1], device=tokens.device)[:, None].expand_as(tokens)
    is_shared = (places < shared[:, None, None]).expand_as(tokens)
    option = tokens.new_full((len(tokens), length), -2)  # -2: padding, -1: the prompt
    option[rows, at[real]] = torch.where(is_shared, -1, options)[real]
    packed, positions = tokens.new_zeros(len(tokens), length), tokens.new_zeros(len(tokens), length)
    packed[rows, at[real]] = tokens[real]
    positions[rows, at[real]] = places.expand_as(tokens)[real]
    here, there = option[:, :, None], option[:, None, :]
    sees = ((there == -1) | (here == there)) & _earlier(length, tokens.device)
    before = torch.where(places == shared[:, None, None], shared[:, None, None] - 1, at - 1)[answer]
    needed = torch.zeros(len(tokens), length, dtype=torch.bool, device=tokens.device)
    question = answer.nonzero()[:, 0]
    needed[question, before] = True
    order = needed.flatten().cumsum(0) - 1
    inputs = {"input_ids": packed, "attention_mask": _as_argument(network, sees), "position_ids": positions}
    return SharedPrompt(inputs, needed, order[question * length + before])


def log_likelihoods(
    logits_at: Callable[[nn.Module, Mapping[str, Any], Tensor], Tensor],
    network: nn.Module,
    shared: SharedPrompt,
    tokens: Tensor,
    answer: Tensor,
) -> Tensor:
    """log p of every option's scored tokens given all before them, in nats: ``(batch, C)``.

    Args:
        logits_at: :func:`bayeslora.models.language.logits_at`.
        network: A causal language model.
        shared: :func:`pack` of these.
        tokens, answer: As there.
    """
    logits = logits_at(network, shared.inputs, shared.needed).float()
    scored = logits[shared.source, tokens[answer]] - logits.logsumexp(-1)[shared.source]
    return scored.new_zeros(tokens.shape).masked_scatter(answer, scored).sum(-1)


def can_share(network: nn.Module, score: Callable[..., Tensor]) -> bool:
    """Whether a network reads options behind one prompt as it reads them one by one: tried once, and remembered.

    Args:
        network: A causal language model, adapted or not.
        score: From network, tokens, mask, answer and what :func:`pack` made of them, or None, to log p, ``(batch, C)``.
    """
    if is_compiled(network):  # a row of another length would be another graph
        return False
    if network not in _tried:
        _tried[network] = _try(network, score)
    return _tried[network]


def _try(network: nn.Module, score: Callable[..., Tensor]) -> bool:
    """Compare with the texts one by one; a wrong mask and wrong positions must both be much farther away."""
    config, device = _base(network).config, next(network.parameters()).device
    if "position_ids" not in inspect.signature(_base(network).forward).parameters:
        return False
    if config._attn_implementation not in ("eager", "sdpa"):
        return False
    if device.type == "meta" or any(parameter.device != device for parameter in network.parameters()):
        return False
    tokens, mask, answer = (part.to(device) for part in _trial(min(config.get_text_config().vocab_size, 50)))
    with torch.no_grad(), evaluation_mode(network), without_cache(network), _without_draw(network):
        shared = pack(network, tokens, mask, answer)
        if shared is None:
            return False
        length = shared.needed.shape[1]
        wrong: list[dict[str, Tensor]] = [
            {"position_ids": torch.arange(length, device=device).expand(len(tokens), -1)},
            {"attention_mask": _as_argument(network, _earlier(length, device).expand(len(tokens), -1, -1))},
        ]
        others = [shared._replace(inputs=shared.inputs | change) for change in wrong]
        try:
            alone, found, *rest = (score(network, tokens, mask, answer, how) for how in (None, shared, *others))
        except (RuntimeError, TypeError, ValueError, IndexError):  # it does not take such arguments
            return False
    error = float((found - alone).abs().max())
    return all(MARGIN * error < float((other - alone).abs().max()) for other in rest)


def _trial(vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two questions with three options of different lengths behind prompts of different lengths."""
    random = torch.Generator().manual_seed(0)
    texts = torch.randint(vocabulary, (2, 1, 18), generator=random).repeat(1, 3, 1)
    answer, mask = torch.zeros(2, 3, 18, dtype=torch.bool), torch.zeros(2, 3, 18, dtype=torch.long)
    for question, prompt in enumerate((12, 9)):
        for option, size in enumerate((3, 1, 5)):
            end = prompt + size
            texts[question, option, prompt:end] = torch.randint(vocabulary, (size,), generator=random)
            answer[question, option, prompt:end] = True
            mask[question, option, :end] = 1
    return texts, mask, answer


def _base(network: nn.Module) -> Any:
    """The transformers model."""
    return network.get_base_model() if hasattr(network, "get_base_model") else network  # type: ignore[operator]


def _reach(network: nn.Module) -> float:
    """How many tokens back attention sees in every layer."""
    config = _base(network).config.get_text_config()
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((limit for limit in limits if limit), default=math.inf)


def _earlier(length: int, device: torch.device) -> Tensor:
    """Each token sees itself and those before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _as_argument(network: nn.Module, sees: Tensor) -> Tensor:
    """``(batch, L, L)`` as the attention takes it: truth values, or what is added to scores."""
    if _base(network).config._attn_implementation == "sdpa":
        return sees[:, None]
    return torch.zeros(sees.shape, device=sees.device).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]


@contextmanager
def _without_draw(network: nn.Module) -> Iterator[None]:
    """Inside, adapters are at their mean, for a batch of any size; afterwards draws are what they were."""
    draws = [module.draw for module in network.modules() if isinstance(module, SampledLinear)]
    before = [(draw.weight, draw.signs, draw.is_reached) for draw in draws]
    for draw in draws:
        draw.weight = draw.signs = None
    try:
        yield
    finally:
        for draw, values in zip(draws, before, strict=True):
            draw.weight, draw.signs, draw.is_reached = values
