"""A draw reaches every adapted layer, or an error names those that it does not reach."""

import pyro
import pytest
import torch
from peft.tuners.lora import LoraLayer
from pyro.infer.autoguide import AutoNormal
from torch import nn

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig
from bayeslora.inference.generation import token_uncertainty
from bayeslora.inference.predict import Collator
from tests.architectures import ARCHITECTURES
from tests.conftest import tiny_batch, tiny_dataset, tiny_network
from tests.language import tiny_language_model

CONFIG = MonteCLoRAConfig(r=2, target_modules=["query", "value"])
MESSAGE = r"the draw did not arrive in .*0\.attention\.self\.query \(of 4 adapted layers\).*lora_mlp_kernel"


def fuse(network: nn.Module, name: str) -> None:
    """What fused kernels do: one function of the input and of ``lora_A.weight`` itself."""
    layer = network.get_base_model().get_submodule(name)
    assert isinstance(layer, LoraLayer)
    a, b, scale = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]
    layer.forward = lambda x: layer.base_layer(x) + scale * nn.functional.linear(x, b.weight @ a.weight)


@pytest.fixture
def fused():
    bayes = BayesLoRA(tiny_network(), CONFIG)
    fuse(bayes.network, "bert.encoder.layer.0.attention.self.query")
    return bayes


class TestFusedKernels:
    @pytest.mark.parametrize("noise", ["shared", "per_example"])
    def test_training(self, noise):
        bayes = BayesLoRA(tiny_network(), CONFIG.replace(noise=noise)).train()
        fuse(bayes.network, "bert.encoder.layer.0.attention.self.query")
        with pytest.raises(InputError, match=MESSAGE):
            bayes(**tiny_batch())

    def test_training_with_a_guide_of_another_kind(self):
        bayes = BayesLoRA(tiny_network(), CONFIG.replace(normalization="elbo"), guide=AutoNormal).train()
        bayes.num_examples = 6
        fuse(bayes.network, "bert.encoder.layer.0.attention.self.query")
        with pytest.raises(InputError, match=MESSAGE):
            bayes(**tiny_batch())

    def test_gradient_checkpointing(self, fused):
        fused.activation_checkpointing_enable()
        with pytest.raises(InputError, match=MESSAGE):
            fused.train()(**tiny_batch())

    def test_prediction(self, fused):
        with pytest.raises(InputError, match=MESSAGE):
            fused.predict(tiny_dataset(4), num_samples=2, progress=False)

    def test_the_mean_needs_no_draw(self, fused):
        assert fused.predict(tiny_dataset(4), num_samples=0, progress=False).probs.shape == (4, 2)
        assert torch.isfinite(fused.eval()(**tiny_batch()).loss)

    def test_generation_and_token_uncertainty(self):
        bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=2, target_modules=["q_proj"]))
        fuse(bayes.network, "model.layers.1.self_attn.q_proj")
        for mode in ("draws", "mixture"):
            with pytest.raises(InputError, match=r"did not arrive in model\.layers\.1"):
                bayes.generate([[5, 6]], num_samples=2, mode=mode, max_new_tokens=2, progress=False)
        with pytest.raises(InputError, match=r"did not arrive in model\.layers\.1"):
            token_uncertainty(bayes, [{"input_ids": [5, 6, 7], "attention_mask": [1] * 3, "labels": [5, 6, 7]}])

    @pytest.mark.filterwarnings("ignore::UserWarning")  # torch.compile looks at .grad of whatever it meets
    def test_compiled(self, fused):
        fused.compile(backend="eager")
        with pytest.raises(InputError, match=MESSAGE):
            fused.train()(**tiny_batch())


