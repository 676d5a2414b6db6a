"""Every option of PEFT's LoraConfig: what was fitted with it comes back as it was, or it is refused before training."""

import dataclasses
import warnings
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig
from bayeslora.inference.predict import Collator
from tests.architectures import ARCHITECTURES
from tests.conftest import tiny_network

ARCHITECTURE = ARCHITECTURES["llama"]
TARGETS = ["q_proj", "v_proj", "down_proj"]

# Each option with values other than its default.
VALUES: dict[str, list[Any]] = {
    "r": [3],
    "lora_alpha": [5],
    "lora_dropout": [0.3],
    "target_modules": ["all-linear", r".*\.1\.self_attn\.(q|k)_proj", ["layers.0.mlp.up_proj"]],
    "exclude_modules": [["v_proj"], r".*layers\.0.*"],
    "fan_in_fan_out": [True],
    "bias": ["all", "lora_only"],
    "use_rslora": [True],
    "modules_to_save": [["norm"], ["layers.1.input_layernorm"], ["embed_tokens"]],
    "init_lora_weights": [
        False,
        "gaussian",
        "orthogonal",
        "pissa",
        "pissa_niter_2",
        "olora",
        "eva",
        "corda",
        "loftq",
        "lora_ga",
    ],
    "layers_to_transform": [[1], 0],
    "layers_pattern": ["layers"],
    "rank_pattern": [{"q_proj": 3}, {r".*\.1\..*_proj": 4}],
    "alpha_pattern": [{"q_proj": 3}, {r"^model\.layers\.1.*": 30}, {r".*(q|v)_proj": 1, "down_proj": 7}],
    "megatron_config": [{"tensor_model_parallel_size": 1}],
    "trainable_token_indices": [[3, 5]],
    "loftq_config": [{"loftq_bits": 4}],
    "eva_config": [{}],
    "corda_config": [{}],
    "lora_ga_config": [{}],
    "use_dora": [True],
    "velora_config": [{}],
    "alora_invocation_tokens": [[3]],
    "use_qalora": [True],
    "qalora_group_size": [8],
    "monteclora_config": [{}],
    "layer_replication": [[[0, 2], [1, 2]]],
    "lora_bias": [True],
    "target_parameters": [["self_attn.q_proj.weight"]],
    "use_bdlora": [{}],
    "arrow_config": [{}],
    "kasa_config": [{}],
    "ensure_weight_tying": [True],
}
# Set by us or by PEFT, or without meaning for what an adapter computes.
OTHERS = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "megatron_core",
    "runtime_config",
}
WORKING = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "loftq_config",
}  # which PEFT drops where init_lora_weights is not "loftq"


def test_nothing_is_said_that_a_user_cannot_act_on():
    """Of what PEFT asks transformers for."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        BayesLoRA(tiny_network(), MonteCLoRAConfig(r=2))
    assert not [one for one in said if "is_gradient_checkpointing" in str(one.message)]


def test_the_table_is_complete():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    unknown = fields - VALUES.keys() - OTHERS
    assert not unknown, f"PEFT {peft.__version__} has new options: say here what becomes of them"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "base"
    ARCHITECTURE.save_base(folder)
    return folder


def train(bayes):
    optimizer = torch.optim.Adam([p for p in bayes.parameters() if p.requires_grad], 0.02)
    batch = Collator.for_network(bayes.network)(ARCHITECTURE.examples())
    bayes.train()
    for _ in range(2):
        optimizer.zero_grad()
        bayes(**batch).loss.backward()
        optimizer.step()
    return bayes.eval()


def check_comes_back(bayes, base, folder):
    train(bayes).save_pretrained(folder)
    examples = ARCHITECTURE.examples()
    expected = bayes.predict(examples, num_samples=2, progress=False).sample_probs
    again = BayesLoRA.from_pretrained(folder, ARCHITECTURE.load(base, seed=8))
    found = again.predict(examples, num_samples=2, progress=False).sample_probs
    np.testing.assert_allclose(found, expected, atol=1e-6)
    inputs = Collator.for_network(bayes.network)(examples)
    inputs.pop("labels")
    plain = PeftModel.from_pretrained(ARCHITECTURE.load(base, seed=9), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, bayes.network(**inputs).logits, rtol=1e-5, atol=1e-6)


def all_options():
    return [
        pytest.param(name, value, id=f"{name}-{index}")
        for name, values in VALUES.items()
        for index, value in enumerate(values)
    ]


def build(network, name, value):
    """With the option as one of our own words where it is one, else among ``lora_options``."""
    own = {field.name for field in dataclasses.fields(MonteCLoRAConfig)}
    words = {"r": 2, "target_modules": TARGETS}
    words |= {name: value} if name in own else {"lora_options": {name: value}}
    if name == "layers_pattern":
        words["layers_to_transform"] = [0]
    return BayesLoRA(network, MonteCLoRAConfig(**words))


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:fan_in_fan_out is set to True:UserWarning")
@pytest.mark.parametrize(("name", "value"), all_options())
def test_comes_back_or_is_refused(base, tmp_path, name, value):
    refused = name not in WORKING or (name == "init_lora_weights" and value not in (False, "gaussian", "orthogonal"))
    network = ARCHITECTURE.load(base, seed=1)
    if refused:
        with pytest.raises(InputError, match=name):
            build(network, name, value)
        return
    check_comes_back(build(network, name, value), base, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize(
    "options",
    [
        {"alpha_pattern": {r".*\.0.*": 40}, "rank_pattern": {"q_proj": 5}},
        {"modules_to_save": ["score"], "bias": "all"},
        {"use_rslora": True, "alpha_pattern": {"v_proj": 3}},
    ],
)
def test_of_a_peft_model(base, tmp_path, options):
    lora = LoraConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS", **options)
    check_comes_back(BayesLoRA(get_peft_model(ARCHITECTURE.load(base, seed=1), lora)), base, tmp_path / "adapter")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_peft_model_whose_base_was_changed_is_refused(base, init):
    lora = LoraConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS", init_lora_weights=init)
    with pytest.raises(InputError, match=r"init_lora_weights must be .* the others change the base weights"):
        BayesLoRA(get_peft_model(ARCHITECTURE.load(base, seed=1), lora))


def test_of_a_peft_model_that_eva_began(base, tmp_path):
    """EVA decides A and its ranks when it begins, and changes nothing else."""
    network = get_peft_model(
        ARCHITECTURE.load(base, seed=1), LoraConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS")
    )
    network.peft_config["default"].init_lora_weights = "eva"
    check_comes_back(BayesLoRA(network), base, tmp_path / "adapter")
