"""Exported draws open in plain PEFT as the networks that were drawn."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig
from bayeslora.adapters.drawing import using_draw
from bayeslora.inference.draws import Draws, run_as
from tests.conftest import tiny_batch, tiny_network
from tests.language import tiny_language_model, words

CONFIGS = {
    "plain": {},
    "explicit": {"components": "explicit"},
    "ranks": {"rank_pattern": {"q_proj": 2}},
}


def fitted(network, **options):
    bayes = BayesLoRA(network, MonteCLoRAConfig(r=4, sample_scaler=0.5, **options)).eval()
    for module in bayes.network.modules():
        if hasattr(module, "lora_B"):
            for layer in module.lora_B.values():
                torch.nn.init.normal_(layer.weight, std=0.3)
    return bayes


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_each_draw_opens_in_peft_as_the_network_that_was_drawn(tmp_path, name):
    bayes = fitted(tiny_language_model(), **CONFIGS[name])
    batch = {"input_ids": torch.tensor([words("where is the big red ball ?")])}
    folders = bayes.export_draws(tmp_path / "draws", 2, seed=7)
    assert [folder.name for folder in folders] == ["draw-000", "draw-001"]
    draws, seen = Draws(bayes, 2, seed=7), []
    for index, folder in enumerate(folders):
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        alone = PeftModel.from_pretrained(tiny_language_model(), folder).eval()
        with using_draw(bayes.model.groups, draws.matrices(index, 1)):
            expected = bayes.network(**batch).logits
        torch.testing.assert_close(alone(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        seen.append(expected)
    assert (seen[0] - seen[1]).abs().max() > 1e-2
    mean = PeftModel.from_pretrained(tiny_language_model(), tmp_path / "draws" / "mean").eval()
    torch.testing.assert_close(mean(**batch).logits, bayes.network(**batch).logits)
    index = json.loads((tmp_path / "draws" / "draws.json").read_text(encoding="utf-8"))
    assert index == {"seed": 7, "mean": "mean", "draws": ["draw-000", "draw-001"]}


@torch.no_grad()
def test_the_average_of_exported_draws_is_the_posterior_predictive(tmp_path):
    bayes = fitted(tiny_network())
    batch = tiny_batch(3)
    labels = batch.pop("labels")
    examples = [{name: value[i] for name, value in batch.items()} | {"labels": int(labels[i])} for i in range(3)]
    expected = bayes.predict(examples, num_samples=3, seed=0, progress=False).probs
    served = PeftModel.from_pretrained(tiny_network(), bayes.export_draws(tmp_path / "draws", 3)[0], "draw-000")
    for name in ("draw-001", "draw-002"):
        served.load_adapter(tmp_path / "draws" / name, name)
    probs = 0
    for name in ("draw-000", "draw-001", "draw-002"):
        served.set_adapter(name)
        probs = probs + served.eval()(**batch).logits.softmax(-1) / 3
    torch.testing.assert_close(probs.double(), torch.tensor(expected), atol=1e-5, rtol=1e-4)


SERVED = {
    "plain": {},
    "ranks": {"rank_pattern": {"q_proj": 2}},
    "alphas": {"lora_options": {"alpha_pattern": {"q_proj": 3}}, "rank_pattern": {"v_proj": 9}},
    "rslora": {"use_rslora": True},
    "blocks": {"layers_to_transform": (1,), "target_modules": ("q_proj", "down_proj")},
}


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_for_a_server_each_draw_is_the_same_network(tmp_path, name):
    """One rank and one scale, as vLLM and SGLang read adapter_config.json; computed here as they compute it."""
    bayes = fitted(tiny_language_model(), **SERVED[name])
    batch = {"input_ids": torch.tensor([words("where is the big red ball ?")])}
    folders = bayes.export_draws(tmp_path / "draws", 2, seed=7, for_server=True)
    index = json.loads((tmp_path / "draws" / "draws.json").read_text(encoding="utf-8"))
    rank = 16 if name == "alphas" else 8
    assert index["max_lora_rank"] == rank
    draws = Draws(bayes, 2, seed=7)
    for number, folder in enumerate([tmp_path / "draws" / "mean", *folders], -1):
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert (config["r"], config["use_rslora"], config["modules_to_save"]) == (rank, False, None)
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
        assert isinstance(config["target_modules"], list)
        tensors = load_file(folder / "adapter_model.safetensors")
        matrices = draws.matrices(number, 1) if number >= 0 else None
        expected = run_as(bayes, matrices, lambda: bayes.network(**batch).logits)
        served = tiny_language_model()
        for key in [key for key in tensors if ".lora_A." in key]:
            layer = served.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            first, last = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            assert (len(first), last.shape[1]) == (rank, rank)
            layer.weight += config["lora_alpha"] / config["r"] * last @ first
        torch.testing.assert_close(served(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        alone = PeftModel.from_pretrained(tiny_language_model(), folder).eval()
        torch.testing.assert_close(alone(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_no_server_loads_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"trained whole.*bayes\.merge"):
        fitted(tiny_network()).export_draws(tmp_path / "draws", 1, for_server=True)
    assert not (tmp_path / "draws").exists()


def test_nothing_is_overwritten(tmp_path):
    bayes = fitted(tiny_language_model())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(InputError, match="holds something"):
        bayes.export_draws(tmp_path / "taken", 1)
    with pytest.raises(InputError, match="at least 1"):
        bayes.export_draws(tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="no draws"):
        BayesLoRA(tiny_network(), MonteCLoRAConfig(r=2, sample_scaler=0)).export_draws(tmp_path / "none", 1)
