"""The Pyro model and its guides, on their own and under Pyro's own tools; see test_guide_contract for every guide."""

import math

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from bayeslora import BayesLoRA, CooperativeELBO, InputError, MonteCLoRAConfig
from bayeslora.distributions import expected_column_kl
from bayeslora.guides import AmortizedGuide, MeanFieldGuide, MixtureGuide
from bayeslora.models import GaussianLikelihood, MonteCLoRA
from tests.conftest import tiny_batch, tiny_network
from tests.modules import TARGETS, small_model, trace

COMPONENTS = ["collapsed", "explicit"]


class TestModel:
    def test_three_sites_a_group_in_plates(self):
        model = small_model()
        nodes = trace(model, **tiny_batch()).nodes
        shapes = {name: tuple(node["value"].shape) for name, node in nodes.items() if node["type"] == "sample"}
        plates = [name for name in shapes if name.split("_")[0] in ("adapters", "columns")]
        assert len(plates) == 2 * len(model.groups) == 4
        assert shapes["pi_r2_in16"] == (4, 1, 3)
        assert shapes["sigma_tril_r2_in16"] == (4, 1, 2, 2)
        assert shapes["A_r2_in16"] == (4, 16, 2)
        assert shapes["A_r2_in24"] == (2, 24, 2)
        frames = {f.name: f.size for f in nodes["A_r2_in16"]["cond_indep_stack"]}
        assert frames == {"adapters_r2_in16": 4, "columns_r2_in16": 16}

    def test_explicit_components_have_their_own_plate(self):
        nodes = trace(small_model(components="explicit"), **tiny_batch()).nodes
        assert tuple(nodes["S_r2_in16"]["value"].shape) == (3, 4, 16, 2)
        frames = {f.name: f.size for f in nodes["S_r2_in16"]["cond_indep_stack"]}
        assert frames == {"adapters_r2_in16": 4, "components_r2_in16": 3, "columns_r2_in16": 16}

    def test_likelihood_is_scaled_to_the_training_set(self):
        model = small_model()
        model.num_examples = 600
        node = trace(model, **tiny_batch(6)).nodes["labels"]
        assert node["scale"] == pytest.approx(100)
        assert node["is_observed"]

    def test_prior_predictive_simulates_labels(self):
        batch = tiny_batch(6)
        batch.pop("labels")
        labels = Predictive(small_model(), num_samples=40)(**batch)["labels"]
        assert labels.shape[0] == 40
        assert set(labels.unique().tolist()) == {0, 1}

    def test_registered_parameters_are_the_trainable_ones(self):
        model = small_model()
        params = {n for n, node in trace(model, **tiny_batch()).nodes.items() if node["type"] == "param"}
        expected = {f"network.{n}" for n, p in model.network.named_parameters() if p.requires_grad}
        assert params == expected
        assert any("lora_B" in name for name in params)

    def test_a_second_model_in_a_used_parameter_store_is_an_error(self):
        trace(small_model(), **tiny_batch())
        with pytest.raises(InputError, match="clear_param_store"):
            trace(small_model(), **tiny_batch())

    def test_regression_has_a_learned_noise(self):
        network = tiny_network(num_labels=1)
        model = MonteCLoRA(network, MonteCLoRAConfig(r=2, target_modules=TARGETS))
        assert isinstance(model.likelihood, GaussianLikelihood)
        batch = tiny_batch() | {"labels": torch.randn(6)}
        node = trace(model, **batch).nodes["labels"]
        assert node["fn"].scale.tolist() == pytest.approx([math.sqrt(0.5)] * 6)
        names = {n for n, node in trace(model, **batch).nodes.items() if node["type"] == "param"}
        assert any("scale" in name for name in names)

    def test_a_network_without_a_likelihood_is_refused(self):
        import transformers

        config = transformers.BertConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        with pytest.raises(InputError, match="BertForQuestionAnswering"):
            MonteCLoRA(transformers.BertForQuestionAnswering(config), MonteCLoRAConfig(r=2))

    def test_degrees_of_freedom(self):
        model = small_model()
        assert model.degrees_of_freedom(model.groups[0]) == 2
        model = small_model(degrees_of_freedom=7.5)
        assert trace(model, **tiny_batch()).nodes["sigma_tril_r2_in16"]["fn"].df == 7.5


