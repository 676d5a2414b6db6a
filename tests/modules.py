"""Modules and Pyro models on tiny networks, and what to compare of them."""

import pyro
import torch
import transformers

from bayeslora import BayesLoRA, MonteCLoRAConfig
from bayeslora.models import MonteCLoRA
from tests.conftest import VOCABULARY, tiny_batch, tiny_network

TARGETS = ["query", "output.dense"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CONFIGS = {
    "longformer": lambda: transformers.LongformerConfig(attention_window=4, max_position_embeddings=40, **SMALL),
    "deberta": lambda: transformers.DebertaV2Config(
        relative_attention=True, position_buckets=4, share_att_key=True, pos_att_type=["p2c", "c2p"], **SMALL
    ),
    "t5": lambda: transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, eos_token_id=1
    ),
}
LAST_BLOCK = {
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "down_proj"],
    "t5": ["q", "wo"],
    "deberta": ["key_proj", "output.dense"],
}


def module(kind="bert", *, seed=0, network_options=None, **options):
    options = {"r": 2, "num_components": 3, "sample_scaler": 0.05} | options
    network = tiny_network(kind, seed=seed, **(network_options or {}))
    torch.manual_seed(seed)
    return BayesLoRA(network, MonteCLoRAConfig(**options)).train()


def randomize_b(bayes):
    """LoRA's B starts at zero, where A has no effect."""
    with torch.no_grad():
        for name, parameter in bayes.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return bayes


def inputs_only(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def fitted(kind="bert", **options):
    """A module whose every trained number differs from its initial value."""
    bayes = randomize_b(module(kind, **options))
    with torch.no_grad():
        for parameter in [*bayes.guide.parameters(), *bayes.model.parameters(), *head(bayes)]:
            parameter.add_(torch.rand_like(parameter) / 4)
    return bayes.eval()


def head(bayes):
    return [p for name, p in bayes.network.named_parameters() if "modules_to_save" in name]


def logits(network):
    with torch.no_grad():
        return network(**inputs_only(tiny_batch())).logits


def network_of(kind, seed=0):
    if kind not in CONFIGS:
        return tiny_network(kind, seed=seed)
    torch.manual_seed(seed)
    config = CONFIGS[kind]()
    config.update({"vocab_size": VOCABULARY, "pad_token_id": 0, "num_labels": 2})
    return transformers.AutoModelForSequenceClassification.from_config(config)


def adapted(kind="bert", *, last_block=False, **options):
    """Draws that differ visibly, of all blocks or of the second alone."""
    if last_block:
        options |= {"layers_to_transform": (1,), "target_modules": LAST_BLOCK.get(kind, ["query", "output.dense"])}
    config = MonteCLoRAConfig(**{"r": 2, "num_components": 3, "sample_scaler": 0.3} | options)
    return randomize_b(BayesLoRA(network_of(kind), config)).eval()


def small_model(**options):
    layers, kind = options.pop("layers", 2), options.pop("kind", "bert")
    options = {"r": 2, "num_components": 3, "target_modules": TARGETS, "sample_scaler": 0.1} | options
    return MonteCLoRA(tiny_network(kind, layers=layers), MonteCLoRAConfig(**options))


def trace(fn, *args, **kwargs):
    return pyro.poutine.trace(fn).get_trace(*args, **kwargs)
