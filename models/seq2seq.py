"""The likelihood of a target, for networks with an encoder and a decoder (T5, BART, Whisper)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayeslora.errors import InputError, Where
from bayeslora.models.language import NextTokenLikelihood
from bayeslora.models.likelihoods import NOT_SCORED
from bayeslora.models.network import plain, vocabulary_size


class TargetLikelihood(NextTokenLikelihood):
    """Targets: the product of the probabilities of their tokens, each given the source and all target tokens before.

    ``labels`` are ``(batch, T)``, the target's tokens with the one that ends it, and -100 in the padding. The decoder
    reads them moved by one, behind the token that it starts from, as transformers moves them.

    Args:
        reduction: ``"mean"``, in nats per token, transformers' own loss; or ``"sum"``, in nats per target. See
            :class:`NextTokenLikelihood`.

    Example:
        >>> TargetLikelihood("sum").describe()
        {'kind': 'target', 'reduction': 'sum'}

    References:
        Sutskever, Vinyals and Le (2014), *Sequence to Sequence Learning with Neural Networks*, Eq. 1.
    """

    loss_type = None
    without_labels = (
        "the sources have no targets, so no token is scored: give their tokens as labels, or let the network write "
        "with bayes.generate()"
    )

    def outputs(self, network: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None = None) -> Tensor:
        """Log-likelihood of each target in nats, and the number of its tokens: ``(batch, 2)``.

        Without labels, logits of a target's first token, ``(batch, 1, vocabulary)``.
        """
        if labels is None:
            source = next(value for name, value in inputs.items() if name.startswith("input"))
            begin = torch.full((len(source), 1), start_token(network), device=source.device)
            return network(**{"decoder_input_ids": begin, **inputs}, use_cache=False).logits
        scored = labels != NOT_SCORED
        logits = network(**inputs, decoder_input_ids=moved(network, labels), use_cache=False).logits
        losses = nn.functional.cross_entropy(logits[scored].float(), labels[scored], reduction="none")
        log_probs = losses.new_zeros(labels.shape)
        log_probs[scored] = -losses
        log_likelihood = log_probs.sum(-1)
        return torch.stack([log_likelihood, scored.sum(-1).to(log_likelihood)], -1)

    def count(self, labels: Tensor) -> Tensor:
        """The tokens of the targets, where they are averaged over; else the targets."""
        return torch.tensor(len(labels)) if self.reduction == "sum" else (labels != NOT_SCORED).sum()

    def columns_read(self, arguments: frozenset[str]) -> frozenset[str] | None:
        own = {"decoder_input_ids", "decoder_inputs_embeds"}  # which the labels make
        return arguments - own if type(self).outputs is TargetLikelihood.outputs else None

    def check_label(self, label: np.ndarray, example: Mapping[str, Any], where: Where, network: nn.Module) -> None:
        """A target has a token, and tokens of the network alone."""
        vocabulary = vocabulary_size(network)
        if label.ndim != 1:
            raise where.refused(f"a target is one list of tokens, got labels of shape {label.shape}")
        scored = label[label != NOT_SCORED]
        if not scored.size:
            raise where.refused("no token of its target is scored: its labels are all -100, or there are none")
        if (label[: len(scored)] == NOT_SCORED).any():
            raise where.refused("a label of -100 stands before the end of the target, which the decoder has to read")
        if vocabulary and not ((scored >= 0) & (scored < vocabulary)).all():
            raise where.refused(f"labels of a target are tokens, 0 to {vocabulary - 1}, and -100 behind them")

    def describe(self) -> dict[str, Any]:
        return {"kind": "target", "reduction": self.reduction}


def start_token(network: nn.Module) -> int:
    """What a decoder reads first.

    Raises:
        InputError: where the configuration does not say it.
    """
    config: Any = plain(network).config
    for name in ("decoder_start_token_id", "bos_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            return token
    raise InputError(
        f"{type(plain(network)).__name__} does not say which token its decoder starts from: set "
        "network.config.decoder_start_token_id"
    )


def moved(network: nn.Module, labels: Tensor) -> Tensor:
    """What the decoder reads to give each label: those before it, behind the token to start from."""
    start = labels.new_full((len(labels), 1), start_token(network))
    before = labels[:, :-1]
    filling = getattr(plain(network).config, "pad_token_id", None) or 0  # behind the target, where nothing is scored
    return torch.cat([start, before.masked_fill(before == NOT_SCORED, filling)], 1)
