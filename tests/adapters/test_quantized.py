"""Networks whose frozen weights are packed into eight or four bits."""

import copy

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, TorchAoConfig

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, fit
from bayeslora.adapters.quantized import frozen_weight, is_quantized, keep_trainable
from bayeslora.guides.amortized import _description
from tests.conftest import tiny_batch, tiny_dataset, tiny_network

KINDS = ["bert", "llama"]
HEADS = ["classifier", "score"]


@pytest.fixture(scope="module", params=["4bit", "4bit-double", "8bit", "torchao-int8"])
def storage(request):
    pytest.importorskip("torchao" if "torchao" in request.param else "bitsandbytes")
    return request.param


@pytest.fixture
def load(storage, tmp_path):
    """Makes a tiny network, quantised as a checkpoint of it would be on loading."""
    return lambda kind="bert", **options: quantized(kind, storage, tmp_path, **options)


def quantized(kind, storage, folder, *, heads=tuple(HEADS), seed=0):
    if storage == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(heads))
    elif storage == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(heads))
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=storage == "4bit-double",
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=list(heads),
        )
    checkpoint = folder / f"{kind}-{seed}"
    tiny_network(kind, layers=1, seed=seed).save_pretrained(checkpoint)
    return AutoModelForSequenceClassification.from_pretrained(checkpoint, quantization_config=config)


def module(network, **options):
    """B away from zero, no dropout, in training mode."""
    torch.manual_seed(1)
    bayes = BayesLoRA(
        network, MonteCLoRAConfig(**{"r": 2, "num_components": 3, "sample_scaler": 0.3} | options)
    ).train()
    with torch.no_grad():
        for name, parameter in bayes.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    for part in bayes.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return bayes


def step(bayes):
    bayes.zero_grad()
    torch.manual_seed(7)
    loss = bayes(**tiny_batch()).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in bayes.named_parameters() if p.requires_grad}


def distance(found, expected):
    """Relative distance of two gradients."""
    difference = torch.cat([(found[name] - gradient).flatten() for name, gradient in expected.items()])
    return float(difference.norm() / torch.cat([gradient.flatten() for gradient in expected.values()]).norm())


def dequantized(network):
    """The same function in plain layers."""
    plain = copy.deepcopy(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and is_quantized(layer):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            linear.weight.data.copy_(frozen_weight(layer))
            if layer.bias is not None:
                linear.bias.data.copy_(layer.bias)
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, linear)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer", "is_quantized"):
        if hasattr(plain, name):
            delattr(plain, name)
    return plain