class TestParameters:
    @pytest.mark.parametrize("layers", [2, 5])
    def test_mean_field_adds_r_plus_n_an_adapter(self, layers):
        model = small_model(layers=layers, r=4, num_components=3)
        adapters = sum(len(group) for group in model.groups)
        assert sum(p.numel() for p in MeanFieldGuide(model).parameters()) == adapters * (4 + 3)

    def test_amortized_parameters_do_not_grow_with_depth(self):
        counts = {
            layers: sum(p.numel() for p in AmortizedGuide(small_model(layers=layers)).parameters())
            for layers in (2, 24)
        }
        assert counts[2] == counts[24]

    def test_amortized_starts_where_mean_field_does(self):
        model = small_model(alpha_init="ones", scale_init=0.5)
        for guide in (MeanFieldGuide(model), AmortizedGuide(model)):
            for group in model.groups:
                log_v, log_alpha = guide.variational_parameters(group)
                torch.testing.assert_close(log_v.exp(), torch.full_like(log_v, 0.5))
                torch.testing.assert_close(log_alpha.exp(), torch.ones_like(log_alpha))

    @pytest.mark.parametrize("normalization", ["paper", "elbo"])
    @pytest.mark.parametrize("components", COMPONENTS)
    def test_v_starts_where_its_kl_is_smallest(self, normalization, components):
        """With closed-form terms the gradient of the KL in v is zero at the start: only data can move it."""
        model = small_model(normalization=normalization, components=components, target_modules=["query"])
        model.num_examples = 50
        guide = MeanFieldGuide(model)
        elbo = CooperativeELBO(1.0, 0.0, normalization)
        kl = elbo.differentiable_loss(model.joint, guide.forward, **tiny_batch())
        task = elbo.parts.task  # lora_B is zero, so the task loss does not depend on v yet
        assert kl.item() > task
        (gradient,) = torch.autograd.grad(kl, guide.log_v_r2_in16)
        assert gradient.abs().max() < 1e-5 * kl.item()

    def test_amortized_tells_adapters_apart(self):
        model = small_model(layers=3)
        guide = AmortizedGuide(model)
        torch.nn.init.normal_(guide.output.weight)
        log_v, _ = guide.variational_parameters(model.groups[0])
        assert len({tuple(row.tolist()) for row in log_v.detach()}) == len(model.groups[0])

    def test_random_alpha_is_between_one_and_e(self):
        model = small_model(num_components=16)
        _, log_alpha = MeanFieldGuide(model).variational_parameters(model.groups[0])
        assert 0 <= log_alpha.min() < 0.2
        assert 0.8 < log_alpha.max() < 1


class TestPluggable:
    def test_a_new_guide_is_one_class(self):
        class OneScale(MixtureGuide):
            def __init__(self, model):
                super().__init__(model)
                self.log_scale = torch.nn.Parameter(torch.zeros(()))

            def variational_parameters(self, group):
                log_v = self.log_scale.expand(len(group), group.rank)
                return log_v, log_v.new_zeros(len(group), self.config.num_components)

        bayes = BayesLoRA(tiny_network(), MonteCLoRAConfig(r=2), guide=OneScale)
        bayes(**tiny_batch()).loss.backward()
        assert bayes.guide.log_scale.grad.abs() > 0

    def test_autonormal_fits_with_the_proper_elbo(self):
        model = small_model()
        guide = AutoNormal(model, init_scale=0.01)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=CooperativeELBO(1.0, 0.0, "elbo"))
        assert all(math.isfinite(svi.step(**tiny_batch())) for _ in range(2))

    def test_autonormal_elbo_equals_pyros(self):
        """Constrained sites keep their Jacobian: our estimate is Trace_ELBO's."""
        model = small_model()
        guide = AutoNormal(model, init_scale=0.1)
        batch = tiny_batch(6)
        values = {}
        for elbo, scale in ((Trace_ELBO(), 1), (CooperativeELBO(1.0, 0.0, "elbo"), 6)):
            losses = torch.tensor([elbo.loss(model, guide, **batch) * scale for _ in range(49)])
            values[type(elbo)] = (losses.mean(), losses.std() / 10)
        (ours, e1), (theirs, e2) = values[CooperativeELBO], values[Trace_ELBO]
        assert abs(ours - theirs) <= 5 * (e1**2 + e2**2).sqrt()

    def test_auxiliary_sites_have_no_share_per_adapter(self):
        model = small_model()
        guide = AutoNormal(model)
        with pytest.raises(InputError, match="normalization='elbo'"):
            CooperativeELBO().loss(model, guide, **tiny_batch())

    def test_a_guide_of_another_model_is_refused(self):
        model, other = small_model(), small_model(layers=3)
        with pytest.raises(InputError, match="another model"):
            CooperativeELBO().loss(model, MeanFieldGuide(other), **tiny_batch())
        wider = small_model(target_modules=["key", "intermediate.dense"], r=3)
        with pytest.raises(InputError, match="missing sites"):
            CooperativeELBO().loss(model, MeanFieldGuide(wider), **tiny_batch())


def test_likelihood_parameters_belong_to_their_module():
    """The second of two regressors in a process starts with its own σ, not with what the first one learnt."""
    for _ in range(2):
        bayes = BayesLoRA(tiny_network(layers=1, num_labels=1), MonteCLoRAConfig(r=2))
        assert bayes.model.likelihood.scale.item() == pytest.approx(math.sqrt(0.5))
        bayes.train()(**tiny_batch(num_labels=1)).loss.backward()
        assert bayes.model.likelihood.scale.item() == pytest.approx(math.sqrt(0.5))
        with torch.no_grad():
            bayes.model.likelihood.scale_unconstrained.fill_(2.0)


def test_expected_kl_uses_the_configured_degrees_of_freedom():
    model = small_model(degrees_of_freedom=5.0, scale_init=0.2)
    nodes = trace(MeanFieldGuide(model)).nodes
    node, wishart = nodes["A_r2_in16"], nodes["sigma_tril_r2_in16"]["fn"]
    assert wishart.df == 5.0
    torch.testing.assert_close(node["infer"]["expected_kl"], expected_column_kl(wishart))
