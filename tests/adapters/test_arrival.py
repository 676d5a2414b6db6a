"""A draw reaches every adapted layer, or an error names those that it does not reach."""

import re

import pyro
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from pyro.infer.autoguide import AutoNormal
from torch import nn

from bayeslora import BayesLoRA, BayesTrainer, InputError, MonteCLoRAConfig
from bayeslora.analysis import to_arviz
from bayeslora.inference.diagnostics import diagnose
from bayeslora.inference.generation import token_uncertainty
from bayeslora.inference.predict import Collator
from tests.architectures import ARCHITECTURES
from tests.conftest import tiny_batch, tiny_dataset, tiny_network
from tests.language import tiny_language_model

CONFIG = MonteCLoRAConfig(r=2, target_modules=["query", "value"])
MESSAGE = r"the draw did not arrive in .*0\.attention\.self\.query \(of 4 adapted layers\).*lora_mlp_kernel"


def fuse(network: nn.Module, name: str, *, in_training_only: bool = False) -> None:
    """What fused kernels do: one function of the input and of ``lora_A.weight`` itself."""
    layer = network.get_base_model().get_submodule(name)
    assert isinstance(layer, LoraLayer)
    a, b, scale, plain = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"], layer.forward

    def fused(x: torch.Tensor) -> torch.Tensor:
        if in_training_only and not layer.training:
            return plain(x)
        return layer.base_layer(x) + scale * nn.functional.linear(x, b.weight @ a.weight)

    layer.forward = fused


def texts(count: int = 4) -> list[dict]:
    tokens = [[5 + index, 6, 7, 8] for index in range(count)]
    return [{"input_ids": row, "attention_mask": [1] * 4, "labels": row} for row in tokens]


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

    @pytest.mark.parametrize("mode", ["joint", "post_hoc"])
    def test_a_kernel_for_training_alone(self, mode):
        """The look in evaluation mode would pass it."""
        bayes = BayesLoRA(tiny_network(), CONFIG.replace(mode=mode)).train()
        fuse(bayes.network, "bert.encoder.layer.0.attention.self.query", in_training_only=True)
        before = [parameter.requires_grad for parameter in bayes.parameters()]
        with pytest.raises(InputError, match=r"in .*0\.attention\.self\.query: in training a fused kernel reads"):
            bayes(**tiny_batch())
        assert [parameter.requires_grad for parameter in bayes.parameters()] == before

    def test_a_kernel_that_comes_later(self):
        bayes = BayesLoRA(tiny_network(), CONFIG).train()
        bayes(**tiny_batch()).loss.backward()
        fuse(bayes.network, "bert.encoder.layer.0.attention.self.query")
        with pytest.raises(InputError, match=MESSAGE):
            bayes(**tiny_batch())

    def test_a_kernel_that_comes_later_where_layers_are_left_out_at_random(self):
        architecture = ARCHITECTURES["opt"]
        bayes = BayesLoRA(architecture.network(layerdrop=1.0), MonteCLoRAConfig(r=2)).train()
        batch = Collator.for_network(bayes.network)(architecture.examples())
        for _ in range(3):
            bayes(**batch)
        fuse(bayes.network, "model.decoder.layers.1.self_attn.q_proj")
        with pytest.raises(InputError, match=r"did not arrive in model\.decoder\.layers\.1\.self_attn\.q_proj \("):
            bayes(**batch)  # the fourth of those that left out a layer

    @pytest.mark.parametrize("loss", [pyro.infer.Trace_ELBO, None])
    def test_pyro_svi(self, fused, loss):
        svi = pyro.infer.SVI(fused.model, fused.guide, pyro.optim.Adam({"lr": 0.01}), loss() if loss else fused.elbo)
        fused.num_examples = 6
        fused.train()
        with pytest.raises(InputError, match=MESSAGE):
            svi.step(**tiny_batch())

    def test_trainers(self, tmp_path):
        """Ours, transformers' and, for texts, the one over TRL's: before the first step."""
        asked = {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "report_to": []}
        for trainer in (BayesTrainer, transformers.Trainer):
            bayes = BayesLoRA(tiny_network(), CONFIG)
            fuse(bayes.network, "bert.encoder.layer.0.attention.self.query")
            before = {name: value.clone() for name, value in bayes.state_dict().items()}
            arguments = transformers.TrainingArguments(str(tmp_path), **asked)
            collate = Collator.for_network(bayes.network)
            with pytest.raises(InputError, match=MESSAGE):
                trainer(bayes, arguments, collate, tiny_dataset(8)).train()
            assert all(torch.equal(value.cpu(), before[name]) for name, value in bayes.state_dict().items())

    def test_one_draw_used_by_hand(self, fused):
        batch = {name: value for name, value in tiny_batch().items() if name != "labels"}
        with fused.as_draw(1):
            pass  # nothing ran
        with pytest.raises(InputError, match=MESSAGE), fused.as_draw(1) as network, torch.no_grad():
            network(**batch)
        with pytest.raises(RuntimeError, match="indices"), fused.as_draw(1) as network:
            network(input_ids=batch["input_ids"] / 2)  # what is wrong inside is what is said
        with pytest.raises(InputError, match="took the draw away"), fused.as_draw(1):
            fused.merge()

    def test_diagnostics_tuning_and_arviz(self, fused):
        data = tiny_dataset(24)
        for ask in (
            lambda: fused.tune(data, progress=False),
            lambda: to_arviz(fused, data, num_samples=2),
            lambda: diagnose(fused, data, num_samples=25, steps=1),
        ):
            with pytest.raises(InputError, match=MESSAGE):
                ask()

    @pytest.mark.filterwarnings("ignore::UserWarning")  # torch.compile looks at .grad of whatever it meets
    def test_compiled_after_some_steps(self):
        bayes = BayesLoRA(tiny_network(), CONFIG).train()
        bayes.compile(backend="eager")
        for _ in range(3):  # the flag is set by the compiled graph too
            bayes(**tiny_batch()).loss.backward()

    @pytest.mark.filterwarnings("ignore::UserWarning")  # torch.compile looks at .grad of whatever it meets
    def test_compiled(self, fused):
        fused.compile(backend="eager")
        with pytest.raises(InputError, match=MESSAGE):
            fused.train()(**tiny_batch())


