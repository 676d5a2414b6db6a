"""A posterior on a finished adapter: its mean is the adapter, its noise has the shape and the width that were asked."""

import math

import numpy as np
import peft
import pytest
import torch

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, fit
from bayeslora.adapters.groups import find_groups
from bayeslora.adapters.inject import make_samplable
from bayeslora.inference.bayesianize import absorb_width
from bayeslora.inference.shapes import DAMPING, SHAPES, curvature_shape, gradient_covariances, output_shape
from bayeslora.models import ChoiceLikelihood, Tuning
from bayeslora.training.monitor import noise_to_signal
from tests.conftest import tiny_dataset, tiny_network
from tests.language import questions, tiny_language_model

DATA = tiny_dataset(24, rule="random")
UNLABELLED = [{name: value for name, value in row.items() if name != "labels"} for row in DATA]
QUICK = {"num_samples": 4, "progress": False}


def trained(kind="bert", *, seed=0, size=0.3, network_options=None, **options):
    """What PEFT has after training: an adapter whose B is anything."""
    network = tiny_language_model() if kind == "language" else tiny_network(kind, seed=seed, **(network_options or {}))
    task = "CAUSAL_LM" if kind == "language" else "SEQ_CLS"
    lora = peft.LoraConfig(**{"r": 3, "target_modules": "all-linear", "task_type": task} | options)
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(network, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
    return adapted.eval()


def texts():
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in DATA]


def numbers():
    return [row | {"labels": float(row["labels"]) - 0.3} for row in DATA]