@pytest.mark.parametrize("guide", ["amortized", "mean_field"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dequantised_network(kind, guide, load, storage):
    network = load(kind)
    plain = module(dequantized(network), guide=guide)
    bayes = module(network, guide=guide)
    assert not is_quantized(plain)
    loss, gradients = step(bayes)
    expected_loss, expected = step(plain)
    assert gradients.keys() == expected.keys()
    assert any("lora_A" in name for name in gradients)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    bound = 0.03 if storage == "8bit" else 1e-4  # 8-bit layers round their inputs too
    assert abs(loss - expected_loss) < bound
    assert distance(gradients, expected) < bound
    assert distance({n: torch.zeros_like(g) for n, g in gradients.items()}, expected) > bound


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_after_an_evaluation(kind, load):
    """bitsandbytes would repack four-bit weights on the CPU for good, and stop their gradients."""
    bayes = module(load(kind))
    before = step(bayes)
    assert bayes.predict(tiny_dataset(4), 2, progress=False).probs.shape == (4, 2)
    bayes.eval()(**tiny_batch())
    after = step(bayes.train())
    assert torch.equal(after[0], before[0])
    for name, gradient in before[1].items():
        assert torch.equal(after[1][name], gradient), name


def test_fit_on_a_network_prepared_for_training(load, tmp_path):
    """With evaluations in between; the mean network fits the data better, and the packed weights stay."""
    network, data = prepare_model_for_kbit_training(load(), use_gradient_checkpointing=False), tiny_dataset(16)
    bayes = module(network, sample_scaler=0.05)
    frozen = {adapter.name: frozen_weight(adapter.layer).clone() for adapter in bayes.model.groups[0].adapters}

    def loss():
        return -bayes.predict(data, 0, progress=False).sample_log_likelihood.mean()

    before = loss()
    fit(bayes, data, data, output_dir=tmp_path / "run", epochs=24, batch_size=8, learning_rate=2e-2, progress=False)
    assert loss() < before - 0.02
    for adapter in bayes.model.groups[0].adapters:
        assert torch.equal(frozen_weight(adapter.layer), frozen[adapter.name])


def test_deepcopy(load):
    bayes = module(load())
    expected = step(bayes)
    loss, gradients = step(copy.deepcopy(bayes))
    assert torch.equal(loss, expected[0])
    assert distance(gradients, expected[1]) == 0


class TestFolder:
    @pytest.mark.parametrize("kind", KINDS)
    def test_onto_a_freshly_quantised_base(self, kind, load, tmp_path):
        bayes = module(load(kind))
        step(bayes)
        bayes.save_pretrained(tmp_path / "adapter")
        again = BayesLoRA.from_pretrained(tmp_path / "adapter", load(kind))
        data = tiny_dataset(4)
        expected = bayes.predict(data, 3, progress=False).sample_probs
        assert (again.predict(data, 3, progress=False).sample_probs == expected).all()
        network = load(kind)
        keep_trainable(network)  # bitsandbytes' kernel for prediction rounds to bfloat16
        plain = PeftModel.from_pretrained(network, tmp_path / "adapter").eval()
        assert torch.equal(plain(**tiny_batch()).logits, bayes.eval()(**tiny_batch()).logits)

    @pytest.mark.parametrize("kind", KINDS)
    def test_onto_the_base_in_full_precision_and_back(self, kind, load, tmp_path):
        bayes = module(load(kind)).eval()
        bayes.save_pretrained(tmp_path / "packed")
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"{kind}-0")
        full = BayesLoRA.from_pretrained(tmp_path / "packed", base)
        logits = full(**tiny_batch()).logits
        torch.testing.assert_close(full.merge().eval()(**tiny_batch()).logits, logits)
        torch.testing.assert_close(logits, bayes(**tiny_batch()).logits, atol=0.05, rtol=0)
        full.save_pretrained(tmp_path / "full")
        BayesLoRA.from_pretrained(tmp_path / "full", load(kind))

    def test_another_base_is_refused(self, load, tmp_path):
        module(load()).save_pretrained(tmp_path / "adapter")
        for other in (load(seed=5), tiny_network(layers=1, seed=5)):
            with pytest.raises(InputError, match="another base model"):
                BayesLoRA.from_pretrained(tmp_path / "adapter", other)


def test_the_amortized_guide_describes_the_weight_not_its_packing(load):
    packed, plain = module(load()), module(tiny_network(layers=1))
    for ours, theirs in zip(packed.model.groups, plain.model.groups, strict=True):
        for one, other in zip(ours.adapters, theirs.adapters, strict=True):
            assert frozen_weight(one.layer).shape == other.layer.weight.shape
            torch.testing.assert_close(_description(one, 0.0), _description(other, 0.0), atol=0.3, rtol=0)


class TestRefusals:
    def test_merging(self, load):
        with pytest.raises(InputError, match="full precision, and merge there"):
            module(load()).merge()

    def test_a_quantised_head(self, load):
        with pytest.raises(InputError, match=r"'classifier' is quantised .* llm_int8_skip_modules=\['classifier'\]"):
            module(load(heads=["nothing"]))

    def test_a_network_that_has_been_repacked(self, load, storage):
        if not storage.startswith("4bit"):
            pytest.skip("four-bit layers alone are repacked")
        network = load()
        network.bert.pooler.dense.weight.quant_state.packing_format_for_cpu = True
        with pytest.raises(InputError, match="freshly loaded"):
            module(network)

    def test_a_packing_that_cannot_be_read(self):
        class Packed(nn.Module):
            pass

        with pytest.raises(InputError, match="the weight of a Packed"):
            frozen_weight(Packed())