SUPPORTED = [name for name, architecture in ARCHITECTURES.items() if architecture.refused is None]


@pytest.mark.parametrize("name", SUPPORTED)
def test_any_one_fused_layer_of_any_network_is_named(name):
    """In training and in prediction; the network without it is trained and predicts."""
    architecture = ARCHITECTURES[name]
    bayes = BayesLoRA(architecture.network(), MonteCLoRAConfig(r=2)).train()
    batch = Collator.for_network(bayes.network)(architecture.examples())
    bayes(**batch)
    chosen = int(torch.randint(len(bayes.adapter_names), (), generator=torch.Generator().manual_seed(len(name))))
    layer = bayes.adapter_names[chosen]
    fuse(bayes.network, layer)
    message = rf"did not arrive in {re.escape(layer)} \(of {len(bayes.adapter_names)} adapted layers\)"
    with pytest.raises(InputError, match=message):
        bayes(**batch)
    with pytest.raises(InputError, match=message):
        bayes.predict(architecture.examples(2), num_samples=2, progress=False)


class TestSwitchedOff:
    def test_training_is_refused(self):
        bayes = BayesLoRA(tiny_network(), CONFIG).train()
        with bayes.disable_adapter():
            loss = bayes(**tiny_batch()).loss
        with pytest.raises(InputError, match="enable_adapter_layers"):
            loss.backward()
        bayes(**tiny_batch()).loss.backward()
        svi = pyro.infer.SVI(bayes.model, bayes.guide, pyro.optim.Adam({"lr": 0.01}), bayes.elbo)
        with bayes.disable_adapter(), pytest.raises(InputError, match="enable_adapter_layers"):
            svi.step(**tiny_batch())

    def test_prediction_is_the_base_network(self):
        bayes = BayesLoRA(tiny_network(), CONFIG).eval()
        with bayes.disable_adapter():
            drawn = bayes.predict(tiny_dataset(4), num_samples=2, progress=False).sample_probs
        assert (drawn[0] == drawn[1]).all()


class TestLayersThatRunMoreThanOnce:
    def test_one_block_in_two_places_is_one_draw(self):
        """As merged: the same weights both times."""
        network = tiny_network()
        network.bert.encoder.layer[1] = network.bert.encoder.layer[0]
        bayes = BayesLoRA(network, CONFIG)
        assert len(bayes.adapter_names) == 2
        for group in bayes.model.groups:
            for adapter in group.adapters:
                nn.init.normal_(adapter.layer.lora_B["default"].weight)
        bayes.train()(**tiny_batch()).loss.backward()
        inputs = {name: value for name, value in tiny_batch().items() if name != "labels"}
        merged = bayes.merge(draw=2).eval()
        with torch.no_grad(), bayes.eval().as_draw(2) as drawn:
            expected = merged(**inputs).logits
            torch.testing.assert_close(drawn(**inputs).logits, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("whole", [True, False], ids=["one layer", "one weight"])
    def test_layers_that_share_a_matrix_are_refused(self, whole):
        network = get_peft_model(tiny_network(), LoraConfig(r=2, target_modules=["query", "value"]))
        one, other = (network.base_model.model.bert.encoder.layer[i].attention.self.query for i in range(2))
        if whole:
            other.lora_A["default"] = one.lora_A["default"]
        else:
            other.lora_A["default"].weight = one.lora_A["default"].weight
        with pytest.raises(InputError, match=r"0\.attention\.self\.query' and .*1\.attention\.self\.query' share one"):
            BayesLoRA(network, CONFIG)


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