class TestLayersThatDoNotRun:
    def test_a_layer_that_the_network_never_calls(self):
        network = tiny_network()
        network.bert.encoder.layer[0].spare = nn.Linear(16, 16)
        bayes = BayesLoRA(network, CONFIG.replace(target_modules=["query", "spare"])).train()
        with pytest.raises(InputError, match=r"arrive in bert\.encoder\.layer\.0\.spare.*leave them out of target_mod"):
            bayes(**tiny_batch())

    @pytest.mark.parametrize("name", ["wav2vec2", "whisper", "opt", "bart"])
    def test_layers_left_out_at_random_are_not_an_error(self, name, monkeypatch):
        """LayerDrop: in training a layer may be left out, and the draw is there when it runs."""
        architecture = ARCHITECTURES[name]
        drop = {
            "wav2vec2": ["layerdrop"],
            "whisper": ["encoder_layerdrop"],
            "opt": ["layerdrop"],
            "bart": ["encoder_layerdrop", "decoder_layerdrop"],
        }[name]
        bayes = BayesLoRA(architecture.network(**dict.fromkeys(drop, 1.0)), MonteCLoRAConfig(r=2)).train()
        batch = Collator.for_network(bayes.network)(architecture.examples())
        bayes(**batch).loss.backward()
        layers = [a.lora_A for group in bayes.model.groups for a in group.adapters]
        assert not all(layer.draw.is_reached for layer in layers)
        bayes.eval().predict(architecture.examples(), num_samples=2, progress=False)

    def test_the_draw_of_the_step_is_left_for_the_backward_pass(self):
        """Looking for layers that were left out must not change what recomputed layers see."""
        architecture = ARCHITECTURES["opt"]
        gradients = []
        for checkpointed in (False, True):
            torch.manual_seed(0)
            bayes = BayesLoRA(architecture.network(layerdrop=1.0, dropout=0.0), MonteCLoRAConfig(r=2)).train()
            if checkpointed:
                bayes.activation_checkpointing_enable()
            torch.manual_seed(3)
            bayes(**Collator.for_network(bayes.network)(architecture.examples())).loss.backward()
            gradients.append({name: p.grad.clone() for name, p in bayes.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, msg=name)


class TestOneNetworkUsedAgain:
    def test_a_second_posterior_on_a_network_that_carries_one(self):
        network = tiny_network()
        BayesLoRA(network, CONFIG)
        with pytest.raises(InputError, match="carries an adapter already"):
            BayesLoRA(network, CONFIG)

    def test_a_second_posterior_on_the_same_peft_model_goes_on_with_its_mean(self):
        first = BayesLoRA(tiny_network(), CONFIG)
        second = BayesLoRA(first.network, CONFIG.replace(guide="gaussian"))
        a, b = (bayes.predict(tiny_dataset(4), num_samples=0, progress=False).probs for bayes in (first, second))
        assert (a == b).all()
        second.train()(**tiny_batch()).loss.backward()
        assert all(a.lora_A.weight.grad is not None for group in first.model.groups for a in group.adapters)

    def test_a_frozen_adapter_is_trained_in_joint_mode(self, tmp_path):
        """As ``PeftModel.from_pretrained`` loads it."""
        from peft import PeftModel

        BayesLoRA(tiny_network(), CONFIG).save_pretrained(tmp_path / "a")
        frozen = PeftModel.from_pretrained(tiny_network(), tmp_path / "a")
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
        bayes = BayesLoRA(frozen, CONFIG).train()
        bayes(**tiny_batch()).loss.backward()
        trained = {name for name, parameter in bayes.network.named_parameters() if parameter.grad is not None}
        fresh = BayesLoRA(tiny_network(), CONFIG)
        assert trained == {name for name, parameter in fresh.network.named_parameters() if parameter.requires_grad}

    def test_what_was_frozen_on_purpose_stays_frozen(self):
        first = BayesLoRA(tiny_network(), CONFIG)
        for group in first.model.groups:
            for adapter in group.adapters:
                adapter.lora_A.weight.requires_grad_(False)
        second = BayesLoRA(first.network, CONFIG)
        assert not any(a.lora_A.weight.requires_grad for group in second.model.groups for a in group.adapters)

    @pytest.mark.parametrize("mode", ["joint", "post_hoc"])
    @pytest.mark.parametrize("guide", ["amortized", "mean_field", "gaussian"])
    def test_a_second_model_in_pyros_store(self, mode, guide):
        """By name it would take over the first one's parameters, and its own would never move."""

        def fit(bayes):
            svi = pyro.infer.SVI(bayes.model, bayes.guide, pyro.optim.Adam({"lr": 0.01}), bayes.elbo)
            before = [p.clone() for p in bayes.guide.parameters()]
            svi.step(**tiny_batch())
            return any(not torch.equal(a, b) for a, b in zip(before, bayes.guide.parameters(), strict=True))

        config = CONFIG.replace(mode=mode, guide=guide)
        first, second = (BayesLoRA(tiny_network(seed=seed), config) for seed in range(2))
        assert fit(first)
        with pytest.raises(InputError, match="clear_param_store"):
            fit(second)
        assert fit(first)
        pyro.clear_param_store()
        assert fit(second)

    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
    def test_merging_an_output_layer_tied_to_the_embeddings(self, tmp_path):
        network = tiny_language_model(tie_word_embeddings=True)
        bayes = BayesLoRA(network, MonteCLoRAConfig(r=2, target_modules=["lm_head", "q_proj"]))
        with torch.no_grad():
            for group in bayes.model.groups:
                for adapter in group.adapters:
                    nn.init.normal_(adapter.layer.lora_B["default"].weight)
        tokens = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            expected = bayes.network.eval()(tokens).logits
            merged = bayes.merge()
            torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-4)
            merged.save_pretrained(tmp_path / "merged")
            again = type(merged).from_pretrained(tmp_path / "merged")
            torch.testing.assert_close(again(tokens).logits, expected, rtol=1e-4, atol=1e-4)
