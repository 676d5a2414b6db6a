"""The network with an adapter merged into its weights: a plain transformers model."""

import copy
from collections import Counter
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from bayeslora.adapters.drawing import clear_draw
from bayeslora.adapters.groups import find_groups
from bayeslora.adapters.quantized import is_quantized
from bayeslora.adapters.sharding import refuse_in_shards
from bayeslora.errors import InputError
from bayeslora.inference.draws import Draws
from bayeslora.posterior import Posterior


def merged(bayes: Posterior, draw: int | None = None, seed: int = 0) -> nn.Module:
    """See :meth:`bayeslora.BayesLoRA.merge`."""
    if is_quantized(bayes.network):
        raise InputError(
            "merging into quantised weights would round the adapter away: save_pretrained it, open it with "
            "from_pretrained on the same base model in full precision, and merge there"
        )
    refuse_in_shards(bayes.network, "merging")
    clear_draw(bayes.model.groups)
    network = copy.deepcopy(bayes.network)
    _untie(network)
    if draw is not None:
        drawn = Draws(bayes, 1, seed, first=draw).matrices(0, 1)
        with torch.no_grad():
            for group in find_groups(network):
                for adapter, columns in zip(group.adapters, drawn[group.name], strict=True):
                    adapter.lora_A.weight.copy_(columns.mT)
    vars(network.get_base_model()).pop("accepts_loss_kwargs", None)  # said of our objective, not of its own loss
    return network.merge_and_unload()


def _untie(network: PeftModel) -> None:
    """Give adapted layers whose frozen weight is another's too, an output layer tied to the embeddings, their own."""
    uses = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    for adapter in (adapter for group in find_groups(network) for adapter in group.adapters):
        base: Any = adapter.layer.get_base_layer()
        if uses[id(base.weight)] > 1:
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            network.get_base_model().config.tie_word_embeddings = False
