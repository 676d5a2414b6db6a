"""Adapters as other programs write them: PEFT's two files, with the fields of the PEFT that each had."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bayeslora.storage.peft_files import open_peft_adapter
from tests.language import tiny_language_model

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMMON = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "a-model",
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "rank_pattern": {},
    "target_modules": LAYERS,
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}
WRITERS = {
    "Unsloth": {
        "base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit",
        "fan_in_fan_out": False,
        "layer_replication": None,
        "lora_dropout": 0,
        "revision": "unsloth",
    },
    "axolotl": {
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": None,
        "lora_bias": False,
        "lora_dropout": 0.05,
        "revision": None,
    },
    "LLaMA-Factory": {
        "corda_config": None,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "layer_replication": None,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "revision": None,
        "trainable_token_indices": None,
    },
}


@pytest.mark.parametrize("writer", WRITERS)
def test_opens_as_the_network_that_was_trained(writer, tmp_path):
    """Beside checkpoints, a tokenizer and a model card."""
    torch.manual_seed(0)
    trained = get_peft_model(tiny_language_model(), LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    trained.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(COMMON | WRITERS[writer]), encoding="utf-8")
    for name in ("README.md", "training_args.bin", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / "checkpoint-5").mkdir()
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = trained(tokens).logits
        found = open_peft_adapter(tmp_path, tiny_language_model()).eval()(tokens).logits
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(tiny_language_model()(tokens).logits, expected)