KINDS = {
    "classes": lambda: (trained(), DATA, None),
    "numbers": lambda: (trained(network_options={"num_labels": 1}), numbers(), None),
    "texts": lambda: (trained("language"), texts(), None),
    "choices": lambda: (trained("language"), questions() * 7, ChoiceLikelihood(tuple("abcd"))),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_the_mean_is_the_adapter_bit_for_bit(self, kind, shape):
        network, data, likelihood = KINDS[kind]()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        bayes = BayesLoRA.from_adapter(network, data, shape=shape, likelihood=likelihood, **QUICK)
        after = bayes.network.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not any(parameter.requires_grad for parameter in bayes.network.parameters())

    def test_the_width_is_no_worse_than_the_mean(self, kind, shape):
        network, data, likelihood = KINDS[kind]()
        bayes = BayesLoRA.from_adapter(network, data, shape=shape, likelihood=likelihood, **QUICK)
        assert bayes.tuning.nll <= bayes.tuning.nll_at_mean
        assert bayes.predict(data, **QUICK).nll == pytest.approx(bayes.tuning.nll, rel=1e-6)

    def test_comes_back_from_disk(self, kind, shape, tmp_path):
        network, data, likelihood = KINDS[kind]()
        bayes = BayesLoRA.from_adapter(network, data, shape=shape, width=0.7, likelihood=likelihood)
        bayes.save_pretrained(tmp_path / "adapter")
        fresh = KINDS[kind]()[0].unload()
        again = BayesLoRA.from_pretrained(tmp_path / "adapter", fresh, likelihood=likelihood)
        assert again.tuning == bayes.tuning
        ours, theirs = (one.predict(data, **QUICK).sample_outputs for one in (bayes, again))
        np.testing.assert_array_equal(ours, theirs)


class TestShapes:
    def test_isotropic_noise_is_as_large_as_each_layers_a(self):
        bayes = BayesLoRA.from_adapter(trained(), DATA, width=2.0)
        torch.testing.assert_close(noise_to_signal(bayes), torch.full((len(bayes.adapter_names),), 2.0))

    @pytest.mark.parametrize(
        "options", [{}, {"num_components": 1}, {"degrees_of_freedom": 50.0}, {"mixture": "sparse"}]
    )
    @pytest.mark.parametrize("shape", SHAPES)
    def test_size_does_not_depend_on_the_mixture(self, shape, options):
        config = MonteCLoRAConfig(**options)
        sizes = [
            noise_to_signal(BayesLoRA.from_adapter(trained(), DATA, shape=shape, width=1.0, config=one))
            for one in (config, None)
        ]
        torch.testing.assert_close(*sizes)

    def test_output_noise_is_the_inverse_of_b_in_one_unit(self):
        """Covariances of a column are c²·(BᵀB)⁻¹ with the same c in all layers, which even noise has on average."""
        network = trained()
        make_samplable(network)
        groups = find_groups(network)
        shape = output_shape(groups)
        units, even = [], []
        for group in groups:
            covariance = shape.deviations[group.name].square()[:, None, None] * (
                shape.factors[group.name] @ shape.factors[group.name].mT
            )
            scales = group.mean_scale()
            for adapter, found, scale in zip(group.adapters, covariance, scales, strict=True):
                b = adapter.layer.lora_B[adapter.key].weight.detach()
                whole = b @ found @ b.mT  # the covariance of the layer's output is a projection, times c²
                units.append(torch.linalg.matrix_norm(whole, 2))
                torch.testing.assert_close(whole @ whole, whole * units[-1], rtol=1e-3, atol=1e-5)
                even.append(scale**2 * (b @ b.mT).trace() / 3)
        torch.testing.assert_close(torch.stack(units), units[0].expand(len(units)), rtol=1e-3, atol=0)
        torch.testing.assert_close(units[0], torch.stack(even).mean(), rtol=1e-3, atol=0)

    def test_curvature_noise_is_as_large_in_each_output_as_even_noise(self):
        bayes = BayesLoRA.from_adapter(trained(), DATA, width=1.0)
        shape = curvature_shape(bayes.model, DATA, batch_size=32, seed=0)
        for group in bayes.model.groups:
            for place, adapter in enumerate(group.adapters):
                b = adapter.layer.lora_B[adapter.key].weight.detach()
                turned = shape.deviations[group.name][place] * b @ shape.factors[group.name][place]
                even = group.mean_scale()[place] * b
                torch.testing.assert_close(turned.square().sum(), even.square().sum())

    def test_a_layer_whose_b_is_zero_has_even_noise(self):
        network = trained()
        make_samplable(network)
        group = find_groups(network)[0]
        with torch.no_grad():
            group.adapters[0].layer.lora_B[group.adapters[0].key].weight.zero_()
        shape = output_shape(find_groups(network))
        torch.testing.assert_close(shape.factors[group.name][0], torch.eye(3))
        torch.testing.assert_close(shape.deviations[group.name][0], group.mean_scale()[0])

    def test_gradients_are_those_of_single_examples(self):
        """Of numbers, whose labels are looked at: B's transposed gradient at the layer's output, example by example."""
        network, data, _ = KINDS["numbers"]()
        bayes = BayesLoRA.from_adapter(network, data, width=1.0)
        found = gradient_covariances(bayes.model, data, batch_size=5)
        for group in bayes.model.groups:
            expected = [_by_hand(bayes, adapter, data) for adapter in group.adapters]
            torch.testing.assert_close(found[group.name].float(), torch.stack(expected), rtol=1e-3, atol=1e-6)

    def test_of_classes_it_is_the_fisher_information(self):
        """Labels are drawn from the network: over many copies of one example, the sum over classes by probability."""
        network, copies = trained(), 600
        bayes = BayesLoRA.from_adapter(network, DATA, width=1.0)
        example = {name: value for name, value in DATA[3].items() if name != "labels"}
        found = gradient_covariances(bayes.model, [example] * copies, batch_size=100)
        probs = bayes.predict([example], num_samples=0, progress=False).probs[0]
        for group in bayes.model.groups:
            for adapter, covariance in zip(group.adapters, found[group.name], strict=True):
                each = [_by_hand(bayes, adapter, [example | {"labels": label}]) for label in range(2)]
                expected = sum(p * c for p, c in zip(probs, each, strict=True))
                error = math.sqrt(probs[0] * probs[1] / copies) * (each[0] - each[1]).abs()
                assert ((covariance - expected).abs() <= 5 * error + 1e-6 * expected.abs().max()).all()

    def test_no_label_is_looked_at(self):
        bayes = BayesLoRA.from_adapter(trained(), DATA, width=1.0)
        flipped = [row | {"labels": 1 - row["labels"]} for row in DATA]
        found = [gradient_covariances(bayes.model, data) for data in (DATA, flipped, UNLABELLED)]
        for name, values in found[0].items():
            assert torch.equal(values, found[1][name])
            assert torch.equal(values, found[2][name])

    def test_curvature_noise_is_its_damped_inverse(self):
        bayes = BayesLoRA.from_adapter(trained(), DATA, width=1.0)
        found = gradient_covariances(bayes.model, DATA, batch_size=32, seed=3)
        shape = curvature_shape(bayes.model, DATA, batch_size=32, seed=3)
        for group in bayes.model.groups:
            for covariance, factor in zip(found[group.name], shape.factors[group.name].double(), strict=True):
                damped = covariance + DAMPING * covariance.diagonal().mean() * torch.eye(3)
                product = damped @ factor @ factor.mT
                torch.testing.assert_close(product / product[0, 0], torch.eye(3).double(), rtol=1e-4, atol=1e-4)
                assert float(factor.square().sum()) == pytest.approx(3, rel=1e-5)


def _by_hand(bayes, adapter, data):
    """BᵀGB of one adapter, a backward pass for each example, through the gradient at the layer's output."""
    total, outputs_of_layer = torch.zeros(3, 3), []
    b, scaling = adapter.layer.lora_B[adapter.key].weight.detach(), adapter.layer.scaling[adapter.key]

    def keep(layer, args, output):
        outputs_of_layer.append(output + torch.zeros_like(output, requires_grad=True))
        return outputs_of_layer[-1]

    for row in data:
        outputs_of_layer.clear()
        hook = adapter.layer.register_forward_hook(keep)
        inputs = {name: torch.tensor([value]) for name, value in row.items() if name != "labels"}
        outputs = bayes.model.outputs(inputs)
        hook.remove()
        loss = -bayes.negative_log_likelihood(outputs, torch.tensor([row["labels"]])).sum()
        (gradient,) = torch.autograd.grad(loss, outputs_of_layer)
        rows = scaling * gradient.flatten(0, -2) @ b
        total += rows.mT @ rows
    return total / len(data)


class TestWidth:
    def test_agreement_holds_and_the_next_step_of_the_search_does_not(self):
        network = trained(size=1.0, network_options={"num_labels": 5})
        with torch.no_grad():  # so that not every answer is the same
            network.base_model.model.classifier.modules_to_save["default"].weight.normal_(std=2.0)
        bayes = BayesLoRA.from_adapter(network, UNLABELLED, agreement=0.9, **QUICK)
        answers = bayes.predict(DATA, num_samples=0, progress=False).probs.argmax(-1)

        def kept(width):
            bayes.tuning = Tuning(width)
            return (bayes.predict(DATA, **QUICK).probs.argmax(-1) == answers).mean()

        found, agreement = bayes.tuning.width, bayes.tuning.agreement
        assert kept(found) == agreement >= 0.9
        step = (1 if found < 1 else 2 ** math.floor(math.log2(found))) / 32
        assert kept(found + step) < 0.9

    def test_labels_are_used_where_there_are_any(self):
        assert BayesLoRA.from_adapter(trained(), DATA, **QUICK).tuning.nll is not None
        assert BayesLoRA.from_adapter(trained(), UNLABELLED, **QUICK).tuning.agreement is not None
        assert BayesLoRA.from_adapter(trained(), DATA, width="agreement", **QUICK).tuning.nll is None

    def test_with_a_temperature(self):
        plain, both = (BayesLoRA.from_adapter(trained(), DATA, with_temperature=t, **QUICK) for t in (False, True))
        assert both.tuning.nll <= plain.tuning.nll
        assert both.tuning.temperature != 1

    @pytest.mark.parametrize("shape", SHAPES)
    def test_absorbed_it_leaves_every_draw(self, shape):
        bayes = BayesLoRA.from_adapter(trained(), DATA, shape=shape, width=0.6)
        before = bayes.predict(DATA, **QUICK).sample_probs
        absorb_width(bayes)
        assert bayes.tuning is None
        np.testing.assert_allclose(bayes.predict(DATA, **QUICK).sample_probs, before, atol=1e-5)

    def test_of_zero_cannot_be_trained(self):
        with pytest.raises(InputError, match="there is no noise to train"):
            absorb_width(BayesLoRA.from_adapter(trained(), DATA, width=0))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_guide_alone_can_be_trained_from_there(self, shape, tmp_path):
        network = trained()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        bayes = BayesLoRA.from_adapter(network, DATA, shape=shape, width=0.5)
        absorb_width(bayes)
        guide = [parameter.clone() for parameter in bayes.guide.parameters()]
        fit(bayes, DATA, output_dir=tmp_path / "run", max_steps=3, progress=False)
        assert all(torch.equal(before[name], value) for name, value in bayes.network.state_dict().items())
        assert any((a != b).any() for a, b in zip(guide, bayes.guide.parameters(), strict=True))


class TestAdapters:
    @pytest.mark.parametrize(
        "options",
        [
            {"use_rslora": True},
            {"rank_pattern": {"query": 2}, "alpha_pattern": {"value": 64}},
            {"modules_to_save": ["pooler"]},
        ],
        ids=["rslora", "patterns", "modules_to_save"],
    )
    @pytest.mark.parametrize("shape", SHAPES)
    def test_of_every_option(self, shape, options, tmp_path):
        network = trained(**options)
        bayes = BayesLoRA.from_adapter(network, DATA, shape=shape, **QUICK)
        bayes.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(tiny_network(), tmp_path / "adapter").eval()
        probs = bayes.predict(DATA[:1], num_samples=0, progress=False).probs
        with torch.no_grad():
            plain = again(input_ids=torch.tensor([DATA[0]["input_ids"]])).logits.softmax(-1)
        np.testing.assert_allclose(plain.numpy(), probs, atol=1e-6)

    def test_of_several_the_active_one(self):
        network = trained()
        network.add_adapter("other", peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        network.set_adapter("default")
        bayes = BayesLoRA.from_adapter(network, DATA, **QUICK)
        assert bayes.active_adapter == "default"
        network = trained()
        network.add_adapter("other", peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        network.set_adapter("other")
        with pytest.raises(InputError, match="nothing was trained"):
            BayesLoRA.from_adapter(network, DATA, **QUICK)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"shape": "round"}, "shape must be one of isotropic, output, curvature, got 'round'"),
            ({"width": "wide"}, "width must be 'labels', 'agreement' or a number"),
            ({"width": True}, "width must be"),
            ({"width": -1.0}, "width must be a number, 0 or more"),
            ({"width": "agreement", "with_temperature": True}, "a temperature is found by labels"),
            ({"agreement": 1.5, "width": "agreement"}, "agreement is a share"),
        ],
    )
    def test_options(self, options, says):
        with pytest.raises(InputError, match=says):
            BayesLoRA.from_adapter(trained(), DATA, **QUICK, **options)

    @pytest.mark.parametrize(
        ("network", "data", "says"),
        [
            (tiny_network, DATA, "takes a PeftModel with a trained adapter"),
            (lambda: trained(size=0.0), DATA, "every lora_B of this adapter is zero"),
            (lambda: trained(use_dora=True), DATA, "DoRA"),
            (trained, DATA[:19], "at least 20 examples"),
            (trained, [], "empty|at least 20"),
            (lambda: trained("language"), [{"input_ids": [4, 5]}] * 20, "labels"),
        ],
        ids=["plain", "untrained", "dora", "few", "none", "unlabelled_texts"],
    )
    def test_networks_and_data(self, network, data, says):
        with pytest.raises(InputError, match=says):
            BayesLoRA.from_adapter(network(), data, **QUICK)

    def test_an_unlabelled_temperature(self):
        with pytest.raises(InputError, match="these examples have none"):
            BayesLoRA.from_adapter(trained(), UNLABELLED, with_temperature=True, **QUICK)
